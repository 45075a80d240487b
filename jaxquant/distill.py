"""Distillation of a whole quantized model: its next-token distributions learn to be the dense model's.

Reference: end-to-end fine-tuning of Egiazarian et al., AQLM, https://arxiv.org/abs/2401.06118, section 5, and, with
steps on codes, Malinovskii et al., PV-Tuning, https://arxiv.org/abs/2405.14852.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant import stacked, trees
from jaxquant.evaluate import over_chunks
from jaxquant.models.base import Model
from jaxquant.projection import CodeConfig
from jaxquant.stacked import Run
from jaxquant.tensors import dense_tree
from jaxquant.training import Progress, State, Step, TrainConfig, begin, default_optimizer, result, split, train


@dataclasses.dataclass(frozen=True)
class DistillLoss:
    """Mean KL(dense || quantized) of the next-token distributions, in nats per token.

    The teacher runs along with the student: a forward pass costs less than a quarter of a step, needs no cache of
    logits (or of their top k) and leaves nothing out. Logits exist for `chunk` tokens at a time, also in the backward
    pass.

    Attributes:
      model: pure functions of the network.
      runs: the student's runs of equal blocks.
      teacher_runs: the teacher's.
      dtype: of the activations, or None for that of the embedding.
      chunk: tokens per step of the head.
    """

    model: Model
    runs: tuple[Run, ...]
    teacher_runs: tuple[Run, ...]
    dtype: str | None = None
    chunk: int = 2048

    def densify(self, params: Any) -> Any:
        """See `training.Loss`."""
        return {"blocks": stacked.densify(params["blocks"]), "ends": dense_tree(params["ends"])}

    def __call__(self, dense: Any, batch: jax.Array, constants: Any) -> jax.Array:
        """Returns the loss on a batch of tokens.

        Args:
          dense: {"blocks": stacked student, "ends": trained parameters outside the blocks}.
          batch: tokens, int32 [windows, time].
          constants: {"teacher": {"blocks", "ends"}, "ends": the student's other parameters outside the blocks}.
        """
        dense = trees.cast_floats(dense, self.dtype)
        ends, teacher = {**constants["ends"], **dense["ends"]}, constants["teacher"]
        x = stacked.hidden(self.model, self.runs, ends, dense["blocks"], batch)
        y = jax.lax.stop_gradient(
            stacked.hidden(self.model, self.teacher_runs, teacher["ends"], teacher["blocks"], batch)
        )

        @jax.checkpoint
        def divergence(x, y):
            q = jax.nn.log_softmax(self.model.head(ends, x[None])[0].astype(jnp.float32))
            p = jax.nn.log_softmax(self.model.head(teacher["ends"], y[None])[0].astype(jnp.float32))
            return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

        return jnp.mean(over_chunks(divergence, (x, y), self.chunk))


class Distillation(NamedTuple):
    """A prepared run: the step, its data and constants, how windows are split, and the parameters, trained and kept."""

    step: Step
    data: Any
    constants: Any
    config: TrainConfig
    plan: Any
    params: Any
    kept: Any

    def begin(self) -> State:
        """Returns the state before the first step."""
        return begin(self.step, self.params, self.data, self.constants, self.plan.held)

    def run(self, state: State) -> Iterator[Progress]:
        """Runs from a state on, see `training.train`."""
        return train(self.step, state, self.data, self.constants, self.config, self.plan)

    def result(self, state: State) -> Any:
        """Returns the model's parameters with the best iterate, stored in the formats of the given ones."""
        best = result(state)
        return {**self.kept, **best["ends"], "blocks": stacked.unstack(best["blocks"])}


def prepare(
    model: Model,
    params: Any,
    dense_params: Any,
    tokens: np.ndarray,
    config: TrainConfig,
    *,
    codes: CodeConfig | None = None,
    ends: bool = False,
    dtype: str | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Distillation:
    """Prepares the distillation of a quantized model.

    All floats of the blocks and the final norm are trained. Memory: the dense weights of teacher and student and one
    gradient in float32, the inputs of the blocks for `micro_batch` windows, and one block's backward pass.

        run = prepare(model, params, dense_params, tokens, TrainConfig(1e-4, epochs=1))
        for progress in run.run(run.begin()):
            print(progress.held_out)
        params = run.result(progress.state)

    Args:
      model: pure functions of the network.
      params: parameters with quantized weights.
      dense_params: the same model's dense parameters.
      tokens: integers [windows, length].
      config: settings.
      codes: also change codes, by PV-tuning; None leaves them.
      ends: also train the embedding and the head, which are dense.
      dtype: of the activations of both models; by default those of the embeddings. What is trained is float32 anyhow.
      optimizer: any optax transformation for the floats; by default `training.default_optimizer`.

    Raises:
      ValueError: too few windows for the settings.
    """
    plan = split(config, len(tokens))
    kinds = model.config.layer_kinds
    runs, blocks = stacked.stack(params["blocks"], kinds)
    teacher_runs, teacher_blocks = stacked.stack(dense_params["blocks"], kinds)
    outer = {name: value for name, value in params.items() if name != "blocks"}
    trained = {name: value for name, value in outer.items() if ends or name == "norm"}
    kept = {name: value for name, value in outer.items() if name not in trained}
    constants = {
        "ends": kept,
        "teacher": {
            "blocks": teacher_blocks,
            "ends": {name: value for name, value in dense_params.items() if name != "blocks"},
        },
    }
    constants = trees.cast_floats(constants, dtype)
    loss = DistillLoss(model, runs, teacher_runs, dtype)
    step = Step(loss, optimizer or default_optimizer(config, plan.chunks * plan.steps), codes)
    data = jnp.asarray(tokens, jnp.int32)
    return Distillation(step, data, constants, config, plan, {"blocks": blocks, "ends": trained}, kept)
