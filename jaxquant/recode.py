"""New codes for quantized weights that training pulls elsewhere: the V step of PV-tuning.

A dense buffer A follows the gradient of the dense weight. After every step the few vectors that are farthest from their
part of A get the nearest representable value; all others keep their codes. A whole matrix rounded back after a small
step would not change at all; few vectors with large changes do, and a large step is safe for them.

Reference: Malinovskii et al., PV-Tuning, https://arxiv.org/abs/2405.14852, algorithm 2 and the released code. Differs
from it: the share of vectors is taken per matrix; tiles have rules of their own, see `jaxquant.projection`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.masters import is_master, rounded
from jaxquant.projection import CodeConfig, project
from jaxquant.tensors import is_quantized


class CodeState(NamedTuple):
    """Buffers of the V step: A and its second moments, in the tree of the parameters with None for what is not quantized.

    `steps` is int32.
    """

    buffer: Any
    second: Any
    steps: jax.Array


def _leaf(x: Any) -> bool:
    return is_quantized(x) or is_master(x)


def _quantized(params: Any, values: Any) -> Any:
    """`values` of the quantized weights of `params`, None for others."""
    return jax.tree.map(lambda p, x: x if is_quantized(p) else None, params, values, is_leaf=_leaf)


@jax.jit
def begin_codes(params: Any, dense_params: Any) -> CodeState:
    """Returns the state before the first step: A is the dense weight.

    Args:
      params: tree of masters.
      dense_params: the same tree with dense arrays in place of its QuantizedTensors.
    """
    buffer = _quantized(params, dense_params)
    return CodeState(buffer, jax.tree.map(jnp.zeros_like, buffer), jnp.zeros((), jnp.int32))


def _norm(x: jax.Array) -> jax.Array:
    """Frobenius norms of matrices [..., out, in], [..., 1, 1]."""
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))


def recode_step(params: Any, gradient: Any, state: CodeState, config: CodeConfig) -> tuple[Any, CodeState]:
    """Moves the buffers along the gradient and a few codes after them.

    Args:
      params: tree of masters, floats already updated; weights may be stacked along one leading axis.
      gradient: of the loss by the dense weights, in the tree of the dense parameters.
      state: buffers.
      config: settings.

    Returns:
      (params with new codes, state).
    """
    gradient = _quantized(params, gradient)
    steps = state.steps + 1
    correction = 1 - config.decay ** steps.astype(jnp.float32)
    second = jax.tree.map(lambda v, g: config.decay * v + (1 - config.decay) * g * g, state.second, gradient)

    def move(a, g, v):
        update = g / (jnp.sqrt(v / correction) + 1e-12)
        length = _norm(update)
        return a - config.learning_rate * (_norm(a) / jnp.where(length > 0, length, 1)) * update

    def recode(tensor, target):
        coded = project(tensor, target, config)
        # with pull 0 the dense weight is not used, and not computed
        return coded, target + config.pull * (coded.dequantize() - target)

    def one(tensor, target):
        if target is None:
            return tensor, None
        return (recode if target.ndim == 2 else jax.vmap(recode))(tensor, target)

    buffer = jax.tree.map(move, state.buffer, gradient, second)
    pairs = jax.tree.map(one, rounded(params), buffer, is_leaf=is_quantized)
    first, last = (jax.tree.map(lambda _, p, i=i: p[i], params, pairs, is_leaf=_leaf) for i in (0, 1))
    params = jax.tree.map(lambda m, c: m if is_master(m) else c, params, first, is_leaf=is_master)
    return params, CodeState(last, second, steps)
