import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxquant.packing import WIDTHS, PackedArray, pack, rounded, saturate


def bit_stream(row, bits):
    """The documented layout, bit by bit."""
    stream = [(int(v) >> k) & 1 for v in row for k in range(bits)]
    stream += [0] * (-len(stream) % 32)
    return [sum(b << k for k, b in enumerate(stream[i : i + 32])) for i in range(0, len(stream), 32)]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_layout_and_round_trip(bits, length):
    values = np.random.default_rng(bits * length).integers(0, 2**bits, (3, length))
    packed = pack(jnp.asarray(values), bits)
    np.testing.assert_array_equal(packed.words, [bit_stream(row, bits) for row in values])
    np.testing.assert_array_equal(packed.unpack(), values)
    assert packed.shape == (3, length)
    assert packed.unpack().dtype == (jnp.uint8 if bits <= 8 else jnp.uint16)


@settings(max_examples=25, deadline=None)
@given(bits=st.sampled_from(WIDTHS), data=st.data())
def test_any_values_survive(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    np.testing.assert_array_equal(pack(jnp.asarray(values), bits).unpack(), values)


def test_batches_under_vmap_and_jit():
    values = jnp.asarray(np.random.default_rng(0).integers(0, 8, (4, 5, 70)))
    packed = jax.jit(jax.vmap(lambda v: pack(v, 3)))(values)
    assert isinstance(packed, PackedArray)
    np.testing.assert_array_equal(packed.unpack(), values)


@pytest.mark.parametrize("bits", [0, 17, 2.5])
def test_refuses_other_widths(bits):
    with pytest.raises(ValueError, match="bits: expected an integer from 1 to 16"):
        pack(jnp.zeros((4,), jnp.uint8), bits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float32"])
def test_rounding_is_that_of_storage(dtype):
    """Without a conversion that a compiler could drop: normal numbers, subnormal ones, zeros, ties, beyond the range."""
    info = jnp.finfo(dtype)
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(4000) * np.exp2(rng.uniform(-40, 20, 4000))
    ties = np.arange(64) * float(info.smallest_normal) / 2 ** (info.nmant + 1) if info.nexp < 8 else np.zeros(1)
    x = np.concatenate([spread, ties, -ties, [0.0, -0.0, 1.0, 1e30, -1e30]]).astype(np.float32)
    expected = np.clip(x, -float(info.max), float(info.max)).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(rounded(jnp.asarray(x), dtype), expected)
    assert saturate(jnp.asarray(x), dtype).dtype == dtype
    assert dtype == "float32" or f"new_dtype={dtype}" not in str(jax.make_jaxpr(lambda v: rounded(v, dtype))(x))
