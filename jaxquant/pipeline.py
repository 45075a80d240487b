"""Quantize a model block by block, each on inputs that went through the blocks already quantized."""

import dataclasses
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import ratedistortion, stats, stream, trees
from jaxquant.finetune import FinetuneConfig, TuneReport
from jaxquant.methods import METHODS, Config
from jaxquant.models.base import Model
from jaxquant.problem import LayerProblem, dead_columns, relative_error
from jaxquant.tensors import QuantizedTensor, bits_per_weight, dense_weight
from jaxquant.training import split
from jaxquant.warmup import compile_ahead


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
      path: such as "blocks/3/attn/q".
      shape: (out, in).
      format: of the quantized tensor, or the dtype of a layer left dense.
      bits: storage bits of the weight.
      relative_error: tr(E H E^T) / tr(W H W^T) with the undamped H of its inputs; None if left dense.
      excess_bits: bits per weight beyond the rate-distortion bound at this error, see `ratedistortion.excess_bits`.
      damp: damping used, relative to mean(diag H); None where the method needs none.
      dead: inputs that were zero on every token.
      tokens: tokens behind H.
      seconds: time of the method, compilation included.
    """

    path: str
    shape: tuple[int, int]
    format: str
    bits: int
    relative_error: float | None = None
    excess_bits: float | None = None
    damp: float | None = None
    dead: int = 0
    tokens: int = 0
    seconds: float = 0.0


class BlockResult(NamedTuple):
    """One finished block: parameters, a report per layer (as before fine-tuning), and one of fine-tuning, if any."""

    index: int
    block: Any
    reports: list[LayerReport]
    tuning: TuneReport | None = None


def layer_key(key: jax.Array, path: str) -> jax.Array:
    """Returns a key that depends on the layer's path alone, not on the order of the work: resuming changes nothing."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def quantize_layer(
    path: str,
    weight: jax.Array,
    hessian: jax.Array,
    config: Config,
    *,
    key: jax.Array,
    tokens: int = 0,
    damp: float | None = None,
    eigenvalues: jax.Array | None = None,
) -> tuple[QuantizedTensor, LayerReport]:
    """Quantizes one layer and measures the result.

    Args:
      path: the layer's path; it seeds the method and names the layer in errors.
      weight: float [out, in].
      hessian: float32 [in, in], E[x x^T].
      config: settings; their type names the method.
      key: of the whole run.
      tokens: tokens behind the hessian, for the report.
      damp: what `stats.damping_used` says of this hessian and config, if that is known already.
      eigenvalues: what `ratedistortion.spectrum` says of this hessian, if that is known already.

    Returns:
      (the quantized tensor, its report).

    Raises:
      ValueError: weights or hessian are not finite, the hessian is zero, or the result's error is not finite.
    """
    began = time.perf_counter()
    trace = float(jnp.trace(hessian))
    if not math.isfinite(trace):
        raise ValueError(
            f"{path}: expected finite inputs on the calibration tokens, got NaN or Inf; "
            "float16 activations overflow: load the model in bfloat16 or float32"
        )
    if trace <= 0:
        raise ValueError(f"{path}: expected a positive hessian, got zero: no calibration token reached this layer")
    problem = LayerProblem(weight.astype(jnp.float32), hessian)
    try:
        tensor = METHODS[type(config)](problem, config, key=layer_key(key, path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    error = float(relative_error(problem, tensor))
    if not math.isfinite(error):
        raise ValueError(f"{path}: expected a finite error, got {error} with {config}; are all weights finite?")
    report = LayerReport(
        path=path,
        shape=(weight.shape[0], weight.shape[1]),
        format=tensor.format,
        bits=tensor.storage_bits(),
        relative_error=error,
        excess_bits=bits_per_weight(tensor) - float(ratedistortion.rate_at_error(problem, error, eigenvalues)),
        damp=stats.damping_used(hessian, config) if damp is None else damp,
        dead=int(dead_columns(hessian).sum()),
        tokens=tokens,
        seconds=time.perf_counter() - began,
    )
    return tensor, report


def _dense_report(path: str, weight: Any) -> LayerReport:
    return LayerReport(path, weight.shape, str(weight.dtype), weight.size * weight.dtype.itemsize * 8)


def _hessians(
    model: Model,
    block: Any,
    hidden: Sequence[jax.Array],
    kind: str,
    group: tuple[str, ...],
    importance: Mapping[str, np.ndarray] | None,
) -> dict[str, jax.Array]:
    """Second moments of a group's inputs over all tokens: of each layer with its weights, or the first's for all."""
    columns = trees.get(block, group[0])["weight"].shape[1]
    if importance is None:
        group_weights: list[jax.Array | None] = [None] * len(hidden)
        names, total = group[:1], np.asarray(float(sum(h.shape[0] * h.shape[1] for h in hidden)), np.float32)
    else:
        each = np.stack([importance[name] for name in group])
        cuts = np.cumsum([len(h) for h in hidden])[:-1]
        group_weights = [jnp.asarray(w) for w in np.split(each, cuts, axis=1)]
        names, total = group, np.maximum(each.sum(axis=(1, 2)), np.finfo(np.float32).tiny)[:, None, None]
    grams = stats.init(columns, len(names))
    for h, w in zip(hidden, group_weights, strict=True):
        grams = stats.capture_update(model, block, h, grams, w, kind=kind, group=group)
    return dict(zip(names, grams / total, strict=True))


def _quantize_block(
    model: Model,
    block: Any,
    hidden: Sequence[jax.Array],
    plan: Mapping[str, Config | None],
    index: int,
    key: jax.Array,
    importance: Mapping[str, np.ndarray] | None,
) -> tuple[Any, list[LayerReport]]:
    """Quantizes the groups of a block in order, each on inputs that passed the groups before it."""
    kind, prefix = model.config.layer_kinds[index], f"blocks/{index}/"
    tokens = sum(h.shape[0] * h.shape[1] for h in hidden)
    reports, passes = [], block  # what the forward passes see: dense weights, the new ones as they will be decoded
    for group in model.groups:
        hessians = {}
        if any(plan[prefix + name] is not None for name in group):
            hessians = _hessians(model, passes, hidden, kind, group, importance)
        spectra = {name: ratedistortion.spectrum(hessian) for name, hessian in hessians.items()}
        damps = {}  # a factorization each, and layers that share the hessian mostly share the settings
        for name in group:
            weight, config = trees.get(block, name)["weight"], plan[prefix + name]
            if config is None:
                reports.append(_dense_report(prefix + name, weight))
                continue
            source = name if name in hessians else group[0]
            if (source, config) not in damps:
                damps[source, config] = stats.damping_used(hessians[source], config)
            tensor, report = quantize_layer(
                prefix + name,
                weight,
                hessians[source],
                config,
                key=key,
                tokens=tokens,
                damp=damps[source, config],
                eigenvalues=spectra[source],
            )
            block = trees.replace(block, f"{name}/weight", tensor)
            passes = trees.replace(passes, f"{name}/weight", dense_weight(tensor, hidden[0].dtype))
            reports.append(report)
    return block, reports


def quantize_blocks(
    model: Model,
    params: Any,
    tokens: np.ndarray,
    plan: Mapping[str, Config | None],
    *,
    key: jax.Array,
    batch_size: int = 8,
    start: int = 0,
    importance: Sequence[Mapping[str, np.ndarray]] | None = None,
    finetune: FinetuneConfig | None = None,
    dense_blocks: Sequence[Any] | None = None,
) -> Iterator[BlockResult]:
    """Quantizes the blocks of a model one after the other; the caller saves, logs and stops as it likes.

    For each block, in the order of `model.groups`: the second moments of the group's inputs are gathered, its layers
    quantized and put in place before the next group's inputs are computed. Its outputs are the next block's inputs.

    Args:
      model: pure functions of the network.
      params: its parameters; of `params["blocks"][:start]` the quantized ones.
      tokens: calibration tokens, integers [n, length].
      plan: {path: settings or None} for every linear layer, from `plan.resolve`.
      key: seeds the methods, by path.
      batch_size: sequences per forward pass; it changes results by float rounding only.
      start: first block to quantize.
      importance: weights of the tokens in the second moments, for each block {layer: float32 [n, length]}, from
        `sensitivity.token_importance`; None for ones. Errors in the reports are weighted likewise.
      finetune: fine-tune every block once its layers are quantized, or None.
      dense_blocks: of the dense model; by default those of `params`; needed to fine-tune towards it from a later start.

    Yields:
      BlockResult for each block from `start` on.

    Raises:
      ValueError: from `quantize_layer`, with the layer's path; too few tokens to fine-tune.

    Reference: the sequential protocol of Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323, with "true sequential"
    groups.
    """
    tokens = np.asarray(tokens, np.int32)
    if finetune:
        split(finetune.train, len(tokens))  # too few windows: fail now, not after the first block
    if start < len(params["blocks"]):
        compile_ahead(model, params, plan, tokens[:batch_size].shape, key, start, weighted=importance is not None)

    def change(index, block, hidden):
        return _quantize_block(
            model, block, hidden, plan, index, key, None if importance is None else importance[index]
        )

    options = {"batch_size": batch_size, "start": start, "finetune": finetune, "dense_blocks": dense_blocks}
    yield from (BlockResult(*done) for done in stream.walk(model, params, tokens, change, **options))


def tune_blocks(
    model: Model,
    params: Any,
    dense_blocks: Sequence[Any],
    tokens: np.ndarray,
    finetune: FinetuneConfig,
    *,
    batch_size: int = 8,
    start: int = 0,
) -> Iterator[BlockResult]:
    """Fine-tunes the blocks of a quantized model one after the other; arguments as of `quantize_blocks`."""
    split(finetune.train, len(tokens))
    options = {"batch_size": batch_size, "start": start, "finetune": finetune, "dense_blocks": dense_blocks}
    keep = stream.walk(model, params, tokens, lambda _, block, __: (block, []), **options)
    yield from (BlockResult(*done) for done in keep)
