"""A random Llama of two blocks with a tokenizer of single bytes, written as a Hugging Face directory."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from jaxquant.models.config import parse_config, tensor_names, tensor_shape

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
}
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "seven",
    "grey",
    "birds",
    "flew",
    "over",
    "quiet",
    "green",
    "hills",
)


def weights(config=CONFIG, seed=0, dtype=np.float32):
    """Weights under Hugging Face names, large enough that every block changes its input."""
    rng = np.random.default_rng(seed)
    parsed = parse_config(config)
    result = {}
    for path, name in tensor_names(parsed).items():
        array = rng.standard_normal(tensor_shape(parsed, path))
        result[name] = (1 + 0.2 * array if "norm" in path else 0.25 * array).astype(dtype)
    return result


def text(words=3000, seed=0):
    """English words in random order."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def write_tokenizer(directory: Path) -> None:
    """Byte-level BPE without merges: token i is byte i in the order of the characters that stand for bytes."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write(directory: Path, config=CONFIG, tensors=None) -> Path:
    """Writes model and tokenizer; returns the directory, a source for `load_model` and `load_tokenizer`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights(config) if tensors is None else tensors, directory / "model.safetensors")
    write_tokenizer(directory)
    return directory


def write_text(file: Path, words=3000, seed=0) -> Path:
    """Writes a text file; returns its path."""
    file.write_text(text(words, seed))
    return file
