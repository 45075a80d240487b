"""Trellis codes: against brute force, their constants against a fresh measurement, the method against scalar levels."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import CMPQConfig, LayerProblem, bits_per_weight, cmpq, objective, relative_error, tiles, trellis
from jaxquant.kernels.trellis_paths import gpu, reference
from jaxquant.methods.trellis import TrellisConfig, trellis_quantize
from tests.conftest import make_problem

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
BITS = 8  # L


def states_by_hand(codes, width, closed):
    """The last BITS bits of a string of codes, for one run."""
    if not width:
        return [0] * len(codes)
    text, result = "".join(format(c, f"0{width}b") for c in codes), []
    for end in range(width, len(text) + 1, width):
        before = text * (8 if closed else 0) + text[:end]
        result.append(int(before[-BITS:], 2))
    return result


@pytest.mark.parametrize("width", [0, 1, 3, 8])
def test_states_are_the_last_bits(width):
    sizes = (9, 8, 3)  # two rings, and a run too short to close
    runs = trellis.rings(sizes, BITS)
    codes = RNG.integers(0, 2**width, 20)
    states = trellis.states(jnp.asarray(codes[:, None]), jnp.full((20, 1), width), runs, BITS)
    parts = np.split(codes, np.cumsum(sizes)[:-1])
    expected = [states_by_hand(p, width, closed) for p, closed in zip(parts, (True, True, False), strict=True)]
    np.testing.assert_array_equal(np.asarray(states)[:, 0], np.concatenate(expected))


def cost(target, weight, states):
    return (weight * (target - trellis.table(BITS)[states]) ** 2).sum(-1)


def search(target, weight, width, runs, incumbent=None):
    values = jnp.broadcast_to(trellis.table(BITS), (len(runs.row), 2**BITS))
    arrays = (jnp.asarray(x, jnp.float32) for x in (target, weight))
    return np.asarray(trellis.search(*arrays, jnp.asarray(width), values, runs, incumbent))


def test_open_runs_get_the_best_of_all_paths():
    runs = trellis.rings((5, 4), BITS)
    target, weight = RNG.standard_normal(9), RNG.random(9)
    found = search(target, weight, [2, 1], runs)
    for rows, width in ((slice(0, 5), 2), (slice(5, 9), 1)):
        codes = itertools.product(range(2**width), repeat=rows.stop - rows.start)
        paths = np.asarray([states_by_hand(c, width, closed=False) for c in codes])
        best = cost(target[rows], weight[rows], paths).min()
        assert cost(target[rows], weight[rows], found[rows]) == pytest.approx(best, rel=1e-5)


def test_rings_get_the_best_path_through_the_incumbents_end():
    runs = trellis.rings((10,), BITS)
    target, weight = RNG.standard_normal(10), RNG.random(10)
    paths = np.asarray([states_by_hand(c, 1, closed=True) for c in itertools.product(range(2), repeat=10)])
    incumbent = paths[777]
    found = search(target, weight, [1], runs, jnp.asarray(incumbent, jnp.int32))
    same_end = paths[paths[:, -1] == incumbent[-1]]
    assert cost(target, weight, found) == pytest.approx(cost(target, weight, same_end).min(), rel=1e-5)
    assert any((found == path).all() for path in paths)
    fresh = search(target, weight, [1], runs)
    assert any((fresh == path).all() for path in paths)
    assert cost(target, weight, fresh) < np.quantile(cost(target, weight, paths), 0.25)


@pytest.mark.parametrize("state_bits", trellis.TRELLISES)
def test_tables_hold_each_quantile_once(state_bits):
    values = np.sort(trellis.table(state_bits))
    assert (np.diff(values) > 0).all()
    np.testing.assert_allclose(values, -values[::-1], atol=1e-6)
    assert values.std() == pytest.approx(1, abs=0.01)


def test_constants_are_what_is_measured():
    constants = trellis.TRELLISES[BITS]
    target = jnp.asarray(RNG.standard_normal(4096), jnp.float32)
    runs = trellis.rings((512,) * 8, BITS)
    for width in (1, 2, 3, 4):
        values = jnp.broadcast_to(constants.gain[width] * trellis.table(BITS), (8, 2**BITS))
        states = trellis.search(target, jnp.ones(4096), jnp.full(8, width), values, runs, None)
        error = np.mean((np.asarray(target) - np.asarray(values[0])[states]) ** 2)
        assert error == pytest.approx(constants.distortion[width], rel=0.06)


@pytest.fixture(scope="module")
def layer():
    weight, hessian = make_problem(128, 96, tokens=400)
    return LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))


def config(bits=3.0, **kwargs):
    return TrellisConfig(bits, state_bits=BITS, **kwargs)


def test_the_budget_is_met_and_beats_levels(layer):
    tensor = trellis_quantize(layer, config(), key=KEY)
    assert 2.98 <= bits_per_weight(tensor) <= 3.0
    scalar = cmpq(layer, CMPQConfig(3.0), key=KEY)
    assert float(relative_error(layer, tensor)) < 0.95 * float(relative_error(layer, scalar))


def test_rounds_never_hurt(layer):
    errors = [float(objective(layer, trellis_quantize(layer, config(rounds=r), key=KEY))) for r in (0, 2)]
    assert errors[1] <= errors[0] * (1 + 1e-5)


def test_the_stored_codes_are_those_of_the_search(layer):
    """Decoded by hand: planes of bits, strings of codes, the table, the scales."""
    tensor = trellis_quantize(layer, config(2.5, outliers=0.0), key=KEY)
    base = tensor.base
    assert isinstance(base, tiles.TiledTensor)
    widths, codes = np.asarray(base.widths.unpack()).astype(int), np.asarray(base.codes())
    rows, columns = np.asarray(base.row_order()), np.asarray(base.column_order())
    gains, table = np.asarray(base.levels, np.float64), trellis.table(BITS)
    weight = np.zeros(base.shape)
    for k, column in enumerate(columns):
        for c in range(2):
            width, run = widths[c, k // 32], slice(64 * c, 64 * (c + 1))
            values = gains[width] * table[states_by_hand(codes[run, k], width, closed=True)]
            weight[rows[run], column] = values * np.asarray(base.column_scale, np.float64)[column]
    weight *= np.asarray(base.row_scale, np.float64)[:, None]
    np.testing.assert_allclose(np.asarray(base.dequantize()), weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "bad", [{"average_bits": 9.0}, {"state_bits": 9}, {"rounds": -1}, {"sweeps": 0}, {"outliers": 1.0}]
)
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrellisConfig(**bad)


def kernel_arguments(given):
    """Every width, a shorter ring, a run too short to close."""
    runs = trellis.rings((20, 19, 20, 20, 20, 20, 20, 20, 20, 5), BITS)
    width = np.asarray([0, 1, 2, 3, 4, 5, 6, 7, 8, 2])
    count, m = runs.row.shape
    target, weight = RNG.standard_normal((count, m)), RNG.random((count, m)) * runs.valid
    values = np.where(width > 0, np.linspace(0.9, 1.1, count), 0)[:, None] * trellis.table(BITS)
    moves = jnp.asarray(np.where(runs.valid, width[:, None], 0), jnp.int32)
    ends = jnp.asarray(RNG.integers(0, 2**BITS, count), jnp.int32) if given else None
    floats = (jnp.asarray(x, jnp.float32) for x in (target, weight))
    return runs, (*floats, moves, jnp.asarray(values, jnp.float32), ends, jnp.asarray(runs.closed))


@pytest.mark.parametrize("given", [False, True])
def test_the_gpu_kernel_finds_the_same_paths(given):
    """In interpret mode."""
    runs, arguments = kernel_arguments(given)
    expected = reference.paths(*arguments, widest=8)
    found = gpu.paths(*arguments, widest=8, interpret=True)
    np.testing.assert_array_equal(np.where(runs.valid, found, 0), np.where(runs.valid, expected, 0))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_the_gpu_kernel_compiles_for_cuda():
    """As far as a machine without a GPU can tell: down to Triton's language."""
    _, arguments = kernel_arguments(given=False)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(functools.partial(gpu.paths, widest=8)).trace(*arguments)
        assert "__gpu$xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
