"""Times greedy decoding at batch 1: `python -m experiments.bench_generation`. A row per model and format, as JSON.

The same code decodes with bfloat16 weights and with quantized ones in all linear layers of the blocks, laid out for the
device: by default additive codes, two codebooks of 256 vectors of 8. Embedding and head are bfloat16 in any case. Weights
are random, those of `--model` too: their values do not matter for speed, so only its configuration is read. A pass is one
call of `generation.next_tokens`, as `generate` makes tokens, only more of them; a figure is the median over passes.

Runs with other arguments add their rows to the device's file; a row that was there is replaced.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import bench_kernels
from experiments.bench_kernels import store
from experiments.run import commit
from jaxquant import trees
from jaxquant.checkpoint import environment
from jaxquant.codebook_tensor import ColumnTensor
from jaxquant.generation import empty_cache, for_generation, next_token, next_tokens
from jaxquant.models import Model, ModelConfig, make_model
from jaxquant.models.config import parse_config, tensor_names, tensor_shape
from jaxquant.models.gguf import read_gguf
from jaxquant.models.load import read_directory, resolve
from jaxquant.serving import for_serving, from_serving
from jaxquant.tensors import is_quantized

RESULTS = Path(__file__).parent / "results" / "generation"
# Of bench_kernels, and the standard deviation of their random weights, or None for dense ones.
FORMATS = {"2x8": 2**0.5, "uniform 4-bit": 4.61, "gptvq 2D 2-bit": 1.155, "bfloat16": None}
KEY = ("model", "format")  # of a row
SHAPES: dict[str, dict[str, Any]] = {  # as in a model's config.json
    "llama-2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Time greedy decoding with dense and with quantized weights.

    Attributes:
      shapes: names of SHAPES; none, for `--model` alone.
      model: another shape to time, that of a Hugging Face directory, a .gguf file or a hub id.
      layers: blocks, in place of the model's own number.
      formats: names of FORMATS; the smallest first, because a device tells only the peak memory of all before.
      prompt: tokens of the prompt, not timed.
      context: positions of the cache, over all of which attention goes for every token.
      steps: tokens in a pass.
      passes: timed passes, after one that is not.
      results: folder for the result.
    """

    shapes: tuple[str, ...] = ("llama-2-7b",)
    model: str | None = None
    layers: int | None = None
    formats: tuple[str, ...] = ("2x8", "bfloat16")
    prompt: int = 16
    context: int = 256
    steps: int = 64
    passes: int = 10
    results: Path = RESULTS


@functools.partial(jax.jit, static_argnames=("shape", "name"))
def random_weight(key: jax.Array, shape: tuple[int, ...], name: str) -> Any:
    """A weight [out, in] that keeps the variance of its input, of one of FORMATS and laid out for the device."""
    out, columns = shape
    deviation = FORMATS[name]
    if deviation is None:
        return jax.random.normal(key, shape, jnp.bfloat16) * jnp.asarray(columns**-0.5, jnp.bfloat16)
    tensor: Any = bench_kernels.FORMATS[name](key, columns, out)
    scale = jnp.full((out, 1), columns**-0.5 / deviation, jnp.float16)
    if isinstance(tensor, ColumnTensor):
        return for_serving(dataclasses.replace(tensor, base=dataclasses.replace(tensor.base, scale=scale)))
    return for_serving(dataclasses.replace(tensor, scale=scale))


def random_params(config: ModelConfig, name: str) -> Any:
    """Random parameters of a model, each made on the device.

    Args:
      config: says which there are, and their shapes.
      name: of FORMATS, for the linear layers of the blocks.

    Raises:
      ValueError: packed weights that no kernel of this platform reads.
    """
    params: Any = {"blocks": [{} for _ in range(config.num_layers)]}
    linear = 0
    for i, path in enumerate(tensor_names(config)):
        *parents, leaf = path.split("/")
        node = params
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        shape, packed = tensor_shape(config, path), name != "bfloat16" and path.startswith("blocks")
        if len(shape) == 1:  # norms and biases
            node[leaf] = jnp.ones(shape, jnp.bfloat16)
            continue
        node[leaf] = random_weight(jax.random.key(i), shape, name if packed else "bfloat16")
        linear += packed
    params = for_generation(params)
    if (read := sum(map(is_quantized, trees.flatten(params).values()))) < linear:
        where = f"{jax.default_backend()} with JAX {jax.__version__}"
        raise ValueError(f"{name}: expected a kernel for all {linear} packed weights, got one for {read} on {where}")
    return params


