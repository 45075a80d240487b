"""Peak memory of a run, before it runs: the compiler's own figures for every program that will run."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import trees
from jaxquant.methods import METHODS, Config
from jaxquant.models.base import Model
from jaxquant.plan import abstract_problem
from jaxquant.sensitivity import BATCHES, block_gradients
from jaxquant.stats import capture_update


class Peak(NamedTuple):
    """Bytes on the device and in host memory, and the step that needs the most."""

    device: int
    host: int
    largest: str


def _working_set(lowered: Any) -> int:
    """Bytes that a compiled program holds beside what was resident: temporaries and outputs."""
    stats = lowered.compile().memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def _guidance(model: Model, params: Any, sequences: int, length: int, batch_size: int) -> int:
    """Bytes on the device of `token_importance`, beside the parameters: inputs and one gradient of all its blocks."""
    dtype, blocks = params["embed"]["weight"].dtype, params["blocks"]
    batch = min(batch_size, sequences)
    hidden = jax.ShapeDtypeStruct((batch, length, model.config.hidden_size), dtype)
    kind = model.config.layer_kinds[0]
    lowered = block_gradients.lower(model, blocks[0], hidden, hidden, kind=kind, axes=(2,))
    streams = (len(blocks) + 1) * min(sequences, BATCHES * batch)
    return streams * length * model.config.hidden_size * dtype.itemsize + _working_set(lowered)


def estimate(
    model: Model,
    params: Any,
    plan: Mapping[str, Config | None],
    sequences: int,
    length: int,
    batch_size: int,
    *,
    guided: bool = False,
) -> Peak:
    """Estimates the peak memory of quantizing a model.

    Resident: all parameters, the hidden states of all sequences, one second-moment matrix. On top of that comes the
    largest working set of any step, as compiled for the first block: gathering statistics, or a method on a layer.

    Args:
      model: pure functions of the network.
      params: its parameters.
      plan: {path: settings or None}.
      sequences: calibration windows.
      length: tokens per window.
      batch_size: windows per forward pass.
      guided: tokens weigh by their importance, which is measured first.

    Returns:
      Peak. Where the device is the CPU, the host figure holds the device's too.
    """
    config = model.config
    dtype = params["embed"]["weight"].dtype
    block, kind = params["blocks"][0], config.layer_kinds[0]
    hidden = jax.ShapeDtypeStruct((min(batch_size, sequences), length, config.hidden_size), dtype)
    steps: dict[str, int] = {}
    for group in model.groups:
        columns = trees.get(block, group[0])["weight"].shape[1]
        gram = jax.ShapeDtypeStruct((1, columns, columns), jnp.float32)
        lowered = capture_update.lower(model, block, hidden, gram, kind=kind, group=group)
        steps[f"statistics of {group[0]}"] = _working_set(lowered) + columns * columns * 4
    key = jax.random.key(0)
    for shape, settings in {(trees.get(params, path)["weight"].shape, c) for path, c in plan.items() if c is not None}:
        out, n = shape
        method: Any = METHODS[type(settings)]
        lowered = method.lower(abstract_problem(shape), settings, key=key)
        # beside its own: the float32 weight, the hessian and the sum that the hessian came from
        steps[f"{method.__name__} of {out} x {n}"] = _working_set(lowered) + (out * n + 2 * n * n) * 4
    largest = max(steps, key=lambda step: steps[step])
    held = sum(x.nbytes for x in trees.flatten(params).values())
    stream = sequences * length * config.hidden_size * dtype.itemsize
    working = stream + steps[largest]
    # Loading, hashing and saving go through the host one tensor at a time.
    host = 2 * max(x.nbytes for x in trees.flatten(params).values())
    if guided:
        host += len(params["blocks"]) * sum(map(len, model.groups)) * sequences * length * 4
        guidance = _guidance(model, params, sequences, length, batch_size)
        working, largest = max((working, largest), (guidance, "importance of tokens"))
    device = held + working
    return Peak(device, host + (device if jax.default_backend() == "cpu" else 0), f"largest step: {largest}")
