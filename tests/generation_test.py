"""Generated text: the same with a cache as without, packed as dense, and as transformers generates it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import cli, dense_tree, pack, trees
from jaxquant.export import load_packed, save_packed
from jaxquant.generation import STEPS, empty_cache, for_generation, generate, next_token, next_tokens, sample
from jaxquant.models import load_model, make_model
from jaxquant.models.config import parse_config
from jaxquant.serving import LookupTensor
from jaxquant.tensors import CodebookTensor, is_quantized
from tests import tiny
from tests.models_test import CONFIGS, TOKENS, nested, random_weights, reference_model
from tests.ops_test import outliers, uniform_tensor

PROMPT = [5, 17, 80, 3, 41, 9, 66]
COUNT = 9


def build(name):
    config = CONFIGS[name]
    parsed = parse_config(config)
    return make_model(parsed), nested(random_weights(config), parsed)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gemma3"])
def test_the_cache_changes_nothing(name):
    model, params = build(name)
    tokens = jnp.asarray(TOKENS)
    expected = jax.jit(model.forward)(params, tokens)
    cache = empty_cache(model.config, len(tokens), tokens.shape[1] + 2, jnp.float32)

    @functools.partial(jax.jit, static_argnames="time")
    def step(cache, start, time):
        hidden, after = model.embed(params, jax.lax.dynamic_slice_in_dim(tokens, start, time, 1)), []
        for block, kind, state in zip(params["blocks"], model.config.layer_kinds, cache, strict=True):
            hidden, state = model.step(block, hidden, kind, state, start)
            after.append(state)
        return model.head(params, hidden), after

    start = 0
    for time in (7, *[1] * 10, 7):
        logits, cache = step(cache, np.int32(start), time)
        np.testing.assert_allclose(logits, expected[:, start : start + time], atol=2e-5)  # as test_logits_equal
        start += time


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_greedy_text_equals_transformers(name):
    torch = pytest.importorskip("torch", reason="torch is the reference")
    model, params = build(name)
    reference = reference_model(CONFIGS[name], random_weights(CONFIGS[name]))
    with torch.no_grad():
        ids = reference.generate(
            torch.tensor([PROMPT]), max_new_tokens=COUNT, do_sample=False, pad_token_id=0, use_cache=True
        )
    assert list(generate(model, params, PROMPT, count=COUNT)) == ids[0, len(PROMPT) :].tolist()


def test_several_tokens_at_once_are_those_of_single_steps():
    model, params = build("llama")
    start, cache = np.int32(len(PROMPT)), [empty_cache(model.config, 2, 20, jnp.float32) for _ in range(2)]
    prompts = jnp.asarray([PROMPT, PROMPT[::-1]])
    (first, one), (_, many) = (next_token(model, params, prompts, c, np.int32(0)) for c in cache)
    at_once, many = next_tokens(model, params, first, many, start, count=5)
    token, single = first, []
    for place in range(5):
        token, one = next_token(model, params, token[:, None], one, start + np.int32(place))
        single.append(token)
    np.testing.assert_array_equal(at_once, jnp.stack(single, axis=1))
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("count", [1, 2, STEPS + 1, STEPS + 2])
def test_any_number_of_tokens(count):
    model, params = build("llama")
    model = model._replace(config=dataclasses.replace(model.config, eos_ids=()))
    longest = list(generate(model, params, PROMPT, count=STEPS + 2))
    assert list(generate(model, params, PROMPT, count=count)) == longest[:count]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sampled_text_is_drawn_from_the_model(name):
    """Every token is the draw of its key from the logits of a forward pass over the finished windows."""
    model, params = build(name)
    prompts, key = jnp.asarray([PROMPT[:3], PROMPT[3:6]]), jax.random.key(7)
    windows = sample(model, params, prompts, length=16, key=key)
    np.testing.assert_array_equal(windows[:, :3], prompts)
    logits = jax.jit(model.forward)(params, windows)
    for place in range(3, 16):
        drawn = jax.random.categorical(jax.random.fold_in(key, place), logits[:, place - 1])
        np.testing.assert_array_equal(windows[:, place], drawn)
    assert len(np.unique(windows)) > 8


def quantized(params):
    """Additive codes for most linear layers of the tiny Llama, other formats for some."""
    rng, changed = np.random.default_rng(0), {}
    for path, leaf in trees.flatten(params).items():
        if not path.startswith("blocks") or leaf.ndim != 2:
            continue
        out, n = leaf.shape
        codes = pack(jnp.asarray(rng.integers(0, 256, (2, out, n // 8))), 8)
        books = jnp.asarray(0.2 * rng.standard_normal((2, 256 * 8)), jnp.float16)
        changed[path] = CodebookTensor(codes, books, jnp.ones((out, 1), jnp.float16), (1, 1), (1, 8))
    changed["blocks/0/mlp/up/weight"] = outliers(changed["blocks/0/mlp/up/weight"])
    changed["blocks/1/attn/k/weight"] = uniform_tensor(*params["blocks"][1]["attn"]["k"]["weight"].shape)
    return trees.update(params, changed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A packed model of several formats."""
    folder = tmp_path_factory.mktemp("generation")
    loaded = load_model(tiny.write(folder / "dense"))
    save_packed(folder / "packed", quantized(loaded.params), tiny.CONFIG, {})
    tiny.write_tokenizer(folder / "packed")
    return folder / "packed"


def test_packed_text_is_that_of_the_dense_copy(saved):
    model, params = load_packed(saved)[:2]
    served = for_generation(params)
    held = [x for x in trees.flatten(served).values() if is_quantized(x)]
    assert len(held) == 13
    assert sum(isinstance(x, LookupTensor) for x in held) == 12
    ours = list(generate(model, served, PROMPT, count=COUNT))
    assert ours == list(generate(model, dense_tree(params), PROMPT, count=COUNT))
    assert len(set(ours)) > 2


def test_the_command_prints_text_and_speed(saved, capsys):
    command = ["generate", str(saved), "--prompt", "a grey cat [sat", "--tokens", "34"]
    texts = []
    for more in ([], ["--dense"]):
        assert cli.main([*command, *more]) == 0
        text = capsys.readouterr().out
        assert text.startswith("a grey cat [sat")
        assert f"{0 if more else 13} layers read packed" in text
        assert "prompt 16 tokens, generated 34" in text
        assert "tokens per second" in text
        texts.append(text[: text.index("\nweights ")])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 1, "a prompt of a token or more"),
        ([1], 0, "count >= 1, got 1, 0"),
        ([96], 1, r"expected ids in \[0, 96\), got 96 to 96"),
        ([1], 2**20, "expected at most 131072 tokens with the prompt"),
    ],
)
def test_errors(prompt, count, message):
    model, params = build("llama")
    with pytest.raises(ValueError, match=message):
        next(generate(model, params, prompt, count=count))
    with pytest.raises(ValueError, match="expected a model with a step function"):
        next(generate(model._replace(step=None), params, [1], count=1))
