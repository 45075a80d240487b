"""One model from every kind of file, and what cannot be loaded says why."""

import json
import os

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxquant.models import load_model
from jaxquant.models.config import parse_config
from jaxquant.models.gguf import GEMMA_LAYER, LAYER, hf_name
from tests.models_test import CONFIGS, GEMMA, LLAMA, PLAIN, logits, random_weights, write_directory


def test_sharded_equals_whole(tmp_path):
    weights = random_weights(LLAMA)
    whole = write_directory(tmp_path / "whole", LLAMA, weights)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "config.json").write_text(json.dumps(LLAMA))
    names = sorted(weights)
    where = {name: f"model-{i % 3 + 1}-of-3.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: weights[n] for n in names if where[n] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    loaded = load_model(parts)
    assert len(loaded.files) == 3
    np.testing.assert_array_equal(logits(loaded), logits(load_model(whole)))
    (parts / "model-2-of-3.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected \['model-2-of-3.safetensors'\]"):
        load_model(parts)


def test_tied_head_may_be_stored_twice(tmp_path):
    config = CONFIGS["qwen2"]
    weights = random_weights(config)
    loaded = load_model(write_directory(tmp_path / "a", config, weights))
    assert "head" not in loaded.params
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    np.testing.assert_array_equal(logits(load_model(write_directory(tmp_path / "b", config, weights))), logits(loaded))


def test_multimodal_gives_the_text_model(tmp_path):
    weights = random_weights(GEMMA)
    expected = logits(load_model(write_directory(tmp_path / "text", GEMMA, weights)))
    outer = {"model_type": "gemma3", "text_config": GEMMA, "eos_token_id": [2, 3]}
    for i, prefix in enumerate(("language_model.model.", "model.language_model.")):
        wrapped = {name.replace("model.", prefix, 1): array for name, array in weights.items()}
        wrapped["vision_tower.patch.weight"] = np.ones((2, 2), np.float32)
        loaded = load_model(write_directory(tmp_path / str(i), outer, wrapped))
        np.testing.assert_array_equal(logits(loaded), expected)


def quantized(array, kind):
    """Raw GGUF data of an array and what it stands for."""
    raw = gguf.quantize(array, kind)
    return raw, np.asarray(gguf.dequantize(raw, kind), np.float32)


def write_gguf(path, arch, config, weights, extra=None):
    """A GGUF file as llama.cpp's converter writes it; returns the weights that it stands for, under their names."""
    layers = range(config["num_hidden_layers"])
    stems = ["token_embd", "output_norm", "output"]
    stems += [f"blk.{i}.{part}" for i in layers for part in (GEMMA_LAYER if arch == "gemma3" else LAYER)]
    own = {hf_name(f"{s}.{leaf}", arch): f"{s}.{leaf}" for s in stems for leaf in ("weight", "bias")}
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    kinds = [gguf.GGMLQuantizationType[k] for k in ("Q8_0", "F16", "F32", "Q4_1")]
    result = {}
    for i, (name, array) in enumerate(weights.items()):
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        kind = kinds[i % 4] if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = array
        if arch == "llama" and heads:
            rows = array.reshape(config[heads], 2, -1, *array.shape[1:]).swapaxes(1, 2)
            stored = np.ascontiguousarray(rows.reshape(array.shape))
        if arch == "gemma3" and name.endswith("norm.weight"):
            stored = array + 1
        raw, meant = quantized(stored, kind)
        writer.add_tensor(own[name], raw, raw_dtype=kind)
        if arch == "llama" and heads:
            meant = meant.reshape(config[heads], -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        result[name] = meant - 1 if arch == "gemma3" and name.endswith("norm.weight") else meant
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return result


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "qwen3", "gemma3"])
def test_gguf_equals_the_same_weights_from_a_directory(name, tmp_path):
    factors, config = None, PLAIN | {"model_type": name}
    if name == "llama":
        config = LLAMA
        factors = np.asarray(parse_config(LLAMA).rope.factors, np.float32)
    elif name == "llama-bias":
        config = PLAIN | {"attention_bias": True, "tie_word_embeddings": True}
    elif name == "gemma3":
        period = {"query_pre_attn_scalar": 32, "num_hidden_layers": 7, "layer_types": ["sliding_attention"] * 7}
        config = GEMMA | period | {"final_logit_softcapping": None, "rope_local_base_freq": 10000.0}
        config["layer_types"] = [*config["layer_types"][:5], "full_attention", "sliding_attention"]
        del config["rope_scaling"]
    extra = None if factors is None else {"rope_freqs.weight": factors}
    weights = write_gguf(tmp_path / "m.gguf", name.split("-")[0], config, random_weights(config), extra)
    expected = load_model(write_directory(tmp_path / "hf", config, weights))
    loaded = load_model(tmp_path / "m.gguf")
    np.testing.assert_allclose(logits(loaded), logits(expected), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded.params, expected.params)
    assert loaded.model is expected.model  # equal configurations
    assert parse_config(json.loads(json.dumps(loaded.config_dict))) == expected.model.config


