"""The layer problem: minimise tr((W - V) H (W - V)^T) over quantized weights V."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxquant.tensors import QuantizedTensor, dense


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "hessian"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """One linear layer to quantize.

    Attributes:
      weight: float32 [out, in].
      hessian: float32 [in, in], E[x x^T] over calibration tokens; any positive multiple is equivalent.
    """

    weight: jax.Array
    hessian: jax.Array


def check(problem: LayerProblem) -> None:
    """Raises ValueError unless shapes and dtypes are those of a LayerProblem. Needs no values."""
    w, h = problem.weight, problem.hessian
    if w.ndim != 2 or h.shape != (w.shape[1], w.shape[1]):
        raise ValueError(f"problem: expected weight [out, in] and hessian [in, in], got {w.shape} and {h.shape}")
    if w.dtype != jnp.float32 or h.dtype != jnp.float32:
        raise ValueError(f"problem: expected float32 weight and hessian, got {w.dtype} and {h.dtype}; cast them first")


def dead_columns(hessian: jax.Array) -> jax.Array:
    """Returns bool [in]: inputs that were zero on every calibration token."""
    return jnp.diagonal(hessian) <= 0


def revive(problem: LayerProblem) -> LayerProblem:
    """Returns the problem with dead columns made harmless: average curvature, no coupling, zero weight.

    Reference: GPTQ's code sets H_jj = 1 and W_:j = 0 for such columns before fitting grids. Differs from it: H_jj is
    the mean over the other columns, so that damping, relative to mean(diag H), is what it is without dead columns.
    """
    dead = dead_columns(problem.hessian)
    weight = jnp.where(dead[None, :], 0.0, problem.weight)
    hessian = jnp.where(dead[None, :] | dead[:, None], 0.0, problem.hessian)
    mean = jnp.trace(hessian) / jnp.maximum(jnp.sum(~dead), 1).astype(hessian.dtype)
    fill = jnp.where(mean > 0, mean, 1.0)
    return LayerProblem(weight, hessian + fill * jnp.diag(dead.astype(hessian.dtype)))


def row_objective(error: jax.Array, hessian: jax.Array) -> jax.Array:
    """Returns e_i H e_i^T of each row of `error` [out, in], float32 [out]."""
    return jnp.sum((error @ hessian) * error, axis=1)


@jax.jit
@jax.default_matmul_precision("highest")
def objective(problem: LayerProblem, tensor: QuantizedTensor | jax.Array) -> jax.Array:
    """Returns tr((V - W) H (V - W)^T), float32 scalar, with the undamped H."""
    return row_objective(dense(tensor) - problem.weight, problem.hessian).sum()


@jax.jit
@jax.default_matmul_precision("highest")
def relative_error(problem: LayerProblem, tensor: QuantizedTensor | jax.Array) -> jax.Array:
    """Returns tr((V - W) H (V - W)^T) / tr(W H W^T), float32 scalar, with the undamped H."""
    return objective(problem, tensor) / row_objective(problem.weight, problem.hessian).sum()
