"""Training of the floats in a tree of quantized tensors: the one loop behind block fine-tuning, distillation and PV.

Whole chunks of steps are one program (`jax.lax.scan`) with donated buffers; the host looks once per chunk, at two
numbers. After every chunk the held-out loss decides whether the present iterate is the best one so far.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant import trees
from jaxquant.masters import masters, rounded, stored
from jaxquant.methods.settings import check_choice, check_integers
from jaxquant.projection import CodeConfig
from jaxquant.recode import begin_codes, recode_step


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
      learning_rate: largest step, relative to the root mean square of each array: scales, codebooks and norms differ in
        size by orders of magnitude.
      epochs: passes over the training windows.
      batch_size: windows of a step.
      micro_batch: windows of one backward pass, a divisor of `batch_size`; gradients of a step are summed over them.
      schedule: "cosine" falls to zero, "constant" stays; both after a linear warm-up.
      warmup: share of the steps in which the rate rises.
      held_out: share of the windows, the last ones, on which iterates are judged.
      chunks: times that the held-out loss is measured (and a run may be interrupted); None for once per epoch.
      patience: chunks without a new best after which training stops.
      clip: largest global norm of a gradient.
      seed: of the order of the windows.
    """

    learning_rate: float = 1e-3
    _: dataclasses.KW_ONLY
    epochs: int = 10
    batch_size: int = 8
    micro_batch: int = 4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.1
    held_out: float = 0.125
    chunks: int | None = None
    patience: int = 3
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every field."""
        check_integers(self, epochs=1, batch_size=1, micro_batch=1, patience=1)
        if self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch: expected a divisor of batch_size {self.batch_size}, got {self.micro_batch}")
        if self.chunks is not None and (not isinstance(self.chunks, int) or self.chunks < 1):
            raise ValueError(f"chunks: expected an integer >= 1 or None, got {self.chunks!r}")
        check_choice("schedule", self.schedule, Literal["cosine", "constant"])
        for name, low, high in (("learning_rate", 0, np.inf), ("warmup", 0, 1), ("clip", 0, np.inf)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected a number from {low} to {high}, got {getattr(self, name)!r}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, got {self.held_out!r}")


class Loss(Protocol):
    """What is minimised. Hashable (a frozen dataclass), so that equal losses share their compiled programs."""

    def densify(self, params: Any) -> Any:
        """Returns the tree with dense arrays in place of its QuantizedTensors; differentiable."""
        ...

    def __call__(self, dense: Any, batch: Any, constants: Any) -> jax.Array:
        """Returns the mean loss of a micro-batch, float32 scalar."""
        ...


class State(NamedTuple):
    """All that a run needs to go on; arrays only.

    `params` and `best` are trees of masters, `optimizer` is optax's, `codes` that of the V step or (), `best_loss` the
    held-out loss of `best` (float32), `chunk` the chunks done and `stale` those since the best (int32).
    """

    params: Any
    optimizer: Any
    codes: Any
    best: Any
    best_loss: jax.Array
    chunk: jax.Array
    stale: jax.Array


class Progress(NamedTuple):
    """After a chunk: chunks done and in all, mean training loss, held-out loss, best one, and the state.

    The state's buffers are given away when the next chunk begins: save it before, or copy.
    """

    done: int
    total: int
    loss: float
    held_out: float
    best: float
    state: State


def default_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Adam (betas 0.9 and 0.95 as in AQLM, https://arxiv.org/abs/2401.06118) with steps relative to each array's size.

    Equal settings give the same object, which compiled programs are found by.
    """
    return _adam(config.learning_rate, config.schedule, round(config.warmup * steps), steps, config.clip)


@functools.cache
def _adam(peak: float, schedule: str, warm: int, steps: int, clip: float) -> optax.GradientTransformation:
    if schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0 if warm else peak, peak, warm, max(steps, warm + 1))
    else:
        rate = optax.warmup_constant_schedule(0.0 if warm else peak, peak, warm)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(0.9, 0.95),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(rate),
    )


class Split(NamedTuple):
    """Windows of a run: held-out ones, and how the others are cut into chunks of steps."""

    train: int
    held: np.ndarray
    chunks: int
    steps: int

    def order(self, config: TrainConfig, chunk: int) -> np.ndarray:
        """Windows of a chunk, int32 [steps, micro-batches, windows], a function of the seed and the chunk alone."""
        need = self.steps * config.batch_size
        first, last = chunk * need // self.train, ((chunk + 1) * need - 1) // self.train
        epochs = [np.random.default_rng((config.seed, e)).permutation(self.train) for e in range(first, last + 1)]
        picked = np.concatenate(epochs)[chunk * need - first * self.train :][:need]
        return picked.reshape(self.steps, -1, config.micro_batch).astype(np.int32)


