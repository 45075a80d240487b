"""Distillation and PV-tuning of a whole model: the loss against float64, runs of equal blocks, resuming, codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import LayerProblem, RTNConfig, dense_tree, rtn, trees
from jaxquant.distill import prepare
from jaxquant.masters import masters, rounded, stored
from jaxquant.models.config import parse_config, tensor_names, tensor_shape
from jaxquant.models.load import load_model
from jaxquant.models.transformer import make_model
from jaxquant.projection import CodeConfig
from jaxquant.recode import begin_codes
from jaxquant.serialize import decode
from jaxquant.stacked import Run, stack, unstack
from jaxquant.training import TrainConfig
from tests import tiny
from tests.contract_test import assert_same_bits

TOKENS = np.random.default_rng(0).integers(0, 256, (10, 12))
CONFIG = TrainConfig(1e-2, epochs=4, batch_size=4, micro_batch=2, held_out=0.2, chunks=2)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(tiny.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def params(loaded):
    """The model with one layer of each block at 2 bits."""
    blocks = []
    for block in loaded.params["blocks"]:
        problem = LayerProblem(block["mlp"]["up"]["weight"], jnp.eye(32))
        tensor = rtn(problem, RTNConfig(2, search="minmax"), key=jax.random.key(0))
        blocks.append(trees.replace(block, "mlp/up/weight", tensor))
    return {**loaded.params, "blocks": blocks}


def divergence(loaded, params, tokens):
    """Mean KL(dense || quantized) in nats per token, in float64, from whole logits."""
    p, q = (
        np.asarray(loaded.model.forward(dense_tree(x), jnp.asarray(tokens)), np.float64)
        for x in (loaded.params, params)
    )
    p, q = (x - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return np.mean(np.sum(np.exp(p) * (p - q), axis=-1))


def finish(run, state=None):
    """Progress of all chunks and the resulting parameters."""
    figures = []
    for progress in run.run(run.begin() if state is None else state):
        figures.append((progress.done, progress.loss, progress.held_out, progress.best))
        last = progress.state
    return figures, run.result(last), last


@pytest.fixture(scope="module")
def run(loaded, params):
    """A distillation whose head takes five of the 24 tokens of a micro-batch at a time."""
    run = prepare(loaded.model, params, loaded.params, TOKENS, CONFIG)
    loss = dataclasses.replace(run.step.loss, chunk=5)
    return run._replace(step=dataclasses.replace(run.step, loss=loss))


@pytest.fixture(scope="module")
def finished(run):
    return finish(run)


def test_blocks_are_stacked_in_runs_and_back():
    small, large = {"a": jnp.zeros(2), "b": [jnp.ones((1, 3))]}, {"a": jnp.zeros(2), "b": [jnp.ones((2, 3))]}
    kinds = ("full", "full", "sliding", "sliding", "sliding")
    blocks = [small, small, small, large, large]
    runs, stacked = stack(blocks, kinds)
    assert runs == (Run("full", 2), Run("sliding", 1), Run("sliding", 2))
    assert stacked[0]["b"][0].shape == (2, 1, 3)
    for ours, expected in zip(unstack(stacked), blocks, strict=True):
        assert_same_bits(ours, expected)


def test_the_loss_is_the_divergence(loaded, params, run):
    assert len(run.step.loss.runs) == 1  # both blocks are one program
    state = run.begin()
    assert float(state.best_loss) == pytest.approx(divergence(loaded, params, TOKENS[8:]), rel=1e-4)


def test_the_gradient_is_that_of_the_plain_model(loaded, params, run):
    """Stacking, rematerialisation and micro-batches against one gradient of the model's own forward pass."""
    weight = rounded(masters(params["blocks"][1]["mlp"]["up"]["weight"]))
    dense = dense_tree(params)
    teacher = jax.nn.log_softmax(loaded.model.forward(loaded.params, jnp.asarray(TOKENS[:4])))

    def plain(scale):
        changed = trees.replace(dense, "blocks/1/mlp/up/weight", dataclasses.replace(weight, scale=scale).dequantize())
        logits = jax.nn.log_softmax(loaded.model.forward(changed, jnp.asarray(TOKENS[:4])))
        return jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - logits), axis=-1))

    def ours(scale):
        blocks = run.params["blocks"]
        up = rounded(masters(blocks[0]["mlp"]["up"]["weight"]))
        up = dataclasses.replace(up, scale=up.scale.at[1].set(scale))
        stacked = [trees.replace(blocks[0], "mlp/up/weight", up)]
        tree = run.step.loss.densify({"blocks": stacked, "ends": run.params["ends"]})
        return run.step.loss(tree, run.data[:4], run.constants)

    expected, gradient = jax.jit(jax.grad(plain))(weight.scale), jax.jit(jax.grad(ours))(weight.scale)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


