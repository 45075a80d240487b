"""Quantized weights: frozen pytrees that know how to become dense and how many bits they cost."""

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.packing import PackedArray


class QuantizedTensor(abc.ABC):
    """A weight [out, in] in a compressed format.

    Every subclass is final, frozen, and a pytree whose array leaves are all that a decoder needs; what is static is a
    few integers. A tensor may hold tracers, ShapeDtypeStructs or a leading batch axis from `jax.vmap`.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""

    @abc.abstractmethod
    def dequantize(self) -> jax.Array:
        """Returns the dense weight, float32 [out, in]; differentiable in every float field."""

    def storage_bits(self) -> int:
        """Returns the bits of all array leaves, as held in memory and written to disk.

        Needs shapes and dtypes alone, so it works on the result of `jax.eval_shape`.
        """
        return sum(x.size * x.dtype.itemsize * 8 for x in jax.tree.leaves(self))

    @property
    @abc.abstractmethod
    def format(self) -> str:
        """Short description for tables, such as "uniform 3-bit g64"."""


def dense(weight: Any) -> jax.Array:
    """Returns `weight` itself if it is an array, its dequantized form if it is a QuantizedTensor."""
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def is_quantized(x: Any) -> bool:
    """True for a QuantizedTensor; for `jax.tree` functions' `is_leaf`."""
    return isinstance(x, QuantizedTensor)


def dense_tree(tree: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
    """Returns `tree` with every QuantizedTensor dequantized, cast to `dtype` unless None."""

    def convert(x: Any) -> Any:
        if not is_quantized(x):
            return x
        return x.dequantize() if dtype is None else x.dequantize().astype(dtype)

    return jax.tree.map(convert, tree, is_leaf=is_quantized)


def bits_per_weight(tensor: QuantizedTensor) -> float:
    """Returns all storage bits over out * in."""
    out, n = tensor.shape
    return tensor.storage_bits() / (out * n)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale", "zero"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class UniformTensor(QuantizedTensor):
    """weight[i, j] = scale[i, j // group] * (codes[i, j] - zero[j // group, i]), with group = in / groups.

    Attributes:
      codes: PackedArray [out, in] of `bits` bits.
      scale: float16, bfloat16 or float32 [out, groups].
      zero: PackedArray [groups, out] of `bits` bits, packed along out; None for a symmetric grid, whose zero point is
        2**(bits - 1).
    """

    codes: PackedArray
    scale: jax.Array
    zero: PackedArray | None

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.codes.bits

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        return self.scale.shape[-2], self.codes.length

    @property
    def group_size(self) -> int:
        """Consecutive columns that share a scale."""
        return self.codes.length // self.scale.shape[-1]

    def dequantize(self) -> jax.Array:
        """Returns the dense weight, float32 [out, in]."""
        codes = self.codes.unpack().astype(jnp.float32)
        if self.zero is None:
            zero = jnp.float32(2 ** (self.bits - 1))
        else:
            zero = jnp.swapaxes(self.zero.unpack(), -1, -2).astype(jnp.float32)[..., None]
        grouped = codes.reshape(*self.scale.shape, self.group_size)
        return ((grouped - zero) * self.scale.astype(jnp.float32)[..., None]).reshape(codes.shape)

    @property
    def format(self) -> str:
        """Short description for tables."""
        group = "row" if self.scale.shape[-1] == 1 else f"g{self.group_size}"
        return f"uniform {self.bits}-bit {group}{' symmetric' if self.zero is None else ''}"
