"""The benchmark of decoding on a tiny model: what it stores and accounts, not how fast anything is."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments import bench_generation, tables
from jaxquant.tensors import dense
from tests import tiny

# One block, hidden 64, MLP 256, vocabulary 256: embedding and head, three norms, and seven linear layers.
DENSE = 2 * 256 * 64 + 3 * 64
LINEAR = [(64, 64)] * 4 + [(256, 64)] * 2 + [(64, 256)]


def packed_bytes(out, columns):
    """Two codes of a byte for eight weights, two codebooks of 256 vectors of 8 and a scale per row in float16."""
    return out * columns // 4 + 2 * 2 * 256 * 8 + 2 * out


def test_a_row_per_format(tmp_path, capsys):
    settings = ["--shapes", "tiny", "--layers", "1", "--prompt", "1", "--context", "16", "--results", str(tmp_path)]
    settings += ["--steps", "3", "--passes", "2"]
    assert bench_generation.main(settings) == 0
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    packed, dense = result["rows"]
    assert (packed["format"], dense["format"]) == ("2x8", "bfloat16")
    for row in result["rows"]:
        assert row["model"] == "tiny, 1 layers"
        assert row["milliseconds_per_token"] == pytest.approx(1e3 / row["tokens_per_second"])
        assert row["accounted_bytes"] == row["weight_bytes"]  # these sizes need no padding
        assert {"jax", "device", "platform"} <= set(row["environment"])
    assert dense["weight_bytes"] == 2 * (DENSE + sum(out * columns for out, columns in LINEAR))
    assert packed["weight_bytes"] == 2 * DENSE + sum(packed_bytes(*shape) for shape in LINEAR)
    assert len(capsys.readouterr().out.splitlines()) == 2

    assert bench_generation.main([*settings, "--formats", "2x8"]) == 0
    again = json.loads(file.read_text())["rows"]
    assert again[0] != packed
    assert again[1:] == [dense]

    lines = tables.generation([result]).splitlines()
    assert len(lines) == 4
    assert f"{packed['weight_bytes'] / dense['weight_bytes']:.3f}" in lines[2]
    assert f"{packed['tokens_per_second'] / dense['tokens_per_second']:.2f}" in lines[2]


def test_padding_is_held_and_not_accounted():
    tensor = bench_generation.random_weight(jax.random.key(0), (1024, 32), "2x8")
    accounted = bench_generation.accounted_bytes({"weight": tensor})
    assert accounted == packed_bytes(1024, 32)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(tensor)) == accounted + 64 * 8  # a cache line per row of slots


@pytest.mark.parametrize("name", bench_generation.FORMATS)
def test_weights_keep_the_variance_of_inputs(name):
    weight = dense(bench_generation.random_weight(jax.random.key(0), (256, 512), name)).astype(jnp.float32)
    assert float(jnp.std(weight)) == pytest.approx(512**-0.5, rel=0.1)


def test_a_given_model_has_its_own_shape(tmp_path):
    args = bench_generation.Arguments(shapes=("tiny",), model=str(tiny.write(tmp_path / "bird.2")))
    given, named = bench_generation.configs(args).items()
    assert (given[0], given[1].hidden_size, given[1].num_layers) == ("bird.2", 32, 2)
    assert (named[0], named[1].hidden_size, named[1].head_dim) == ("tiny", 64, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "huge"], r"shapes: expected some of llama-2-7b, tiny, got ['huge']"),
        (["--formats", "3x3"], r"formats: expected some of 2x8, uniform 4-bit, gptvq 2D 2-bit, bfloat16, got ['3x3']"),
        (["--context", "64"], "a context that holds prompt + steps, got 16, 64, 10 and 64"),
        (["--model", "no/such/model"], "source: expected a Hugging Face directory, a .gguf file or a hub id"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, message):
    assert bench_generation.main([*arguments, "--results", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert message in error


def test_weights_without_a_kernel_are_not_timed_as_packed(monkeypatch):
    config = next(iter(bench_generation.configs(bench_generation.Arguments(("tiny",), layers=1)).values()))
    monkeypatch.setattr(bench_generation, "for_generation", lambda params: {"embed": params["embed"]})  # none is left
    with pytest.raises(ValueError, match="2x8: expected a kernel for all 7 packed weights, got one for 0 on cpu"):
        bench_generation.random_params(config, "2x8")
