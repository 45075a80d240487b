"""Perplexity and divergence against float64 numpy computations of the same tiny model."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import evaluate as module
from jaxquant.evaluate import evaluate, kl_divergence, perplexity
from jaxquant.models.base import Model
from jaxquant.packing import pack
from jaxquant.tensors import UniformTensor, dense, dense_tree

VOCAB, WIDTH, BOS = 37, 8, 5
F32 = np.finfo(np.float32).eps


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of a ModelConfig that evaluation reads."""

    vocab_size: int = VOCAB
    bos_id: int | None = BOS
    layer_kinds: tuple[str, ...] = ("full", "sliding", "full")


traced: list[str] = []


def embed(params, tokens):
    return dense(params["embed"]["weight"])[tokens]


def block(block, hidden, kind):
    """Mean over the past (kind full) or the token alone, through one layer."""
    traced.append(kind)
    if kind == "full":
        count = jnp.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[None, :, None]
        mixed = jnp.cumsum(hidden, axis=1) / count
    else:
        mixed = hidden
    return hidden + jnp.tanh(mixed @ dense(block["mlp"]["up"]["weight"]).T)


def head(params, hidden):
    return hidden @ dense(params["head"]["weight"]).T + params["norm"]["bias"][None, None]


MODEL = Model(Config(), embed, block, lambda *_: None, head)


def make_params(seed):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "embed": {"weight": normal(VOCAB, WIDTH)},
        "blocks": [{"mlp": {"up": {"weight": normal(WIDTH, WIDTH)}}} for _ in range(3)],
        "norm": {"bias": normal(VOCAB)},
        "head": {"weight": normal(VOCAB, WIDTH)},
    }


PARAMS, OTHER = make_params(0), make_params(1)
TOKENS = np.random.default_rng(2).integers(VOCAB, size=(7, 12))


