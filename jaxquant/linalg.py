"""Triangular factors: of the (inverse) Hessian, with damping that is raised until the factor exists, and of many blocks.

Blocks are factored by recursion over halves, not by LAPACK: on CPUs jaxlib 0.10 runs batches of LAPACK's on XLA's own
threads and waits for them there, so that two at once can wait for each other forever on a machine of two cores. On
accelerators, a few products of all blocks at once take less than a library's loop over columns.
"""

import jax
import jax.numpy as jnp

# Raising stops here: a Hessian that is indefinite even with this much damping holds NaN or Inf.
_MAX_DAMP = 1e3
_MOST = 64  # rows of a block that recursion is still compiled fast for


def damped(hessian: jax.Array, damp: jax.Array | float) -> jax.Array:
    """Returns H + damp * mean(diag H) * I."""
    return hessian + damp * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(len(hessian), dtype=hessian.dtype)


def _reverse_cholesky(hessian: jax.Array) -> jax.Array:
    """Returns the upper triangular R with H = R R^T (NaN if H is not positive definite)."""
    return jnp.linalg.cholesky(hessian[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]


def upper_factor(hessian: jax.Array, damp: float) -> tuple[jax.Array, jax.Array]:
    """Upper triangular factor of the damped Hessian.

    R_jj^2 is the conditional variance of input j given the inputs after it: the weight of the squared rounding error of
    column j when error feedback absorbs the rest (METHODS: tr(E H E^T) = sum_j R_jj^2 e_j^2).

    Args:
      hessian: float32 [in, in], symmetric, without zeros on its diagonal.
      damp: first damping tried, relative to mean(diag H).

    Returns:
      (R float32 [in, in] with H + d * mean(diag H) * I = R R^T, the damping d that was used, float32 scalar). d is
      `damp`, raised to at least 1e-6 and then tenfold until the factor is finite. R is NaN if none up to 1e3 helped.
    """

    def unusable(state):
        factor, used = state
        return ~jnp.isfinite(jnp.diagonal(factor)).all() & (used < _MAX_DAMP)

    def raise_damping(state):
        used = jnp.maximum(state[1] * 10, 1e-6)
        return _reverse_cholesky(damped(hessian, used)), used

    first = jnp.asarray(damp, hessian.dtype)
    return jax.lax.while_loop(unusable, raise_damping, (_reverse_cholesky(damped(hessian, first)), first))


def inverse_factor(hessian: jax.Array, damp: float) -> jax.Array:
    """Upper triangular U with (H + d * mean(diag H) * I)^-1 = U^T U, float32 [in, in].

    The factor that GPTQ's sweep uses. Differs from its code: one reverse Cholesky and one triangular inverse, without
    forming H^-1, which squares the condition number.
    """
    factor, _ = upper_factor(hessian, damp)
    return jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(hessian), dtype=hessian.dtype))


def cholesky_blocks(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cholesky factors of small matrices, and their inverses.

    Args:
      blocks: float32 [..., d, d], symmetric; NaN comes of those that are not positive definite.

    Returns:
      (L lower triangular with L L^T = blocks, L^-1), each float32 [..., d, d].
    """
    d = blocks.shape[-1]
    if d == 1:
        root = jnp.sqrt(blocks)
        return root, 1 / root
    half = d // 2
    first, first_inverse = cholesky_blocks(blocks[..., :half, :half])
    below = _product(blocks[..., half:, :half], first_inverse.mT)
    last, last_inverse = cholesky_blocks(blocks[..., half:, half:] - _product(below, below.mT))
    return _lower(first, below, last), _lower(
        first_inverse, -_product(last_inverse, _product(below, first_inverse)), last_inverse
    )


def inverse_of_blocks(blocks: jax.Array) -> jax.Array:
    """Inverses of small positive definite matrices, float32 [..., d, d]."""
    _, inverse = cholesky_blocks(blocks)
    return _product(inverse.mT, inverse)


def solve_blocks(blocks: jax.Array, right: jax.Array) -> jax.Array:
    """Solutions of positive definite systems: blocks float32 [..., d, d] and right sides [..., d] give [..., d]."""
    if blocks.shape[-1] > _MOST:
        return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(blocks), True), right[..., None])[..., 0]
    _, inverse = cholesky_blocks(blocks)
    return _product(inverse.mT, _product(inverse, right[..., None]))[..., 0]


def inverse_of_upper_blocks(blocks: jax.Array) -> jax.Array:
    """Inverses of small upper triangular matrices, float32 [..., d, d]."""
    d = blocks.shape[-1]
    if d == 1:
        return 1 / blocks
    half = d // 2
    first, last = inverse_of_upper_blocks(blocks[..., :half, :half]), inverse_of_upper_blocks(blocks[..., half:, half:])
    above = -_product(first, _product(blocks[..., :half, half:], last))
    return _lower(first.mT, above.mT, last.mT).mT


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _lower(first: jax.Array, below: jax.Array, last: jax.Array) -> jax.Array:
    """[[first, 0], [below, last]]."""
    top = jnp.concatenate([first, jnp.zeros_like(below.mT)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, last], axis=-1)], axis=-2)
