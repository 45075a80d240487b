"""Products with scalar codes in half words: which implementation can do which, and calling it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.kernels import too_old
from jaxquant.kernels.uniform_matmul import tiles

TPU_TOKENS, GPU_TOKENS = 128, 8
GPU_COLUMNS, GPU_LEVEL_COLUMNS = 49_152, 18_432  # whose inputs, and the tables, fit in shared memory
_NO_CPU_KERNEL = "there is a CPU kernel for additive codes only"
# Bits of a code, and rows and columns of an entry, of which a GPU multiplies tables per block.
BOOKS = ((2, 1, 1), (3, 1, 1), (4, 1, 1), (4, 1, 2), (6, 1, 2), (8, 1, 2), (8, 1, 4))
BOOK_VALUES = 2**14  # of tables that shared memory has room for, per step of
_TILE = 256, 128  # outputs and columns, at most and at least
_FEW_BYTES = 2**15  # of tables of 16 rows, up to which the kernel for few tokens copies them for every 16 rows
TPU_INPUTS = 3_500_000  # tokens * in that fit in a TPU's fast memory


def supports(implementation: str, *, bits: int, group: int | None, columns: int, tokens: int) -> str | None:
    """Says why an implementation cannot do a product with uniform grids; None if it can.

    Args:
      implementation: "cpu", "tpu" or "gpu".
      bits: width of a code.
      group: columns that share a scale, or None for whole rows.
      columns: of the weight.
      tokens: rows of x.
    """
    if implementation == "cpu":
        return _NO_CPU_KERNEL
    if bits not in (2, 3, 4, 8):
        return f"expected codes of 2, 3, 4 or 8 bits, got {bits}"
    multiple = 16 if implementation == "tpu" else 32
    if group is not None and group % multiple:
        return f"expected groups of a multiple of {multiple} columns, got {group}"
    return _too_many(tokens, columns) if implementation == "tpu" else _on_gpu(tokens, columns, GPU_COLUMNS)


def supports_levels(implementation: str, *, scale: tuple[int, ...] | None, columns: int, tokens: int) -> str | None:
    """Says why an implementation cannot do a product with a table of levels per row; None if it can."""
    if implementation == "cpu":
        return _NO_CPU_KERNEL
    if scale is not None and min(scale) > 1:
        return f"expected scales of rows or of columns, got scales {scale[0]} x {scale[1]}"
    return _too_many(tokens, columns) if implementation == "tpu" else _on_gpu(tokens, columns, GPU_LEVEL_COLUMNS)


def fits_books(
    *,
    bits: int,
    count: int,
    size: int,
    vector: tuple[int, int],
    blocks: tuple[int, int],
    shape: tuple[int, int],
    scale: tuple[int, ...] | None,
) -> str | None:
    """Says why entries of a table per block do not fit the layout for GPUs; None if they do.

    Args:
      bits: width of a code.
      count: M, codebooks that are added up.
      size: K, entries of a codebook.
      vector: (g, d), rows and columns of an entry.
      blocks: (R, C).
      shape: of the weight.
      scale: shape of the scale, or None.
    """
    if size != 2**bits:
        return f"expected {2**bits} entries for codes of {bits} bits, got {size}"
    got = f"{bits} bits for {vector[0]} x {vector[1]}"
    if count != 1 or (bits, *vector) not in BOOKS:
        known = ", ".join(f"{b} bits for {g} x {d}" for b, g, d in BOOKS)
        return f"expected one codebook per block with codes of {known}, got {count} with {got}"
    if scale is not None and min(scale) > 1:
        return f"expected scales of rows or of columns, got scales {scale[0]} x {scale[1]}"
    rows, columns = shape[0] // blocks[0], shape[1] // blocks[1]
    if columns % 8:
        return f"expected blocks of a multiple of 8 columns, got {columns}"
    values = 2**bits * vector[1] * tiles.cover(_TILE[0], rows, math.gcd(_TILE[0], rows))
    values *= tiles.cover(_TILE[1], columns, math.gcd(_TILE[1], columns))
    if values > BOOK_VALUES:
        tile = f"{_TILE[0]} x {_TILE[1]} weights"
        return f"expected at most {BOOK_VALUES} values in the tables of {tile}, got {values}: blocks are {rows} x {columns}"
    return None


def _too_many(tokens: int, columns: int) -> str | None:
    most = min(TPU_TOKENS, TPU_INPUTS // max(1, columns))
    if tokens <= most:
        return None
    return f"expected at most {most} tokens, got {tokens}; make the weight dense for many tokens"


def _on_gpu(tokens: int, columns: int, most_columns: int) -> str | None:
    if reason := too_old():
        return reason
    if tokens <= GPU_TOKENS and columns > most_columns:
        return f"expected at most {most_columns} columns for up to {GPU_TOKENS} tokens, got {columns}"
    return None


def uniform_matmul(x: jax.Array, words: jax.Array, scale: jax.Array, zero: jax.Array | None, *, bits: int) -> jax.Array:
    """Returns x @ W.T by the TPU kernel, float32 [tokens, out]; see `tpu.uniform_matmul`."""
    from jaxquant.kernels.uniform_matmul import tpu

    return tpu.uniform_matmul(x, words, scale, zero, bits=bits)


def level_matmul(x: jax.Array, words: jax.Array, levels: jax.Array, scale: jax.Array | None, *, bits: int) -> jax.Array:
    """Returns x @ W.T by the TPU kernel, float32 [tokens, out]; see `tpu.level_matmul`."""
    from jaxquant.kernels.uniform_matmul import tpu

    return tpu.level_matmul(x, words, levels, scale, bits=bits)


@functools.partial(jax.jit, static_argnames=("bits", "dtype"))  # layers of one shape are lowered once
def uniform_tile_matmul(
    x: jax.Array, words: jax.Array, scale: jax.Array, zero: jax.Array | None, *, bits: int, dtype: Any
) -> jax.Array:
    """Returns x @ W.T by the GPU kernels, [tokens, out] of `dtype`; see `gpu.uniform_matmul` and that of `gpu_batch`."""
    from jaxquant.kernels.uniform_matmul import gpu, gpu_batch

    product = (gpu if _few(x, words, bits, table=False) else gpu_batch).uniform_matmul
    return product(x, words, scale, zero, bits=bits, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("bits", "dtype"))  # layers of one shape are lowered once
def level_tile_matmul(
    x: jax.Array, words: jax.Array, levels: jax.Array, scale: jax.Array | None, *, bits: int, dtype: Any
) -> jax.Array:
    """Returns x @ W.T by the GPU kernels, [tokens, out] of `dtype`; see `gpu.level_matmul` and that of `gpu_batch`."""
    from jaxquant.kernels.uniform_matmul import gpu, gpu_batch

    product = (gpu if _few(x, words, bits, table=True) else gpu_batch).level_matmul
    return product(x, words, levels, scale, bits=bits, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("bits", "dimension", "block", "out", "dtype"))
def book_tile_matmul(
    x: jax.Array,
    words: jax.Array,
    tables: jax.Array,
    factor: jax.Array | None,
    *,
    bits: int,
    dimension: int,
    block: tuple[int, int],
    out: int,
    dtype: Any,
) -> jax.Array:
    """Returns x @ W.T by the GPU kernels, [tokens, out] of `dtype`; see `gpu_books.book_matmul`."""
    from jaxquant.kernels.uniform_matmul import gpu, gpu_books

    sizes: dict[str, Any] = {"bits": bits, "dimension": dimension, "block": block}
    book = gpu.book_of(tables, **sizes)
    few = len(x) <= GPU_TOKENS and gpu.in_one_call(x, words, bits=bits, table=True, book=book)
    few = few and book.lines * book.line_bytes <= _FEW_BYTES
    product = (gpu if few else gpu_books).book_matmul
    return product(x, words, tables, factor, dtype=dtype, out=out, **sizes)


def _few(x: jax.Array, words: jax.Array, bits: int, *, table: bool) -> bool:
    """Whether to use the GPU kernel for few tokens: if it reads the codes once, or as the only one exact for float32."""
    from jaxquant.kernels.uniform_matmul import gpu

    return len(x) <= GPU_TOKENS and (x.dtype == jnp.float32 or gpu.in_one_call(x, words, bits=bits, table=table))
