"""GPTVQ; numbers of METHODS section 9 in the names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.methods.gptq import GPTQConfig, gptq
from jaxquant.methods.gptvq import GPTVQConfig, gptvq
from jaxquant.methods.rtn import RTNConfig, rtn
from jaxquant.problem import LayerProblem, relative_error
from jaxquant.tensors import CodebookTensor, bits_per_weight
from tests.conftest import make_problem

SMALL = {"columns": 16, "iterations": 5, "rounds": 2, "sweeps": 1}


def problem(**kwargs):
    return LayerProblem(*(jnp.asarray(x, jnp.float32) for x in make_problem(**kwargs)))


@pytest.mark.parametrize(
    "field", ["bits", "vector_dim", "group_size", "entry_bits", "codebooks", "order", "damp", "rounds"]
)
def test_bad_settings_are_named(field):
    bad = {"bits": 2.25, "entry_bits": 12, "codebooks": "fixed", "order": "random"}.get(field, -1)
    with pytest.raises(ValueError, match=field):
        GPTVQConfig(**{field: bad})


def test_vectors_must_fit(key):
    with pytest.raises(ValueError, match="vector_dim"):
        gptvq(problem(columns=46), GPTVQConfig(2, 4), key=key)


@pytest.mark.parametrize(
    ("bits", "dim", "group"), [(2, 1, 256), (2, 2, 2048), (2, 4, 65536), (3, 2, 8192), (4, 2, 32768)]
)
def test_10_default_groups_are_the_papers(bits, dim, group):
    config = GPTVQConfig.paper(bits, dim)
    down, across = config.blocks(4096, 4096)
    assert (4096 // down) * (4096 // across) == group


@pytest.mark.parametrize("config", [GPTVQConfig.paper(2, 2, group_size=96), GPTVQConfig(2, 4, group_size=96, **SMALL)])
def test_10_bits_are_those_of_the_formula(config, key):
    out, n = 24, 48
    shape = jax.eval_shape(lambda p: gptvq(p, config, key=key), problem())
    down, across = config.blocks(out, n)
    books = down * across * (config.entry_bits * 2**config.code_bits * config.vector_dim + 16)
    expected = 2 * out * n + books + 16 * out * config.row_scale + config.column_scale * (5 * n + 32)
    # words of 32 bits are padded: the entries of a codebook, the column scales, and the codes of a row of vectors
    padding = 32 * (out * n // n + 1)
    assert expected <= shape.storage_bits() <= expected + padding
    assert bits_per_weight(shape) == shape.storage_bits() / (out * n)


def test_9_one_dimension_and_a_uniform_grid_is_gptq(key):
    """Rows with the levels of their grid for a codebook: nothing left to learn, codes as by GPTQ."""
    weight, hessian = make_problem()
    levels = np.random.default_rng(0).integers(-2, 2, weight.shape).astype(np.float64)
    levels[:, :4] = [-2, -1, 0, 1]  # every row uses all levels, so k-means finds exactly them
    exact = LayerProblem(jnp.asarray(levels, jnp.float32), jnp.asarray(hessian, jnp.float32))
    config = GPTVQConfig(2, 1, group_size=48, columns=48, row_scale=False, column_scale=False, entry_bits=16)
    ours = gptvq(exact, config, key=key).dequantize()
    theirs = gptq(exact, GPTQConfig(2, search="minmax", order="natural"), key=key).dequantize()
    np.testing.assert_allclose(ours, levels, atol=1e-3)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_it_beats_rounding_and_descent_beats_the_paper(key):
    p = problem(out=32)
    errors = [
        float(relative_error(p, method(p, config, key=key)))
        for method, config in (
            (rtn, RTNConfig(2)),
            (gptvq, GPTVQConfig.paper(2, 2, group_size=512)),
            (gptvq, GPTVQConfig(2, 2, group_size=512, row_scale=False, column_scale=False)),
        )
    ]
    assert errors[0] > errors[1] > errors[2]


def test_dead_columns_and_zero_rows(key):
    weight, hessian = make_problem()
    hessian[:, 7] = hessian[7, :] = 0
    weight[3] = 0
    p = LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))
    tensor = gptvq(p, GPTVQConfig(2, 2, group_size=192, order="variance", **SMALL), key=key)
    assert isinstance(tensor.base, CodebookTensor)
    assert np.isfinite(tensor.dequantize()).all()
    assert relative_error(p, tensor) < 0.2


def test_rows_are_independent_of_their_order_within_a_block(key):
    p = problem()
    config = GPTVQConfig(2, 2, group_size=2**20, **SMALL)
    shuffle = np.random.default_rng(0).permutation(24)
    ours = relative_error(p, gptvq(p, config, key=key))
    shuffled = LayerProblem(p.weight[shuffle], p.hessian)
    assert relative_error(shuffled, gptvq(shuffled, config, key=key)) == pytest.approx(float(ours), rel=0.05)
