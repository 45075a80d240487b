"""The sequential protocol on a tiny model: every method, what each layer's hessian is, resuming, reports and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    METHODS,
    AQLMConfig,
    CMPQConfig,
    GPTQConfig,
    GPTVQConfig,
    RTNConfig,
    Rule,
    TrellisConfig,
    dense_tree,
    pipeline,
    resolve,
    stats,
    trees,
)
from jaxquant.models.load import load_model
from jaxquant.pipeline import compile_ahead, layer_key, quantize_blocks, quantize_layer
from jaxquant.plan import linear_paths
from jaxquant.tensors import is_quantized
from tests import tiny
from tests.conftest import make_problem
from tests.contract_test import CASES

KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 24))
BATCH = 2
# Every method takes part, each on layers of one shape, so that few programs need compiling.
# Methods whose tables outweigh a tiny layer have end-to-end runs of their own size elsewhere.
SMALL = [m for m in METHODS if m not in (CMPQConfig, TrellisConfig, GPTVQConfig, AQLMConfig)]
CONFIGS = [next(c.config for c in CASES.values() if type(c.config) is method) for method in SMALL]
LAYERS = ["attn/q", "attn/k", "mlp/gate", "mlp/down", "attn/v", "attn/o", "mlp/up"]
RULES = [Rule(f".*/{layer}", config) for layer, config in zip(LAYERS, CONFIGS, strict=False)]
RULES.append(Rule(".*", RTNConfig(4, search="minmax")))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(tiny.write(tmp_path_factory.mktemp("model")))


def plan_of(loaded, rules=RULES):
    return resolve(rules, linear_paths(loaded.model, loaded.params))


def run(loaded, rules=RULES, params=None, **kwargs):
    params = loaded.params if params is None else params
    return list(
        quantize_blocks(loaded.model, params, TOKENS, plan_of(loaded, rules), key=KEY, batch_size=BATCH, **kwargs)
    )


@pytest.fixture(scope="module")
def finished(loaded):
    """Results of a run, and the hessian that each layer was given."""
    hessians = {}

    def record(path, weight, hessian, *args, **kwargs):
        hessians[path] = np.asarray(hessian)
        return quantize_layer(path, weight, hessian, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "quantize_layer", record)
        return run(loaded), hessians


def assert_same_bits(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_method_quantizes_every_block(loaded, finished):
    results, _ = finished
    assert {type(rule.config) for rule in RULES} == set(SMALL)
    assert [r.index for r in results] == [0, 1]
    plan = plan_of(loaded)
    for result in results:
        for report in result.reports:
            weight = trees.get(result.block, report.path.split("/", 2)[2])["weight"]
            dense = trees.get(loaded.params, report.path)["weight"]
            assert is_quantized(weight)
            assert report.shape == weight.shape == dense.shape
            assert (report.format, report.bits) == (weight.format, weight.storage_bits())
            assert 0 < report.relative_error < 0.5
            assert (report.tokens, report.dead) == (TOKENS.size, 0)
            assert report.damp == pytest.approx(getattr(plan[report.path], "damp", None))
            assert report.seconds > 0
    assert [r.path for result in results for r in result.reports] == list(plan)
    params = {**loaded.params, "blocks": [r.block for r in results]}
    forward = jax.jit(loaded.model.forward)
    ours, expected = (forward(p, TOKENS) for p in (params, loaded.params))
    assert np.isfinite(ours).all()
    assert float(jnp.mean((ours - expected) ** 2) / jnp.mean(expected**2)) < 1  # that of zeros
    np.testing.assert_allclose(forward(dense_tree(params), TOKENS), ours, atol=1e-4)


def capture(model, block, hidden, group):
    """E[x x^T] in float64 of what `group` sees, all sequences at once."""
    x = np.asarray(jax.jit(model.capture, static_argnums=(2, 3))(block, hidden, "full", group), np.float64)
    x = x.reshape(-1, x.shape[-1])
    return x.T @ x / len(x)


def assert_hessian(ours, expected):
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def test_24_each_layer_sees_inputs_that_passed_what_is_quantized(loaded, finished):
    """Sequential protocol: groups in order within a block, blocks in order, always on quantized predecessors."""
    (first, _), hessians = finished
    model, dense = loaded.model, loaded.params["blocks"][0]
    qkv, o, gate_up, down = model.groups
    hidden = jax.jit(model.embed)(loaded.params, jnp.asarray(TOKENS))
    for name in qkv:
        assert_hessian(hessians[f"blocks/0/{name}"], capture(model, dense, hidden, qkv))
    done = dense
    for names, group in ((qkv, o), (o, gate_up), (gate_up, down)):
        for name in names:
            done = trees.replace(done, name, trees.get(first.block, name))
        seen = capture(model, done, hidden, group)
        for name in group:
            assert_hessian(hessians[f"blocks/0/{name}"], seen)
        assert np.abs(seen - capture(model, dense, hidden, group)).max() > 1e-3 * np.abs(seen).max()
    second = loaded.params["blocks"][1]
    forward = jax.jit(model.block, static_argnums=2)
    assert_hessian(hessians["blocks/1/attn/q"], capture(model, second, forward(first.block, hidden, "full"), qkv))
    unlike = capture(model, second, forward(dense, hidden, "full"), qkv)
    assert np.abs(hessians["blocks/1/attn/q"] - unlike).max() > 1e-3 * np.abs(unlike).max()


def test_24_resuming_changes_nothing(loaded, finished):
    results, _ = finished
    params = {**loaded.params, "blocks": [results[0].block, loaded.params["blocks"][1]]}
    resumed = run(loaded, params=params, start=1)
    assert [r.index for r in resumed] == [1]
    assert_same_bits(resumed[0].block, results[1].block)
    same = [dataclasses.replace(r, seconds=0.0) for r in resumed[0].reports]
    assert same == [dataclasses.replace(r, seconds=0.0) for r in results[1].reports]
    assert run(loaded, params={**loaded.params, "blocks": [r.block for r in results]}, start=2) == []


def recorded(monkeypatch):
    """The hessian that each layer will be given, by path, once something runs; layers stay as they are."""
    hessians = {}

    def record(path, weight, hessian, *_, **__):
        hessians[path] = np.asarray(hessian)
        return weight, None

    monkeypatch.setattr(pipeline, "quantize_layer", record)
    monkeypatch.setattr(pipeline, "compile_ahead", lambda *_, **__: None)
    return hessians


def test_each_layer_has_the_weights_of_its_tokens(loaded, monkeypatch):
    """Hessians are sum w x x^T / sum w; weights of ones change nothing."""
    hessians = recorded(monkeypatch)
    rng, names = np.random.default_rng(0), [name for group in loaded.model.groups for name in group]
    importance = [{n: rng.exponential(size=TOKENS.shape).astype(np.float32) for n in names} for _ in range(2)]
    run(loaded, importance=importance)
    hidden = jax.jit(loaded.model.embed)(loaded.params, jnp.asarray(TOKENS))
    block = loaded.params["blocks"][0]
    x = np.asarray(jax.jit(loaded.model.capture, static_argnums=(2, 3))(block, hidden, "full", loaded.model.groups[0]))
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    for name in "qkv":
        w = importance[0][f"attn/{name}"].reshape(-1, 1)
        assert_hessian(hessians[f"blocks/0/attn/{name}"], (w * x).T @ x / w.sum())
    plain = dict(hessians)
    run(loaded)
    assert np.abs(plain["blocks/0/attn/q"] - hessians["blocks/0/attn/q"]).max() > 0
    weighted = dict(hessians)
    run(loaded, importance=[dict.fromkeys(names, np.ones(TOKENS.shape, np.float32)) for _ in range(2)])
    for path, hessian in weighted.items():
        assert_hessian(hessians[path], hessian)


def test_24_a_plan_of_nothing_changes_nothing(loaded, monkeypatch):
    monkeypatch.setattr(stats, "capture_update", None)  # nor does it gather statistics
    monkeypatch.setattr(pipeline, "compile_ahead", lambda *_, **__: None)
    results = run(loaded, [Rule(".*", None)])
    for result, block in zip(results, loaded.params["blocks"], strict=True):
        assert_same_bits(result.block, block)
        assert all(r.format == "float32" and r.relative_error is None for r in result.reports)
        assert all(r.bits == 32 * r.shape[0] * r.shape[1] for r in result.reports)


def test_layers_left_dense_pass_hidden_states_on(loaded, monkeypatch):
    """With a dense first block the second one's hessian is that of the dense model."""
    hessians = recorded(monkeypatch)
    run(loaded, [Rule("blocks/1/attn/[qkv]", RTNConfig(3, group_size=16)), Rule(".*", None)])
    model, (first, second) = loaded.model, loaded.params["blocks"]
    hidden = jax.jit(model.embed)(loaded.params, jnp.asarray(TOKENS))
    expected = capture(model, second, jax.jit(model.block, static_argnums=2)(first, hidden, "full"), model.groups[0])
    assert list(hessians) == [f"blocks/1/attn/{name}" for name in "qkv"]
    for hessian in hessians.values():
        assert_hessian(hessian, expected)


