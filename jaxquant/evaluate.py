"""Perplexity, and the divergence from a reference model, on windows of tokens.

The definition is the usual one of the quantization papers: non-overlapping windows of L tokens, the tail dropped; in
each window the mean cross entropy of the L - 1 predictions; perplexity = exp(mean over windows). It depends on L, on
the tokenizer and on a beginning-of-sequence token, so every result says which L and whether there was one.

    tokens = evaluation_tokens("wiki.test.txt", tokenizer, length=2048).tokens
    for result in track(evaluate(model, params, tokens), "perplexity", total=len(tokens)):
        pass
    print(result.perplexity.value)
"""

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.data import windows as windows
from jaxquant.models.base import Model, run_block, run_embed
from jaxquant.tensors import dense_tree

DEFAULT_TOKENS = 4096  # per step where no batch size is given


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
      value: exp(nll).
      nll: mean over windows of the mean cross entropy per token, in nats.
      windows: number of windows.
      window_length: tokens per window, a beginning-of-sequence token included.
      tokens_scored: windows * (window_length - 1).
      bos: every window begins with the model's beginning-of-sequence token.
      dtype: of the hidden states that reach the head; cross entropy itself is float32.
      precision: of matrix products, set by `jax.default_matmul_precision`; "default" means TF32 on recent GPUs and
        bfloat16 on TPUs for float32 weights.
    """

    value: float
    nll: float
    windows: int
    window_length: int
    tokens_scored: int
    bos: bool
    dtype: str
    precision: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures over the windows seen so far; the last two are None without a reference.

    Attributes:
      perplexity: of the parameters under test.
      kl: mean over predictions of KL(reference || tested), in nats per token.
      reference: perplexity of the reference parameters on the same windows.
    """

    perplexity: Perplexity
    kl: float | None = None
    reference: Perplexity | None = None


def perplexity(
    model: Model, params: Any, tokens: Any, *, batch_size: int | None = None, chunk: int = 256
) -> Perplexity:
    """Returns the perplexity of a model on windows of tokens; see `evaluate` for arguments and errors."""
    return _last(evaluate(model, params, tokens, batch_size=batch_size, chunk=chunk)).perplexity


def kl_divergence(
    model: Model, reference_params: Any, params: Any, tokens: Any, *, batch_size: int | None = None, chunk: int = 256
) -> float:
    """Returns mean KL(reference || params) in nats per token; see `evaluate` for arguments and errors."""
    kl = _last(evaluate(model, params, tokens, reference_params, batch_size=batch_size, chunk=chunk)).kl
    assert kl is not None
    return kl


