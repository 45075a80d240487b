"""Float32 masters of what is stored in few bits: training moves the masters, the forward pass sees the stored numbers.

Steps of an optimizer are far below the spacing of float16 scales, float8 scales or 8-bit codebook entries. So a tree is
trained as `masters(tree)`; inside the loss `rounded` turns it into what would be stored, with the gradient passed
straight through the rounding (Bengio et al., https://arxiv.org/abs/1308.3432); at the end `stored` packs it as it was
before. What is evaluated is what is stored, and the formats, and with them the bits, do not change.

Masters exist for float arrays and for codebooks that are stored as integers with a scale per row. What else is a
number by meaning but a code by storage stays fixed: zero points, exponents of column scales, tile widths.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import grid, trees
from jaxquant.packing import saturate
from jaxquant.tensors import CodebookTensor, UniformTensor


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "scale"], meta_fields=["dtype", "bits"])
@dataclasses.dataclass(frozen=True)
class Master:
    """A float32 array and how it is stored.

    Attributes:
      value: float32 [...].
      scale: None for a plain array. For integers, their scales in the storage dtype, as float32 [..., rows, 1]: they
        grow when a row's values do and never shrink, so that storing what was stored changes nothing.
      dtype: storage dtype of the array, or of the scales (static).
      bits: width of the integers, or None (static).
    """

    value: jax.Array
    scale: jax.Array | None
    dtype: str
    bits: int | None = None

    def store(self) -> jax.Array | UniformTensor:
        """Returns the array in its storage dtype, or the integers and their scales."""
        if self.bits is None:
            return saturate(self.value, self.dtype)
        assert self.scale is not None
        top = 2 ** (self.bits - 1) - 1
        high, low = self.value.max(-1, keepdims=True), self.value.min(-1, keepdims=True)
        span = jnp.maximum(high / top, -low / (top + 1))
        scale = saturate(jnp.maximum(self.scale, span), self.dtype)
        return grid.symmetric_tensor(self.value, scale, self.bits)

    def rounded(self) -> jax.Array:
        """Returns the numbers that would be stored, with the gradient of `value`.

        They are float32, since gradients may underflow in float16 and below; bfloat16 keeps its dtype, because the
        activations of a model take the dtype of its embedding.
        """
        stored = jax.tree.map(jax.lax.stop_gradient, self).store()
        if isinstance(stored, UniformTensor):
            return _straight_through(self.value, stored.dequantize())
        near = _straight_through(self.value, stored.astype(jnp.float32))
        return near.astype(self.dtype) if self.dtype == "bfloat16" else near


@jax.custom_jvp
def _straight_through(value: jax.Array, stored: jax.Array) -> jax.Array:
    """`stored`, with the derivative of `value`."""
    del value
    return stored


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]


def is_master(x: Any) -> bool:
    """True for a Master; for `jax.tree` functions' `is_leaf`."""
    return isinstance(x, Master)


def _master(x: Any) -> Any:
    return Master(x.astype(jnp.float32), None, str(x.dtype)) if trees.is_float(x) else x


def _codebook_master(books: Any) -> Any:
    if isinstance(books, UniformTensor) and books.zero is None and books.scale.shape[-1] == 1:
        return Master(books.dequantize(), books.scale.astype(jnp.float32), str(books.scale.dtype), books.bits)
    return jax.tree.map(_master, books)


@jax.jit
def masters(tree: Any) -> Any:
    """Returns `tree` with a Master in place of every float array and of every codebook stored as integers.

    Args:
      tree: parameters; weights may be quantized, and may be stacked along leading axes.
    """

    def open_up(x):
        if isinstance(x, CodebookTensor):
            return dataclasses.replace(x, codebooks=_codebook_master(x.codebooks), scale=_master(x.scale))
        return _master(x)

    return jax.tree.map(open_up, tree, is_leaf=lambda x: isinstance(x, CodebookTensor))


def rounded(tree: Any) -> Any:
    """Returns what a tree of masters stands for: the same tree with arrays, see `Master.rounded`."""
    return jax.tree.map(lambda x: x.rounded() if is_master(x) else x, tree, is_leaf=is_master)


@jax.jit
def stored(tree: Any) -> Any:
    """Returns a tree of masters as it is stored: inverse of `masters`, bit for bit while nothing was trained."""
    return jax.tree.map(lambda x: x.store() if is_master(x) else x, tree, is_leaf=is_master)
