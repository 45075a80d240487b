"""AQLM; numbers of METHODS section 9 in the names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.methods.aqlm import AQLMConfig, aqlm
from jaxquant.methods.rtn import RTNConfig, rtn
from jaxquant.problem import LayerProblem, relative_error
from jaxquant.tensors import CodebookTensor
from tests.conftest import make_problem
from tests.reference import vector as reference

SMALL = {"iterations": 5, "rounds": 2, "sweeps": 1}


def problem(**kwargs):
    return LayerProblem(*(jnp.asarray(x, jnp.float32) for x in make_problem(**kwargs)))


@pytest.mark.parametrize(
    "field", ["num_codebooks", "codebook_bits", "beam_size", "entry_bits", "start", "order", "damp"]
)
def test_bad_settings_are_named(field):
    with pytest.raises(ValueError, match=field):
        AQLMConfig(**{field: "x" if field in ("start", "order") else -1})


def test_vectors_must_fit(key):
    with pytest.raises(ValueError, match="group_size"):
        aqlm(problem(columns=46), AQLMConfig(), key=key)


def test_14_bits_of_a_large_layer_are_the_papers(key):
    """gate_proj of Llama-2 70B, 2x8 g8: 2.002232 bits."""
    out, n = 28672, 8192
    shapes = LayerProblem(jax.ShapeDtypeStruct((out, n), jnp.float32), jax.ShapeDtypeStruct((n, n), jnp.float32))
    tensor = jax.eval_shape(lambda p: aqlm(p, AQLMConfig.paper(), key=key), shapes)
    assert isinstance(tensor, CodebookTensor)
    assert tensor.storage_bits() / (out * n) == pytest.approx(2.002232, abs=1e-6)


def test_bits_of_the_best_settings(key):
    tensor = jax.eval_shape(lambda p: aqlm(p, AQLMConfig(2, 4, 4), key=key), problem(out=32, columns=64))
    books, scales = 2 * (16 * 4 * 8 + 16), 32 * 16 + 64 * 5 + 32
    assert tensor.storage_bits() == 2 * 32 * 64 + books + scales + 6 * 64


@pytest.mark.parametrize("start", ["feedback", "kmeans"])
def test_13_more_rounds_are_no_worse(start, key):
    p = problem(out=32)
    errors = [
        float(relative_error(p, aqlm(p, AQLMConfig(2, 3, 4, start=start, sweeps=1, rounds=rounds), key=key)))
        for rounds in (0, 1, 4)
    ]
    assert errors[0] > errors[1] >= errors[2] * (1 - 1e-4)
    assert errors[2] < float(relative_error(p, rtn(p, RTNConfig(1), key=key)))


def test_13_a_full_beam_reaches_the_exhaustive_optimum(key):
    weight, hessian = make_problem(out=12, columns=4, tokens=400)
    p = LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))
    # a beam over both vectors that holds every partial solution; the last step is a sweep, so codes suit the codebooks
    config = AQLMConfig(2, 2, 2, 256, window=2, entry_bits=16, column_scale=False, order="natural", rounds=2, sweeps=1)
    tensor = aqlm(p, config, key=key)
    books = np.asarray(tensor.codebooks, np.float64).reshape(2, 4, 2)
    best = reference.best_codes(weight, hessian, books, np.asarray(tensor.scale, np.float64)[:, 0])
    error = np.asarray(tensor.dequantize(), np.float64) - weight
    ours = np.sum((error @ hessian) * error, axis=1)
    np.testing.assert_allclose(ours, best, rtol=1e-3, atol=1e-5)


def test_15_the_scale_of_codebooks_is_free(key):
    p = problem()
    config = AQLMConfig(2, 4, 4, entry_bits=16, **SMALL)
    error = relative_error(p, aqlm(p, config, key=key))
    doubled = LayerProblem(p.weight * 4, p.hessian * 2)
    assert relative_error(doubled, aqlm(doubled, config, key=key)) == pytest.approx(float(error), rel=0.02)


def test_uneven_inputs_gain_from_mixed_vectors(key):
    weight, hessian = make_problem(out=64, columns=64, tokens=400)
    size = np.geomspace(1, 30, 64)
    hessian = hessian * size[:, None] * size[None, :]
    p = LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))
    errors = [
        relative_error(p, aqlm(p, AQLMConfig(2, 6, 4, order=o, **SMALL), key=key)) for o in ("variance", "natural")
    ]
    assert errors[0] < errors[1]


def test_dead_columns_and_zero_rows(key):
    weight, hessian = make_problem()
    hessian[:, 7] = hessian[7, :] = 0
    weight[3] = 0
    p = LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))
    value = aqlm(p, AQLMConfig(2, 4, 4, **SMALL), key=key).dequantize()
    assert np.isfinite(value).all()
    assert relative_error(p, value) < 0.2