def evaluate(
    model: Model,
    params: Any,
    tokens: Any,
    reference_params: Any = None,
    *,
    batch_size: int | None = None,
    chunk: int = 256,
) -> Iterator[Evaluation]:
    """Measures perplexity and, with a reference, the divergence from it; yields a running result per window.

    Logits exist for `chunk` tokens at a time only: at 262144 words 256 tokens take 268 MB where a window of 2048 would
    take 2.1 GB. One block function is compiled per layer kind (and per format of quantized weights). Quantized weights
    are dequantized in every batch, so larger batches are faster; `jaxquant.tensors.dense_tree` does it once for all.

    Args:
      model: pure functions of the network.
      params: its parameters; weights may be quantized.
      tokens: integers [n, L], see `jaxquant.data.evaluation_tokens`.
      reference_params: parameters of the same model to compare with, usually the dense ones, or None.
      batch_size: most windows per step; by default as many as make 4096 tokens.
      chunk: tokens per step of the head.

    Yields:
      n results, each over the windows so far: the last is the result, and `total=len(tokens)` suits a progress bar.

    Raises:
      ValueError: an argument is out of range, ids are outside the vocabulary, or logits are not finite.
    """
    tokens = _check_tokens(tokens, model.config.vocab_size)
    n, length = tokens.shape
    if batch_size is None:
        batch_size = max(1, DEFAULT_TOKENS // length)
    if batch_size < 1 or chunk < 1:
        raise ValueError(f"evaluate: expected batch_size >= 1 and chunk >= 1, got {batch_size=} and {chunk=}")
    batches = math.ceil(n / batch_size)
    size = math.ceil(n / batches)  # equal batches, so that the least is computed in vain
    about = {
        "window_length": length,
        "bos": bool((tokens[:, 0] == model.config.bos_id).all()),
        "precision": str(getattr(jax.config, "jax_default_matmul_precision") or "default"),  # noqa: B009 (unknown to pyright)
    }
    sums, seen = np.zeros(3), 0  # nll of tested and reference, KL
    for start in range(0, n, size):
        batch = tokens[np.arange(start, start + size) % n]  # the last batch is filled up: one shape, one compilation
        hidden = _hidden(model, params, batch)
        if reference_params is None:
            figures = (_cross_entropy(model, _ends(params), hidden, batch, chunk=chunk),)
        else:
            reference = _hidden(model, reference_params, batch)
            both = (_ends(params), _ends(reference_params))
            figures = _compare(model, *both, hidden, reference, batch, chunk=chunk)
        figures = [_window_means(x, start)[: n - start] for x in figures]
        about["dtype"] = str(hidden.dtype)
        for row in zip(*figures, strict=True):
            seen += 1
            sums[: len(row)] += row
            nll, reference_nll, kl = sums / seen
            if reference_params is None:
                yield Evaluation(perplexity=_perplexity(nll, seen, about))
            else:
                other = _perplexity(reference_nll, seen, about)
                yield Evaluation(perplexity=_perplexity(nll, seen, about), kl=float(kl), reference=other)


def _perplexity(nll: float, count: int, about: dict[str, Any]) -> Perplexity:
    scored = count * (about["window_length"] - 1)
    value = math.exp(nll) if nll < 700 else math.inf  # beyond the range of floats
    return Perplexity(value=value, nll=float(nll), windows=count, tokens_scored=scored, **about)


def _last(results: Iterator[Evaluation]) -> Evaluation:
    return deque(results, maxlen=1).pop()


def _check_tokens(tokens: Any, vocab_size: int) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        got = f"{tokens.dtype} {tokens.shape}"
        raise ValueError(f"tokens: expected integers [n >= 1, length >= 2], got {got}; cut a text with windows()")
    if not 0 <= tokens.min() <= tokens.max() < vocab_size:
        got = f"{tokens.min()} to {tokens.max()}"
        raise ValueError(f"tokens: expected ids in [0, {vocab_size}), got {got}; use the model's own tokenizer")
    return tokens.astype(np.int32)


def _window_means(values: jax.Array, start: int) -> np.ndarray:
    """Means of [windows, predictions] in float64, after checking that all are finite."""
    array = np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        window, position = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(
            f"logits of window {start + window}, position {position}: expected finite numbers, got NaN or infinity; "
            "check the weights for NaN, or use bfloat16 or float32 activations where float16 overflows"
        )
    return np.mean(array, axis=1)


def _ends(params: Any) -> Any:
    """Parameters without the blocks: all that embed and head need, and alike however the blocks are quantized."""
    return {name: value for name, value in params.items() if name != "blocks"}


def _hidden(model: Model, params: Any, tokens: np.ndarray) -> jax.Array:
    """Hidden states [batch, time, d] after the last block."""
    hidden = run_embed(model, _ends(params), tokens)
    for block, kind in zip(params["blocks"], model.config.layer_kinds, strict=True):
        hidden = run_block(model, block, hidden, kind=kind)
    return hidden


def _log_probabilities(model: Model, ends: Any, hidden: jax.Array) -> jax.Array:
    """f32 [tokens, vocab] of hidden [tokens, d]; rows with any logit that is not finite are NaN."""
    logits = model.head(ends, hidden[None])[0].astype(jnp.float32)
    finite = jnp.isfinite(logits).all(axis=-1, keepdims=True)
    return jnp.where(finite, jax.nn.log_softmax(logits), jnp.nan)


def over_chunks(function: Any, arrays: tuple[jax.Array, ...], chunk: int) -> Any:
    """Maps `function` over arrays [batch, time, ...], `chunk` tokens at a time; outputs are [batch, time]."""
    batch, time = arrays[0].shape[:2]
    chunk = min(chunk, batch * time)
    padding = -batch * time % chunk

    def split(x):
        x = x.reshape(batch * time, *x.shape[2:])
        return jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))).reshape(-1, chunk, *x.shape[1:])

    outputs = jax.lax.map(lambda chunks: function(*chunks), tuple(map(split, arrays)))
    return jax.tree.map(lambda x: x.reshape(-1)[: batch * time].reshape(batch, time), outputs)


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def _cross_entropy(model: Model, ends: Any, hidden: jax.Array, tokens: jax.Array, *, chunk: int) -> jax.Array:
    """Nats f32 [batch, time - 1] of each next token, from hidden [batch, time, d] and tokens [batch, time]."""
    ends = dense_tree(ends, hidden.dtype)  # once, not in every chunk

    def one(hidden, target):
        return -_pick(_log_probabilities(model, ends, hidden), target)

    return over_chunks(one, (hidden[:, :-1], tokens[:, 1:]), chunk)


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def _compare(model, ends, reference_ends, hidden, reference, tokens, *, chunk: int) -> tuple[jax.Array, ...]:
    """Nats of each next token by the tested and the reference model, and KL(reference || tested), [batch, time - 1]."""
    ends, reference_ends = dense_tree(ends, hidden.dtype), dense_tree(reference_ends, reference.dtype)

    def one(hidden, reference, target):
        q, p = _log_probabilities(model, ends, hidden), _log_probabilities(model, reference_ends, reference)
        return -_pick(q, target), -_pick(p, target), jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    return over_chunks(one, (hidden[:, :-1], reference[:, :-1], tokens[:, 1:]), chunk)
