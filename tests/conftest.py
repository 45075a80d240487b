"""Strict modes for every test, and the small problems that many of them share."""

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs would round float32 operands

# A first example may compile for seconds; no test is about time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def make_problem(out=24, columns=48, *, seed=0, rank=None, tokens=200):
    """Correlated inputs with uneven scales, and weights with uneven rows: float64 (W [out, in], H [in, in])."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, rank or columns)) * np.geomspace(3, 0.1, rank or columns)
    x = mix @ rng.standard_normal((rank or columns, tokens)) + 0.05 * rng.standard_normal((columns, tokens))
    weight = rng.standard_normal((out, columns)) * np.geomspace(0.3, 2, out)[:, None]
    return weight, x @ x.T / tokens


@pytest.fixture
def key():
    return jax.random.key(0)
