"""The specification: what a weight of codebook entries is, and its product.

Vector (i, j) of the weight is scale[i, j] * sum_m codebook(i, j, m)[codes[m, i, j]]; see `decode`.
"""

import jax
import jax.numpy as jnp
import numpy as np


def decode(
    codes: jax.Array,
    codebooks: jax.Array,
    scale: jax.Array | None,
    *,
    blocks: tuple[int, int],
    vector: tuple[int, int],
) -> jax.Array:
    """Returns the dense weight.

    Args:
      codes: unsigned integers [M, out / g, in / d].
      codebooks: float [R * C * M, K * g * d]; block (r, c) of the weight uses rows (r * C + c) * M + m.
      scale: float [out / g or 1, in / d or 1], or None for ones.
      blocks: (R, C), equal blocks of consecutive rows and columns.
      vector: (g, d), rows and columns of an entry.

    Returns:
      float32 [out, in], differentiable in `codebooks` and `scale`.
    """
    count, rows, columns = codes.shape
    size = codebooks.shape[-1] // (vector[0] * vector[1])
    row, column = np.arange(rows) * blocks[0] // rows * blocks[1], np.arange(columns) * blocks[1] // columns
    # Added one by one, lest a constant as large as the codes becomes part of the program.
    place = codes.astype(jnp.int32)
    for first in (np.arange(count)[:, None, None], count * row[None, :, None], count * column[None, None, :]):
        place = place + jnp.asarray(first * size, jnp.int32)
    entries = codebooks.astype(jnp.float32).reshape(-1, vector[0] * vector[1])
    vectors = jnp.take(entries, place, axis=0).sum(0)
    if scale is not None:
        vectors = vectors * scale.astype(jnp.float32)[..., None]
    return vectors.reshape(rows, columns, *vector).swapaxes(1, 2).reshape(rows * vector[0], columns * vector[1])


def codebook_matmul(
    x: jax.Array,
    codes: jax.Array,
    codebooks: jax.Array,
    scale: jax.Array | None,
    *,
    blocks: tuple[int, int],
    vector: tuple[int, int],
) -> jax.Array:
    """Returns x @ decode(...).T, float [tokens, out], for x [tokens, in]; in the dtype of `x`."""
    weight = decode(codes, codebooks, scale, blocks=blocks, vector=vector)
    return jnp.einsum("ti,oi->to", x, weight.astype(x.dtype))
