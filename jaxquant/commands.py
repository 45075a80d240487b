"""What the commands do: load, call the library, print tables."""

import dataclasses
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxquant import checkpoint, export, generation, memory, trees
from jaxquant import evaluate as evaluation
from jaxquant.cli import Evaluate, Generate, Inspect, Plan, Quantize, Sample, Tune
from jaxquant.data import CalibrationConfig, TokenSet, evaluation_tokens, load_tokens, mixed, save_tokens
from jaxquant.finetune import FinetuneConfig
from jaxquant.methods import Config
from jaxquant.models.base import Model
from jaxquant.models.load import LoadedModel, load_model
from jaxquant.pipeline import LayerReport
from jaxquant.plan import linear_paths, plan_layers, resolve, variants
from jaxquant.progress import track
from jaxquant.run import measure_costs, quantize_to_directory, read_costs
from jaxquant.sensitivity import allocate_layers
from jaxquant.tensors import dense_tree, is_quantized
from jaxquant.tokenizer import Tokenizer, load_tokenizer
from jaxquant.training import TrainConfig, split
from jaxquant.tune import TuneConfig, tune_to_directory

SEQUENCES, BUILTIN_SEQUENCES = 128, 32
COST_SEQUENCES = 16  # tell layers apart well enough, and the inputs of all blocks must be held at once


class Opened(NamedTuple):
    """A model to evaluate or inspect: dense or packed."""

    model: Model
    params: Any
    tokenizer: Tokenizer
    record: dict[str, Any] | None


def console() -> Console:
    """Standard output; tables are not folded to the width of a pipe, which has none."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=160)


def open_model(source: str) -> Opened:
    """Loads a dense model or a packed one."""
    path = Path(source)
    if export.is_packed(path):
        saved = export.load_packed(path)
        return Opened(saved.model, saved.params, load_tokenizer(path), saved.record)
    if (path / "run.json").is_file():
        raise ValueError(f"{source}: expected a finished run, got one that stopped; repeat its command to finish it")
    loaded = load_model(source)
    return Opened(loaded.model, loaded.params, load_tokenizer(loaded.tokenizer_source), None)


def default_bos(model: Model) -> int | None:
    """The token that windows begin with: Gemma's, whose figures are meaningless without it; none for others."""
    return model.config.bos_id if model.config.architecture.startswith("gemma") else None


def coverage(params: Any, plan: dict[str, Any]) -> list[str]:
    """Lines that say which share of the parameters will be quantized, and what stays dense and why."""
    flat = trees.flatten(params)
    total = sum(x.size for x in flat.values())
    chosen = {f"{path}/weight" for path, config in plan.items() if config is not None}
    quantized = sum(x.size for path, x in flat.items() if path in chosen)
    skipped = [path for path, config in plan.items() if config is None]
    ends = sum(x.size for path, x in flat.items() if path.startswith(("embed/", "head/")))
    rest = total - quantized - ends - sum(flat[f"{path}/weight"].size for path in skipped)
    lines = [f"quantized: {len(chosen)} of {len(plan)} linear layers, {quantized / total:.1%} of {total / 1e6:.1f} M"]
    tied = "head" not in params
    lines.append(f"dense: embedding{' (also the head)' if tied else ' and head'} {ends / total:.1%}, by protocol")
    lines.append(f"dense: norms and biases {rest / total:.2%}")
    if skipped:
        lines.append(f"dense: {len(skipped)} linear layers by --skip, such as {skipped[0]}")
    return lines


def calibration(args: Plan | Quantize, loaded: LoadedModel, tokenizer: Tokenizer, most: int | None = None) -> TokenSet:
    """The calibration tokens of a command, or the first windows of them."""
    sequences = args.sequences or (SEQUENCES if args.calibration else BUILTIN_SEQUENCES)
    config = CalibrationConfig(
        args.calibration,
        sequences=sequences if most is None else min(sequences, most),
        length=args.length,
        seed=args.seed,
        bos_id=default_bos(loaded.model),
    )
    return load_tokens(config, tokenizer, vocab_size=loaded.model.config.vocab_size)


