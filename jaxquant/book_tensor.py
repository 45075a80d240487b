"""Codes of entries of a table per block of the weight, such as GPTVQ's, as the GPU kernel reads them."""

import dataclasses
import functools
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from jaxquant.kernels import too_old
from jaxquant.kernels.uniform_matmul import api, tiles
from jaxquant.packing import pack
from jaxquant.serving_tensor import ServingTensor, has_row_levels
from jaxquant.tensors import CodebookTensor, UniformTensor

# Tables of a block of rows are multiplied by a power of two that brings their largest grid's spacing to between 2**7 and
# 2**8, so that 8-bit entries do not overflow. Spacings 2**30 times smaller count as this, far below float16's rounding.
_TARGET, _LEAST = 8, 2.0**-23


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "tables", "spacing", "factor", "scale"],
    meta_fields=["bits", "blocks", "dimension", "entry_bits", "row_scale", "rows", "columns"],
)
@dataclasses.dataclass(frozen=True)
class BookTileTensor(ServingTensor):
    """A CodebookTensor of one codebook per block, as `kernels.uniform_matmul.tiles` describes.

    Attributes:
      words: uint32 [tiles, blocks, loads, threads, words of a load].
      tables: float16 [C, units, unit]; integers are multiplied by their spacing and a power of two.
      spacing: of integer entries, float [R * C, 1]; None for float16 entries, to which nothing is done.
      factor: float32 [out], what rows are multiplied by, or None for ones.
      scale: float [1, in / d], that of columns, or None.
      bits: of a code per column (static).
      blocks: (R, C) (static).
      dimension: d (static).
      entry_bits: width of integer entries (static).
      row_scale: dtype of the scale of rows, None if there is none (static).
      rows: out (static).
      columns: in (static).
    """

    words: jax.Array
    tables: jax.Array
    spacing: jax.Array | None
    factor: jax.Array | None
    scale: jax.Array | None
    bits: int
    blocks: tuple[int, int]
    dimension: int
    entry_bits: int
    row_scale: str | None
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        return self.rows, self.columns

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.rows // self.blocks[0], self.columns // self.blocks[1]

    def original(self) -> CodebookTensor:
        """Returns the CodebookTensor."""
        width, scale = self.bits * self.dimension, self.scale
        digits = tiles.from_tiles(self.words, self.bits, *self.shape, table=True)
        codes = pack(tiles.from_digits(digits, self.bits, self.dimension)[None], width)
        books: Any = tiles.from_units(self.tables, self.blocks[0], 2**width * self.dimension)
        power = None
        if self.spacing is not None:
            power, spacing = _normalised(self.spacing, self.blocks)
            books = jnp.round(books.astype(jnp.float32) / spacing[..., None]) + 2.0 ** (self.entry_bits - 1)
            books = books.astype(jnp.uint8)
        books = books.reshape(self.blocks[0] * self.blocks[1], -1)
        if self.spacing is not None:
            books = UniformTensor(pack(books, self.entry_bits), self.spacing, None)
        if self.row_scale is not None:
            factor: Any = self.factor
            factor = factor if power is None else factor / jnp.repeat(power, self.block[0])
            scale = factor.astype(self.row_scale)[:, None]
        return CodebookTensor(codes, books, scale, self.blocks, (1, self.dimension))


def _normalised(spacing: jax.Array, blocks: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Powers of two [R], and the spacings [R, C] of the tables that they are to be multiplied by."""
    spacing = spacing.astype(jnp.float32).reshape(blocks)
    exponent = jnp.frexp(spacing.max(axis=1))[1] - _TARGET
    least = jnp.maximum(jnp.ldexp(spacing, -exponent[:, None]), _LEAST)
    return jnp.ldexp(jnp.float32(1), exponent), least


def book_tensor(tensor: CodebookTensor) -> BookTileTensor:
    """Lays out codes of entries of a table per block.

    Raises:
      ValueError: not the kind of codes that the layout holds.
    """
    if reason := why_not(tensor):
        raise ValueError(f"book layout: {reason}")
    books: Any = tensor.codebooks
    (out, columns), blocks, d = tensor.shape, tensor.blocks, tensor.vector[1]
    spacing, power, entry_bits = None, None, 16
    if isinstance(books, UniformTensor):
        entry_bits, spacing = books.bits, books.scale
        power, least = _normalised(spacing, blocks)
        entries = books.codes.unpack().astype(jnp.float32) - 2.0 ** (entry_bits - 1)
        books = (entries.reshape(*blocks, -1) * least[..., None]).astype(jnp.float16)
    factor = None if power is None else jnp.repeat(power, out // blocks[0])
    scale, row_scale = tensor.scale, None
    if scale is not None and scale.shape[1] == 1:
        rows = jnp.broadcast_to(scale.astype(jnp.float32)[:, 0], (out,))
        factor = rows if factor is None else rows * factor
        row_scale, scale = str(scale.dtype), None
    digits = tiles.to_digits(tensor.codes.unpack()[0], tensor.codes.bits // d, d)
    return BookTileTensor(
        words=tiles.to_tiles(digits, tensor.codes.bits // d, table=True),
        tables=tiles.to_units(books.reshape(*blocks, -1)),
        spacing=spacing,
        factor=factor,
        scale=scale,
        bits=tensor.codes.bits // d,
        blocks=blocks,
        dimension=d,
        entry_bits=entry_bits,
        row_scale=row_scale,
        rows=out,
        columns=columns,
    )


def why_not(tensor: CodebookTensor) -> str | None:
    """Says why the layout cannot hold a tensor; None if it can."""
    books: Any = tensor.codebooks
    integers = isinstance(books, UniformTensor) and books.zero is None and books.scale.shape[-1] == 1
    if not integers and (isinstance(books, UniformTensor) or books.dtype != jnp.float16):
        got = books.format if isinstance(books, UniformTensor) else books.dtype
        return f"expected codebooks of float16 or of integers with a scale each, got {got}"
    return api.fits_books(
        bits=tensor.codes.bits,
        count=tensor.num_codebooks,
        size=tensor.codebook_size,
        vector=tensor.vector,
        blocks=tensor.blocks,
        shape=tensor.shape,
        scale=None if tensor.scale is None else tensor.scale.shape,
    )


def has_books(tensor: Any) -> TypeGuard[CodebookTensor]:
    """True for one codebook per block, of entries along a row: what no other kernel of a GPU reads."""
    if not isinstance(tensor, CodebookTensor) or tensor.num_codebooks > 1 or has_row_levels(tensor):
        return False
    return tensor.vector[0] == 1 and (tensor.vector[1] < 4 or (tensor.vector[1] == 4 and tensor.blocks != (1, 1)))


def worth_books(tensor: Any) -> TypeGuard[CodebookTensor]:
    """True where the kernel would read the layout, and few columns are not padded to many."""
    if not has_books(tensor) or why_not(tensor) or too_old():
        return False
    return tiles.worth_padding(*tensor.shape, tensor.codes.bits // tensor.vector[1])
