import jax.numpy as jnp
import pytest

from jaxquant import GPTQConfig, LayerProblem, QuantEaseConfig, RTNConfig, Rule, resolve, rtn
from jaxquant.models import make_model
from jaxquant.models.config import parse_config
from jaxquant.plan import abstract_tensor, linear_paths, plan_layers
from tests import tiny

MODEL = make_model(parse_config(tiny.CONFIG))
PATHS = ["blocks/0/attn/q", "blocks/0/mlp/down", "blocks/1/attn/q", "blocks/1/mlp/down"]


def params(blocks=2, dtype="float32"):
    attn = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    mlp = {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}
    block = {
        part: {name: {"weight": jnp.zeros(shape, dtype)} for name, shape in shapes.items()}
        for part, shapes in (("attn", attn), ("mlp", mlp))
    }
    return {"blocks": [block] * blocks}


def test_paths_are_in_the_order_of_work():
    assert linear_paths(MODEL, params())[:8] == [
        "blocks/0/attn/q",
        "blocks/0/attn/k",
        "blocks/0/attn/v",
        "blocks/0/attn/o",
        "blocks/0/mlp/gate",
        "blocks/0/mlp/up",
        "blocks/0/mlp/down",
        "blocks/1/attn/q",
    ]


def test_the_first_matching_rule_wins():
    first, down = GPTQConfig(4), QuantEaseConfig(2)
    rules = [Rule("blocks/0/attn/.*", None), Rule(".*/down", down), Rule(".*", first)]
    assert resolve(rules, PATHS) == dict(zip(PATHS, [None, down, first, down], strict=True))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("blocks/0/.*", None)], r"no rule matches 'blocks/1/attn/q'; end with Rule\('\.\*', config or None\)"),
        ([Rule("block", None), Rule(".*", None)], "'block' decides no layer .* such as 'blocks/0/attn/q'"),
        ([Rule(".*", None), Rule(".*/down", None)], "'.*/down' decides no layer"),
        ([], "no rule matches"),
    ],
)
def test_rules_that_cannot_be_meant(rules, message):
    with pytest.raises(ValueError, match=message):
        resolve(rules, PATHS)


def test_planned_bits_are_those_of_the_result(key):
    config = RTNConfig(3, group_size=16)
    plan = resolve([Rule("blocks/0/.*", None), Rule(".*", config)], linear_paths(MODEL, params()))
    layers = plan_layers(plan, params(dtype="bfloat16"))
    assert [layer.path for layer in layers] == list(plan)
    dense, quantized = layers[0], layers[-1]
    assert (dense.shape, dense.config, dense.format, dense.bits) == ((32, 32), None, "bfloat16", 32 * 32 * 16)
    problem = LayerProblem(jnp.ones((32, 48)), jnp.eye(48))
    tensor = rtn(problem, config, key=key)
    assert (quantized.shape, quantized.format, quantized.bits) == ((32, 48), tensor.format, tensor.storage_bits())
    # 3-bit codes in words of 32, a float16 scale and a 3-bit zero per group: 3 * 48 = 4.5 words, 3 groups of 32 zeros
    assert quantized.bits == 32 * 5 * 32 + 32 * 3 * 16 + 3 * 3 * 32
    assert tensor.format == "uniform 3-bit g16"


def test_settings_that_do_not_fit_name_the_layer():
    plan = resolve([Rule(".*", RTNConfig(3, group_size=32))], linear_paths(MODEL, params()))
    with pytest.raises(ValueError, match=r"blocks/0/mlp/down 32x48: group_size: expected a divisor of the 48 input"):
        plan_layers(plan, params())


def test_an_abstract_tensor_costs_nothing():
    tensor = abstract_tensor((2**16, 2**16), GPTQConfig(4, group_size=128))
    assert tensor.shape == (2**16, 2**16)
    assert tensor.storage_bits() == 2**32 * 4 + 2**32 // 128 * (16 + 4)
