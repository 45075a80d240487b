"""Quantized weights: frozen pytrees that know how to become dense and how many bits they cost."""

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.kernels.codebook_matmul import reference as codebook
from jaxquant.kernels.uniform_matmul import reference as uniform
from jaxquant.packing import PackedArray, pack, saturate


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


@functools.partial(jax.jit, static_argnames="dtype")
def dense_weight(weight: Any, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """Returns a weight, quantized or not, as an array, cast to `dtype` unless None."""
    return dense(weight) if dtype is None else dense(weight).astype(dtype)


def dense_tree(tree: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
    """Returns `tree` with every QuantizedTensor dequantized, cast to `dtype` unless None."""
    return jax.tree.map(lambda x: dense_weight(x, dtype) if is_quantized(x) else x, tree, is_leaf=is_quantized)


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
        zero = None if self.zero is None else jnp.swapaxes(self.zero.unpack(), -1, -2)
        return uniform.decode(self.codes.unpack(), self.scale, zero, bits=self.bits)

    @property
    def format(self) -> str:
        """Short description for tables."""
        group = "row" if self.scale.shape[-1] == 1 else f"g{self.group_size}"
        return f"uniform {self.bits}-bit {group}{' symmetric' if self.zero is None else ''}"


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "codebooks", "scale"], meta_fields=["blocks", "vector"]
)
@dataclasses.dataclass(frozen=True)
class CodebookTensor(QuantizedTensor):
    """Sums of codebook entries: vector (i, j) is scale[i, j] * sum_m codebook(i, j, m)[codes[m, i, j]].

    A vector covers g rows and d columns of the weight; `vector` is (g, d). The vectors fall into R * C equal blocks of
    consecutive rows and columns; `blocks` is (R, C), and the vectors of block (r, c) use the codebooks
    (r * C + c) * M + m. AQLM has one block and M > 1, GPTVQ many blocks and M = 1, a table per row is (out, 1), a table
    per column (1, in).

    Attributes:
      codes: PackedArray [M, out / g, in / d].
      codebooks: float16, bfloat16 or float32 [R * C * M, K * g * d], or a QuantizedTensor of that shape; entry k of a
        codebook is [k * g * d, (k + 1) * g * d), row-major in (g, d).
      scale: float [out / g or 1, in / d or 1], or None for ones.
      blocks: (R, C) (static).
      vector: (g, d) (static).
    """

    codes: PackedArray
    codebooks: Any
    scale: jax.Array | None
    blocks: tuple[int, int] = (1, 1)
    vector: tuple[int, int] = (1, 1)

    @property
    def num_codebooks(self) -> int:
        """Codebook entries that are added up for one vector, M."""
        return self.codes.shape[-3]

    @property
    def codebook_size(self) -> int:
        """Entries of a codebook, K."""
        return self.codebooks.shape[-1] // (self.vector[0] * self.vector[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        return self.codes.shape[-2] * self.vector[0], self.codes.length * self.vector[1]

    def dequantize(self) -> jax.Array:
        """Returns the dense weight, float32 [out, in]."""
        codes, codebooks = self.codes.unpack(), dense(self.codebooks)
        return codebook.decode(codes, codebooks, self.scale, blocks=self.blocks, vector=self.vector)

    @property
    def format(self) -> str:
        """Short description for tables."""
        (g, d), (r, c) = self.vector, self.blocks
        vector = f" {g}x{d} vectors" if g * d > 1 else ""
        return f"codebook {self.num_codebooks}x{self.codes.bits}-bit{vector}, {r * c} block{'s' if r * c > 1 else ''}"


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "values", "indices", "starts"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class OutlierTensor(QuantizedTensor):
    """weight = dense(base), with values[k] added to single entries.

    Rows come in blocks of as many as hold at most 2**16 weights, so that 16 bits name an entry of a block whatever the
    share of outliers; only the starts of the blocks need more. This is compressed sparse rows with blocks for rows.

    Attributes:
      base: QuantizedTensor or array [out, in], in <= 2**16.
      values: float16, bfloat16 or float32 [k], differences from `base`.
      indices: uint16 [k], row * in + column within the block, increasing; entries with value 0 may repeat the last.
      starts: uint32 [blocks + 1], first outlier of each block; the last is k.
    """

    base: Any
    values: jax.Array
    indices: jax.Array
    starts: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        return self.base.shape[-2], self.base.shape[-1]

    @staticmethod
    def block_rows(columns: int) -> int:
        """Rows of a block."""
        return max(1, 2**16 // columns)

    def positions(self) -> jax.Array:
        """Returns the flat positions row * in + column of the outliers in the whole weight, int32 [k]."""
        out, n = self.shape
        block = jnp.searchsorted(self.starts, jnp.arange(len(self.values), dtype=jnp.uint32), side="right") - 1
        first = block.astype(jnp.int32) * np.int32(self.block_rows(n) * n)
        return jnp.minimum(first + self.indices.astype(jnp.int32), np.int32(out * n - 1))

    def dequantize(self) -> jax.Array:
        """Returns the dense weight, float32 [out, in]."""
        base = dense(self.base).astype(jnp.float32)
        flat = base.reshape(-1).at[self.positions()].add(self.values.astype(jnp.float32))
        return flat.reshape(base.shape)

    @property
    def format(self) -> str:
        """Short description for tables."""
        base = self.base.format if isinstance(self.base, QuantizedTensor) else str(self.base.dtype)
        share = self.values.shape[-1] / (self.shape[0] * self.shape[1])
        return f"{base} + {share:.2%} outliers"


def with_outliers(base: QuantizedTensor, values: jax.Array, positions: jax.Array, dtype: str) -> OutlierTensor:
    """Adds single entries to a tensor.

    Args:
      base: [out, in].
      values: float32 [k], what to add.
      positions: int32 [k], row * in + column, increasing; unused entries last, out * in or more, with value 0.
      dtype: storage dtype of the values.

    Raises:
      ValueError: more than 2**16 columns.
    """
    out, n = base.shape
    if n > 2**16:
        raise ValueError(f"outliers: expected at most {2**16} input columns (16-bit indices), got {n}")
    if out * n >= 2**31:
        raise ValueError(f"outliers: expected fewer than 2**31 weights, got {out}x{n}; split the layer by rows")
    size = OutlierTensor.block_rows(n) * n
    blocks = -(-out * n // size)
    positions = jnp.minimum(positions, np.int32(out * n - 1))
    bounds = np.minimum(np.arange(1, blocks, dtype=np.int64) * size, out * n).astype(np.int32)
    inner = jnp.searchsorted(positions, bounds).astype(jnp.uint32)
    ends = jnp.asarray([len(values)], jnp.uint32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.uint32), inner, ends])
    return OutlierTensor(base, saturate(values, dtype), (positions % size).astype(jnp.uint16), starts)


