"""Decoder-only transformers of the Llama family and Gemma 3, as pure functions over nested dicts.

One set of functions serves every architecture; what differs is in `ModelConfig`. The arithmetic, casts included,
follows Hugging Face transformers (models/llama/modeling_llama.py, models/gemma3/modeling_gemma3.py), so logits agree.
Activations keep the dtype of the embedding. There is no padding; positions start at 0, but for `cached_block`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import ops
from jaxquant.models.base import GROUPS, Model, ModelConfig
from jaxquant.prologue import ACTIVATIONS, Gate, Prologue, RMSNorm

MAX_SCORES = 2**26  # attention scores held at once, in elements (256 MiB in f32)


@functools.cache
def make_model(config: ModelConfig) -> Model:
    """The model of a configuration; equal configurations give the same object, so jit caches are shared.

    Args:
      config: any supported architecture.

    Returns:
      A `Model`.

    Raises:
      ValueError: an activation that is not known, or layer kinds that do not match the number of layers.
    """
    if config.activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {config.activation!r}")
    if len(config.layer_kinds) != config.num_layers or not set(config.layer_kinds) <= {"full", "sliding"}:
        raise ValueError(f"layer_kinds: expected {config.num_layers} of 'full' or 'sliding', got {config.layer_kinds}")
    return Model(
        config=config,
        embed=functools.partial(embed, config),
        block=functools.partial(transformer_block, config),
        capture=functools.partial(capture, config),
        head=functools.partial(head, config),
        step=functools.partial(cached_block, config),
    )


def linear(layer: Any, x: jax.Array) -> jax.Array:
    """X Wᵀ + b: x [..., in] with layer {"weight" [out, in][, "bias" [out]]} -> [..., out]."""
    return linears([layer], x)[0]


def linears(layers: Sequence[Any], x: jax.Array, prologue: Prologue | None = None) -> list[jax.Array]:
    """`linear` of one x, or of prologue(x), with several layers."""
    results = ops.matmul_each(x, [layer["weight"] for layer in layers], prologue=prologue)
    return [
        y + jnp.broadcast_to(layer["bias"].astype(y.dtype), y.shape) if "bias" in layer else y
        for layer, y in zip(layers, results, strict=True)
    ]


def add_linear(
    config: ModelConfig, hidden: jax.Array, layer: Any, x: jax.Array, norm: Any, prologue: Prologue | None = None
) -> jax.Array:
    """Hidden [..., out] + norm(linear(prologue(x))); `norm` is there where the configuration has norms after layers."""
    if not config.post_norms and "bias" not in layer:
        return ops.matmul_each(x, [layer["weight"]], prologue=prologue, residual=hidden)[0]
    (out,) = linears([layer], x, prologue)
    return hidden + (rms_norm(config, norm, out) if config.post_norms else out)


def make_norm(config: ModelConfig, norm: Any) -> RMSNorm:
    """The norm with parameters {"weight" [size]}."""
    return RMSNorm(norm["weight"], config.norm_eps, config.norm_offset)


def rms_norm(config: ModelConfig, norm: Any, x: jax.Array) -> jax.Array:
    """RMS norm over the last axis, see `RMSNorm`."""
    return make_norm(config, norm)(x)


def rotate(config: ModelConfig, x: jax.Array, kind: str, start: jax.Array | None = None) -> jax.Array:
    """Rotary position embedding of x [batch, time, heads, head_dim] from position start, pairing i with i + head_dim / 2."""
    rope = config.rope if kind == "full" else config.rope_sliding
    frequencies = rope.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    frequencies = jnp.asarray(frequencies / np.asarray(rope.factors or 1.0), jnp.float32)
    place = jnp.arange(x.shape[1], dtype=jnp.float32)
    place = place if start is None else place + start.astype(jnp.float32)
    angles = jnp.outer(place, frequencies)[None, :, None, :]
    left, right = jnp.split(x, 2, axis=-1)
    cos = jnp.broadcast_to(jnp.cos(angles).astype(x.dtype), left.shape)
    sin = jnp.broadcast_to(jnp.sin(angles).astype(x.dtype), left.shape)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _has_fused_attention(dtype: np.dtype, head_dim: int) -> bool:
    """Whether cuDNN's attention can be used: it holds no scores, which are most of the memory traffic of a training step.

    It takes 16-bit types and heads of up to 128, on NVIDIA's GPUs from Ampere on (AMD's have no number for a capability).
    """
    if jax.default_backend() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    major = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")[0]
    return major.isdecimal() and int(major) >= 8 and head_dim <= 128 and head_dim % 8 == 0


def attend(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, kind: str) -> jax.Array:
    """Causal attention, sequences taken a few at a time so that the scores never outgrow MAX_SCORES.

    One sequence is the least taken at once: num_heads * time² scores. The backward pass computes them again.

    Args:
      config: gives the scale of the scores and the window.
      q: [batch, time, num_heads, head_dim].
      k: [batch, time, num_kv_heads, head_dim].
      v: as k.
      kind: "full" or "sliding".

    Returns:
      [batch, time, num_heads, head_dim].
    """
    batch, time, heads, _ = q.shape
    window = config.sliding_window if kind == "sliding" else None

    fused = _has_fused_attention(q.dtype, q.shape[-1])

    def one(q, k, v):
        near = None if window is None or window >= time else (window - 1, 0)
        # JAX's own function promotes bf16 to f32 implicitly, which callers may have made an error.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q,
                k,
                v,
                scale=config.query_scale,
                is_causal=True,
                local_window_size=near,
                implementation="cudnn" if fused else "xla",
            )

    rows = max(1, MAX_SCORES // (heads * time * time))
    if fused or batch <= rows:
        return one(q, k, v)
    return jax.lax.map(jax.checkpoint(lambda qkv: one(*qkv)), (q, k, v), batch_size=rows)


def project(
    config: ModelConfig,
    attn: Any,
    x: jax.Array,
    kind: str,
    start: jax.Array | None = None,
    norm: RMSNorm | None = None,
) -> Any:
    """Rotated queries and keys, and values, each [batch, time, heads, head_dim], of x [batch, time, hidden_size].

    If a norm is given, x is normalised first.
    """
    shape = (*x.shape[:2], -1, config.head_dim)
    q, k, v = (y.reshape(shape) for y in linears([attn[name] for name in ("q", "k", "v")], x, norm))
    if config.qk_norm:
        q, k = rms_norm(config, attn["q_norm"], q), rms_norm(config, attn["k_norm"], k)
    return rotate(config, q, kind, start), rotate(config, k, kind, start), v


def attention(config: ModelConfig, attn: Any, x: jax.Array, kind: str) -> jax.Array:
    """Input of the output projection [batch, time, num_heads * head_dim] from x [batch, time, hidden_size]."""
    q, k, v = project(config, attn, x, kind)
    return attend(config, q, k, v, kind).reshape(*x.shape[:2], -1)


def attend_cached(config: ModelConfig, q: jax.Array, cache: Any, kind: str, start: jax.Array) -> jax.Array:
    """Causal attention of the queries from position `start` on, [batch, time, num_heads, head_dim], to a cache."""
    query = start + jnp.arange(q.shape[1])[:, None]
    key = jnp.arange(cache["k"].shape[1])[None, :]
    seen = key <= query
    if kind == "sliding" and config.sliding_window is not None:
        seen = seen & (key > query - config.sliding_window)
    with jax.numpy_dtype_promotion("standard"):  # as in `attend`
        return jax.nn.dot_product_attention(q, cache["k"], cache["v"], mask=seen[None, None], scale=config.query_scale)


def add_attention(config: ModelConfig, block: Any, hidden: jax.Array, mixed: jax.Array) -> jax.Array:
    """The residual stream after attention, from what `attention` returned."""
    return add_linear(config, hidden, block["attn"]["o"], mixed, block.get("post_attn_norm"))


def gate_and_up(config: ModelConfig, mlp: Any, x: jax.Array, norm: RMSNorm | None = None) -> tuple[Gate, jax.Array]:
    """What makes the input of the down projection, and of what [batch, time, intermediate_size]; see `project`."""
    gate, up = linears([mlp["gate"], mlp["up"]], x, norm)
    return Gate(gate, config.activation), up


def transformer_block(config: ModelConfig, block: Any, hidden: jax.Array, kind: str) -> jax.Array:
    """One transformer block; see `Model.block`."""
    mixed = attention(config, block["attn"], rms_norm(config, block["attn_norm"], hidden), kind)
    return add_mlp(config, block, add_attention(config, block, hidden, mixed))


def add_mlp(config: ModelConfig, block: Any, hidden: jax.Array) -> jax.Array:
    """The residual stream after the MLP."""
    gate, up = gate_and_up(config, block["mlp"], hidden, make_norm(config, block["mlp_norm"]))
    return add_linear(config, hidden, block["mlp"]["down"], up, block.get("post_mlp_norm"), gate)


def cached_block(
    config: ModelConfig, block: Any, hidden: jax.Array, kind: str, cache: Any, start: jax.Array
) -> tuple[jax.Array, Any]:
    """One transformer block for the tokens from position `start` on; see `Model.step`.

    Args:
      config: of the model.
      block: its parameters.
      hidden: [batch, time, hidden_size].
      kind: "full" or "sliding"; the cache has all positions for both.
      cache: {"k", "v": [batch, length, num_kv_heads, head_dim]} in the dtype of `hidden`.
      start: int32 scalar; start + time <= length, which is not checked.

    Returns:
      hidden after the block, and the cache with the keys and values of these tokens.
    """
    q, k, v = project(config, block["attn"], hidden, kind, start, make_norm(config, block["attn_norm"]))
    at = (0, start, 0, 0)
    cache = {name: jax.lax.dynamic_update_slice(cache[name], x, at) for name, x in (("k", k), ("v", v))}
    mixed = attend_cached(config, q, cache, kind, start).reshape(*hidden.shape[:2], -1)
    return add_mlp(config, block, add_attention(config, block, hidden, mixed)), cache


def capture(config: ModelConfig, block: Any, hidden: jax.Array, kind: str, group: tuple[str, ...]) -> jax.Array:
    """Input shared by the linear layers of a group; see `Model.capture`.

    Raises:
      ValueError: a group that the model does not have.
    """
    if tuple(group) not in GROUPS:
        raise ValueError(f"group: expected one of {GROUPS}, got {group}")
    x = rms_norm(config, block["attn_norm"], hidden)
    if "attn/q" in group:
        return x
    mixed = attention(config, block["attn"], x, kind)
    if "attn/o" in group:
        return mixed
    x = rms_norm(config, block["mlp_norm"], add_attention(config, block, hidden, mixed))
    if "mlp/gate" in group:
        return x
    gate, up = gate_and_up(config, block["mlp"], x)
    return gate(up)


def embed(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """Hidden states of tokens; a token outside the vocabulary gives NaN, never another token's row."""
    hidden = jnp.take(params["embed"]["weight"], tokens, axis=0, mode="fill")
    return hidden if config.embed_scale == 1.0 else hidden * jnp.asarray(config.embed_scale, hidden.dtype)


def head(config: ModelConfig, params: Any, hidden: jax.Array) -> jax.Array:
    """Final norm and projection on the vocabulary; see `Model.head`."""
    layer = params["embed"] if config.tie_embeddings else params["head"]
    logits = linear(layer, rms_norm(config, params["norm"], hidden)).astype(jnp.float32)
    cap = config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)
