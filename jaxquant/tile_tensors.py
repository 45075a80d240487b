"""Scalar codes as the GPU kernel reads them: weights on uniform grids, and with a table of levels per row."""

import dataclasses
import functools
from typing import Any, TypeGuard

import jax

from jaxquant.kernels.uniform_matmul import api, tiles
from jaxquant.packing import PackedArray, pack
from jaxquant.serving_tensor import ServingTensor, has_row_levels
from jaxquant.tensors import CodebookTensor, QuantizedTensor, UniformTensor

TILE_BITS = (2, 3, 4, 8)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["words", "scale", "zero"], meta_fields=["bits", "columns"]
)
@dataclasses.dataclass(frozen=True)
class UniformTileTensor(ServingTensor):
    """A UniformTensor, its codes as `kernels.uniform_matmul.tiles` describes.

    Attributes:
      words: uint32 [tiles, blocks, loads, threads, words of a load].
      scale: as in UniformTensor, but [groups, out]: a tile's 16 scales lie side by side.
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
        return self.scale.shape[-1], self.columns

    def original(self) -> UniformTensor:
        """Returns the UniformTensor."""
        codes = tiles.from_tiles(self.words, self.bits, *self.shape, table=False)
        return UniformTensor(pack(codes, self.bits), self.scale.T, self.zero)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["words", "levels", "scale"], meta_fields=["bits", "rows", "columns"]
)
@dataclasses.dataclass(frozen=True)
class LevelTileTensor(ServingTensor):
    """A CodebookTensor of one table of levels per row, its codes as `kernels.uniform_matmul.tiles` describes.

    Attributes:
      words: uint32 [tiles, blocks, loads, threads, words of a load].
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
        codes = tiles.from_tiles(self.words, self.bits, *self.shape, table=True)
        return CodebookTensor(pack(codes[None], self.bits), self.levels, self.scale, (self.rows, 1), (1, 1))


def tile_tensor(tensor: UniformTensor | CodebookTensor) -> UniformTileTensor | LevelTileTensor:
    """Lays out scalar codes for a GPU.

    Raises:
      ValueError: not the kind of codes that the layout holds.
    """
    bits = tensor.codes.bits
    if not has_scalar_codes(tensor):
        raise ValueError(
            f"tile layout: expected codes of one of {TILE_BITS} bits, or levels of rows, got {tensor.format}"
        )
    if isinstance(tensor, UniformTensor):
        words = tiles.to_tiles(tensor.codes.unpack(), bits, table=False)
        return UniformTileTensor(words, tensor.scale.T, tensor.zero, bits, tensor.shape[1])
    words = tiles.to_tiles(tensor.codes.unpack()[0], bits, table=True)
    return LevelTileTensor(words, tensor.codebooks, tensor.scale, bits, *tensor.shape)


def has_scalar_codes(tensor: Any) -> TypeGuard[UniformTensor | CodebookTensor]:
    """True for uniform grids, and for one table of levels per row, of as many bits as the layout holds."""
    if isinstance(tensor, UniformTensor):
        return tensor.bits in TILE_BITS
    return isinstance(tensor, CodebookTensor) and has_row_levels(tensor)


def worth_tiles(tensor: QuantizedTensor) -> TypeGuard[UniformTensor | CodebookTensor]:
    """True where the kernel would read the layout, and few columns are not padded to many."""
    if not has_scalar_codes(tensor):
        return False
    if isinstance(tensor, UniformTensor):
        group = None if tensor.scale.shape[-1] == 1 else tensor.group_size
        reason = api.supports("gpu", bits=tensor.bits, group=group, columns=tensor.shape[1], tokens=1)
    else:
        scale = None if tensor.scale is None else tensor.scale.shape
        reason = api.supports_levels("gpu", scale=scale, columns=tensor.shape[1], tokens=1)
    return reason is None and tiles.worth_padding(*tensor.shape, tensor.codes.bits)
