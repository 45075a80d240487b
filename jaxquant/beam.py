"""Search for codes: which entries of the codebooks come nearest to a target, over one vector or a window of several."""

import jax
import jax.numpy as jnp

# Scores held at once, in float32 entries: rows are searched in chunks of this size.
_SCORES = 2**26


def _extend(residual, cost, codes, entries, place, keep):
    """Adds one codebook to partial sums.

    Args:
      residual: float32 [rows, b, S * d], what the partial sums leave.
      cost: float32 [rows, b], squared residual of the coordinates up to and with the present vector's.
      codes: int32 [rows, b, m].
      entries: float32 [K, S * d].
      place: slice of the present vector's coordinates.
      keep: partial sums to keep.

    Returns:
      The same three for the `keep` best of all b * K sums.
    """
    rows, present = len(residual), entries[:, place]
    norms = jnp.sum(present**2, axis=1)
    scores = cost[:, :, None] + norms[None, None, :] - 2 * jnp.einsum("nbd,kd->nbk", residual[:, :, place], present)
    scores = scores.reshape(rows, -1)
    if keep == 1:
        best = jnp.argmin(scores, axis=1).astype(jnp.int32)[:, None]
        cost = jnp.take_along_axis(scores, best, axis=1)
    else:
        cost, best = jax.lax.top_k(-scores, min(keep, scores.shape[1]))
        cost = -cost
    parent, code = best // len(entries), best % len(entries)
    residual = jnp.take_along_axis(residual, parent[:, :, None], axis=1) - entries[code]
    codes = jnp.take_along_axis(codes, parent[:, :, None], axis=1)
    return residual, cost, jnp.concatenate([codes, code[:, :, None]], axis=2)


def _exchange(residual, codes, entries):
    """Gives each codebook in turn its best entry, the others held fixed; never raises the squared residual."""
    norms = jnp.sum(entries**2, axis=2)

    def one(m, state):
        residual, codes = state
        partial = residual + entries[m][codes[:, m]]
        code = jnp.argmin(norms[m][None, :] - 2 * partial @ entries[m].T, axis=1).astype(jnp.int32)
        return partial - entries[m][code], codes.at[:, m].set(code)

    return jax.lax.fori_loop(0, len(entries), one, (residual, codes))


def _search(point: jax.Array, entries: jax.Array, window: int, beam: int, incumbent: jax.Array | None) -> jax.Array:
    """Codes int32 [n, S * M] for points [n, S * d] and entries [S * M, K, S * d], in the Euclidean metric."""
    stages, width = len(entries), point.shape[1] // window
    residual, cost = point[:, None, :], jnp.zeros((len(point), 1))
    codes = jnp.zeros((len(point), 1, 0), jnp.int32)
    for stage in range(stages):
        vector, book = divmod(stage, stages // window)
        place = slice(vector * width, (vector + 1) * width)
        if book == 0:
            cost = cost + jnp.sum(residual[:, :, place] ** 2, axis=2)
        keep = 1 if stage == stages - 1 else beam
        residual, cost, codes = _extend(residual, cost, codes, entries[stage], place, keep)
    residual, codes = residual[:, 0], codes[:, 0]
    if stages > 1:
        residual, codes = _exchange(residual, codes, entries)
    if incumbent is None:
        return codes
    kept = incumbent
    old = point - sum(entries[m][kept[:, m]] for m in range(stages))
    if stages > 1:  # a sweep settles where neither a fresh search nor an exchange helps
        old, kept = _exchange(old, kept, entries)
    better = jnp.sum(residual**2, axis=1) < jnp.sum(old**2, axis=1)
    return jnp.where(better[:, None], codes, kept)


def search(
    target: jax.Array, factor: jax.Array, books: jax.Array, *, beam: int, incumbent: jax.Array | None = None
) -> jax.Array:
    """Finds codes with small |(target - value) L|^2, for a window of S vectors of every row.

    Vector after vector, codebook after codebook, entries are added to the `beam` best partial solutions of each row;
    then each codebook in turn gets its best entry. Since L is upper triangular, a partial solution is judged by what it
    costs if the vectors still to come could take any real value. A beam as wide as all partial solutions finds the
    optimum.

    Args:
      target: float32 [rows, S * d].
      factor: L, float32 [S * d, S * d], upper triangular.
      books: float32 [R, M, K, d]: row blocks, codebooks of a vector; row i uses those of block i * R // rows.
      beam: partial solutions kept per row.
      incumbent: codes int32 [rows, S * M] that compete with the result (after the same exchange), or None.

    Returns:
      int32 [rows, S * M], the codes of the first vector first.

    Reference: Egiazarian et al., AQLM, https://arxiv.org/abs/2401.06118, section 3.2. Differs from it: the beam begins
    afresh in every window, where it follows the exact cost, and does not carry whole rows from vector to vector.
    """
    blocks, count, size, d = books.shape
    window = target.shape[1] // d
    point = (target @ factor).reshape(blocks, -1, window * d)
    rows, stages = point.shape[1], window * count
    entries = jnp.einsum("rmkd,sde->rsmke", books, factor.reshape(window, d, window * d))
    entries = entries.reshape(blocks, stages, size, window * d)
    width = beam if stages > 1 else 1
    if incumbent is not None:
        incumbent = incumbent.reshape(blocks, rows, stages)

    if blocks > 1:
        codes = jax.lax.map(
            lambda args: _search(args[0], args[1], window, beam, args[2]),
            (point, entries, incumbent),
            batch_size=max(1, _SCORES // (rows * width * size)),
        )
    elif rows * width * size <= _SCORES:
        codes = _search(point[0], entries[0], window, beam, None if incumbent is None else incumbent[0])
    else:

        def one_row(args):
            point, incumbent = jax.tree.map(lambda x: x[None], args)
            return _search(point, entries[0], window, beam, incumbent)[0]

        args = (point[0], None if incumbent is None else incumbent[0])
        codes = jax.lax.map(one_row, args, batch_size=max(1, _SCORES // (width * size)))
    return codes.reshape(-1, stages)
