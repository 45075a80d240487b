"""Triangular factors of the (inverse) Hessian, with damping that is raised until the factor exists."""

import jax
import jax.numpy as jnp

# Raising stops here: a Hessian that is indefinite even with this much damping holds NaN or Inf.
_MAX_DAMP = 1e3


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
