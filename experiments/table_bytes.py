"""What tables of partial products in one or two bytes do to a model: `python -m experiments.table_bytes`. JSON.

The TPU's kernel for few tokens (`kernels.codebook_matmul.tpu`) rounds the table that it looks up, to two bytes, or to one
if it is asked to. Here a model with additive codes in all linear layers predicts a text with every product by that
function, only the sums of looked-up bytes by XLA.
"""

import contextlib
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import tyro

from experiments import models
from experiments.run import commit
from jaxquant import AQLMConfig, ops
from jaxquant.checkpoint import describe_config, environment, write_json
from jaxquant.evaluate import dense_tree, perplexity
from jaxquant.kernels.codebook_matmul import api, tpu
from jaxquant.serving import for_serving
from jaxquant.xla import compile_fast

RESULTS = Path(__file__).parent / "results" / "table_bytes"
CONFIG = AQLMConfig()  # 2x8, vectors of 8
_TOKENS = 64  # whose tables are held at once


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure what rounded tables do to a model.

    Attributes:
      model: a Hugging Face directory, a .gguf file or a hub id.
      calibration: text to quantize with.
      text: evaluation text.
      sequences: calibration windows.
      windows: of the evaluation text, the first ones.
      length: tokens of a window.
      results: folder for the result.
    """

    model: str
    calibration: str
    text: str
    sequences: int = 128
    windows: int = 16
    length: int = 2048
    results: Path = RESULTS


def lookup_sums(slots: jax.Array, planes: jax.Array) -> jax.Array:
    """In place of `tpu.lookup_sums`, which needs a TPU to be fast."""
    codes = jnp.pad(slots.astype(jnp.int32), ((0, planes.shape[1] - len(slots)), (0, 0)))
    return jax.vmap(lambda plane: jnp.take_along_axis(plane.astype(jnp.int32), codes, axis=1).sum(0))(planes)


def rounded_product(*arrays: Any, num_bytes: int, implementation: str, **settings: Any) -> jax.Array:
    """In place of `codebook_matmul.api.codebook_matmul`: rounded tables for any number of tokens."""
    del implementation
    return tpu.lookup_matmul(*arrays, num_bytes=num_bytes, **settings)


def in_chunks(
    x: jax.Array, weights: Any, *, prologue: Any = None, residual: jax.Array | None = None, product: Any
) -> list[jax.Array]:
    """In place of `ops.matmul_each`: the TPU's way of doing it, a few tokens at a time."""
    x = x if prologue is None else prologue(x)
    flat = x.reshape(-1, x.shape[-1])
    chunks = jnp.pad(flat, ((0, -len(flat) % _TOKENS), (0, 0))).reshape(-1, _TOKENS, x.shape[-1])
    results = jax.lax.map(lambda chunk: product(chunk, weights, "tpu"), chunks)
    results = [y.reshape(-1, y.shape[-1])[: len(flat)].reshape(*x.shape[:-1], -1) for y in results]
    return results if residual is None else [residual + y for y in results]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and stores."""
    args = tyro.cli(Arguments, args=arguments)
    compile_fast()
    jax.config.update("jax_default_matmul_precision", "highest")
    task = models.open_task(args.model, args.calibration, args.text, args.sequences, args.length)
    params = models.quantize(task, CONFIG, "aqlm 2x8 g8", batch_size=8)[0]
    text, rows = task.text[: args.windows], []
    exact = dense_tree(params, task.params["embed"]["weight"].dtype)
    packed = for_serving(params, "tpu")
    chunked = functools.partial(in_chunks, product=ops.matmul_each)
    for num_bytes in (None, 2, 1):
        jax.clear_caches()  # programs know the products of before
        if num_bytes is None:
            value = perplexity(task.model, exact, text, batch_size=1)
        else:
            product = functools.partial(rounded_product, num_bytes=num_bytes)
            patches = (
                (ops, "matmul_each", chunked),
                (api, "codebook_matmul", product),
                (tpu, "lookup_sums", lookup_sums),
            )
            with contextlib.ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(mock.patch.object(*patch))
                value = perplexity(task.model, packed, text, batch_size=1)
        rows.append({"bytes": num_bytes, "perplexity": value.value, "evaluation": dataclasses.asdict(value)})
        print(json.dumps(rows[-1]), flush=True)
    about = {**task.about, "method": "aqlm 2x8 g8", "config": describe_config(CONFIG)}
    args.results.mkdir(parents=True, exist_ok=True)
    result = about | {"rows": rows, "environment": environment(), "commit": commit()}
    write_json(args.results / "aqlm_2x8.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
