"""Models agree with transformers, and what the pipeline reads of them is what their layers see."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxquant.models import load_model, make_model, transformer
from jaxquant.models.config import parse_config, tensor_names, tensor_shape

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 2.0**-17,  # exact in f32, as GGUF stores it
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
PLAIN = {k: v for k, v in LLAMA.items() if k != "rope_scaling"} | {"rope_theta": 10000.0}
GEMMA = PLAIN | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
    "final_logit_softcapping": 3.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# Llama's scaling is set to change all kinds of frequencies within the sequence of 24 tokens.
SCALED = LLAMA | {"rope_theta": 100.0}
SCALED["rope_scaling"] = LLAMA["rope_scaling"] | {"original_max_position_embeddings": 16}
CONFIGS = {
    "llama": SCALED,
    "llama-linear": PLAIN | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "attention_bias": True},
    "mistral": PLAIN | {"model_type": "mistral", "sliding_window": 7},
    "qwen2": PLAIN | {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": 16},
    "qwen2-sliding": PLAIN
    | {"model_type": "qwen2", "head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": PLAIN | {"model_type": "qwen3"},
    "gemma3": GEMMA,
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))


def random_weights(config, seed=0, dtype=np.float32):
    """Weights under Hugging Face names, large enough that every part matters."""
    rng = np.random.default_rng(seed)
    parsed = parse_config(config)
    return {
        name: (rng.normal(size=tensor_shape(parsed, path)) * (0.5 if "norm" in path else 0.2)).astype(dtype)
        for path, name in tensor_names(parsed).items()
    }


def write_directory(path, config, weights):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors")
    return path


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params):
    return model.forward(params, jnp.asarray(TOKENS))


def logits(loaded):
    return np.asarray(forward(loaded.model, loaded.params))


def reference_model(config, weights):
    """The torch model of transformers with the same weights."""
    torch = pytest.importorskip("torch", reason="torch is the reference")
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    config = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    state = {name: torch.tensor(array) for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


def reference_logits(model):
    torch = pytest.importorskip("torch", reason="torch is the reference")
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, tmp_path):
    config = CONFIGS[name]
    model = reference_model(config, random_weights(config))
    expected = reference_logits(model)
    model.save_pretrained(tmp_path / "v5")
    ours = logits(load_model(tmp_path / "v5"))
    assert ours.dtype == np.float32
    assert np.abs(expected).max() > 0.5
    # f32 rounding of sums of 96 terms in 2 or 3 blocks, on logits of order 10
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    again = logits(load_model(write_directory(tmp_path / "v4", config, random_weights(config))))
    np.testing.assert_array_equal(again, ours)  # both spellings of the configuration mean the same


def test_dtype_is_kept(tmp_path):
    config = CONFIGS["gemma3"]
    exact = load_model(write_directory(tmp_path / "f32", config, random_weights(config)))
    half = load_model(write_directory(tmp_path / "bf16", config, random_weights(config, dtype=jnp.bfloat16)))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    hidden = half.model.embed(half.params, TOKENS)
    block = functools.partial(half.model.block, kind="sliding")
    assert jax.eval_shape(block, half.params["blocks"][0], hidden).dtype == jnp.bfloat16
    assert logits(half).dtype == np.float32
    np.testing.assert_allclose(logits(half), logits(exact), atol=0.3)  # 8 bits of mantissa, softcap at 3


@pytest.mark.parametrize("name", ["gemma3", "llama-linear"])
def test_capture_is_the_input_of_the_linear_layers(name):
    torch = pytest.importorskip("torch", reason="torch is the reference")
    config = CONFIGS[name]
    weights = random_weights(config)
    reference = reference_model(config, weights)
    seen = {}
    for i, layer in enumerate(reference.model.layers):
        for path, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                key = (i, path.replace("self_attn.", "attn/").replace("mlp.", "mlp/").replace("_proj", ""))
                module.register_forward_pre_hook(lambda _, x, key=key: seen.__setitem__(key, x[0].numpy().copy()))
    reference_logits(reference)
    parsed = parse_config(config)
    model, params = make_model(parsed), nested(weights, parsed)
    hidden = model.embed(params, TOKENS)
    capture, run = jax.jit(model.capture, static_argnums=(2, 3)), jax.jit(model.block, static_argnums=2)
    for i, (block, kind) in enumerate(zip(params["blocks"], parsed.layer_kinds, strict=True)):
        for group in model.groups:
            x = np.asarray(capture(block, hidden, kind, group))
            for path in group:
                np.testing.assert_allclose(x, seen[i, path], atol=2e-5, err_msg=f"{i} {path}")
        hidden = run(block, hidden, kind)
    with pytest.raises(ValueError, match="group: expected one of"):
        model.capture(params["blocks"][0], hidden, "full", ("attn/q",))


def nested(weights, parsed):
    """Parameters of a model from weights under Hugging Face names."""
    params = {"blocks": [{} for _ in range(parsed.num_layers)]}
    for path, name in tensor_names(parsed).items():
        *parents, leaf = path.split("/")
        node = params
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[leaf] = jnp.asarray(weights[name])
    return params


def test_few_sequences_at_a_time_change_nothing(monkeypatch):
    parsed = parse_config(CONFIGS["mistral"])
    q = jax.random.normal(jax.random.key(0), (5, 24, 4, 32))
    kv = jax.random.normal(jax.random.key(1), (5, 24, 2, 32))

    def total(q):
        out = transformer.attend(parsed, q, kv, kv, "sliding")
        return jnp.sum(out**2), out

    (_, whole), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(q)
    monkeypatch.setattr(transformer, "MAX_SCORES", 2 * 4 * 24 * 24)
    (_, parts), other = jax.jit(jax.value_and_grad(lambda q: total(q), has_aux=True))(q)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    np.testing.assert_allclose(other, slope, atol=1e-4)
    assert not np.allclose(transformer.attend(parsed, q, kv, kv, "full"), whole)


def test_future_and_distant_tokens_do_not_matter():
    parsed = parse_config(CONFIGS["mistral"])
    model, params = make_model(parsed), nested(random_weights(CONFIGS["mistral"]), parsed)
    block = params["blocks"][0]
    hidden = model.embed(params, TOKENS)
    run = jax.jit(model.block, static_argnums=2)
    out, changed = run(block, hidden, "sliding"), run(block, hidden.at[:, 10].add(1.0), "sliding")
    same = np.isclose(out, changed, atol=1e-6).all(axis=(0, 2))
    assert same.tolist() == [not 10 <= t < 10 + 7 for t in range(24)]


def test_equal_configurations_share_a_model():
    model = make_model(parse_config(LLAMA))
    assert model is make_model(parse_config(dict(LLAMA)))
    assert hash(model) == hash(make_model(parse_config(LLAMA)))


def test_a_token_outside_the_vocabulary_is_not_another_token():
    parsed = parse_config(PLAIN)
    params = nested(random_weights(PLAIN), parsed)
    assert np.isnan(make_model(parsed).embed(params, np.array([[3, 96]]))).any(-1).tolist() == [[False, True]]


def test_strict_promotion():
    config = CONFIGS["gemma3"]
    parsed = parse_config(config)
    model, params = make_model(parsed), nested(random_weights(config, dtype=jnp.bfloat16), parsed)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        out = jax.eval_shape(model.forward, params, jnp.asarray(TOKENS))
    assert out.shape == (2, 24, 96)


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "head_dim", "fused"),
    [
        ("gpu", "9.0", jnp.bfloat16, 64, True),
        ("gpu", "8.0", jnp.float16, 128, True),
        ("gpu", "9.0", jnp.float32, 64, False),
        ("gpu", "9.0", jnp.bfloat16, 256, False),
        ("gpu", "9.0", jnp.bfloat16, 60, False),
        ("gpu", "7.5", jnp.float16, 64, False),
        ("gpu", "gfx942", jnp.bfloat16, 64, False),
        ("cpu", None, jnp.bfloat16, 64, False),
    ],
)
def test_where_attention_is_fused(monkeypatch, backend, capability, dtype, head_dim, fused):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert transformer._has_fused_attention(jnp.dtype(dtype), head_dim) == fused
