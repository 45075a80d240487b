"""Scalar codes on a GPU for few tokens, by Pallas Mosaic GPU: codes go from global memory to the matrix unit in registers.

The codes lie as the matrix unit's operands do (see `tiles`): a thread loads 16 bytes and makes them operands, bytes of codes
on uniform grids (`gpu_grid`) or pairs of float16 numbers, of a table per row (`gpu_table`) or per block of the weight
(`gpu_entries`). The matrix unit multiplies 16 outputs of weights with 8 columns of inputs at once, so a few tokens cost
little more than one. One block of threads runs on a multiprocessor, has all inputs in shared memory, and goes through tiles
of 16 outputs; its warps divide the columns, each with the codes of its next tile already on the way. The warps' sums are
added up in a fixed order.

The time is that of reading the codes and, with tables, of as many bytes of lookups in shared memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels.uniform_matmul import gpu_thread, tiles
from jaxquant.kernels.uniform_matmul.gpu_plan import MOST_ROWS, BlockConfig, Book, Plan

SHARED_BYTES = 227 * 1024


def _kernel(*refs, plan: Plan, names: tuple[str, ...]):
    block = lax.axis_index("block")
    scalar = plgpu.Layout.WG_SPLAT(())

    def on_threads(program):
        @plgpu.inline_mgpu(arg_types=(scalar,) + (plgpu.RefType(),) * len(refs))
        def thread(_, block, *refs):
            addresses = dict(zip(names, map(t.pointer, refs), strict=True))
            program(gpu_thread.Thread(plan, block.registers.item(), addresses))

        thread(block, *refs)

    # The next kernel may start while this one runs; this one reads and writes nothing before the one before has ended.
    plgpu.griddepcontrol_launch_dependents()
    if plan.config.early:
        on_threads(gpu_thread.Thread.prefetch)
    plgpu.griddepcontrol_wait()
    on_threads(gpu_thread.Thread.run)


def _call(plan: Plan, arrays: dict[str, jax.Array]) -> jax.Array:
    """Runs the kernel: [tokens, out]."""
    scratch = plan.scratch()
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan, names=(*arrays, "y", *scratch)),
        out_type=jax.ShapeDtypeStruct((plan.tokens, plan.out), plan.dtypes["y"]),
        grid=(plan.grid,),
        grid_names=("block",),
        num_threads=plan.config.warpgroups,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((count,), dtype) for count, dtype in scratch.values()],
        kernel_name="scalar_code_matmul",
    )
    return kernel(*arrays.values())


def _plans(x: jax.Array, words: jax.Array, config: BlockConfig | None, **sizes: Any) -> Callable[..., Plan]:
    """The plan for these arrays, of a number of tokens."""
    sizes |= {"columns": x.shape[1], "blocks": words.shape[1]}
    return functools.partial(Plan, config or BlockConfig(), parts=2 if x.dtype == jnp.float32 else 1, **sizes)


def _tokens_of_a_call(plan: Callable[..., Plan]) -> int:
    """As many tokens as shared memory has room for."""
    limit = MOST_ROWS // plan(tokens=1).parts if plan(tokens=1).table else MOST_ROWS
    return next(n for n in range(limit, 0, -1) if n == 1 or plan(tokens=n).shared_bytes() <= SHARED_BYTES)


def in_one_call(x: jax.Array, words: jax.Array, *, bits: int, table: bool, book: Book | None = None) -> bool:
    """Whether the codes are read once for all tokens."""
    plan = _plans(x, words, None, bits=bits, table=table, book=book, out=1, groups=1, dtypes={})
    return len(x) <= _tokens_of_a_call(plan) and plan(tokens=len(x)).shared_bytes() <= SHARED_BYTES


def book_of(tables: jax.Array, *, bits: int, dimension: int, block: tuple[int, int]) -> Book:
    """Sizes of tables [C, units, unit], see `tiles.to_units`."""
    lines, units, unit = tables.shape
    return Book(dimension, 2 ** (bits * dimension) * dimension, block, lines, units * unit)


def _product(arrays: dict[str, jax.Array | None], dtype: Any, config: BlockConfig | None, **sizes: Any) -> jax.Array:
    """Returns x @ W.T, by as many calls as the tokens need."""
    given = {name: array for name, array in arrays.items() if array is not None}
    # A load is 16 bytes; more columns than there are meet inputs of zero.
    x = given.pop("x")
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8)))
    dtypes = {"x": x.dtype, "y": jnp.dtype(dtype)} | {name: array.dtype for name, array in given.items()}
    plan = _plans(x, given["words"], config, dtypes=dtypes, **sizes)
    chunk = -(-len(x) // -(-len(x) // _tokens_of_a_call(plan)))
    results = []
    for start in range(0, len(x), chunk):
        part = x[start : start + chunk]
        results.append(_call(plan(tokens=len(part)), {"x": part, **given}))
    return results[0] if len(results) == 1 else jnp.concatenate(results)


def shared_bytes(*, bits: int, columns: int, table: bool) -> int:
    """Shared memory that a token of float32 needs."""
    blocks = -(-columns // tiles.block_columns(bits))
    return Plan(BlockConfig(), bits, 1, 2, columns, 1, blocks, 1, table, {}).shared_bytes()


def uniform_matmul(
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    *,
    bits: int,
    dtype: Any = jnp.float32,
    config: BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T for uniform grids, [tokens, out] of `dtype`; sums are float32 and always in the same order.

    Args:
      x: float [tokens, in]; inputs are exact to 2**-22 of a token's largest.
      words: see `tiles.to_tiles`, not for tables.
      scale: float [groups, out]; with more than one group, a group is a multiple of 32 columns.
      zero: uint32 [groups, out * bits / 32, rounded up], codes packed along out; or None for 2**(bits - 1).
      bits: 2, 3, 4 or 8.
      dtype: of the result.
      config: division of the work.
    """
    groups, out = scale.shape
    arrays = {"x": x, "words": words, "scale": scale, "zero": zero}
    return _product(arrays, dtype, config, bits=bits, out=out, groups=groups, table=False)