def test_distillation_lowers_the_divergence(loaded, params, finished):
    figures, after, _ = finished
    assert [f[0] for f in figures] == [1, 2]
    assert figures[-1][3] == pytest.approx(divergence(loaded, after, TOKENS[8:]), rel=1e-4)
    assert figures[-1][3] < 0.95 * divergence(loaded, params, TOKENS[8:])
    assert figures[-1][1] < figures[0][1]
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for name in ("embed", "head"):
        np.testing.assert_array_equal(after[name]["weight"], params[name]["weight"])
    for old, new in zip(params["blocks"], after["blocks"], strict=True):
        np.testing.assert_array_equal(old["mlp"]["up"]["weight"].codes.words, new["mlp"]["up"]["weight"].codes.words)
        assert new["mlp"]["up"]["weight"].scale.dtype == jnp.float16


def test_a_run_taken_up_from_a_saved_state_ends_with_the_same_bits(run, finished):
    progress = next(run.run(run.begin()))
    saved = jax.tree.map(jnp.asarray, jax.device_get(progress.state))
    figures, after, _ = finish(run, saved)
    assert figures == finished[0][1:]
    assert_same_bits(after, finished[1])


def test_pv_tuning_changes_few_codes_and_goes_further(loaded, params, finished):
    codes = CodeConfig(0.1, share=0.01)
    run = prepare(loaded.model, params, loaded.params, TOKENS, CONFIG, codes=codes, ends=True)
    figures, after, state = finish(run)
    assert figures[-1][3] == pytest.approx(divergence(loaded, after, TOKENS[8:]), rel=1e-4)
    assert figures[-1][3] < divergence(loaded, params, TOKENS[8:])
    steps = run.plan.chunks * run.plan.steps
    assert int(state.codes.steps) == steps
    changed = 0
    for old, new in zip(params["blocks"], unstack(state.params["blocks"]), strict=True):
        a, b = (np.asarray(x["mlp"]["up"]["weight"].codes.unpack()) for x in (old, new))
        changed += (a != b).sum()
        assert (a != b).sum() <= steps * -(-a.size // 100)
        assert b.max() <= 3
    assert changed > 0
    assert np.any(np.asarray(after["embed"]["weight"]) != np.asarray(params["embed"]["weight"]))


def test_activations_in_another_dtype(loaded, params):
    """The loss is that of float32 to the precision of bfloat16; what is not trained comes back as it was."""
    run = prepare(loaded.model, params, loaded.params, TOKENS, CONFIG, dtype="bfloat16")
    state = run.begin()
    assert float(state.best_loss) == pytest.approx(divergence(loaded, params, TOKENS[-2:]), rel=0.05)
    assert {str(x.dtype) for x in jax.tree.leaves(run.constants)} == {"bfloat16"}
    result = run.result(state)
    np.testing.assert_array_equal(result["embed"]["weight"], params["embed"]["weight"])
    assert result["embed"]["weight"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_activation_dtypes_and_kinds_fit_together(dtype):
    """Shapes and dtypes of a whole step, for a model with sliding windows and a tied head; nothing is computed."""
    config = tiny.CONFIG | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 5,
        "query_pre_attn_scalar": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }
    parsed = parse_config(config)
    arrays = {path: jnp.ones(tensor_shape(parsed, path), dtype) for path in tensor_names(parsed)}
    dense = decode(arrays, {path: {"array": path} for path in arrays})
    up = rtn(LayerProblem(jnp.ones((48, 32)), jnp.eye(32)), RTNConfig(2, search="minmax"), key=jax.random.key(0))
    quantized = {**dense, "blocks": [trees.replace(b, "mlp/up/weight", up) for b in dense["blocks"]]}
    run = prepare(make_model(parsed), quantized, dense, TOKENS, CONFIG, codes=CodeConfig(), ends=True)
    assert run.step.loss.runs == (Run("sliding", 2), Run("full", 1))

    def step(params):
        opened = masters(params)
        with jax.numpy_dtype_promotion("standard"):
            state = run.step.optimizer.init(trees.partition(opened)[0])
        buffers = begin_codes(opened, run.step.loss.densify(rounded(opened)))
        after, *_, loss = run.step(opened, state, buffers, run.data, run.constants, jnp.zeros((2, 2), jnp.int32))
        return stored(after), loss

    after, loss = jax.eval_shape(step, run.params)
    assert loss.dtype == jnp.float32
    assert jax.tree.structure(after) == jax.tree.structure(run.params)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(run.params), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
