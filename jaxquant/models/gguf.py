"""Read GGUF files as if they were Hugging Face checkpoints: same config keys, tensor names, row order and norm weights.

Source of the conventions that are undone here: llama.cpp's convert_hf_to_gguf.py
(https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py): rows of q and k are permuted for architecture
"llama" (its rotary embedding pairs neighbours, Hugging Face pairs halves), Gemma norm weights are stored plus one,
and Llama 3's rope scaling is stored as a tensor of divisors. Quantized tensors are dequantized to f32.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from jaxquant.models.config import GEMMA, llama3_factors

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": GEMMA}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    GEMMA: "Gemma3ForCausalLM",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_LAYER = LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FREQS = "rope_freqs.weight"


class Checkpoint(NamedTuple):
    """Weights and configuration in Hugging Face terms, wherever they come from.

    Attributes:
      config: what config.json would hold.
      shapes: tensor name -> shape.
      read: tensor name -> array; nothing is read before.
      files: the files that hold the weights.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    files: tuple[Path, ...]


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Reader of a GGUF file; the last one is kept, since the library takes seconds for a large vocabulary.

    Raises:
      ValueError: a file that is not GGUF, or is cut off.
    """
    stat = path.stat()
    return reader_of(path.resolve(), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def reader_of(path: Path, *version: int) -> gguf.GGUFReader:
    """See `open_gguf`; `version` tells a rewritten file from the one that was read."""
    del version
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: expected a GGUF file, got one that cannot be read ({error})") from error


def metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    """All key-value fields as Python scalars, strings and lists."""
    return {name: field.contents() for name, field in reader.fields.items()}


def read_gguf(path: Path) -> Checkpoint:
    """A GGUF file as a Hugging Face checkpoint with f32 tensors.

    Args:
      path: the file; any tensor type that gguf.dequantize supports.

    Returns:
      A `Checkpoint`; its config has no rope scaling entry unless the file scales rope.

    Raises:
      ValueError: unknown architecture (the supported ones are listed), missing metadata (the key is named), a tensor
        that has no place in the architecture, or rope divisors that are not Llama 3's.
    """
    reader = open_gguf(path)
    fields = metadata(reader)
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture: expected one of {sorted(ARCHITECTURES)}, got {arch!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = hf_config(fields, arch, tensors)
    except KeyError as error:
        raise ValueError(f"{path}: metadata: expected the key {error}, got a file without it") from error
    if ROPE_FREQS in tensors:
        factors = np.asarray(tensors.pop(ROPE_FREQS).data, np.float64)
        config["rope_scaling"] = llama3_scaling(factors, config["rope_theta"], config["head_dim"])
    names = {hf_name(name, arch): name for name in tensors}

    def read(name: str) -> np.ndarray:
        tensor = tensors[names[name]]
        array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            array = unpermute(array, heads)
        return array - np.float32(1) if arch == "gemma3" and name.endswith("norm.weight") else array

    shapes = {name: tuple(int(n) for n in tensors[own].shape[::-1]) for name, own in names.items()}
    return Checkpoint(config, shapes, read, (path,))


def hf_name(name: str, arch: str) -> str:
    """The Hugging Face name of a GGUF tensor: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight.

    A name without a counterpart is returned as it is, so that the loader names it among the unexpected ones.
    """
    stem, _, suffix = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{suffix}"
    parts = stem.split(".")
    layer = GEMMA_LAYER if arch == "gemma3" else LAYER
    if len(parts) != 3 or parts[0] != "blk" or parts[2] not in layer:
        return name
    return f"model.layers.{parts[1]}.{layer[parts[2]]}.{suffix}"


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * head_dim, ...] from rotary neighbours (2i, 2i + 1) to halves (i, i + head_dim / 2)."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(array.shape))


def hf_config(fields: dict[str, Any], arch: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """What config.json would hold.

    Args:
      fields: metadata of the file.
      arch: its architecture, one of ARCHITECTURES.
      tensors: tensor name -> anything with a shape (GGUF order, fastest axis first).

    Returns:
      A config that transformers accepts.

    Raises:
      KeyError: metadata that must be there is not.
    """

    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"{arch}.{key}", default)

    def need(key: str) -> Any:
        return fields[f"{arch}.{key}"]

    model_type, heads, width = ARCHITECTURES[arch], need("attention.head_count"), need("embedding_length")
    head_dim = get("attention.key_length", get("rope.dimension_count", width // heads))
    config = {
        "model_type": model_type,
        "architectures": [CLASSES[model_type]],
        "dtype": "float32",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "partial_rotary_factor": get("rope.dimension_count", head_dim) / head_dim,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "num_local_experts": get("expert_count", 0),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    for key, usual in (("partial_rotary_factor", 1.0), ("num_local_experts", 0)):
        if config[key] == usual:
            del config[key]
    if get("rope.scaling.type", "none") != "none":
        config["rope_scaling"] = {"rope_type": need("rope.scaling.type"), "factor": get("rope.scaling.factor", 1.0)}
    return config | (gemma_config(get, config) if arch == "gemma3" else {})


def gemma_config(get: Callable[..., Any], config: dict[str, Any]) -> dict[str, Any]:
    """Entries of a Gemma 3 config; llama.cpp (src/models/gemma3.cpp) has the same constants where the file is silent.

    The 27B model (62 blocks) scales queries by hidden_size / heads, the others by head_dim.
    """
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    period = get("attention.sliding_window_pattern", 6)
    sliding = period if isinstance(period, list) else [bool((i + 1) % period) for i in range(layers)]
    return {
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "sliding_window": get("attention.sliding_window"),
        "rope_local_base_freq": get("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": config["hidden_size"] // heads if layers == 62 else config["head_dim"],
        "final_logit_softcapping": get("final_logit_softcapping"),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def llama3_scaling(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Rope scaling entry of config.json that gives the divisors stored in a GGUF file.

    Raises:
      ValueError: no Llama 3 scaling with the published constants (1, 4, 8192) gives these divisors.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(np.max(factors)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(theta, head_dim, scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(f"{ROPE_FREQS}: expected the divisors of {scaling}, got others; load the original model")
    return scaling