def choose(args: Plan | Quantize, loaded: LoadedModel, costs: Path) -> dict[str, Config | None]:
    """The settings of every layer: the same for all, or, for --average-bits, what each layer deserves."""
    chosen = resolve(args.rules(), linear_paths(loaded.model, loaded.params))
    if args.average_bits is None:
        return chosen
    skip = [path for path, config in chosen.items() if config is None]
    configs, file = variants(args.method), args.costs or costs
    data = calibration(args, loaded, load_tokenizer(loaded.tokenizer_source), COST_SEQUENCES)
    done = measure_costs(loaded, data, configs, file, seed=args.seed, batch_size=args.batch_size, skip=skip)
    for _ in track(done, "measure layers", total=len(loaded.params["blocks"])):
        pass
    return chosen | allocate_layers(read_costs(file), loaded.params, configs, args.average_bits)


def plan(args: Plan) -> None:
    """Prints the plan and its cost."""
    out = console()
    loaded = load_model(args.model)
    chosen = choose(args, loaded, Path(checkpoint.COSTS_FILE))
    layers = plan_layers(chosen, loaded.params)
    table = Table("layer", "shape", "format", "bits/weight", "MB")
    for layer in layers:
        size = layer.shape[0] * layer.shape[1]
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        table.add_row(layer.path, shape, layer.format, f"{layer.bits / size:.4f}", f"{layer.bits / 8e6:.3f}")
    out.print(table)
    weights = sum(x.shape[0] * x.shape[1] for x in layers)
    bits = sum(x.bits for x in layers)
    dense_bytes = sum(x.nbytes for path, x in trees.flatten(loaded.params).items()) - sum(
        trees.get(loaded.params, x.path)["weight"].nbytes for x in layers
    )
    for line in coverage(loaded.params, chosen):
        out.print(line, highlight=False)
    total = bits / 8e6 + dense_bytes / 1e6
    out.print(f"linear layers: {bits / weights:.4f} bits per weight, {bits / 8e6:.2f} MB; whole model {total:.2f} MB")
    sizes = args.sequences or SEQUENCES, args.length, args.batch_size
    peak = memory.estimate(loaded.model, loaded.params, chosen, *sizes, guided=args.guided)
    out.print(f"peak memory: device {peak.device / 1e6:.0f} MB, host {peak.host / 1e6:.0f} MB ({peak.largest})")


def quantize(args: Quantize) -> None:
    """Runs or resumes a quantization."""
    out = console()
    checkpoint.check_directory(args.out)
    loaded = load_model(args.model)
    tokenizer = load_tokenizer(loaded.tokenizer_source)
    chosen = choose(args, loaded, args.out / checkpoint.COSTS_FILE)
    plan_layers(chosen, loaded.params)  # settings that do not fit a layer fail here, not after an hour
    for line in coverage(loaded.params, chosen):
        out.print(line, highlight=False)
    data = calibration(args, loaded, tokenizer)
    out.print(f"calibration: {len(data.tokens)} x {args.length} tokens of {data.provenance['source']}", highlight=False)
    finetune = None
    if args.finetune:
        micro = min(4, args.batch_size)
        train = TrainConfig(args.finetune_rate, epochs=args.finetune, batch_size=micro, micro_batch=micro)
        finetune = FinetuneConfig(train, args.finetune_targets)
    options = {"seed": args.seed, "batch_size": args.batch_size, "guided": args.guided, "finetune": finetune}
    results = quantize_to_directory(loaded, data, chosen, args.out, **options)
    for _ in track(results, "blocks", total=len(loaded.params["blocks"])):
        pass
    tokenizer.save(args.out)
    saved = export.load_packed(args.out)
    print_reports(out, saved.record)
    size = (args.out / export.MODEL_FILE).stat().st_size
    out.print(f"saved: {args.out / export.MODEL_FILE}, {size / 1e6:.2f} MB", highlight=False)
    if args.dense:
        export.save_dense(args.out / "dense", saved.params, saved.config_dict)
        tokenizer.save(args.out / "dense")
        out.print(f"saved: {args.out / 'dense'}, bfloat16, for transformers", highlight=False)


