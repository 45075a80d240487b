"""The walk through a model's blocks: each sees the outputs of the changed blocks before it, and may be fine-tuned."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.finetune import FinetuneConfig, TuneReport, finetune_block
from jaxquant.models.base import Model, run_block, run_embed
from jaxquant.tensors import dense_tree


class Walked(NamedTuple):
    """One block after the walk passed it: its parameters, what `change` said of it, and what fine-tuning did, if any."""

    index: int
    block: Any
    note: Any
    tuning: TuneReport | None


@functools.partial(jax.jit, static_argnames=("model", "kind"))
def outputs(model: Model, block: Any, hidden: jax.Array, *, kind: str) -> jax.Array:
    """Outputs of a block; the inputs stay."""
    return model.block(block, hidden, kind)


def walk(
    model: Model,
    params: Any,
    tokens: np.ndarray,
    change: Callable[[int, Any, list[jax.Array]], tuple[Any, Any]],
    *,
    batch_size: int,
    start: int = 0,
    finetune: FinetuneConfig | None = None,
    dense_blocks: Sequence[Any] | None = None,
) -> Iterator[Walked]:
    """Changes the blocks of a model from `start` on, each on inputs that passed the blocks already changed.

    Args:
      model: pure functions of the network.
      params: its parameters; `params["blocks"][:start]` are changed already.
      tokens: integers [windows, length].
      change: (index, block, inputs in batches [windows, time, d]) -> (changed block, note).
      batch_size: windows per forward pass.
      start: first block to change.
      finetune: fine-tune every changed block, or None.
      dense_blocks: the blocks of the dense model; by default those of `params`, which then must not be changed ones.

    Yields:
      Walked for each block from `start` on.

    Raises:
      ValueError: the dense model's outputs are wanted from a later start, and its blocks are not given.
    """
    to_model = finetune is not None and finetune.targets == "model"
    if to_model and start and dense_blocks is None:
        raise ValueError(f'dense_blocks: expected the dense blocks for targets "model" from block {start}, got None')
    ends = {name: value for name, value in params.items() if name != "blocks"}
    tokens = np.asarray(tokens, np.int32)
    originals = params["blocks"] if dense_blocks is None else dense_blocks
    hidden = [run_embed(model, ends, tokens[i : i + batch_size]) for i in range(0, len(tokens), batch_size)]
    model_hidden = [h.copy() for h in hidden] if to_model else None
    for index, block in enumerate(params["blocks"]):
        kind, note, tuning = model.config.layer_kinds[index], None, None
        run = functools.partial(outputs, model, originals[index], kind=kind)
        if index >= start:
            block, note = change(index, block, hidden)
        if model_hidden is not None:
            model_hidden = [run(h) for h in model_hidden]
        if index >= start and finetune:
            targets = [run(h) for h in hidden] if model_hidden is None else model_hidden
            block, tuning = finetune_block(model, block, hidden, targets, finetune, kind=kind)
        # Dense weights: forward passes are compiled once, however many formats the layers have.
        passes = dense_tree(block, hidden[0].dtype)
        hidden = [run_block(model, passes, h, kind=kind) for h in hidden]
        if index >= start:
            yield Walked(index, block, note, tuning)
