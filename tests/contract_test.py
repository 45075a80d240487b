"""What every method owes its callers. A new method is one line in CASES."""

import dataclasses
import json
import struct
from typing import Any

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
    LayerProblem,
    LNQConfig,
    OutlierQuantEaseConfig,
    QuantEaseConfig,
    RTNConfig,
    TrellisConfig,
    bits_per_weight,
    relative_error,
)
from jaxquant.checkpoint import block_store
from jaxquant.export import MODEL_FILE, load_packed, save_packed
from jaxquant.pipeline import BlockResult, LayerReport
from jaxquant.plan import abstract_tensor
from jaxquant.tensors import QuantizedTensor, is_quantized
from tests import tiny
from tests.conftest import make_problem

KEY = jax.random.key(0)
OUT, IN = 8, 20


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings, and those of the plain rounding of no fewer bits that they must beat."""

    config: Any
    rounding: RTNConfig
    tables: bool = False  # stores more than codes and grids, which on a tiny layer outweighs them
    neighbours: bool = False  # neighbouring rows share a path
    near_tie: bool = (
        False  # of two solutions; float rounding decides, and so changes a table and every row that shares it
    )


CASES = {
    "rtn": Case(RTNConfig(3), RTNConfig(3)),
    "rtn-symmetric": Case(RTNConfig(3, symmetric=True, search="mse"), RTNConfig(3, symmetric=True, search="minmax")),
    "gptq": Case(GPTQConfig(3), RTNConfig(3)),
    "gptq-running": Case(
        GPTQConfig(2, group_size=4, order="natural", grids="running", storage_dtype="bfloat16"),
        RTNConfig(2, group_size=4, storage_dtype="bfloat16"),
    ),
    "quantease": Case(QuantEaseConfig(2, iterations=6, group_size=4), RTNConfig(2, group_size=4)),
    "quantease-outlier": Case(OutlierQuantEaseConfig(2, iterations=3, outliers=0.05), RTNConfig(2), tables=True),
    "lnq": Case(LNQConfig(2, restarts=2, rounds=2), RTNConfig(2), tables=True),
    "cmpq": Case(CMPQConfig(8.0, row_classes=2, rounds=2), RTNConfig(1), tables=True),
    "trellis": Case(TrellisConfig(7.5, state_bits=8, outliers=0.0), RTNConfig(1), tables=True, neighbours=True),
    "gptvq": Case(GPTVQConfig(2, 2, group_size=OUT * IN, rounds=2, iterations=5), RTNConfig(2), tables=True),
    "aqlm": Case(AQLMConfig(2, 4, 4, 2, rounds=2, iterations=5), RTNConfig(2), tables=True, near_tie=True),
    "quantease-paper": Case(QuantEaseConfig.paper(3, iterations=6), RTNConfig(3)),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# For what needs a program of its own: the first case of each method.
by_method = {type(case.config): (case, name) for name, case in reversed(CASES.items())}.values()
each_method = pytest.mark.parametrize("case", [c for c, _ in by_method], ids=[name for _, name in by_method])


def problem_of(weight, hessian):
    return LayerProblem(jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32))


def solve(problem, case) -> QuantizedTensor:
    return METHODS[type(case.config)](problem, case.config, key=KEY)


@jax.jit
def _dense(tensor):
    return tensor.dequantize()


def dense(tensor):
    return np.asarray(_dense(tensor))


def assert_same_bits(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def rows_that_agree(ours, expected, atol=1e-6):
    """Share of the rows that are equal."""
    return np.all(np.abs(ours - expected) <= atol, axis=-1).mean()


def assert_agree(ours, expected, atol=1e-6):
    """Rows are equal, but for the few where float rounding decides a tie otherwise; then all later columns differ."""
    assert rows_that_agree(ours, expected, atol) >= 0.85


BASE = problem_of(*make_problem(OUT, IN))


def test_every_method_has_a_case():
    assert {type(case.config) for case in CASES.values()} == set(METHODS)


@every
def test_shapes_and_bits_are_known_beforehand(case):
    tensor, abstract = solve(BASE, case), abstract_tensor((OUT, IN), case.config)
    assert jax.tree.structure(tensor) == jax.tree.structure(abstract)  # static fields are part of it
    for ours, planned in zip(jax.tree.leaves(tensor), jax.tree.leaves(abstract), strict=True):
        assert (ours.shape, ours.dtype) == (planned.shape, planned.dtype)
    assert tensor.storage_bits() == abstract.storage_bits() == 8 * sum(x.nbytes for x in jax.tree.leaves(tensor))
    assert bits_per_weight(tensor) == tensor.storage_bits() / (OUT * IN)
    assert tensor.shape == abstract.shape == dense(tensor).shape == (OUT, IN)
    assert _dense(tensor).dtype == jnp.float32
    assert tensor.format == abstract.format


@every
def test_a_second_call_compiles_nothing_and_changes_nothing(case):
    first, method = solve(BASE, case), METHODS[type(case.config)]
    compiled = method._cache_size()
    solve(problem_of(*make_problem(OUT, IN, seed=1)), case)
    assert_same_bits(solve(BASE, dataclasses.replace(case, config=dataclasses.replace(case.config))), first)
    assert method._cache_size() == compiled


@each_method
def test_vmap_and_jit_equal_a_loop(case):
    problems = [problem_of(*make_problem(OUT, IN, seed=seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *problems)
    results = jax.jit(jax.vmap(lambda p: solve(p, case)))(stacked)
    one_by_one = [solve(p, case) for p in problems]
    assert jax.tree.structure(results) == jax.tree.structure(one_by_one[0])
    for i, expected in enumerate(one_by_one):
        assert_agree(dense(jax.tree.map(lambda x, i=i: x[i], results)), dense(expected))


@every
def test_permuted_rows_give_permuted_results(case):
    if case.neighbours:
        pytest.skip("neighbouring rows share a path")
    rng, expected, agree = np.random.default_rng(0), dense(solve(BASE, case)), []
    for rows in (rng.permutation(OUT) for _ in range(5)):
        permuted = solve(dataclasses.replace(BASE, weight=BASE.weight[rows]), case)
        agree.append(rows_that_agree(dense(permuted), expected[rows]))
    assert (np.median if case.near_tie else np.min)(agree) >= 0.85, agree


@every
def test_multiples_of_the_hessian_are_equivalent(case):
    # Powers of four scale every product and root exactly.
    scaled = dataclasses.replace(BASE, hessian=BASE.hessian * jnp.float32(4.0**-8))
    assert_same_bits(solve(scaled, case), solve(BASE, case))


@each_method
def test_dead_columns_change_no_other(case):
    if case.tables:
        pytest.skip("tables and outliers are shared by all columns, and as many as their number says")
    weight, hessian = make_problem(OUT, IN + 8)
    dead = np.arange(8, 16)  # whole groups, so that the other groups hold the same columns without it
    hessian[dead] = hessian[:, dead] = 0
    live = np.setdiff1d(np.arange(IN + 8), dead)
    result = dense(solve(problem_of(weight, hessian), case))
    assert np.isfinite(result).all()
    assert_agree(result[:, live], dense(solve(problem_of(weight[:, live], hessian[np.ix_(live, live)]), case)))


@every
def test_no_worse_than_rounding_of_as_many_bits(case):
    """In the sum over problems; no method promises it for each."""
    errors = np.zeros(2)
    for seed in range(5):
        problem = problem_of(*make_problem(OUT, IN, seed=seed))
        tensors = solve(problem, case), METHODS[RTNConfig](problem, case.rounding, key=KEY)
        assert case.tables or bits_per_weight(tensors[0]) <= bits_per_weight(tensors[1])
        errors += [float(relative_error(problem, t)) for t in tensors]
    assert errors[0] <= errors[1] * (1 + 1e-6)


@every
def test_flatten_and_unflatten(case):
    tensor = solve(BASE, case)
    leaves, structure = jax.tree.flatten(tensor)
    assert_same_bits(jax.tree.unflatten(structure, leaves), tensor)
    assert_same_bits(jax.tree.map(lambda x: x, tensor), tensor)
    assert is_quantized(jax.eval_shape(lambda: tensor))


def test_checkpoints_restore_every_bit(tmp_path):
    block = {name: {"weight": solve(BASE, case), "bias": jnp.arange(3.0)} for name, case in CASES.items()}
    report = LayerReport("blocks/0/rtn", (OUT, IN), "uniform", 480, 0.25, 0.01, 2, 64, 0.5)
    with block_store(tmp_path) as store:
        store.save(BlockResult(0, block, [report]))
        assert store.finished() == 1
    with block_store(tmp_path) as store:
        restored = store.load(0)
    assert_same_bits(restored.block, block)
    assert restored.reports == [report]


def test_packed_files_hold_every_bit_and_no_more(tmp_path):
    tensors = {name: {"weight": solve(BASE, case)} for name, case in CASES.items()}
    save_packed(tmp_path, {"blocks": [tensors]}, tiny.CONFIG, {"note": 1})
    saved = load_packed(tmp_path)
    assert_same_bits(saved.params, {"blocks": [tensors]})
    assert saved.record == {"note": 1}
    data = (tmp_path / MODEL_FILE).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    entries = {k: v["data_offsets"] for k, v in json.loads(data[8 : 8 + size]).items() if k != "__metadata__"}
    for name, layer in tensors.items():
        written = sum(end - start for k, (start, end) in entries.items() if k.startswith(f"blocks/0/{name}/weight"))
        assert 8 * written == layer["weight"].storage_bits()
    assert len(data) - 8 - size == sum(layer["weight"].storage_bits() for layer in tensors.values()) // 8


def degenerate(kind):
    weight, hessian = make_problem(OUT, IN)
    if kind == "zero rows":
        weight[[0, 3]] = 0
    elif kind == "constant rows":
        weight[0], weight[1] = 0.7, -0.7
    elif kind == "all zero":
        weight[:] = 0
    elif kind == "outlier":
        weight[2, 5] = 1e7  # beyond the range of float16 scales
    elif kind == "tiny":
        weight *= 1e-6
    elif kind == "duplicate columns":
        weight[:, 7] = weight[:, 3]
        hessian[7], hessian[:, 7] = hessian[3], hessian[:, 3]
        hessian[7, 7] = hessian[3, 3]
    elif kind == "identity":
        hessian = np.eye(IN)
    else:
        assert kind == "few tokens"
        x = np.random.default_rng(1).standard_normal((IN, 3))
        hessian = x @ x.T / 3
    return problem_of(weight, hessian)


@every
@pytest.mark.parametrize(
    "kind",
    ["zero rows", "constant rows", "all zero", "outlier", "tiny", "duplicate columns", "identity", "few tokens"],
)
def test_degenerate_problems_give_finite_results(case, kind):
    problem = degenerate(kind)
    tensor = solve(problem, case)
    result = dense(tensor)
    assert np.isfinite(result).all()
    for leaf in jax.tree.leaves(tensor):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    weight = np.asarray(problem.weight)
    if not isinstance(case.config, GPTVQConfig):  # whose rows have no scale of their own
        assert not result[np.all(weight == 0, axis=1)].any()
    if kind not in ("all zero", "outlier"):
        assert float(relative_error(problem, tensor)) < 1
    if kind == "constant rows":  # the ends of a grid's range are on it, but for rounding of the scale
        rows = np.all(weight == weight[:, :1], axis=1)
        if isinstance(case.config, RTNConfig) and case.config.search == "minmax":
            np.testing.assert_allclose(result[rows], weight[rows], rtol=1e-2)


@each_method
def test_one_row(case):
    if hasattr(case.config, "average_bits"):
        pytest.skip("a single row cannot hold the tables of this method")
    weight, hessian = make_problem(1, IN)
    tensor = solve(problem_of(weight, hessian), case)
    assert tensor.shape == (1, IN)
    assert float(relative_error(problem_of(weight, hessian), tensor)) < 1
