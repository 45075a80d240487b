"""Second moments of layer inputs, accumulated over calibration batches, and the damping that they need."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import linalg
from jaxquant.models.base import Model
from jaxquant.problem import LayerProblem, revive


def init(columns: int) -> jax.Array:
    """Returns the empty sum of x x^T, float32 [in, in]."""
    return jnp.zeros((columns, columns), jnp.float32)


@functools.partial(jax.jit, donate_argnums=0)
@jax.default_matmul_precision("highest")
def update(gram: jax.Array, x: jax.Array) -> jax.Array:
    """Adds x^T x over all tokens of `x` [..., in] to `gram` [in, in], in float32 at highest precision."""
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return gram + x.T @ x


@functools.partial(jax.jit, static_argnames=("model", "kind", "group"), donate_argnames="gram")
def capture_update(
    model: Model, block: Any, hidden: jax.Array, gram: jax.Array, *, kind: str, group: tuple[str, ...]
) -> jax.Array:
    """Adds the inputs of one group of linears on a batch to `gram`; only what they depend on is computed.

    Args:
      model: the model (static).
      block: parameters of one transformer block.
      hidden: [batch, time, d], inputs of the block.
      gram: float32 [in, in]; its buffer is reused.
      kind: the block's kind (static).
      group: the linears, one of `model.groups` (static).

    Returns:
      float32 [in, in].
    """
    return update(gram, model.capture(block, hidden, kind, group))


@functools.partial(jax.jit, static_argnames=("model", "kind", "group"), donate_argnames=("gram", "cross"))
@jax.default_matmul_precision("highest")
def cross_update(
    model: Model,
    block: Any,
    hidden: jax.Array,
    dense_block: Any,
    dense_hidden: jax.Array,
    gram: jax.Array,
    cross: jax.Array,
    *,
    kind: str,
    group: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """Adds x x^T to `gram` and y x^T to `cross`, [in, in], over all tokens: y are the inputs x in the dense model.

    Other arguments are those of `capture_update`; `dense_hidden` are the inputs of `dense_block`.
    """
    x, y = model.capture(block, hidden, kind, group), model.capture(dense_block, dense_hidden, kind, group)
    x, y = (z.astype(jnp.float32).reshape(-1, z.shape[-1]) for z in (x, y))
    return gram + x.T @ x, cross + y.T @ x


@functools.partial(jax.jit, static_argnames="damp")
@jax.default_matmul_precision("highest")
def _damping_used(hessian: jax.Array, damp: float) -> jax.Array:
    weight = jnp.zeros((1, len(hessian)), hessian.dtype)
    return linalg.upper_factor(revive(LayerProblem(weight, hessian)).hessian, damp)[1]


def damping_used(hessian: jax.Array, config: Any) -> float | None:
    """Returns the damping with which a method factors `hessian`, relative to mean(diag H); None if it does not."""
    damp = getattr(config, "damp", None)
    return None if damp is None else float(_damping_used(hessian, damp))
