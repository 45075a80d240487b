"""Quantized weights whose codes lie as the kernels read them, chosen once at load; bit-exact and reversible.

    params = for_serving(params)    # after loading, for the devices at hand
    params = from_serving(params)   # the same bits as before

What a layout pads it holds, and `storage_bits` counts it.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.book_tensor import book_tensor, worth_books
from jaxquant.codebook_tensor import ColumnTensor
from jaxquant.kernels.codebook_matmul import api as codebook_api
from jaxquant.kernels.codebook_matmul import layout as slot_layout
from jaxquant.kernels.uniform_matmul import layout as word_layout
from jaxquant.outliers import ColumnOutlierTensor
from jaxquant.packing import PackedArray, pack
from jaxquant.serving_tensor import ServingTensor as ServingTensor
from jaxquant.serving_tensor import has_row_levels
from jaxquant.tensors import (
    CodebookTensor,
    ConcatTensor,
    OutlierTensor,
    QuantizedTensor,
    UniformTensor,
    is_quantized,
)
from jaxquant.tile_tensors import tile_tensor, worth_tiles

WORD_BITS = (2, 3, 4, 8)
# Lines of half words for one product of a TPU's matrix unit; few columns are not worth padding to so many.
_LINES, _FEW_COLUMNS, _FEWEST_LINES = 64, 512, 16
# Rows of slots at a distance of a multiple of 1024 bytes push each other out of a CPU's first cache (8 ways of 4 KiB):
# 5 times slower at 4096 outputs, so such rows are a cache line longer.
_ALIASED, _CACHE_LINE = 1024, 64


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["slots", "codebooks", "scale"],
    meta_fields=["blocks", "dimension", "num_codebooks", "bits", "rows", "columns"],
)
@dataclasses.dataclass(frozen=True)
class LookupTensor(ServingTensor):
    """A CodebookTensor of vectors along a row, its codes as `kernels.codebook_matmul.layout` describes.

    Attributes:
      slots: uint8 [in / d * M, out or more]; what is more is zero.
      codebooks: as in CodebookTensor.
      scale: as in CodebookTensor.
      blocks: as in CodebookTensor (static).
      dimension: d (static).
      num_codebooks: M (static).
      bits: width of a code in the CodebookTensor, at most 8 (static).
      rows: out (static).
      columns: in (static).
    """

    slots: jax.Array
    codebooks: Any
    scale: jax.Array | None
    blocks: tuple[int, int]
    dimension: int
    num_codebooks: int
    bits: int
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        return self.rows, self.columns

    def original(self) -> CodebookTensor:
        """Returns the CodebookTensor."""
        slots = self.slots[:, : self.rows]
        codes = pack(slot_layout.from_slots(slots, self.num_codebooks), self.bits)
        return CodebookTensor(codes, self.codebooks, self.scale, self.blocks, (1, self.dimension))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "codebooks", "scale"],
    meta_fields=["dimension", "num_codebooks", "bits", "columns"],
)
@dataclasses.dataclass(frozen=True)
class BankedTensor(ServingTensor):
    """A CodebookTensor of vectors along a row with codebooks for all of it, its codes as a GPU reads them.

    Attributes:
      words: uint32 [4 * sets, out, 4], see `kernels.codebook_matmul.layout.banked_words`.
      codebooks: as in CodebookTensor.
      scale: as in CodebookTensor.
      dimension: d (static).
      num_codebooks: M (static).
      bits: width of a code in the CodebookTensor, at most 8 (static).
      columns: in (static).
    """

    words: jax.Array
    codebooks: Any
    scale: jax.Array | None
    dimension: int
    num_codebooks: int
    bits: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        return self.words.shape[1], self.columns

    @property
    def blocks(self) -> tuple[int, int]:
        """As in CodebookTensor."""
        return 1, 1

    def original(self) -> CodebookTensor:
        """Returns the CodebookTensor."""
        codes = slot_layout.from_banked_words(self.words, self.num_codebooks, self.columns // self.dimension)
        return CodebookTensor(pack(codes, self.bits), self.codebooks, self.scale, self.blocks, (1, self.dimension))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["words", "scale", "zero"], meta_fields=["bits", "columns"]
)
@dataclasses.dataclass(frozen=True)
class UniformWordTensor(ServingTensor):
    """A UniformTensor, its codes as `kernels.uniform_matmul.layout` describes.

    Attributes:
      words: uint32 [lines / 2, out].
      scale: as in UniformTensor.
      zero: as in UniformTensor.
      bits: 2, 3, 4 or 8 (static).
      columns: in (static).
    """

    words: jax.Array
    scale: jax.Array
    zero: PackedArray | None
    bits: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        return self.scale.shape[-2], self.columns

    def original(self) -> UniformTensor:
        """Returns the UniformTensor."""
        codes = word_layout.from_words(self.words, self.bits, self.columns)
        return UniformTensor(pack(codes, self.bits), self.scale, self.zero)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["words", "levels", "scale"], meta_fields=["bits", "rows", "columns"]
)
@dataclasses.dataclass(frozen=True)
class LevelWordTensor(ServingTensor):
    """A CodebookTensor of one table of levels per row, its codes as `kernels.uniform_matmul.layout` describes.

    Attributes:
      words: uint32 [lines / 2, out].
      levels: the codebooks, [out, 2**bits].
      scale: as in CodebookTensor.
      bits: 2, 3 or 4 (static).
      rows: out (static).
      columns: in (static).
    """

    words: jax.Array
    levels: Any
    scale: jax.Array | None
    bits: int
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        return self.rows, self.columns

    def original(self) -> CodebookTensor:
        """Returns the CodebookTensor."""
        codes = word_layout.from_words(self.words, self.bits, self.columns)
        return CodebookTensor(pack(codes[None], self.bits), self.levels, self.scale, (self.shape[0], 1), (1, 1))


def lookup_tensor(tensor: CodebookTensor, platform: str = "cpu") -> LookupTensor:
    """Lays out additive codes for a platform.

    Raises:
      ValueError: codes of more than 8 bits, or entries of several rows.
    """
    if tensor.codes.bits > 8 or tensor.vector[0] != 1:
        got = f"{tensor.codes.bits} bits, {tensor.vector[0]} rows"
        raise ValueError(f"lookup layout: expected codes of at most 8 bits and entries of one row, got {got}")
    codes = slot_layout.to_slots(tensor.codes.unpack())
    more = _CACHE_LINE if platform == "cpu" and codes.shape[1] % _ALIASED == 0 else 0
    fields = tensor.blocks, tensor.vector[1], tensor.num_codebooks, tensor.codes.bits, *tensor.shape
    return LookupTensor(jnp.pad(codes, ((0, 0), (0, more))), tensor.codebooks, tensor.scale, *fields)


def banked_tensor(tensor: CodebookTensor) -> BankedTensor:
    """Lays out additive codes for a GPU.

    Raises:
      ValueError: codes of more than 8 bits, entries of several rows, or sizes that the kernel does not know.
    """
    if tensor.codes.bits > 8 or tensor.vector[0] != 1:
        got = f"{tensor.codes.bits} bits, {tensor.vector[0]} rows"
        raise ValueError(f"banked layout: expected codes of at most 8 bits and entries of one row, got {got}")
    count, dimension = tensor.num_codebooks, tensor.vector[1]
    if reason := codebook_api.fits_banks(count, dimension, tensor.blocks):
        raise ValueError(f"banked layout: {reason}")
    words = slot_layout.banked_words(tensor.codes.unpack())
    return BankedTensor(words, tensor.codebooks, tensor.scale, dimension, count, tensor.codes.bits, tensor.shape[1])


def word_tensor(tensor: UniformTensor | CodebookTensor) -> UniformWordTensor | LevelWordTensor:
    """Lays out scalar codes.

    Raises:
      ValueError: not the kind of codes that the layout holds.
    """
    bits, columns = tensor.codes.bits, tensor.shape[1]
    if bits not in WORD_BITS:
        raise ValueError(f"word layout: expected codes of one of {WORD_BITS} bits, got {bits}")
    multiple = _LINES if columns >= _FEW_COLUMNS else _FEWEST_LINES
    if isinstance(tensor, UniformTensor):
        group = tensor.group_size if tensor.scale.shape[-1] > 1 else 1
        lines = word_layout.num_lines(columns, bits, math.lcm(multiple, group))
        words = word_layout.to_words(tensor.codes.unpack(), bits, lines)
        return UniformWordTensor(words, tensor.scale, tensor.zero, bits, columns)
    if not has_row_levels(tensor):
        raise ValueError(f"word layout: expected a table of at most 16 levels per row, got {tensor.format}")
    lines = word_layout.num_lines(columns, bits, multiple)
    words = word_layout.to_words(tensor.codes.unpack()[0], bits, lines)
    return LevelWordTensor(words, tensor.codebooks, tensor.scale, bits, *tensor.shape)


def _has_gpu_kernel(tensor: CodebookTensor) -> bool:
    scale = None if tensor.scale is None else tensor.scale.shape
    settings: dict[str, Any] = {"bits": tensor.codes.bits, "count": tensor.num_codebooks, "vector": tensor.vector}
    settings |= {"blocks": tensor.blocks, "scale": scale, "columns": tensor.shape[1], "tokens": 1}
    return codebook_api.supports("gpu", **settings) is None


def _layout(tensor: QuantizedTensor, platform: str) -> QuantizedTensor:
    """The layout for a platform, or the tensor itself where no kernel would read it."""
    if platform not in ("cpu", "tpu", "gpu"):
        return tensor
    if platform == "gpu" and worth_tiles(tensor):
        return tile_tensor(tensor)
    if platform == "gpu" and worth_books(tensor):
        return book_tensor(tensor)
    if isinstance(tensor, CodebookTensor):
        additive = tensor.codes.bits == 8 and tensor.vector[0] == 1 and tensor.vector[1] >= 4
        if platform == "gpu":
            return banked_tensor(tensor) if additive and _has_gpu_kernel(tensor) else tensor
        if additive and tensor.blocks[0] == 1:
            return lookup_tensor(tensor, platform)
        return word_tensor(tensor) if platform == "tpu" and has_row_levels(tensor) else tensor
    if platform == "tpu" and isinstance(tensor, UniformTensor) and tensor.bits in WORD_BITS:
        return word_tensor(tensor)
    return tensor


def _convert(tensor: Any, leaf: Any) -> Any:
    """Applies `leaf` to the tensors that a tensor is made of."""
    if isinstance(tensor, ConcatTensor):
        return dataclasses.replace(tensor, parts=tuple(_convert(part, leaf) for part in tensor.parts))
    if isinstance(tensor, (OutlierTensor, ColumnOutlierTensor, ColumnTensor)):
        return dataclasses.replace(tensor, base=_convert(tensor.base, leaf))
    return leaf(tensor) if is_quantized(tensor) else tensor


def for_serving(tree: Any, platform: str | None = None) -> Any:
    """Returns `tree` with the codes of its quantized weights laid out for the kernels of a platform.

    Args:
      tree: parameters; weights may be QuantizedTensors.
      platform: "cpu", "gpu" or "tpu"; by default that of the first device.
    """
    platform = platform or jax.default_backend()
    return jax.tree.map(lambda x: _convert(x, lambda t: _layout(t, platform)), tree, is_leaf=is_quantized)


def from_serving(tree: Any) -> Any:
    """Inverse of `for_serving`, bit for bit."""

    def back(tensor: QuantizedTensor) -> QuantizedTensor:
        return tensor.original() if isinstance(tensor, ServingTensor) else tensor

    return jax.tree.map(lambda x: _convert(x, back), tree, is_leaf=is_quantized)
