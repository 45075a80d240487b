"""Second moments of layer inputs, accumulated over calibration batches, and the damping that they need."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import linalg
from jaxquant.models.base import Model
from jaxquant.problem import LayerProblem, revive


def init(columns: int, count: int = 1) -> jax.Array:
    """Returns `count` empty sums of x x^T, float32 [count, in, in]."""
    return jnp.zeros((count, columns, columns), jnp.float32)


@functools.partial(jax.jit, donate_argnums=0)
@jax.default_matmul_precision("highest")
def update(grams: jax.Array, x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Adds sum_t w_t x_t x_t^T to each sum, in float32 at highest precision.

    Args:
      grams: float32 [count, in, in].
      x: [..., in].
      weights: float32 [count, ...] for each sum and token of `x`, or None for ones.
    """
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    if weights is None:
        return grams + (x.T @ x)[None]
    return grams + jnp.stack([(x * w[:, None]).T @ x for w in weights.reshape(len(grams), -1)])


@functools.partial(jax.jit, static_argnames=("model", "kind", "group"), donate_argnames="grams")
def capture_update(
    model: Model,
    block: Any,
    hidden: jax.Array,
    grams: jax.Array,
    weights: jax.Array | None = None,
    *,
    kind: str,
    group: tuple[str, ...],
) -> jax.Array:
    """Adds the inputs of one group of linears on a batch to `grams`; only what they depend on is computed.

    Args:
      model: the model (static).
      block: parameters of one transformer block.
      hidden: [batch, time, d], inputs of the block.
      grams: float32 [count, in, in]; their buffer is reused.
      weights: float32 [count, batch, time], or None; see `update`.
      kind: the block's kind (static).
      group: the linears, one of `model.groups` (static).

    Returns:
      float32 [count, in, in].
    """
    return update(grams, model.capture(block, hidden, kind, group), weights)


@functools.partial(jax.jit, static_argnames="damp")
@jax.default_matmul_precision("highest")
def _damping_used(hessian: jax.Array, damp: float) -> jax.Array:
    weight = jnp.zeros((1, len(hessian)), hessian.dtype)
    return linalg.upper_factor(revive(LayerProblem(weight, hessian)).hessian, damp)[1]


def damping_used(hessian: jax.Array, config: Any) -> float | None:
    """Returns the damping with which a method factors `hessian`, relative to mean(diag H); None if it does not."""
    damp = getattr(config, "damp", None)
    return None if damp is None else float(_damping_used(hessian, damp))
