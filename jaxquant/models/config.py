"""From the contents of a Hugging Face config.json to a `ModelConfig`, and from parameter paths to tensor names."""

from typing import Any

import numpy as np

from jaxquant.models.base import ModelConfig, Rope

GEMMA = "gemma3_text"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", GEMMA)
LINEAR = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
ATTENTION, MLP = tuple(LINEAR)[:4], tuple(LINEAR)[4:]
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
GEMMA_DEFAULTS = {  # published configs leave these out: Gemma3TextConfig in transformers has them
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def parse_config(config: dict[str, Any]) -> ModelConfig:
    """The static description of a model from the contents of its config.json.

    Args:
      config: of a text model, in the form of transformers 4 or 5.

    Returns:
      A `ModelConfig`.

    Raises:
      ValueError: an unknown architecture (the supported ones are listed), a missing entry (named), a variant that is
        not implemented.
    """
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"model_type: expected one of {sorted(ARCHITECTURES)}, got {architecture!r}")
    gemma = architecture == GEMMA
    config = (GEMMA_DEFAULTS if gemma else {}) | {k: v for k, v in config.items() if v is not None}
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if key not in config]:
        raise ValueError(f"config.json: expected {missing} in it, got {sorted(config)}")
    refuse_unsupported(config)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    kinds = layer_kinds(config)
    eos = config.get("eos_token_id", ())
    return ModelConfig(
        architecture=architecture,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads", heads),
        head_dim=head_dim,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        norm_offset=1.0 if gemma else 0.0,
        activation=ACTIVATIONS[activation(config)],
        tie_embeddings=config.get("tie_word_embeddings", False),
        biases=biases(config),
        qk_norm=gemma or architecture == "qwen3",
        post_norms=gemma,
        layer_kinds=kinds,
        sliding_window=config["sliding_window"] if "sliding" in kinds else None,
        rope=parse_rope(config, head_dim, "full_attention"),
        rope_sliding=parse_rope(config, head_dim, "sliding_attention"),
        query_scale=config.get("query_pre_attn_scalar", head_dim) ** -0.5,
        embed_scale=config["hidden_size"] ** 0.5 if gemma else 1.0,
        logit_softcap=config.get("final_logit_softcapping"),
        context_length=config.get("max_position_embeddings", 2048),
        bos_id=config.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
    )


def activation(config: dict[str, Any]) -> str:
    """Hugging Face name of the MLP's activation."""
    return config.get("hidden_activation", config.get("hidden_act", "silu"))


def refuse_unsupported(config: dict[str, Any]) -> None:
    """Raises ValueError for what would load but compute something else."""
    if activation(config) not in ACTIVATIONS:
        raise ValueError(f"hidden_act: expected one of {sorted(ACTIVATIONS)}, got {activation(config)!r}")
    plain = {
        "partial_rotary_factor": 1.0,
        "num_local_experts": 0,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "quantization_config": None,
    }
    for key, usual in plain.items():
        if config.get(key, usual) != usual:
            raise ValueError(f"{key}: expected {usual}, got {config[key]!r}; this variant is not supported")


def biases(config: dict[str, Any]) -> tuple[str, ...]:
    """Linear layers of a block that have a bias: always q, k and v in Qwen2, by flag elsewhere."""
    if config["model_type"] == "qwen2":
        return ATTENTION[:3]
    attention = ATTENTION if config.get("attention_bias", False) else ()
    return attention + (MLP if config.get("mlp_bias", False) else ())


def layer_kinds(config: dict[str, Any]) -> tuple[str, ...]:
    """Attention kind of each block, by the rule of each architecture's configuration class in transformers."""
    architecture, layers = config["model_type"], config["num_hidden_layers"]
    if "layer_types" in config and architecture in ("qwen2", "qwen3", GEMMA):
        return tuple(kind.removesuffix("_attention") for kind in config["layer_types"])
    if architecture == GEMMA:
        period = config.get("sliding_window_pattern", 6)
        sliding = [bool((i + 1) % period) for i in range(layers)]
    elif architecture in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28) if config.get("use_sliding_window", False) else layers
        sliding = [i >= first and "sliding_window" in config for i in range(layers)]
    else:
        sliding = [architecture == "mistral" and "sliding_window" in config] * layers
    return tuple("sliding" if s else "full" for s in sliding)