def test_gguf_errors(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="expected a GGUF file"):
        load_model(tmp_path / "bad.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"expected one of \['gemma3', 'llama', 'qwen2', 'qwen3'\], got 'mamba'"):
        load_model(tmp_path / "other.gguf")
    odd = {"rope_freqs.weight": np.linspace(1, 8, 16, dtype=np.float32)}
    write_gguf(tmp_path / "odd.gguf", "llama", PLAIN, random_weights(PLAIN), odd)
    with pytest.raises(ValueError, match=r"rope_freqs.weight: expected the divisors of"):
        load_model(tmp_path / "odd.gguf")


def test_weight_errors_name_the_tensor(tmp_path):
    def load(change):
        weights = random_weights(PLAIN)
        change(weights)
        return load_model(write_directory(tmp_path / "m", PLAIN, weights))

    q = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=f"expected {q}, got a checkpoint without"):
        load(lambda w: w.pop(q))
    with pytest.raises(ValueError, match=rf"{q}: expected shape \(128, 64\) .* got \(64, 64\)"):
        load(lambda w: w.update({q: w[q][:64]}))
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match=f"{q}: expected finite numbers"):
            load(lambda w, value=value: w[q].__setitem__((3, 4), value))
    with pytest.raises(ValueError, match=f"{q}: expected floating point, got int8"):
        load(lambda w: w.update({q: w[q].astype(np.int8)}))
    with pytest.raises(ValueError, match=r"got model.layers.0.self_attn.q_proj.bias too"):
        load(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": np.ones(128, np.float32)}))


def test_source_errors(tmp_path):
    for source in (tmp_path / "nothing", "./nothing", tmp_path / "nothing.gguf"):
        with pytest.raises(ValueError, match=r"source: expected a Hugging Face directory, a .gguf file or a hub id"):
            load_model(source)
    with pytest.raises(ValueError, match=r"expected config.json in it"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ValueError, match="expected safetensors files"):
        load_model(tmp_path)


def test_hub_errors_are_plain(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub downloads models")

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="from the hub: OSError: no network"):
        load_model("someone/some-model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            r"model_type: expected one of \['gemma3_text', 'llama', 'mistral', 'qwen2', 'qwen3'\]",
        ),
        ({"hidden_size": None}, r"expected \['hidden_size'\] in it"),
        ({"hidden_act": "relu"}, "hidden_act: expected one of .* got 'relu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: expected .* got 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type: expected .* got 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, got 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1.0, got 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: expected None"),
        ({"num_local_experts": 8}, "num_local_experts: expected 0, got 8"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        parse_config(PLAIN | change)


@pytest.mark.skipif("JAXQUANT_TEST_MODEL" not in os.environ, reason="JAXQUANT_TEST_MODEL names no .gguf file")
def test_real_model_predicts_text():
    from jaxquant.tokenizer import load_tokenizer

    source = os.environ["JAXQUANT_TEST_MODEL"]
    loaded, tokenizer = load_model(source), load_tokenizer(source)
    ids = np.array([tokenizer.encode("The capital of France is Paris. The capital of Italy is", add_bos=True)])
    scores = loaded.model.forward(loaded.params, ids)
    assert tokenizer.decode([int(scores[0, -1].argmax())]).strip() == "Rome"