def accounted_bytes(params: Any) -> int:
    """Bytes of parameters as they would be stored, before any layout for kernels."""
    leaves = trees.flatten(jax.eval_shape(from_serving, params)).values()
    return sum(x.storage_bits() if is_quantized(x) else x.size * x.dtype.itemsize * 8 for x in leaves) // 8


def seconds_per_token(model: Model, params: Any, args: Arguments) -> float:
    """Median time of a token after the prompt."""
    prompt = np.arange(args.prompt, dtype=np.int32)[None] % model.config.vocab_size
    cache = empty_cache(model.config, 1, args.context, params["embed"]["weight"].dtype)
    first, cache = next_token(model, params, prompt, cache, np.int32(0))

    def took() -> float:
        nonlocal cache  # each pass writes over the positions of the one before
        jax.block_until_ready(cache)
        began = time.perf_counter()
        tokens, cache = next_tokens(model, params, first, cache, np.int32(args.prompt), count=args.steps)
        jax.block_until_ready((tokens, cache))
        return time.perf_counter() - began

    took()  # compiles
    return statistics.median(took() for _ in range(args.passes)) / args.steps


def peak_bytes() -> int:
    """Most memory of the device that the process ever held, the making of weights included; 0 where none is told."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def measured(config: ModelConfig, name: str, args: Arguments) -> dict[str, Any]:
    """Measures one format; its weights are freed on return."""
    before = peak_bytes()
    params = random_params(config, name)
    seconds = seconds_per_token(make_model(config), params, args)
    peak = peak_bytes()
    return {
        "format": name,
        "tokens_per_second": 1 / seconds,
        "milliseconds_per_token": seconds * 1e3,
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "accounted_bytes": accounted_bytes(params),
        "peak_bytes": peak if peak > before else None,  # else that of an earlier measurement
        **{field: getattr(args, field) for field in ("prompt", "context", "steps", "passes")},
    }


def configs(args: Arguments) -> dict[str, ModelConfig]:
    """The models to time, by the names of their rows.

    Raises:
      ValueError: arguments that name or ask for what there is not.
    """
    for what, asked, known in (("shapes", args.shapes, SHAPES), ("formats", args.formats, FORMATS)):
        if unknown := set(asked) - set(known):
            raise ValueError(f"{what}: expected some of {', '.join(known)}, got {sorted(unknown)}")
    if min(args.prompt, args.steps, args.passes) < 1 or args.prompt + args.steps > args.context:
        got = f"{args.prompt}, {args.steps}, {args.passes} and {args.context}"
        raise ValueError(f"expected prompt, steps and passes >= 1 and a context that holds prompt + steps, got {got}")
    found = {name: SHAPES[name] for name in args.shapes}
    if args.model is not None:
        path = resolve(args.model)
        checkpoint = read_gguf(path) if path.suffix == ".gguf" else read_directory(path)
        found = {path.name.removesuffix(".gguf"): checkpoint.config, **found}
    if args.layers is None:
        return {name: parse_config(config) for name, config in found.items()}
    fewer = {"num_hidden_layers": args.layers}
    return {f"{name}, {args.layers} layers": parse_config(config | fewer) for name, config in found.items()}


def rows(args: Arguments) -> Iterator[dict[str, Any]]:
    """Measures and yields a row per model and format."""
    for model, config in configs(args).items():
        for name in args.formats:
            yield {"model": model, **measured(config, name, args)}


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and stores."""
    args = tyro.cli(Arguments, args=arguments)
    origin = {"environment": environment(), "commit": commit()}
    try:
        for row in rows(args):
            store(args.results, row | origin, KEY)  # at once: a run may be cut short
            speed = f"{row['tokens_per_second']:8.1f} tokens/s {row['milliseconds_per_token']:9.3f} ms"
            size = f"weights {row['weight_bytes'] / 1e6:.1f} MB, accounted {row['accounted_bytes'] / 1e6:.1f} MB"
            peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 1e6:.1f} MB"
            print(f"{row['model']:24} {row['format']:8} {speed}   {size}{peak}", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
