"""What the GPU kernels for few tokens do beside a product: several weights in a launch, norms, gates and residuals.

A norm of the input is a scale of its columns, and one of the result that is known in time; a gate is a scale of all inputs.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.kernels import gpu_threads as t
from jaxquant.kernels.codebook_matmul.layout import Weight
from jaxquant.prologue import Prologue

_WARP = 32


def arrays(
    x: jax.Array, weights: Sequence[Weight], prologue: Prologue | None, residual: jax.Array | None
) -> list[jax.Array]:
    """What a kernel reads: x, what the prologue holds, the residual, and of each weight words, codebooks and perhaps scale."""
    given = [x, *jax.tree.leaves((prologue, residual))]
    for words, books, scale in weights:
        scale = jnp.broadcast_to(scale, (words.shape[1], 1)) if scale is not None and scale.size == 1 else scale
        given += [words, books] if scale is None else [words, books, scale.reshape(-1)]
    return given


def place(
    index: t.Value, outs: Sequence[int], blocks: Sequence[int], refs: Sequence[t.Value], plan: Any
) -> tuple[t.Value, t.Value, list[t.Value], dict[str, t.Value]]:
    """Which weight a block has, and where its arrays are.

    Args:
      index: of the block, or of its cluster, among those of all weights.
      outs: outputs of each weight.
      blocks: blocks, or clusters, of each weight.
      refs: addresses of `arrays`, and then of the result of each weight.
      plan: that has `dtypes`.

    Returns:
      The index among those of the weight, the weight's outputs, addresses of x, words, codebooks and result, and those of
      "scale", "prologue" and "residual", as far as there are such.
    """
    x, *rest = refs
    given = {name: rest.pop(0) for name in ("prologue", "residual") if name in plan.dtypes}
    parts, first, chosen = (len(rest) - len(outs)) // len(outs), 0, []
    for i, (out, count) in enumerate(zip(outs, blocks, strict=True)):
        new = [t.sub(index, first), t.add(out), rest[len(rest) - len(outs) + i], *rest[parts * i : parts * (i + 1)]]
        before = t.less(index, first)
        chosen = [t.select(before, *pair) for pair in zip(chosen, new, strict=True)] if chosen else new
        first += count
    own, out, result, words, books, *scale = chosen
    if scale:
        (given["scale"],) = scale
    return own, out, [x, words, books, result], given


def activated(name: str, x: t.Value) -> t.Value:
    """An activation of float32, "silu" or "gelu_tanh".

    Both are x / (1 + exp(-u)): u is x for silu, and sqrt(8 / pi) (x + 0.044715 x^3) for the other, because
    1 + tanh(u / 2) = 2 / (1 + exp(-u)).
    """
    u = x
    if name == "gelu_tanh":
        u = t.fmul(t.fma(t.fmul(x, x), t.fmul(x, t.number(0.044715)), x), t.number(math.sqrt(8 / math.pi)))
    return t.fmul(x, t.reciprocal(t.fadd(t.exp2(t.fmul(u, t.number(-math.log2(math.e)))), t.number(1.0))))


def sum_squares(values: Sequence[t.Value], total: t.Value) -> t.Value:
    """The sum of squares of float32, added to another."""
    return functools.reduce(lambda total, x: t.fma(x, x, total), values, total)


def store_of_warp(value: t.Value, warp: t.Value, sums: t.Value) -> None:
    """Writes the sum of a float32 over a warp's threads to shared memory, float32 [warps]."""
    for distance in (1, 2, 4, 8, 16):
        value = t.fadd(value, t.shuffle(value, distance))
    with t.when(t.less(t.rem(t.thread_index(), _WARP), 1)):
        t.store(value, t.at(sums, t.mul(warp, 4)))


def norm_factor(squares: t.Value, warps: int, columns: int, eps: float) -> t.Value:
    """One over the root mean square of inputs whose sums of squares are float32 [warps] in shared memory."""
    total = added([t.load(t.at(squares, 4 * warp), jnp.float32)[0] for warp in range(warps)])
    return t.rsqrt(t.fma(total, t.number(1 / columns), t.number(eps)))


def added(values: Sequence[t.Value]) -> t.Value:
    """Sum of float32 by pairs, lest every addition waits for the one before."""
    while len(values) > 1:
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        values = [t.fadd(*pair) if len(pair) > 1 else pair[0] for pair in pairs]
    return values[0]
