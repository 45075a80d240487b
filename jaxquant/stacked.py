"""Runs of equal blocks as one block with a leading axis: a program is compiled once for all of them.

Blocks that are quantized alike have equal shapes, so `jax.lax.scan` walks over them; a model of thirty blocks compiles
like one of a single block. Where formats or attention kinds change, a new run begins.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.models.base import Model
from jaxquant.tensors import dense_tree


class Run(NamedTuple):
    """Consecutive blocks of one structure: their attention kind and how many they are. Hashable."""

    kind: str
    count: int


def _structure(block: Any) -> Any:
    leaves, tree = jax.tree.flatten(block)
    return tree, tuple((x.shape, str(x.dtype)) for x in leaves)


def stack(blocks: Sequence[Any], kinds: Sequence[str]) -> tuple[tuple[Run, ...], list[Any]]:
    """Stacks equal neighbours.

    Args:
      blocks: parameters of each block.
      kinds: "full" or "sliding" of each.

    Returns:
      (the runs, the parameters of each run with a leading axis).
    """
    runs, stacked = [], []
    for (kind, _), group in groupby(zip(kinds, blocks, strict=True), lambda pair: (pair[0], _structure(pair[1]))):
        same = [block for _, block in group]
        runs.append(Run(kind, len(same)))
        stacked.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *same))
    return tuple(runs), stacked


def unstack(stacked: Sequence[Any]) -> list[Any]:
    """Inverse of `stack`: the parameters of each block."""
    blocks = []
    for run in stacked:
        count = len(jax.tree.leaves(run)[0])
        blocks += [jax.tree.map(lambda x, i=i: x[i], run) for i in range(count)]
    return blocks


def densify(stacked: Sequence[Any]) -> list[Any]:
    """Returns stacked blocks with their quantized weights dequantized, [blocks, out, in]."""
    return [jax.vmap(dense_tree)(run) for run in stacked]


def hidden(model: Model, runs: Sequence[Run], ends: Any, stacked: Sequence[Any], tokens: jax.Array) -> jax.Array:
    """Hidden states [windows, time, d] after the last block; a backward pass keeps the input of each block only.

    Args:
      model: pure functions of the network.
      runs: from `stack`.
      ends: parameters outside the blocks.
      stacked: from `stack`, dense or quantized.
      tokens: int [windows, time].
    """
    x = model.embed(ends, tokens)
    for run, blocks in zip(runs, stacked, strict=True):
        step: Callable[[Any, jax.Array], jax.Array] = jax.checkpoint(
            lambda b, h, kind=run.kind: model.block(b, h, kind)
        )
        x, _ = jax.lax.scan(lambda h, b, step=step: (step(b, h), None), x, blocks)
    return x
