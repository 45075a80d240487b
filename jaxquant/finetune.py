"""Block fine-tuning: the floats of a quantized block learn to give the dense block's outputs.

Reference: Egiazarian et al., AQLM, https://arxiv.org/abs/2401.06118, section 3.4. It works for every format, since a
block's dense weights depend on its scales, levels, codebooks and outliers by `dequantize`; norms and biases take part.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxquant.methods.settings import check_choice
from jaxquant.models.base import Model
from jaxquant.projection import CodeConfig
from jaxquant.tensors import dense_tree, is_quantized
from jaxquant.training import Step, TrainConfig, begin, default_optimizer, result, split, train

# What outputs should be: the dense layer's or block's on the inputs that the quantized one gets, or the dense model's.
Targets = Literal["prefix", "model"]


@dataclasses.dataclass(frozen=True)
class BlockLoss:
    """Mean squared difference of a block's outputs from targets, times a constant.

    Attributes:
      model: pure functions of the network.
      kind: of the block.
    """

    model: Model
    kind: str

    def densify(self, params: Any) -> Any:
        """See `training.Loss`."""
        return dense_tree(params)

    def __call__(self, dense: Any, batch: tuple[jax.Array, jax.Array], constants: jax.Array) -> jax.Array:
        """Returns the loss of (inputs, targets), both [windows, time, d]; `constants` multiplies it."""
        hidden, target = batch
        error = self.model.block(dense, hidden, self.kind).astype(jnp.float32) - target.astype(jnp.float32)
        return constants * jnp.mean(error * error)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Settings of block fine-tuning.

    Attributes:
      train: of the training.
      targets: outputs to learn: "prefix" the dense block's on the inputs that the quantized block sees (AQLM), "model"
        those of the dense model, so that a block also mends what the blocks before it spoiled.
      codes: also change codes, with a V step after every step; None leaves them.
    """

    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    targets: Targets = "prefix"
    codes: CodeConfig | None = None

    def __post_init__(self) -> None:
        """Checks the choice."""
        check_choice("targets", self.targets, Targets)


@dataclasses.dataclass(frozen=True)
class TuneReport:
    """What fine-tuning did for a block: its held-out mean squared error before and after, and the chunks it took."""

    before: float
    after: float
    chunks: int


@functools.partial(jax.jit, static_argnames="loss")
def _error(loss: BlockLoss, block: Any, data: Any, held: jax.Array) -> jax.Array:
    """Mean loss of a block as it is on the held-out windows."""
    dense = loss.densify(block)
    return jnp.mean(jax.lax.map(lambda i: loss(dense, jax.tree.map(lambda x: x[i], data), jnp.ones(())), held))


def finetune_block(
    model: Model,
    block: Any,
    hidden: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    config: FinetuneConfig,
    *,
    kind: str,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[Any, TuneReport]:
    """Trains the floats of a quantized block towards given outputs.

    The block with the least error on the held-out windows is returned, which may be the one given: never a worse one.
    Memory: inputs and targets, one block with its optimizer state, and one backward pass of `micro_batch` windows.

    Args:
      model: pure functions of the network.
      block: parameters with quantized weights.
      hidden: the block's inputs, batches [windows, time, d].
      targets: the outputs to learn, in the same batches.
      config: settings.
      kind: of the block.
      optimizer: any optax transformation; by default `training.default_optimizer`. Pass the same object for every block:
        a new one is compiled anew.

    Returns:
      (block in the formats of the given one, TuneReport); a block without quantized weights is returned as it is.

    Raises:
      ValueError: too few windows for the settings.

    Reference: AQLM's block fine-tuning. Differs from its code: steps are relative to each array's size, and storage
    dtypes are kept, see `masters`.
    """
    plan = split(config.train, sum(len(h) for h in hidden))
    if not any(map(is_quantized, jax.tree.leaves(block, is_leaf=is_quantized))):
        return block, TuneReport(0.0, 0.0, 0)
    data = (jnp.concatenate(hidden), jnp.concatenate(targets))
    loss = BlockLoss(model, kind)
    before = float(_error(loss, block, data, plan.held))
    if before == 0:
        return block, TuneReport(0.0, 0.0, 0)
    # In units of the given block's error: gradients far below one would drown in the optimizer's epsilon.
    unit = jnp.asarray(1 / before, jnp.float32)
    step = Step(loss, optimizer or default_optimizer(config.train, plan.chunks * plan.steps), config.codes)
    state = begin(step, block, data, unit, plan.held)
    for progress in train(step, state, data, unit, config.train, plan):
        state = progress.state
    tuned, chunks = result(state), int(state.chunk)
    after = float(_error(loss, tuned, data, plan.held))
    return (tuned, TuneReport(before, after, chunks)) if after < before else (block, TuneReport(before, before, chunks))
