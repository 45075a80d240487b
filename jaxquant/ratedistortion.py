"""The least error at a given rate, and how many bits a result wastes against it.

For weights with independent Gaussian entries and inputs with second moments H, the least tr((W - V) H (W - V)^T) at R
bits per weight is proportional to sum_i min(theta, lambda_i), where lambda are the eigenvalues of H and the water
level theta solves mean_i max(0, log2(lambda_i / theta) / 2) = R.

Reference: T. Cover and J. Thomas, Elements of Information Theory, section 10.3.3 (parallel Gaussian sources).
"""

import jax
import jax.numpy as jnp

from jaxquant.problem import LayerProblem, check, relative_error, row_objective
from jaxquant.tensors import QuantizedTensor, bits_per_weight

# Water levels are searched in log2, over all that float32 holds; half a hundred halvings resolve any of them.
_STEPS = 50


@jax.jit
@jax.default_matmul_precision("highest")
def spectrum(hessian: jax.Array) -> jax.Array:
    """Returns the eigenvalues of H [in, in] over the largest, float32 [in], ascending and positive."""
    eigenvalues = jnp.linalg.eigvalsh(hessian)
    # Float32 knows small eigenvalues only up to rounding noise of the largest, some of it negative.
    return jnp.maximum(eigenvalues / eigenvalues[-1], jnp.finfo(jnp.float32).eps ** 2)


def _white(problem: LayerProblem, eigenvalues: jax.Array) -> jax.Array:
    """The relative error that one unit of distortion in `eigenvalues` makes, scalar."""
    weight, hessian = problem.weight, problem.hessian
    top = jnp.trace(hessian) / eigenvalues.sum()
    return jnp.mean(weight**2) * len(weight) / (row_objective(weight, hessian).sum() / top)


def _rate(eigenvalues: jax.Array, log_level: jax.Array) -> jax.Array:
    return jnp.mean(jnp.maximum(0, (jnp.log2(eigenvalues) - log_level) / 2))


def _bisect(below, low: jax.Array | float, high: jax.Array | float) -> jax.Array:
    """The point of [low, high] where `below` turns from true to false."""

    def halve(_, bounds):
        middle = (bounds[0] + bounds[1]) / 2
        is_below = below(middle)
        return jnp.where(is_below, middle, bounds[0]), jnp.where(is_below, bounds[1], middle)

    start = (jnp.float32(low), jnp.float32(high))
    bounds = jax.lax.fori_loop(0, _STEPS, halve, start)
    return (bounds[0] + bounds[1]) / 2


@jax.jit
@jax.default_matmul_precision("highest")
def rate_distortion_bound(problem: LayerProblem, rate: jax.Array | float) -> jax.Array:
    """Least relative error at `rate` bits per weight if the weights were independent Gaussians of one variance.

    Args:
      problem: the layer.
      rate: bits per weight >= 0, scalar.

    Returns:
      float32 scalar. Real weights can lie below: rows that differ in variance, and entries that are not Gaussian, need
      fewer bits. At rate 0 it is the error of independent weights, 1 / rho, with rho the energy of the weights over
      that.
    """
    check(problem)
    eigenvalues = spectrum(problem.hessian)
    low = jnp.log2(eigenvalues[0]) - 2 * rate - 1
    level = _bisect(lambda x: _rate(eigenvalues, x) > rate, low, 0.0)
    return jnp.minimum(2.0**level, eigenvalues).sum() * _white(problem, eigenvalues)


@jax.jit
@jax.default_matmul_precision("highest")
def rate_at_error(problem: LayerProblem, error: jax.Array | float, eigenvalues: jax.Array | None = None) -> jax.Array:
    """Bits per weight at which `rate_distortion_bound` reaches a relative error > 0; 0 if it is there at rate 0.

    `eigenvalues` are those of `spectrum`, which layers with the same inputs share.
    """
    check(problem)
    eigenvalues = spectrum(problem.hessian) if eigenvalues is None else eigenvalues
    target = jnp.float32(error) / _white(problem, eigenvalues)
    low = jnp.log2(jnp.maximum(target / len(eigenvalues), jnp.finfo(jnp.float32).tiny)) - 1
    level = _bisect(lambda x: jnp.minimum(2.0**x, eigenvalues).sum() < target, low, 0.0)
    return _rate(eigenvalues, level)


def excess_bits(problem: LayerProblem, tensor: QuantizedTensor) -> jax.Array:
    """Bits per weight that a result wastes: its storage minus the rate at which the bound reaches its error.

    Args:
      problem: the layer.
      tensor: its quantized weight.

    Returns:
      float32 scalar; negative if the result is below the bound (see `rate_distortion_bound`).
    """
    return bits_per_weight(tensor) - rate_at_error(problem, relative_error(problem, tensor))
