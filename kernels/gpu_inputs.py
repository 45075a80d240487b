"""Inputs of the GPU kernel for several tokens, as it reads them: of 16 bits and permuted, by one launch.

A decoder brings a thread 8 consecutive columns of 32, while a fragment gives thread (., c) columns 8 k + 2 c and the next,
and of the thread's columns 8 c .. 8 c + 7 the pair number k goes there. So the weight's column 8 c + 2 k is the fragment's
8 k + 2 c, and inputs are permuted likewise.

XLA would do this in three passes: the largest number of each row, the permutation as a gather, and the conversion.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels import gpu_words as w

_WARP, _WARPGROUP = 32, 128
_THREADS = 1024  # of a block, at most
_OCTET, _GROUP = 8, 32  # columns that a thread writes at once, and that are permuted among themselves
_COLUMNS, _ROWS = 64, 8  # the kernel for several tokens has multiples of these
_ONE = 1 << 23  # of an exponent, in the bits of a float32
# Of a row's largest number, with its bias: it becomes 2^13, and no power of two that numbers are multiplied by is beyond
# float32's from this exponent on.
_TARGET, _LEAST = 13, 14
_BIAS = 127


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes.

    Attributes:
      tokens: rows of x; those of the result are more, a multiple of 8.
      columns: of both, a multiple of 64.
      dtypes: of x and of the result.
    """

    tokens: int
    columns: int
    dtypes: tuple[Any, Any]

    @property
    def scaled(self) -> bool:
        """Whether rows are multiplied by powers of two, lest they overflow or underflow."""
        return self.dtypes[0] != self.dtypes[1]

    @property
    def threads(self) -> int:
        """Of a block, which has a row."""
        octets = self.columns // _OCTET
        return min(_THREADS, -(-octets // _WARPGROUP) * _WARPGROUP)


class ThreadProgram:
    """The program of one thread.

    Args:
      plan: sizes.
      row: of the result.
      addresses: of x [tokens, columns], of the result, and of a float32 per warp in shared memory.
      factors: address of float32 [tokens], if rows are scaled.
    """

    def __init__(self, plan: Plan, row: t.Value, addresses: Sequence[t.Value], factors: t.Value | None):
        self.plan, self.row, self.factors = plan, row, factors
        self.x, self.y, self.largest = addresses
        self.thread = t.thread_index()

    def run(self) -> None:
        """Everything."""
        plan, octets = self.plan, self.plan.columns // _OCTET
        places = [t.add(self.thread, first) for first in range(0, octets, plan.threads)]
        rows = [self.load(t.least(place, octets - 1)) for place in places]
        if plan.scaled:
            scale = self.scale(rows)
            rows = [[t.fmul(value, scale) for value in values] for values in rows]
        there = t.less(self.row, plan.tokens)
        line = t.line(self.y, self.row, plan.columns * jnp.dtype(plan.dtypes[1]).itemsize)
        for place, values in zip(places, rows, strict=True):
            values = [t.select(there, value, t.number(0.0)) for value in values]
            with t.when(t.less(place, octets)):
                t.store_vector(values, t.at(line, t.mul(place, 16)), plan.dtypes[1])

    def load(self, octet: t.Value) -> list[t.Value]:
        """The 8 values of the result's columns from 8 * octet on; those of the last token where there is no token."""
        plan, size = self.plan, jnp.dtype(self.plan.dtypes[0]).itemsize
        line = t.line(self.x, t.least(self.row, plan.tokens - 1), plan.columns * size)
        per_group = _GROUP // _OCTET
        group, k = t.div(octet, per_group), t.rem(octet, per_group)
        start = t.at(line, t.mul(t.add(t.mul(group, _GROUP), t.mul(k, 2)), size))
        pairs = [t.load(t.at(start, _OCTET * c * size), plan.dtypes[0], 2) for c in range(per_group)]
        return [value for pair in pairs for value in pair]

    def scale(self, rows: Sequence[Sequence[t.Value]]) -> t.Value:
        """A power of two that brings the row's largest number to between 2^13 and 2^14; writes its inverse."""
        bits = functools.reduce(
            w.most, [t.bits_and(w.bits_of(value), 2**31 - 1) for values in rows for value in values]
        )
        for distance in (1, 2, 4, 8, 16):
            bits = w.most(bits, w.bits_of(t.shuffle(w.float_of(bits), distance)))
        with t.when(t.less(t.rem(self.thread, _WARP), 1)):
            t.store(w.float_of(bits), t.at(self.largest, t.mul(t.div(self.thread, _WARP), 4)))
        t.block_barrier()
        places = range(0, self.plan.threads // _WARP, 4)
        warps = [value for first in places for value in t.load(t.at(self.largest, 4 * first), jnp.float32, 4)]
        exponent = w.most(t.div(functools.reduce(w.most, map(w.bits_of, warps)), _ONE), _LEAST)
        with t.when(t.both(t.less(self.thread, 1), t.less(self.row, self.plan.tokens))):
            inverse = w.float_of(t.mul(t.sub(exponent, _TARGET), _ONE))
            t.store(inverse, t.at(self.factors, t.mul(self.row, 4)))
        return w.float_of(t.mul(t.sub(2 * _BIAS + _TARGET, exponent), _ONE))


def _kernel(x, *refs, plan: Plan):
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(scalar, *[plgpu.RefType()] * (1 + len(refs))))
    def thread(_, row, *refs):
        x, y, *factors, shared = map(t.pointer, refs)
        ThreadProgram(plan, row.registers.item(), (x, y, shared), factors[0] if factors else None).run()

    thread(lax.axis_index("row"), x, *refs)


def prepare(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Inputs as the kernel reads them.

    Rows of another dtype than the result's are multiplied by powers of two that bring their largest number to between 2^13
    and 2^14, so that nothing overflows in float16 and little underflows.

    Args:
      x: float [tokens, in].
      dtype: of the result, of 16 bits.

    Returns:
      The permuted inputs, [tokens, in] with zeros up to multiples of 8 and 64, and the factors that undo the scaling,
      float32 [tokens] or None for ones.
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _COLUMNS)))
    plan = Plan(x.shape[0], x.shape[1], (x.dtype, jnp.dtype(dtype)))
    rows = plan.tokens + -plan.tokens % _ROWS
    results = [jax.ShapeDtypeStruct((rows, plan.columns), plan.dtypes[1])]
    if plan.scaled:
        results.append(jax.ShapeDtypeStruct((plan.tokens,), jnp.float32))
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=results,
        grid=(rows,),
        grid_names=("row",),
        num_threads=plan.threads // _WARPGROUP,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((_THREADS // _WARP,), jnp.float32)],
        kernel_name="prepare",
    )
    prepared, *factors = kernel(x)
    return prepared, factors[0] if factors else None
