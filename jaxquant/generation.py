"""Text from a model: one token after the other, the likeliest each time, with a cache of keys and values."""

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
    assert model.step is not None
    hidden, after = model.embed(params, tokens), []
    for block, kind, state in zip(params["blocks"], model.config.layer_kinds, cache, strict=True):
        hidden, state = model.step(block, hidden, kind, state, start)
        after.append(state)
    return jnp.argmax(model.head(params, hidden[:, -1:])[:, 0], axis=-1).astype(jnp.int32), after


def generate(model: Model, params: Any, prompt: Sequence[int], *, count: int) -> Iterator[int]:
    """Continues a prompt with the likeliest token, again and again.

    Two programs are compiled: one for the length of the prompt, one for single tokens.

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
    cache = empty_cache(config, 1, length, params["embed"]["weight"].dtype)
    tokens, start = np.asarray(prompt, np.int32)[None], 0
    for _ in range(count):
        token, cache = next_token(model, params, tokens, cache, np.int32(start))
        start, tokens = start + tokens.shape[1], token[:, None]
        yield int(token[0])
        if int(token[0]) in config.eos_ids:
            return