def test_what_is_compiled_ahead_is_what_runs(loaded, finished):
    compile_ahead(loaded.model, loaded.params, plan_of(loaded), TOKENS[:BATCH].shape, KEY)
    functions = [*METHODS.values(), stats.capture_update]
    compiled = [f._cache_size() for f in functions]
    run(loaded)
    assert [f._cache_size() for f in functions] == compiled


def test_keys_depend_on_the_path_alone():
    keys = [jax.random.key_data(layer_key(KEY, p)).tolist() for p in ("blocks/0/attn/q", "blocks/0/attn/k")]
    assert keys[0] != keys[1]
    assert keys[0] == jax.random.key_data(layer_key(KEY, "blocks/0/attn/q")).tolist()
    assert keys[0] != jax.random.key_data(layer_key(jax.random.key(1), "blocks/0/attn/q")).tolist()


WEIGHT, HESSIAN = (jnp.asarray(x, jnp.float32) for x in make_problem(out=16, columns=32))


def test_reports_tell_of_dead_inputs_and_raised_damping():
    hessian = np.array(HESSIAN)
    hessian[[3, 9]] = hessian[:, [3, 9]] = 0
    config = GPTQConfig(4, search="minmax")
    tensor, report = quantize_layer("blocks/0/attn/k", WEIGHT, jnp.asarray(hessian), config, key=KEY, tokens=77)
    assert (report.dead, report.tokens, report.damp) == (2, 77, pytest.approx(0.01))
    assert report.bits == tensor.storage_bits()
    values, basis = np.linalg.eigh(np.array(HESSIAN, np.float64))
    values[0] = -0.05 * values.mean()
    indefinite = jnp.asarray((basis * values) @ basis.T, jnp.float32)
    _, report = quantize_layer("blocks/0/attn/k", WEIGHT, indefinite, config, key=KEY)
    assert report.damp == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("weight", "hessian", "message"),
    [
        (WEIGHT.at[2, 3].set(jnp.nan), HESSIAN, r"blocks/1/mlp/up: expected a finite error, got nan .* all weights"),
        (WEIGHT.at[2, 3].set(jnp.inf), HESSIAN, r"blocks/1/mlp/up: expected a finite error"),
        (WEIGHT, 0 * HESSIAN, "blocks/1/mlp/up: expected a positive hessian, got zero: no calibration token"),
        (WEIGHT, HESSIAN.at[0, 0].set(jnp.nan), "blocks/1/mlp/up: expected finite inputs .* float16 activations"),
        (WEIGHT, HESSIAN.at[4, 4].set(jnp.inf), "blocks/1/mlp/up: expected finite inputs"),
        (WEIGHT[:, :5], HESSIAN, r"blocks/1/mlp/up: problem: expected weight \[out, in\]"),
    ],
)
def test_what_cannot_be_quantized_is_named(weight, hessian, message):
    with pytest.raises(ValueError, match=message):
        quantize_layer("blocks/1/mlp/up", weight, hessian, RTNConfig(3, search="minmax"), key=KEY)


def test_activations_that_overflow_name_the_layer(loaded):
    broken = trees.replace(loaded.params, "blocks/1/attn_norm/weight", jnp.full(32, jnp.nan))
    with pytest.raises(ValueError, match="blocks/1/attn/q: expected finite inputs on the calibration tokens"):
        run(loaded, params=broken)