def pack_order(order: jax.Array) -> PackedArray | jax.Array:
    """Returns a permutation [n] in as few bits as hold n - 1, or as uint32 beyond 2**16 entries."""
    n = order.shape[-1]
    return pack(order, max(1, (n - 1).bit_length())) if n <= 2**16 else order.astype(jnp.uint32)


def unpack_order(order: PackedArray | jax.Array) -> jax.Array:
    """Returns the permutation that `pack_order` packed, int32 [n]."""
    return (order.unpack() if isinstance(order, PackedArray) else order).astype(jnp.int32)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts", "order"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class ConcatTensor(QuantizedTensor):
    """Tensors side by side: position k along `axis` of the parts, joined, is row or column order[k] of the weight.

    Attributes:
      parts: QuantizedTensors or arrays, equal along the other axis.
      order: what `pack_order` returns, of the permutation [out] or [in]; None for the identity.
      axis: 0 joins rows, 1 columns (static).
    """

    parts: tuple[Any, ...]
    order: PackedArray | jax.Array | None
    axis: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        shape = [self.parts[0].shape[-2], self.parts[0].shape[-1]]
        shape[self.axis] = sum(part.shape[self.axis - 2] for part in self.parts)
        return shape[0], shape[1]

    def dequantize(self) -> jax.Array:
        """Returns the dense weight, float32 [out, in]."""
        joined = jnp.concatenate([dense(part).astype(jnp.float32) for part in self.parts], axis=self.axis)
        if self.order is None:
            return joined
        return jnp.take(joined, jnp.argsort(unpack_order(self.order)), axis=self.axis)

    @property
    def format(self) -> str:
        """Short description for tables."""
        parts = [p.format if isinstance(p, QuantizedTensor) else str(p.dtype) for p in self.parts]
        return " | ".join(parts) + (" permuted" if self.order is not None else "")
