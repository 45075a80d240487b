"""Text from a model, one token after the other, the likeliest or drawn ones, with a cache of keys and values."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import ops
from jaxquant.models.base import Model, ModelConfig
from jaxquant.serving import for_serving
from jaxquant.tensors import is_quantized

Cache = list[dict[str, jax.Array]]
STEPS = 16  # tokens that `generate` makes at a time


def for_generation(params: Any) -> Any:
    """Returns parameters for `generate`: weights in kernel layouts, and dense ones where no kernel here reads them packed.

    Otherwise such weights would be made dense again for every token. Dense ones are in the dtype of the embedding.
    """
    dtype = params["embed"]["weight"].dtype

    def ready(weight: Any) -> Any:
        packed = not is_quantized(weight) or ops.choose(weight) != "reference"
        return weight if packed else weight.dequantize().astype(dtype)

    return jax.tree.map(ready, for_serving(params), is_leaf=is_quantized)


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Returns room for the keys and values of `length` tokens: {"k", "v": [batch, length, heads, head_dim]} per block."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    return [{name: jnp.zeros(shape, dtype) for name in ("k", "v")} for _ in range(config.num_layers)]


def _advance(model: Model, params: Any, tokens: jax.Array, cache: Cache, start: jax.Array) -> tuple[jax.Array, Cache]:
    """Logits after the last of the tokens [batch, time] from position `start` on, float32 [batch, vocab], and the cache."""
    assert model.step is not None
    hidden, after = model.embed(params, tokens), []
    for block, kind, state in zip(params["blocks"], model.config.layer_kinds, cache, strict=True):
        hidden, state = model.step(block, hidden, kind, state, start)
        after.append(state)
    return model.head(params, hidden[:, -1:])[:, 0], after


def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def next_token(model: Model, params: Any, tokens: jax.Array, cache: Cache, start: jax.Array) -> tuple[jax.Array, Cache]:
    """One step of greedy decoding.

    Args:
      model: pure functions of a network with `step`.
      params: its parameters; weights may be quantized.
      tokens: int32 [batch, time], those from position `start` on.
      cache: keys and values of the tokens before; given away.
      start: int32 scalar.

    Returns:
      The likeliest next token, int32 [batch], and the cache with these tokens.
    """
    logits, cache = _advance(model, params, tokens, cache, start)
    return _likeliest(logits), cache


@functools.partial(jax.jit, static_argnames=("model", "count"), donate_argnames="cache")
def next_tokens(
    model: Model, params: Any, token: jax.Array, cache: Cache, start: jax.Array, *, count: int
) -> tuple[jax.Array, Cache]:
    """Several steps in one program, so that a device need not wait for the host after every token.

    Args:
      model: see `next_token`.
      params: see there.
      token: int32 [batch], at position `start`.
      cache: see there.
      start: int32 scalar.
      count: steps.

    Returns:
      The likeliest next tokens, int32 [batch, count], and the cache with `token` and all of these but the last.
    """

    def step(carry, place):
        token, cache = carry
        logits, cache = _advance(model, params, token[:, None], cache, place)
        token = _likeliest(logits)
        return (token, cache), token

    places = start + jnp.arange(count, dtype=jnp.int32)
    (_, cache), tokens = jax.lax.scan(step, (token, cache), places)
    return tokens.T, cache


@functools.partial(jax.jit, static_argnames=("model", "length"))
def sample(model: Model, params: Any, prompts: jax.Array, *, length: int, key: jax.Array) -> jax.Array:
    """Continues prompts with tokens drawn from the model's distributions: text to tune a quantized model on.

    Nothing ends a window: after an end-of-sequence token the model begins something new.

    Args:
      model: pure functions of a network with `step`.
      params: its parameters; weights may be quantized.
      prompts: int32 [batch, time], time >= 1.
      length: tokens per window, those of the prompt included; more than `time`.
      key: of the draws.

    Returns:
      int32 [batch, length].

    Reference: data-free distillation of Liu et al., LLM-QAT, https://arxiv.org/abs/2305.17888.
    """
    batch, time = prompts.shape
    cache = empty_cache(model.config, batch, length, params["embed"]["weight"].dtype)
    tokens = jnp.zeros((batch, length), jnp.int32).at[:, :time].set(prompts)
    logits, cache = _advance(model, params, prompts, cache, jnp.zeros((), jnp.int32))

    def step(place, carry):
        tokens, logits, cache = carry
        drawn = jax.random.categorical(jax.random.fold_in(key, place), logits).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice(tokens, drawn[:, None], (np.int32(0), place))
        logits, cache = _advance(model, params, drawn[:, None], cache, place)
        return tokens, logits, cache

    return jax.lax.fori_loop(time, length, step, (tokens, logits, cache))[0]


def generate(model: Model, params: Any, prompt: Sequence[int], *, count: int) -> Iterator[int]:
    """Continues a prompt with the likeliest token, again and again.

    Two programs are compiled: one for the prompt, one for `STEPS` tokens.

    Args:
      model: pure functions of a network with `step`.
      params: its parameters; weights may be quantized, see `for_generation`.
      prompt: token ids.
      count: most tokens to generate.

    Yields:
      Token ids, up to `count`; one of config.eos_ids is the last.

    Raises:
      ValueError: a network without `step`, an empty prompt, ids outside the vocabulary, or a text longer than the model
        was made for.
    """
    config, length = model.config, len(prompt) + count
    if model.step is None:
        raise ValueError("generate: expected a model with a step function, got one without; see Model.step")
    if not prompt or count < 1:
        raise ValueError(f"generate: expected a prompt of a token or more and count >= 1, got {len(prompt)}, {count}")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        raise ValueError(f"prompt: expected ids in [0, {config.vocab_size}), got {min(prompt)} to {max(prompt)}")
    if length > config.context_length:
        raise ValueError(f"generate: expected at most {config.context_length} tokens with the prompt, got {length}")
    # Room for whole programs: what the last one makes beyond `count` is not used.
    cache = empty_cache(config, 1, length + STEPS, params["embed"]["weight"].dtype)
    token, cache = next_token(model, params, np.asarray(prompt, np.int32)[None], cache, np.int32(0))
    tokens, start = token[:, None], len(prompt)
    while True:
        for token in np.asarray(tokens[0]).tolist():
            yield token
            count -= 1
            if not count or token in config.eos_ids:
                return
        tokens, cache = next_tokens(model, params, tokens[:, -1], cache, np.int32(start), count=STEPS)
        start += STEPS