def print_reports(out: Console, record: dict[str, Any]) -> None:
    """Prints a line per layer, the average, and what fine-tuning did."""
    table = Table("layer", "shape", "format", "bits/weight", "excess", "relative error", "damp", "dead", "tokens", "s")
    weights = bits = 0
    for r in (LayerReport(**r) for r in record["reports"]):
        size = r.shape[0] * r.shape[1]
        weights, bits = weights + size, bits + r.bits
        table.add_row(
            r.path,
            f"{r.shape[0]} x {r.shape[1]}",
            r.format,
            f"{r.bits / size:.4f}",
            "" if r.excess_bits is None else f"{r.excess_bits:+.3f}",
            "" if r.relative_error is None else f"{r.relative_error:.3e}",
            "" if r.damp is None else f"{r.damp:g}",
            str(r.dead) if r.dead else "",
            str(r.tokens) if r.tokens else "",
            f"{r.seconds:.2f}" if r.seconds else "",
        )
    out.print(table)
    out.print(f"average: {bits / weights:.4f} bits per weight in linear layers", highlight=False)
    ratios = [t["after"] / t["before"] for t in record.get("tuning", []) if t and t["before"]]
    if ratios:
        out.print(
            f"fine-tuning: held-out error of blocks fell to {np.prod(ratios) ** (1 / len(ratios)):.1%} (geometric mean)",
            highlight=False,
        )
    stages = ["block fine-tuning"] * bool(ratios) + [t["tuning"]["stage"] for t in record.get("tuned", [])]
    if stages:
        out.print(f"tuned: {', '.join(stages)}; relative errors above are those before", highlight=False)


def tune(args: Tune) -> None:
    """Runs or resumes a tuning run."""
    out = console()
    directory = Path(args.model)
    if not export.is_packed(directory):
        raise ValueError(f"{args.model}: expected the output of `jaxquant quantize`, got something else")
    saved = export.load_packed(directory)
    source = args.reference or saved.record.get("source")
    if source is None:
        raise ValueError(f"{args.model}: expected a record of the dense model, got none; pass --reference MODEL")
    given = {"epochs": args.epochs, "learning_rate": args.learning_rate}
    config = TuneConfig.preset(
        args.stage,
        **{name: value for name, value in given.items() if value is not None},
        batch_size=args.batch_size,
        micro_batch=args.micro_batch,
        seed=args.seed,
    )
    config = dataclasses.replace(config, targets=args.targets, ends=args.ends, dtype=args.dtype)
    dense, tokenizer = load_model(source), load_tokenizer(directory)
    vocab, bos = saved.model.config.vocab_size, default_bos(saved.model)
    windows = CalibrationConfig(args.text, sequences=args.sequences, length=args.length, seed=args.seed, bos_id=bos)
    data = load_tokens(windows, tokenizer, vocab_size=vocab)
    if args.sampled is not None:
        data = mixed(data, args.sampled, seed=args.seed, vocab_size=vocab)
    target = args.out or directory.with_name(f"{directory.resolve().name}-{args.stage}")
    steps = tune_to_directory(saved, dense, data, config, target)
    total = saved.model.config.num_layers if args.stage == "block" else split(config.train, len(data.tokens)).chunks
    for p in track(steps, args.stage, total=total):
        out.print(f"{args.stage} {p.done}/{p.total}: held-out loss {p.before:.5g} -> {p.after:.5g}", highlight=False)
    tokenizer.save(target)
    out.print(f"saved: {target / export.MODEL_FILE}", highlight=False)


