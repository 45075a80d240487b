"""Block fine-tuning: the error falls, formats stay, and nothing worse than what was given comes back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant import LayerProblem, RTNConfig, dense_tree, pack, rtn, trees
from jaxquant.finetune import FinetuneConfig, TuneReport, finetune_block
from jaxquant.models.load import load_model
from jaxquant.tensors import CodebookTensor, is_quantized
from jaxquant.training import TrainConfig, split
from jaxquant.vector import store_books
from tests import tiny
from tests.contract_test import assert_same_bits

WINDOWS, LENGTH, WIDTH = 10, 12, 32
CONFIG = TrainConfig(1e-2, epochs=4, batch_size=4, micro_batch=2, held_out=0.2)
ROUNDING = RTNConfig(3, search="minmax")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(tiny.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def hidden():
    """Inputs of a block with uneven channels, in batches of different lengths."""
    x = np.random.default_rng(1).standard_normal((WINDOWS, LENGTH, WIDTH)) * np.geomspace(3, 0.1, WIDTH)
    return [jnp.asarray(x[:4], jnp.float32), jnp.asarray(x[4:], jnp.float32)]


@pytest.fixture(scope="module")
def block(loaded):
    """The first block, its up and down projections by two methods: uniform, and codebooks stored in 8 bits."""
    block = loaded.params["blocks"][0]
    weight = block["mlp"]["up"]["weight"]
    tensor = rtn(LayerProblem(weight, jnp.eye(32)), ROUNDING, key=jax.random.key(0))
    block = trees.replace(block, "mlp/up/weight", tensor)
    return trees.replace(block, "mlp/down/weight", additive(block["mlp"]["down"]["weight"]))


def additive(weight):
    """Two codebooks of 16 vectors of the weight, the second of what the first leaves, stored in 8 bits."""
    rest = np.asarray(weight, np.float64).reshape(32, 12, 4)
    books, codes = [], []
    for _ in range(2):
        books.append(rest.reshape(-1, 4)[:: rest.size // 64])
        codes.append(np.argmin(((rest[:, :, None] - books[-1]) ** 2).sum(-1), axis=-1))
        rest = rest - books[-1][codes[-1]]
    stored = store_books(jnp.asarray(np.stack(books)[None, None], jnp.float32), 8)
    return CodebookTensor(pack(jnp.asarray(np.stack(codes)), 4), stored, jnp.ones((32, 1), jnp.float16), (1, 1), (1, 4))


def error(loaded, block, hidden, windows):
    """Mean squared error of the block's outputs on some windows, in float64 at the end."""
    x = jnp.concatenate(hidden)[windows]
    ours = loaded.model.block(dense_tree(block), x, "full")
    expected = loaded.model.block(loaded.params["blocks"][0], x, "full")
    return float(np.mean((np.asarray(ours, np.float64) - np.asarray(expected, np.float64)) ** 2))


def tune(loaded, block, hidden, config=CONFIG, **kwargs):
    dense = loaded.params["blocks"][0]
    targets = [loaded.model.block(dense, h, "full") for h in hidden]
    return finetune_block(loaded.model, block, hidden, targets, FinetuneConfig(config), kind="full", **kwargs)


@pytest.fixture(scope="module")
def tuned(loaded, block, hidden):
    return tune(loaded, block, hidden)


def test_the_held_out_error_falls(loaded, block, hidden, tuned):
    after, report = tuned
    assert report.after < 0.95 * report.before
    assert report.chunks == 4
    held = slice(8, 10)
    assert report.before == pytest.approx(error(loaded, block, hidden, held), rel=1e-4)
    assert report.after == pytest.approx(error(loaded, after, hidden, held), rel=1e-4)
    assert error(loaded, after, hidden, slice(0, 8)) < error(loaded, block, hidden, slice(0, 8))


def test_formats_and_codes_stay(block, tuned):
    after, _ = tuned
    assert jax.tree.structure(after) == jax.tree.structure(block)
    assert not is_quantized(after["attn_norm"]["weight"])
    for old, new in zip(jax.tree.leaves(block), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    for path, leaf in (("mlp/up", "codes"), ("mlp/up", "zero")):
        old, new = (getattr(trees.get(b, path)["weight"], leaf).words for b in (block, after))
        np.testing.assert_array_equal(old, new)
    old, new = (b["mlp"]["down"]["weight"] for b in (block, after))
    np.testing.assert_array_equal(old.codes.words, new.codes.words)
    assert np.any(np.asarray(old.codebooks.codes.words) != np.asarray(new.codebooks.codes.words))


def test_the_result_depends_on_data_and_settings_alone(loaded, block, hidden, tuned):
    again, report = tune(loaded, block, hidden)
    assert_same_bits(again, tuned[0])
    assert report == tuned[1]
    other, _ = tune(loaded, block, hidden, dataclasses.replace(CONFIG, seed=1))
    assert any(np.any(np.asarray(a) != b) for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(again), strict=True))


def test_nothing_worse_than_given_is_returned(loaded, block, hidden):
    ruin = dataclasses.replace(CONFIG, patience=2, schedule="constant", warmup=0.0)
    after, report = tune(loaded, block, hidden, ruin, optimizer=optax.sgd(1e3))
    assert_same_bits(after, block)
    assert report.after == report.before
    assert report.chunks == 2  # patience was at its end


def test_any_optimizer_trains(loaded, block, hidden):
    after, report = tune(loaded, block, hidden, optimizer=optax.adabelief(1e-3))
    assert report.after < report.before
    assert report.after == pytest.approx(error(loaded, after, hidden, slice(8, 10)), rel=1e-4)


def test_micro_batches_change_rounding_alone(loaded, block, hidden, tuned):
    _, report = tune(loaded, block, hidden, dataclasses.replace(CONFIG, micro_batch=1))
    assert report.after == pytest.approx(tuned[1].after, rel=1e-2)


def test_a_dense_block_and_a_perfect_one_are_left_alone(loaded, hidden):
    dense = loaded.params["blocks"][0]
    after, report = tune(loaded, dense, hidden)
    assert after is dense
    assert report == TuneReport(0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 3}, "micro_batch: expected a divisor of batch_size 4, got 3"),
        ({"held_out": 0.0}, "held_out: expected a share between 0 and 1"),
        ({"epochs": 0}, "epochs: expected an integer >= 1"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number from 0"),
        ({"schedule": "linear"}, "schedule: expected one of 'cosine', 'constant'"),
        ({"chunks": 0}, "chunks: expected an integer >= 1 or None"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_too_few_windows_are_an_error():
    with pytest.raises(ValueError, match=r"expected at most 2 windows \(4 less 2 held out\), got 4; use more windows"):
        split(CONFIG, 4)


@pytest.mark.parametrize("chunks", [None, 1, 3, 100])
def test_every_epoch_visits_every_window_once(chunks):
    config = TrainConfig(epochs=3, batch_size=4, micro_batch=2, held_out=0.2, chunks=chunks)
    plan = split(config, 18)
    assert plan.train == 14
    np.testing.assert_array_equal(plan.held, [[14, 15], [16, 17]])
    order = np.concatenate([plan.order(config, k).reshape(-1) for k in range(plan.chunks)])
    assert len(order) == plan.chunks * plan.steps * 4 <= 3 * 14
    assert sorted(order[:14]) == list(range(14))
    assert sorted(order[14:28]) == list(range(14))
    assert list(order[:14]) != list(order[14:28])
