"""What a layer costs the model: against measured divergence and finite differences; the allocation against its budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import METHODS, LNQConfig, RTNConfig, run, sensitivity, trees
from jaxquant.data import TokenSet
from jaxquant.evaluate import kl_divergence
from jaxquant.models.load import load_model
from jaxquant.plan import linear_paths, plan_layers, variants
from jaxquant.problem import LayerProblem
from tests import tiny

KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 256, (32, 32))
CONFIGS = [RTNConfig(bits, search="minmax") for bits in (2, 3, 6)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(tiny.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def costs(loaded):
    results = list(sensitivity.layer_costs(loaded.model, loaded.params, TOKENS, CONFIGS, key=KEY))
    assert [r.index for r in results] == [1, 0]
    return results[1].costs | results[0].costs


def test_costs_predict_the_divergence_of_replacing_one_layer(loaded, costs):
    """With 6 bits, where errors are small enough for second order; other layers of the model left as they are."""
    predicted, measured = [], []
    for path in costs:
        weight = trees.get(loaded.params, path)["weight"]
        identity = jnp.eye(weight.shape[1], dtype=jnp.float32)
        quantized = METHODS[RTNConfig](LayerProblem(weight, identity), CONFIGS[2], key=KEY)
        params = trees.replace(loaded.params, f"{path}/weight", quantized)
        measured.append(kl_divergence(loaded.model, loaded.params, params, TOKENS))
        predicted.append(costs[path][2])
    ratio = np.log(np.asarray(predicted) / np.asarray(measured))
    assert abs(ratio.mean()) < 0.15, ratio
    assert (abs(ratio) < np.log(2)).all(), ratio


def test_costs_fall_with_bits_and_come_in_the_order_of_layers(loaded, costs):
    assert list(costs) == linear_paths(loaded.model, loaded.params)
    for options in costs.values():
        assert options[0] > options[1] > options[2] > 0


def test_importance_is_the_norm_of_gradients_in_outputs(loaded, monkeypatch):
    """Against one derivative through the whole model, for a loss whose gradient in the last hidden states is given."""
    tokens, path = TOKENS[:4, :8], "blocks/0/mlp/up"
    model, params = loaded.model, loaded.params
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8, model.config.hidden_size)), jnp.float32)
    monkeypatch.setattr(sensitivity, "_head_gradient", lambda *_: cotangent.copy())
    found = sensitivity.token_importance(model, params, tokens, key=KEY)[0]["mlp/up"]

    def hidden(tap):
        x, tapped = model.embed(params, tokens), trees.replace(params, f"{path}/bias", tap)
        for block in tapped["blocks"]:
            x = model.block(block, x, "full")
        return x

    layer = {**trees.get(params, path), "bias": jnp.zeros(())}
    params = trees.replace(params, path, layer)
    tap = jnp.zeros((4, 8, layer["weight"].shape[0]))
    norms = np.linalg.norm(jax.jit(lambda tap: jax.vjp(hidden, tap)[1](cotangent)[0])(tap), axis=-1)
    assert found.shape == tokens.shape
    np.testing.assert_allclose(found, norms / norms.mean(), rtol=1e-3)


def test_allocation_keeps_the_budget_and_beats_equal_bits(loaded, costs):
    def total(plan):
        return sum(costs[path][CONFIGS.index(config)] for path, config in plan.items())

    equal = dict.fromkeys(costs, CONFIGS[1])
    weights = sum(np.prod(layer.shape) for layer in plan_layers(equal, loaded.params))
    budget = sum(layer.bits for layer in plan_layers(equal, loaded.params)) / weights
    plan = sensitivity.allocate_layers(costs, loaded.params, CONFIGS, budget)
    assert sum(layer.bits for layer in plan_layers(plan, loaded.params)) / weights <= budget
    assert total(plan) <= total(equal)
    with pytest.raises(ValueError, match="average_bits: expected at least"):
        sensitivity.allocate_layers(costs, loaded.params, CONFIGS, 1.0)


def test_settings_that_do_not_fit_a_layer_are_never_chosen(loaded):
    configs = [RTNConfig(2, group_size=48, search="minmax"), RTNConfig(3, search="minmax")]  # 48 divides "down" alone
    results = list(sensitivity.layer_costs(loaded.model, loaded.params, TOKENS[:4], configs, key=KEY, done=(0,)))
    assert [r.index for r in results] == [1]
    assert {path for path, (first, _) in results[0].costs.items() if np.isfinite(first)} == {"blocks/1/mlp/down"}
    plan = sensitivity.allocate_layers(results[0].costs, loaded.params, configs, 8.0)
    assert all(config is configs[1] for path, config in plan.items() if not path.endswith("down"))


def test_measured_costs_are_taken_up_and_belong_to_one_run(loaded, costs, tmp_path, monkeypatch):
    data, file = TokenSet(TOKENS, {"hash": "x"}), tmp_path / "costs.json"
    first = run.measure_costs(loaded, data, CONFIGS, file)
    assert next(first) == 1
    first.close()
    assert list(run.measure_costs(loaded, data, CONFIGS, file)) == [1, 0]
    assert run.read_costs(file) == costs
    monkeypatch.setattr(sensitivity, "layer_costs", None)  # a finished file is only read
    assert list(run.measure_costs(loaded, data, CONFIGS, file)) == [0, 1]
    with pytest.raises(ValueError, match="expected costs of this model"):
        list(run.measure_costs(loaded, data, CONFIGS, file, seed=1))


def test_variants_are_valid_settings_at_other_widths():
    assert [c.bits for c in variants(LNQConfig(3, rounds=2))] == [2, 3, 4, 5, 6]
    assert all(c.rounds == 2 for c in variants(LNQConfig(3, rounds=2)))