def sample(args: Sample) -> None:
    """Draws windows and saves them."""
    if args.out.suffix != ".npy" or args.out.exists():
        raise ValueError(f"{args.out}: expected the name of a new .npy file; remove the old one, or name another")
    opened = open_model(args.model)
    config = opened.model.config
    if not 0 < args.prompt < args.length <= config.context_length:
        raise ValueError(
            f"sample: expected 0 < prompt < length <= {config.context_length}, got {args.prompt} and {args.length}"
        )
    begin = CalibrationConfig(
        args.text, sequences=args.windows, length=args.prompt, seed=args.seed, bos_id=default_bos(opened.model)
    )
    prompts = load_tokens(begin, opened.tokenizer, vocab_size=config.vocab_size)
    # On CPUs bfloat16 would be slower; elsewhere it halves the keys and values, which most of the time goes to.
    dtype = opened.params["embed"]["weight"].dtype if jax.default_backend() == "cpu" else jnp.bfloat16
    params = jax.device_put(trees.cast_floats(dense_tree(opened.params), dtype))
    size = min(args.batch_size, args.windows)
    drawn = []
    for start in track(range(0, args.windows, size), "windows", total=-(-args.windows // size)):
        batch = prompts.tokens[np.arange(start, start + size) % args.windows]  # one shape, one compilation
        key = jax.random.fold_in(jax.random.key(args.seed), start)
        drawn.append(np.asarray(generation.sample(opened.model, params, batch, length=args.length, key=key)))
    save_tokens(args.out, np.concatenate(drawn)[: args.windows])
    console().print(f"saved: {args.out}, {args.windows} x {args.length} tokens", highlight=False)


def evaluate(args: Evaluate) -> None:
    """Measures a model."""
    out = console()
    opened = open_model(args.model)
    reference = None if args.reference is None else jax.device_put(dense_tree(load_model(args.reference).params))
    bos = {None: default_bos(opened.model), True: opened.model.config.bos_id, False: None}[args.bos]
    if args.bos and bos is None:
        raise ValueError(f"{args.model}: expected a beginning-of-sequence token for --bos, the model has none")
    vocab = opened.model.config.vocab_size
    data = evaluation_tokens(
        args.text, opened.tokenizer, length=args.length, limit=args.windows, bos_id=bos, vocab_size=vocab
    )
    params = jax.device_put(dense_tree(opened.params, opened.params["embed"]["weight"].dtype))
    with jax.default_matmul_precision(args.precision):
        results = evaluation.evaluate(opened.model, params, data.tokens, reference)
        last = deque(track(results, "windows", total=len(data.tokens)), maxlen=1).pop()
    p = last.perplexity
    how = (
        f"{p.windows} windows of {p.window_length}, BOS {'yes' if p.bos else 'no'}, {p.dtype}, {p.precision} precision"
    )
    out.print(f"perplexity {p.value:.4f} ({how}; {data.provenance['source']})", highlight=False)
    if last.reference is not None:
        out.print(f"reference {last.reference.value:.4f}, KL {last.kl:.5f} nats per token", highlight=False)


def generate(args: Generate) -> None:
    """Prints a continuation as it is made, and how fast."""
    out = console()
    opened = open_model(args.model)
    dtype = opened.params["embed"]["weight"].dtype
    params = dense_tree(opened.params, dtype) if args.dense else generation.for_generation(opened.params)
    params = jax.device_put(params)
    prompt = opened.tokenizer.encode(args.prompt, add_bos=opened.tokenizer.bos_id is not None)
    ids, moments = [], []
    for token in generation.generate(opened.model, params, prompt, count=args.tokens):
        ids.append(token)
        moments.append(time.perf_counter())
    out.print(args.prompt + opened.tokenizer.decode(ids), highlight=False, markup=False, soft_wrap=True)
    held = sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6
    packed = sum(map(is_quantized, trees.flatten(params).values()))
    out.print(f"weights {held:.1f} MB, {packed} layers read packed, {dtype}, {jax.devices()[0].device_kind}")
    # One token comes with the prompt, then so many at a time; the first of these wait for compilation.
    at_once = generation.STEPS
    rounds = -(-(len(moments) - 1) // at_once) - 1
    seconds = moments[-1] - moments[at_once] if rounds > 0 else 0.0
    speed = f"{rounds * at_once / seconds:.1f} tokens per second" if seconds else "too few for a speed"
    out.print(f"prompt {len(prompt)} tokens, generated {len(ids)}: {speed} (batch 1, compilation left out)")


def inspect(args: Inspect) -> None:
    """Lists layers."""
    out = console()
    opened = open_model(args.model)
    if opened.record is None:
        table = Table("layer", "shape", "dtype", "MB")
        for path in linear_paths(opened.model, opened.params):
            weight = trees.get(opened.params, path)["weight"]
            table.add_row(
                path, f"{weight.shape[0]} x {weight.shape[1]}", str(weight.dtype), f"{weight.nbytes / 1e6:.3f}"
            )
        out.print(table)
        return
    print_reports(out, opened.record)
    run, environment = opened.record["run"], opened.record["environment"]
    data = run["data"]
    out.print(f"calibration: {data}", highlight=False)
    out.print(f"seed {run['seed']}, batch size {run['batch_size']}, {environment}", highlight=False)
    held = sum(x.storage_bits() if is_quantized(x) else x.nbytes * 8 for x in trees.flatten(opened.params).values())
    on_disk = (Path(args.model) / export.MODEL_FILE).stat().st_size
    out.print(f"accounted {held / 8e6:.3f} MB, on disk {on_disk / 1e6:.3f} MB", highlight=False)
