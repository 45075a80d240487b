"""What experiments on whole models share: the model, its texts, and the figures of a set of parameters."""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.configs import Allocated
from jaxquant import Rule, dense_tree, resolve
from jaxquant.checkpoint import describe_config, hash_params
from jaxquant.commands import default_bos
from jaxquant.data import CalibrationConfig, evaluation_tokens, load_tokens
from jaxquant.evaluate import evaluate
from jaxquant.methods import Config
from jaxquant.models.base import Model
from jaxquant.models.load import load_model
from jaxquant.pipeline import LayerReport, quantize_blocks
from jaxquant.plan import linear_paths, variants
from jaxquant.progress import track
from jaxquant.sensitivity import allocate_layers, layer_costs, token_importance
from jaxquant.tokenizer import Tokenizer, load_tokenizer


class Task(NamedTuple):
    """A dense model, calibration windows int32 [n, length], evaluation windows, and what goes into every result.

    `measured` keeps what several methods share: costs for allocations, by settings, and the importance of tokens.
    """

    model: Model
    params: Any
    tokenizer: Tokenizer
    tokens: np.ndarray
    text: np.ndarray
    about: dict[str, Any]
    measured: dict[Any, Any]


def open_task(
    source: str | None, calibration: str | None, text: str | None, sequences: int, length: int, seed: int = 0
) -> Task:
    """Loads a model and its texts.

    Raises:
      ValueError: no model is given, or a source cannot be read.
    """
    if source is None:
        raise ValueError("--model: expected a model for this experiment, got nothing")
    loaded = load_model(source)
    tokenizer, bos = load_tokenizer(loaded.tokenizer_source), default_bos(loaded.model)
    config = CalibrationConfig(calibration, sequences=sequences, length=length, seed=seed, bos_id=bos)
    tokens = load_tokens(config, tokenizer, vocab_size=loaded.model.config.vocab_size)
    windows = evaluation_tokens(text, tokenizer, length=length, bos_id=bos)
    about = {
        "model": hash_params(loaded.params),
        "architecture": f"{loaded.model.config.architecture} {sum(x.size for x in jax.tree.leaves(loaded.params))}",
        "data": {k: v for k, v in tokens.provenance.items() if k != "source"},
        "text": {k: v for k, v in windows.provenance.items() if k != "source"},
    }
    return Task(loaded.model, loaded.params, tokenizer, tokens.tokens, windows.tokens, about, {})


def describe(config: Config | Allocated | None) -> dict[str, Any] | None:
    """Settings ready for JSON."""
    if isinstance(config, Allocated):
        return {**dataclasses.asdict(config), "config": describe_config(config.config), "method": "allocated"}
    return describe_config(config)


def _allocate(task: Task, chosen: Allocated, name: str, batch_size: int, key: jax.Array) -> dict[str, Config]:
    """The settings of every layer."""
    configs, tokens = variants(chosen.config), task.tokens[: chosen.sequences]
    if (configs, chosen.sequences) not in task.measured:
        results = layer_costs(task.model, task.params, tokens, configs, key=key, batch_size=batch_size)
        blocks = {r.index: r.costs for r in track(results, f"costs {name}", total=len(task.params["blocks"]))}
        in_order = {path: options for index in sorted(blocks) for path, options in blocks[index].items()}
        task.measured[configs, chosen.sequences] = in_order
    return allocate_layers(task.measured[configs, chosen.sequences], task.params, configs, chosen.average_bits)


def quantize(
    task: Task,
    config: Config | Allocated,
    name: str,
    batch_size: int,
    *,
    seed: int = 0,
    guided: bool = False,
) -> tuple[Any, list[LayerReport]]:
    """Returns the parameters with all linear layers quantized, and a report for each."""
    key = jax.random.key(seed)
    if isinstance(config, Allocated):
        plan = _allocate(task, config, name, batch_size, key)
    else:
        plan = resolve([Rule(".*", config)], linear_paths(task.model, task.params))
    options: dict[str, Any] = {"key": key, "batch_size": batch_size}
    if guided:
        if "importance" not in task.measured:
            task.measured["importance"] = token_importance(task.model, task.params, task.tokens, **options)
        options["importance"] = task.measured["importance"]
    blocks, reports = list(task.params["blocks"]), []
    results = quantize_blocks(task.model, task.params, task.tokens, plan, **options)
    for result in track(results, name, total=len(blocks)):
        blocks[result.index] = result.block
        reports += result.reports
    return {**task.params, "blocks": blocks}, reports


def evaluation(task: Task, params: Any, reports: Sequence[LayerReport], name: str) -> dict[str, Any]:
    """Returns bits per weight (32 without reports), perplexity and KL on the evaluation windows, and the reports."""
    dense = dense_tree(params, task.params["embed"]["weight"].dtype)
    figures = evaluate(task.model, dense, task.text, task.params, batch_size=4)
    last = deque(track(figures, f"evaluate {name}", total=len(task.text)), maxlen=1).pop()
    weights = sum(r.shape[0] * r.shape[1] for r in reports)
    return {
        "bits_per_weight": sum(r.bits for r in reports) / weights if weights else 32.0,
        "perplexity": last.perplexity.value,
        "kl": last.kl,
        "evaluation": dataclasses.asdict(last.perplexity),
        "layers": [dataclasses.asdict(r) for r in reports],
    }