def numpy_log_probabilities(params, tokens):
    """The model again, in float64: [n, L, vocab]."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    hidden = params["embed"]["weight"][tokens]
    for layer, kind in zip(params["blocks"], Config().layer_kinds, strict=True):
        mixed = hidden
        if kind == "full":
            mixed = np.stack([hidden[:, : t + 1].mean(axis=1) for t in range(hidden.shape[1])], axis=1)
        hidden = hidden + np.tanh(mixed @ layer["mlp"]["up"]["weight"].T)
    logits = hidden @ params["head"]["weight"].T + params["norm"]["bias"]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def numpy_perplexity(params, tokens):
    log_p = numpy_log_probabilities(params, tokens)
    means = [np.mean([-log_p[i, t, window[t + 1]] for t in range(len(window) - 1)]) for i, window in enumerate(tokens)]
    return math.exp(np.mean(means))


def numpy_kl(reference, params, tokens):
    p, q = (numpy_log_probabilities(x, tokens)[:, :-1] for x in (reference, params))
    return (np.exp(p) * (p - q)).sum(axis=-1).mean()


def test_perplexity_equals_numpy():
    result = perplexity(MODEL, PARAMS, TOKENS, chunk=5)
    np.testing.assert_allclose(result.value, numpy_perplexity(PARAMS, TOKENS), rtol=100 * F32)
    assert result.value == math.exp(result.nll)
    assert (result.windows, result.window_length, result.tokens_scored) == (7, 12, 77)
    assert result.dtype == "float32"
    json.dumps(dataclasses.asdict(result))


def test_uniform_logits_give_the_vocabulary_size():
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    np.testing.assert_allclose(perplexity(MODEL, params, TOKENS).value, VOCAB, rtol=10 * F32)


def test_kl_of_a_model_with_itself_is_zero():
    assert kl_divergence(MODEL, PARAMS, PARAMS, TOKENS) == 0.0


def test_kl_equals_numpy():
    kl = kl_divergence(MODEL, PARAMS, OTHER, TOKENS, chunk=7)
    np.testing.assert_allclose(kl, numpy_kl(PARAMS, OTHER, TOKENS), rtol=100 * F32)
    # The reference comes first, and the divergence is not symmetric.
    back = kl_divergence(MODEL, OTHER, PARAMS, TOKENS)
    np.testing.assert_allclose(back, numpy_kl(OTHER, PARAMS, TOKENS), rtol=100 * F32)
    assert abs(back - kl) > 0.01


def test_reference_perplexity_comes_with_the_divergence():
    *_, result = evaluate(MODEL, OTHER, TOKENS, PARAMS)
    np.testing.assert_allclose(result.perplexity.value, perplexity(MODEL, OTHER, TOKENS).value, rtol=10 * F32)
    np.testing.assert_allclose(result.reference.value, perplexity(MODEL, PARAMS, TOKENS).value, rtol=10 * F32)


@pytest.mark.parametrize(("chunk", "batch_size"), [(1, 7), (4, 3), (11, 1), (256, 50), (10**6, None)])
def test_chunks_and_batches_do_not_matter(chunk, batch_size):
    whole = perplexity(MODEL, PARAMS, TOKENS, batch_size=7, chunk=10**6).nll
    np.testing.assert_allclose(
        perplexity(MODEL, PARAMS, TOKENS, batch_size=batch_size, chunk=chunk).nll, whole, rtol=20 * F32
    )


def test_chunked_head_equals_the_whole_head():
    hidden = jax.random.normal(jax.random.key(0), (3, 12, WIDTH))
    log_p = jax.nn.log_softmax(head(PARAMS, hidden[:, :-1]))
    expected = -np.take_along_axis(np.asarray(log_p), TOKENS[:3, 1:, None], axis=-1)[..., 0]
    nll = module._cross_entropy(MODEL, module._ends(PARAMS), hidden, TOKENS[:3], chunk=4)
    np.testing.assert_allclose(nll, expected, rtol=10 * F32, atol=10 * F32)


def test_running_results_one_per_window():
    results = list(evaluate(MODEL, PARAMS, TOKENS, batch_size=3))
    assert [r.perplexity.windows for r in results] == list(range(1, 8))
    assert all(r.kl is None and r.reference is None for r in results)
    for result in results[2:5]:
        part = perplexity(MODEL, PARAMS, TOKENS[: result.perplexity.windows])
        np.testing.assert_allclose(result.perplexity.nll, part.nll, rtol=20 * F32)


def test_bos_is_recorded():
    assert not perplexity(MODEL, PARAMS, TOKENS).bos
    tokens = TOKENS.copy()
    tokens[:, 0] = BOS
    assert perplexity(MODEL, PARAMS, tokens).bos
    no_bos = MODEL._replace(config=Config(bos_id=None))
    assert not perplexity(no_bos, PARAMS, tokens).bos


def test_precision_is_recorded():
    with jax.default_matmul_precision("highest"):
        assert perplexity(MODEL, PARAMS, TOKENS).precision == "highest"


def test_bfloat16_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    result = perplexity(MODEL, params, TOKENS)
    assert result.dtype == "bfloat16"
    np.testing.assert_allclose(result.value, numpy_perplexity(PARAMS, TOKENS), rtol=0.1)


def test_quantized_parameters_equal_their_dense_form():
    def quantize(weight):
        codes = jnp.asarray(np.random.default_rng(3).integers(16, size=weight.shape), jnp.uint8)
        return UniformTensor(pack(codes, 4), jnp.full((len(weight), 1), 0.125, jnp.float16), None)

    matrices = {name: PARAMS[name] for name in ("embed", "blocks", "head")}
    params = {**jax.tree.map(quantize, matrices), "norm": PARAMS["norm"]}
    *_, result = evaluate(MODEL, params, TOKENS, dense_tree(params))
    assert abs(result.kl) < 10 * F32
    np.testing.assert_allclose(result.perplexity.nll, result.reference.nll, rtol=20 * F32)


def test_one_compilation_per_layer_kind():
    perplexity(MODEL, PARAMS, TOKENS[:, :9], batch_size=2)
    traced.clear()
    perplexity(MODEL, OTHER, TOKENS[:, :9], batch_size=2)
    assert traced == []
    perplexity(MODEL, PARAMS, TOKENS[:, :10], batch_size=2)
    assert sorted(traced) == ["full", "sliding"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(bad):
    # A single word of the vocabulary, which is no target: the loss alone would not show minus infinity.
    tokens = np.where(TOKENS == 3, 4, TOKENS)
    params = dict(PARAMS, norm={"bias": PARAMS["norm"]["bias"].at[3].set(bad)})
    with pytest.raises(ValueError, match="logits of window 0, position 0: expected finite numbers"):
        perplexity(MODEL, params, tokens)
    with pytest.raises(ValueError, match="expected finite numbers"):
        kl_divergence(MODEL, params, PARAMS, tokens)


def test_the_window_of_bad_logits_is_named():
    tokens = np.where(TOKENS == 3, 4, TOKENS)
    tokens[5, 2] = 3
    params = dict(PARAMS, embed={"weight": PARAMS["embed"]["weight"].at[3].set(math.nan)})
    with pytest.raises(ValueError, match="window 5, position 2"):
        perplexity(MODEL, params, tokens, batch_size=2)


def test_overflowing_perplexity_is_infinite():
    params = dict(PARAMS, norm={"bias": jnp.where(jnp.arange(VOCAB) == 3, 1e6, 0.0)})
    result = perplexity(MODEL, params, np.where(TOKENS == 3, 4, TOKENS))
    assert result.value == math.inf
    np.testing.assert_allclose(result.nll, 1e6, rtol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[0], "expected integers"),
        (TOKENS.astype(np.float32), "expected integers"),
        (TOKENS[:0], "expected integers"),
        (TOKENS[:, :1], r"expected integers \[n >= 1, length >= 2\], got int64 \(7, 1\)"),
        (TOKENS - VOCAB, r"expected ids in \[0, 37\)"),
        (TOKENS + VOCAB, r"expected ids in \[0, 37\)"),
    ],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        perplexity(MODEL, PARAMS, tokens)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"chunk": 0}])
def test_bad_sizes(bad):
    with pytest.raises(ValueError, match="expected batch_size >= 1 and chunk >= 1"):
        perplexity(MODEL, PARAMS, TOKENS, **bad)