def parse_rope(config: dict[str, Any], head_dim: int, kind: str) -> Rope:
    """Rotary embedding of "full_attention" or "sliding_attention" blocks.

    transformers 5 writes rope_parameters, per kind for Gemma 3; transformers 4 writes rope_theta and rope_scaling,
    and Gemma 3's sliding blocks have a base of their own and no scaling.

    Raises:
      ValueError: a scaling that is not implemented.
    """
    local = config["model_type"] == GEMMA and kind == "sliding_attention"
    rope = {"rope_theta": config.get("rope_local_base_freq" if local else "rope_theta", 10000.0)}
    if "rope_parameters" in config:
        rope |= config["rope_parameters"].get(kind, config["rope_parameters"])
    elif not local:
        rope |= config.get("rope_scaling", {})
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor: expected 1.0, got {rope['partial_rotary_factor']}; not supported")
    theta, scaling = float(rope["rope_theta"]), rope.get("rope_type", rope.get("type", "default"))
    if scaling == "default":
        return Rope(theta=theta)
    if scaling == "linear":
        return Rope(theta=theta, factors=(float(rope["factor"]),) * (head_dim // 2))
    if scaling == "llama3":
        rope = {"original_max_position_embeddings": config.get("max_position_embeddings")} | rope
        return Rope(theta=theta, factors=tuple(llama3_factors(theta, head_dim, rope).tolist()))
    raise ValueError(f"rope_type: expected 'default', 'linear' or 'llama3', got {scaling!r}; it is not supported")


def llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """Divisors f64 [head_dim / 2] of the rotary frequencies under rope type 'llama3'.

    Reference: _compute_llama3_parameters in transformers/modeling_rope_utils.py.
    """
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Path of every parameter, such as "blocks/3/attn/q/weight", -> its name in a Hugging Face checkpoint."""
    block = {"attn_norm/weight": "input_layernorm.weight"}
    if config.post_norms:
        block["post_attn_norm/weight"] = "post_attention_layernorm.weight"
        block["mlp_norm/weight"] = "pre_feedforward_layernorm.weight"
        block["post_mlp_norm/weight"] = "post_feedforward_layernorm.weight"
    else:
        block["mlp_norm/weight"] = "post_attention_layernorm.weight"
    if config.qk_norm:
        block |= {f"attn/{n}/weight": f"self_attn.{n}.weight" for n in ("q_norm", "k_norm")}
    block |= {f"{path}/weight": f"{name}.weight" for path, name in LINEAR.items()}
    block |= {f"{path}/bias": f"{LINEAR[path]}.bias" for path in config.biases}
    names = {"embed/weight": "model.embed_tokens.weight", "norm/weight": "model.norm.weight"}
    if not config.tie_embeddings:
        names["head/weight"] = "lm_head.weight"
    for i in range(config.num_layers):
        names |= {f"blocks/{i}/{path}": f"model.layers.{i}.{name}" for path, name in block.items()}
    return names


def tensor_shape(config: ModelConfig, path: str) -> tuple[int, ...]:
    """Shape of a parameter; weights are [out, in]."""
    layer, leaf = path.split("/")[-2:]
    d, heads, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if layer.endswith("norm"):
        return (config.head_dim if layer in ("q_norm", "k_norm") else d,)
    vocab, wide = (config.vocab_size, d), config.intermediate_size
    shape = {"embed": vocab, "head": vocab, "q": (heads, d), "k": (kv, d), "v": (kv, d), "o": (d, heads)}
    shape |= {"gate": (wide, d), "up": (wide, d), "down": (d, wide)}
    return shape[layer] if leaf == "weight" else shape[layer][:1]