def level_matmul(
    x: jax.Array,
    words: jax.Array,
    levels: jax.Array,
    scale: jax.Array | None,
    *,
    bits: int,
    dtype: Any = jnp.float32,
    config: BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T for a table of levels per row, as `uniform_matmul`.

    Args:
      x: float [tokens, in].
      words: see `tiles.to_tiles`, for tables.
      levels: float [out, 2**bits]; what is not float16 is rounded to its 11 bits.
      scale: float [out or 1, 1] or [1, in], or None.
      bits: 2, 3 or 4.
      dtype: of the result.
      config: division of the work.
    """
    out = len(levels)
    if scale is not None and scale.shape[1] > 1:
        x, scale = x.astype(jnp.float32) * scale.astype(jnp.float32), None
    if scale is not None:
        scale = jnp.broadcast_to(scale, (out, 1)).reshape(1, out)
    if levels.dtype != jnp.float16:
        # A power of two per row brings its levels into the range of float16.
        levels = levels.astype(jnp.float32)
        largest = jnp.maximum(jnp.abs(levels).max(1), jnp.finfo(jnp.float32).tiny)
        factor = jnp.exp2(jnp.floor(jnp.log2(largest)))
        levels = (levels / factor[:, None]).astype(jnp.float16)
        scale = factor[None] if scale is None else factor[None] * scale.astype(jnp.float32)
    arrays = {"x": x, "words": words, "scale": scale, "levels": levels}
    return _product(arrays, dtype, config, bits=bits, out=out, groups=1, table=True)


def book_matmul(
    x: jax.Array,
    words: jax.Array,
    tables: jax.Array,
    factor: jax.Array | None,
    *,
    bits: int,
    dimension: int,
    block: tuple[int, int],
    out: int,
    dtype: Any = jnp.float32,
    config: BlockConfig | None = None,
) -> jax.Array:
    """Returns x @ W.T for tables of entries per block; see `gpu_books.book_matmul` for the arguments.

    `config` is the division of the work. Inputs are those of `uniform_matmul`.
    """
    book = book_of(tables, bits=bits, dimension=dimension, block=block)
    arrays = {"x": x, "words": words, "scale": None if factor is None else factor[None], "levels": tables}
    return _product(arrays, dtype, config, bits=bits, out=out, groups=1, table=True, book=book)
