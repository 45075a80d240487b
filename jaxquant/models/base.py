"""What a model is: a hashable configuration and a few pure functions over nested dicts of arrays.

Nothing here knows a framework. `Model` is all that the quantization pipeline sees of a network, so a user's own
network takes part by filling in these functions. Parameters follow one layout:

    {"embed": {"weight"}, "blocks": [block, ...], "norm": {"weight"}, "head": {"weight"}}   # no head when tied
    block = {"attn_norm": {"weight"}, "attn": {"q", "k", "v", "o": {"weight"[, "bias"]}[, "q_norm", "k_norm"]},
             "mlp_norm": {"weight"}, "mlp": {"gate", "up", "down": {"weight"}}[, "post_attn_norm", "post_mlp_norm"]}

Every linear weight is [out, in], as in the checkpoint, and holds exactly the checkpoint's numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

GROUPS = (("attn/q", "attn/k", "attn/v"), ("attn/o",), ("mlp/gate", "mlp/up"), ("mlp/down",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: frequency i is theta**(-2i / head_dim) / factors[i].

    Attributes:
      theta: base of the geometric sequence of frequencies.
      factors: head_dim / 2 divisors (context extension by 'linear' or 'llama3'), or () for ones.
    """

    theta: float
    factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and variant of a decoder-only transformer; hashable, so it may be a static argument of jit.

    Attributes:
      architecture: the Hugging Face model_type, such as "llama" or "gemma3_text".
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_layers: transformer blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides num_heads.
      head_dim: width of one head.
      norm_eps: added to the mean square in every RMS norm.
      norm_offset: added to every norm weight in use (1 for Gemma, whose checkpoints store weight - 1).
      activation: "silu" or "gelu_tanh".
      tie_embeddings: the head is the embedding.
      biases: linear layers of a block that have a bias, such as ("attn/q", "attn/k", "attn/v").
      qk_norm: queries and keys are normalised per head before rotation.
      post_norms: the outputs of attention and MLP are normalised before they are added (Gemma).
      layer_kinds: "full" or "sliding" for each block.
      sliding_window: positions that a token of a "sliding" block sees, itself included; None without such blocks.
      rope: rotary embedding of "full" blocks.
      rope_sliding: rotary embedding of "sliding" blocks.
      query_scale: multiplies the attention scores.
      embed_scale: multiplies the embedding output.
      logit_softcap: c in c * tanh(logits / c), or None.
      context_length: longest sequence the model was made for.
      bos_id: beginning-of-sequence token, or None.
      eos_ids: tokens that end a generation.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    norm_offset: float = 0.0
    activation: str = "silu"
    tie_embeddings: bool = False
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    post_norms: bool = False
    layer_kinds: tuple[str, ...]
    sliding_window: int | None = None
    rope: Rope
    rope_sliding: Rope
    query_scale: float
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    context_length: int
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


class Model(NamedTuple):
    """A network as pure functions; blocks are alike, so each function is compiled once per layer kind.

    Attributes:
      config: static description.
      embed: (params, tokens int [batch, time]) -> hidden [batch, time, hidden_size].
      block: (block, hidden, kind) -> hidden; one transformer block, `kind` is config.layer_kinds[i] (static).
      capture: (block, hidden, kind, group) -> x [batch, time, in], the input that the linear layers of `group` (an
        element of `groups`, static) share; nothing behind it is computed.
      head: (params, hidden) -> logits f32 [batch, time, vocab_size]; final norm included.
      groups: paths of linear layers inside a block, in order of use, grouped by common input.
      step: (block, hidden, kind, cache, start) -> (hidden, cache); `block` for the tokens from position `start` on,
        given the keys and values of those before, {"k", "v": [batch, length, num_kv_heads, head_dim]}; None for a
        network that does not generate text.
    """

    config: ModelConfig
    embed: Callable[[Any, jax.Array], jax.Array]
    block: Callable[[Any, jax.Array, str], jax.Array]
    capture: Callable[[Any, jax.Array, str, tuple[str, ...]], jax.Array]
    head: Callable[[Any, jax.Array], jax.Array]
    groups: tuple[tuple[str, ...], ...] = GROUPS
    step: Callable[[Any, jax.Array, str, Any, jax.Array], tuple[jax.Array, Any]] | None = None

    def forward(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Logits f32 [batch, time, vocab_size] of int tokens [batch, time]."""
        hidden = self.embed(params, tokens)
        for block, kind in zip(params["blocks"], self.config.layer_kinds, strict=True):
            hidden = self.block(block, hidden, kind)
        return self.head(params, hidden)


@functools.partial(jax.jit, static_argnames="model")
def run_embed(model: Model, params: Any, tokens: jax.Array) -> jax.Array:
    """Jitted `model.embed`; pass the parameters without their blocks, whose formats would compile it anew."""
    return model.embed(params, tokens)


@functools.partial(jax.jit, static_argnames=("model", "kind"), donate_argnames="hidden")
def run_block(model: Model, block: Any, hidden: jax.Array, *, kind: str) -> jax.Array:
    """Jitted `model.block`, compiled once for each kind and formats of the weights; the buffer of `hidden` is reused."""
    return model.block(block, hidden, kind)
