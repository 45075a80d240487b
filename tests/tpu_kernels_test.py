"""TPU kernels, interpreted on a CPU, against float64: every format, sizes that fill no tile, one token and many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import table_bytes
from jaxquant import matmul
from jaxquant.kernels.codebook_matmul import layout, tpu
from jaxquant.ops import supports
from jaxquant.serving import for_serving
from tests.ops_test import TENSORS, additive, dequantize, product, relative, uniform_tensor
from tests.tensors_test import random_codebook_tensor

BOUND = 2e-3


def levels(out, n, bits, **options):
    """A random CodebookTensor with a table per row."""
    return random_codebook_tensor(out, n, 1, 2**bits, (out, 1), (1, 1), **options)


# name: (weight, tokens, bound); the bounds say which arithmetic is exact to float32 and what is rounded to bfloat16.
CASES = {
    "2x8": (additive(136, 40), 1, 2e-4),
    "2x8, 4 tokens": (additive(40, 64), 4, 2e-4),
    "4x8, vectors of 4, column blocks": (additive(130, 64, 4, blocks=(1, 2), d=4), 1, 2e-4),
    "2x8 decoded": (additive(136, 136), 5, BOUND),
    "1x8 decoded, 128 tokens": (additive(20, 64, 1), 128, BOUND),
    "uniform 4-bit": (uniform_tensor(136, 135, 4), 1, 2e-5),
    "uniform 3-bit symmetric": (uniform_tensor(513, 83, 3, zero=False), 3, 2e-5),
    "uniform 2-bit": (uniform_tensor(5, 520, 2), 1, 2e-5),
    "uniform 8-bit": (uniform_tensor(136, 135, 8), 1, 2e-5),
    "uniform 4-bit groups": (uniform_tensor(136, 192, 4, 48), 2, 2e-5),
    "uniform 3-bit groups": (uniform_tensor(130, 192, 3, 32), 1, 2e-5),
    "uniform 8-bit groups": (uniform_tensor(130, 192, 8, 64), 1, 2e-5),
    "uniform 4-bit, 128 tokens": (uniform_tensor(40, 64, 4), 128, 2e-5),
    "16 levels": (levels(200, 135, 4, scaled=False), 1, BOUND),
    "8 levels": (levels(136, 70, 3), 1, 2e-5),
    "4 levels": (levels(12, 100, 2), 2, 2e-5),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_dense_product(name):
    weight, tokens, bound = CASES[name]
    x = np.random.default_rng(1).standard_normal((tokens, weight.shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T
    y = product(jnp.asarray(x), weight, "tpu")
    assert y.shape == (tokens, weight.shape[0])
    assert relative(y, expected) < bound


@pytest.mark.parametrize("name", ["2x8", "uniform 3-bit groups"])
def test_serving_layouts_change_nothing(name):
    weight, tokens, _ = CASES[name]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, weight.shape[1])), jnp.float32)
    served = jax.jit(lambda weight: for_serving(weight, "tpu"))(weight)
    np.testing.assert_array_equal(product(x, served, "tpu"), product(x, weight, "tpu"))


def test_several_grid_steps(monkeypatch):
    monkeypatch.setattr(tpu, "_SLOTS_AT_ONCE", 32)
    monkeypatch.setattr(tpu, "_OUTPUTS_AT_ONCE", 128)
    weight = additive(300, 200)  # 50 slots
    x = np.random.default_rng(1).standard_normal((1, 200)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T
    y = jax.jit(lambda x, weight: matmul(x, weight, "tpu"))(jnp.asarray(x), weight)
    assert relative(y, expected) < 2e-4


def test_half_precision_inputs_are_exact():
    weight = uniform_tensor(40, 64, 4)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 64)), jnp.bfloat16)
    y = product(x, weight, "tpu")
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(weight), np.float64).T
    assert relative(y, expected) < 2**-8  # the result alone is rounded


def test_weights_of_several_parts():
    weight = TENSORS["joined rows"]
    x = np.random.default_rng(1).standard_normal((1, weight.shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T
    assert relative(product(jnp.asarray(x), weight, "tpu"), expected) < 2e-4


def test_one_byte_is_coarse_and_asked_for():
    weight = additive(130, 64)
    slots = layout.to_slots(weight.codes.unpack())
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(dequantize(weight), np.float64).T
    settings = {"blocks": (1, 1), "dimension": 8, "out": 130}
    one, two = (
        tpu.lookup_matmul(jnp.asarray(x), slots, weight.codebooks, weight.scale, num_bytes=n, **settings)
        for n in (1, 2)
    )
    assert BOUND < relative(one, expected) < 4e-2
    assert relative(two, expected) < 2e-4


@pytest.mark.parametrize("more", [0, 14])
def test_the_experiment_on_rounded_tables_sums_as_the_kernel_does(more):
    rng = np.random.default_rng(1)
    slots = jnp.asarray(rng.integers(0, 256, (50, 130)), jnp.uint8)
    planes = jnp.asarray(rng.integers(0, 256, (3, 50, 256)), jnp.uint8)
    alike = jnp.broadcast_to(jnp.uint8(128), (3, more, 256))  # rows beyond the slots, where the codes are arbitrary
    padded = jnp.concatenate([planes, alike, jnp.zeros((3, 14 - more, 256), jnp.uint8)], axis=1)
    np.testing.assert_array_equal(table_bytes.lookup_sums(slots, padded), tpu.lookup_sums(slots, padded))


def test_inputs_of_zero_give_zero():
    y = product(jnp.zeros((1, 64)), additive(130, 64), "tpu")
    np.testing.assert_array_equal(y, np.zeros((1, 130)))


@pytest.mark.parametrize(
    ("weight", "tokens", "reason"),
    [
        (additive(), 129, "expected at most 128 tokens, got 129"),
        (additive(size=16), 1, "expected codes of 8 bits and codebooks for all rows, got 4 bits"),
        (additive(count=3), 5, "expected 1, 2 or 4 codebooks with vectors of 8 in one block beyond 4 tokens, got 3"),
        (uniform_tensor(), 129, "expected at most 128 tokens"),
        (uniform_tensor(1, 2**16, 2), 100, "expected at most 53 tokens, got 100"),
        (uniform_tensor(n=30, group=10), 1, "expected groups of a multiple of 16 columns, got 10"),
    ],
)
def test_refusals(weight, tokens, reason):
    assert reason in supports(weight, "tpu", tokens=tokens)
    with pytest.raises(ValueError, match=reason):
        matmul(jnp.ones((tokens, weight.shape[1])), weight, "tpu")
