"""Compile what a run will call, several programs at a time.

Compilation takes one core per program, and the first layer of each shape would compile its programs one after the
other. Each is called once on zeros, which is what puts it where `jax.jit` will find it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import ratedistortion, stats, trees
from jaxquant.methods import METHODS, Config
from jaxquant.models.base import Model, run_block
from jaxquant.problem import LayerProblem, relative_error
from jaxquant.tensors import dense_weight


def call_all(calls: Iterable[Callable[[], Any]]) -> None:
    """Calls functions side by side and waits for their results."""
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(call) for call in calls]:
            jax.block_until_ready(done.result())


def solve_zeros(shape: tuple[int, int], config: Config, key: jax.Array, dtype: np.dtype) -> Any:
    """Calls all programs that quantize, measure and decode a layer [out, in]."""
    out, n = shape
    problem = LayerProblem(jnp.zeros((out, n), jnp.float32), jnp.eye(n, dtype=jnp.float32))
    stats.damping_used(problem.hessian, config)
    tensor = METHODS[type(config)](problem, config, key=key)
    error = relative_error(problem, tensor)
    spectrum = ratedistortion.spectrum(problem.hessian)
    return ratedistortion.rate_at_error(problem, error, spectrum), dense_weight(tensor, dtype)


def compile_ahead(
    model: Model,
    params: Any,
    plan: Mapping[str, Config | None],
    batch_shape: tuple[int, int],
    key: jax.Array,
    start: int = 0,
    *,
    weighted: bool = False,
) -> None:
    """Compiles every program that quantizing the blocks from `start` on will call, several at a time.

    Args:
      model: pure functions of the network.
      params: its parameters.
      plan: {path: settings or None}.
      batch_shape: (sequences, tokens) of a forward pass.
      key: of the run.
      start: first block to quantize.
      weighted: second moments have weights.
    """
    block, kind = params["blocks"][start], model.config.layer_kinds[start]
    dtype = params["embed"]["weight"].dtype
    hidden = functools.partial(jnp.zeros, (*batch_shape, model.config.hidden_size), dtype)
    calls: list[Callable[[], Any]] = [lambda: run_block(model, block, hidden(), kind=kind)]
    for group in model.groups:
        columns = trees.get(block, group[0])["weight"].shape[1]
        count = len(group) if weighted else 1
        weights = jnp.ones((count, *batch_shape), jnp.float32) if weighted else None
        calls.append(
            lambda c=columns, n=count, w=weights, g=group: stats.capture_update(
                model, block, hidden(), stats.init(c, n), w, kind=kind, group=g
            )
        )

    for shape, config in dict.fromkeys(
        (trees.get(params, path)["weight"].shape, config)
        for path, config in plan.items()
        if config is not None and int(path.split("/")[1]) >= start
    ):
        calls.append(functools.partial(solve_zeros, shape, config, key, dtype))
    call_all(calls)