def split(config: TrainConfig, windows: int) -> Split:
    """Divides windows; the held-out ones come in whole micro-batches.

    Raises:
      ValueError: too few windows.
    """
    micro = config.micro_batch
    held = max(1, round(config.held_out * windows / micro)) * micro
    train = windows - held
    if train < config.batch_size:
        raise ValueError(
            f"batch_size: expected at most {max(train, 0)} windows ({windows} less {held} held out), got "
            f"{config.batch_size}; use more windows, or a smaller batch_size or micro_batch"
        )
    steps = config.epochs * (train // config.batch_size)
    chunks = min(config.chunks or config.epochs, steps)
    return Split(train, np.arange(train, windows, dtype=np.int32).reshape(-1, micro), chunks, steps // chunks)


def _take(data: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[index], data)


def _mean(function: Any, index: jax.Array) -> Any:
    """Mean of a function's values, a tree of arrays, over the rows of `index`, one row at a time."""
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, index[0]))
    total, _ = jax.lax.scan(lambda t, i: (jax.tree.map(jnp.add, t, function(i)), None), total, index)
    return jax.tree.map(lambda x: x / jnp.asarray(len(index), x.dtype), total)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: P (floats by the optimizer, codes held fixed) and, with `codes`, V (see `recode.recode_step`)."""

    loss: Loss
    optimizer: optax.GradientTransformation
    codes: CodeConfig | None = None

    def __call__(self, params: Any, optimizer: Any, codes: Any, data: Any, constants: Any, index: jax.Array) -> Any:
        """Returns (params, optimizer state, codes state, loss) after the windows `index` [micro-batches, windows]."""
        floats, rest = trees.partition(params)
        # Weights are made dense once per step; micro-batches add up gradients of dense weights, which V needs as well.
        dense, pull = jax.vjp(lambda f: self.loss.densify(rounded(trees.combine(f, rest))), floats)
        loss, gradient = _mean(
            lambda i: jax.value_and_grad(self.loss)(dense, _take(data, i), constants),
            index,
        )
        with jax.numpy_dtype_promotion("standard"):  # optax's moments promote
            updates, optimizer = self.optimizer.update(pull(gradient)[0], optimizer, floats)
            floats = optax.apply_updates(floats, updates)
        params = trees.combine(floats, rest)
        if self.codes is not None:
            params, codes = recode_step(params, gradient, codes, self.codes)
        return params, optimizer, codes, loss


def _held_out(loss: Loss, params: Any, data: Any, constants: Any, held: jax.Array) -> jax.Array:
    dense = loss.densify(rounded(params))
    return _mean(lambda i: loss(dense, _take(data, i), constants), held)


@functools.partial(jax.jit, static_argnames="loss")
def held_out_loss(loss: Loss, params: Any, data: Any, constants: Any, held: jax.Array) -> jax.Array:
    """Mean loss of a tree of masters over the windows `held` [micro-batches, windows], float32 scalar."""
    return _held_out(loss, params, data, constants, held)


@functools.partial(jax.jit, static_argnames="step", donate_argnames="state")
def _run_chunk(step: Step, state: State, data: Any, constants: Any, order: jax.Array, held: jax.Array) -> Any:
    def one(carry, index):
        params, optimizer, codes = carry
        params, optimizer, codes, loss = step(params, optimizer, codes, data, constants, index)
        return (params, optimizer, codes), loss

    carry = (state.params, state.optimizer, state.codes)
    (params, optimizer, codes), losses = jax.lax.scan(one, carry, order)
    loss = _held_out(step.loss, params, data, constants, held)
    better = loss < state.best_loss  # false for NaN
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, state.best)
    best_loss, stale = jnp.where(better, loss, state.best_loss), jnp.where(better, 0, state.stale + 1)
    state = State(params, optimizer, codes, best, best_loss, state.chunk + 1, stale)
    return state, (losses.mean(), loss)


def begin(step: Step, params: Any, data: Any, constants: Any, held: np.ndarray) -> State:
    """Returns the state before the first step; `params` are stored parameters, floats and codes."""
    params = masters(params)
    loss = held_out_loss(step.loss, params, data, constants, held)
    with jax.numpy_dtype_promotion("standard"):
        optimizer = step.optimizer.init(trees.partition(params)[0])
    codes = () if step.codes is None else begin_codes(params, step.loss.densify(rounded(params)))
    best = jax.tree.map(jnp.copy, params)  # of its own: both are donated
    zero = jnp.zeros((), jnp.int32)
    return State(params, optimizer, codes, best, loss, zero, jnp.copy(zero))


def train(step: Step, state: State, data: Any, constants: Any, config: TrainConfig, plan: Split) -> Iterator[Progress]:
    """Runs the chunks that are left, until the last one or until patience is at its end.

    Args:
      step: what to do.
      state: from `begin`, or saved after some chunk: the result is the same.
      data: tree of arrays [windows, ...], on the device.
      constants: what else the loss needs.
      config: settings.
      plan: from `split`.

    Yields:
      Progress after each chunk.
    """
    while int(state.chunk) < plan.chunks and int(state.stale) < config.patience:
        order = plan.order(config, int(state.chunk))
        state, (loss, held_out) = _run_chunk(step, state, data, constants, order, plan.held)
        done = int(state.chunk)
        yield Progress(done, plan.chunks, float(loss), float(held_out), float(state.best_loss), state)


def result(state: State) -> Any:
    """Returns the best parameters as they are stored."""
    return stored(state.best)
