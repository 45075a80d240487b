"""The experiment runner on a tiny problem: what a result holds, and that it is not computed twice."""

import json
import sys

import jax
import numpy as np
import pytest

from experiments import configs, models, run, tables
from jaxquant import METHODS, GPTQConfig, RTNConfig, bits_per_weight, relative_error
from jaxquant.finetune import FinetuneConfig
from jaxquant.training import TrainConfig
from tests import tiny
from tests.conftest import make_problem

EXPERIMENT = configs.Layers({"rtn 3-bit": RTNConfig(3, search="minmax"), "rtn 4-bit": RTNConfig(4, search="minmax")})


@pytest.fixture
def problems(tmp_path):
    weight, hessian = make_problem(out=8, columns=16)
    folder = tmp_path / "problems"
    folder.mkdir()
    triangle = hessian[np.triu_indices(16)].astype(np.float32)
    np.savez(folder / "tiny_q.npz", W=weight.astype(np.float16), H=triangle)
    return folder


@pytest.fixture
def main(monkeypatch, tmp_path):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run", *arguments, "--results", str(tmp_path / "results")])
        return run.main()

    monkeypatch.setitem(configs.EXPERIMENTS, "tiny", EXPERIMENT)
    return call


def results(tmp_path):
    return {r["method"]: r for r in map(json.loads, (f.read_text() for f in (tmp_path / "results").rglob("*.json")))}


def test_problems_are_read_whole(problems):
    weight, hessian = make_problem(out=8, columns=16)
    problem = run.load_problem(problems / "tiny_q.npz")
    np.testing.assert_array_equal(problem.weight, weight.astype(np.float16))
    np.testing.assert_array_equal(problem.hessian, hessian.astype(np.float32))


def test_a_result_says_what_it_is_and_is_computed_once(main, problems, tmp_path, monkeypatch, capsys):
    assert main("tiny", "--problems", str(problems), "--only", "3-bit") == 0
    (result,) = results(tmp_path).values()
    problem, config = run.load_problem(problems / "tiny_q.npz"), EXPERIMENT.methods["rtn 3-bit"]
    tensor = METHODS[RTNConfig](problem, config, key=jax.random.key(0))
    assert result["config"]["method"] == "rtn"
    assert result["config"]["bits"] == 3
    assert result["model"] == "tiny_q"
    assert result["experiment"] == "tiny"
    assert result["bits_per_weight"] == bits_per_weight(tensor)
    assert result["relative_error"] == pytest.approx(float(relative_error(problem, tensor)), rel=1e-6)
    assert {"excess_bits", "seconds", "environment", "commit", "hash", "data"} <= set(result)
    assert json.loads(capsys.readouterr().out)["method"] == "rtn 3-bit"

    assert main("tiny", "--problems", str(problems)) == 0  # adds the other one
    both = results(tmp_path)
    assert set(both) == {"rtn 3-bit", "rtn 4-bit"}
    assert both["rtn 3-bit"] == result
    assert both["rtn 4-bit"]["relative_error"] < result["relative_error"]
    assert len(capsys.readouterr().out.splitlines()) == 1

    monkeypatch.setattr(run, "relative_error", None)
    assert main("tiny", "--problems", str(problems)) == 0
    assert capsys.readouterr().out == ""
    assert results(tmp_path) == both


def test_errors_are_one_line(main, capsys):
    assert main("none") == 1
    assert capsys.readouterr().err.startswith(
        f"error: name: expected one of {', '.join(configs.EXPERIMENTS)}, got 'none'"
    )
    assert main("tiny") == 1
    assert "error: --problems: expected a folder of .npz files" in capsys.readouterr().err


def test_every_stage_of_tuning_is_measured(main, tmp_path, monkeypatch, capsys):
    source = tiny.write(tmp_path / "model")
    text = str(tiny.write_text(tmp_path / "text.txt"))
    train = TrainConfig(1e-2, epochs=2, batch_size=4, micro_batch=2, held_out=0.2)
    config = RTNConfig(2, search="minmax")
    # bfloat16 would need implicit promotion, in the derivative of JAX's own attention
    options = {"dtype": "float32", "seeds": (0,), "sequences": 10, "length": 16}
    small = configs.Tuning({"2-bit": config}, FinetuneConfig(train), train, train, **options)
    monkeypatch.setitem(configs.EXPERIMENTS, "tiny", small)
    # one layer of each block, so that there is less to compile
    monkeypatch.setattr(models, "resolve", lambda _, paths: {p: config if "up" in p else None for p in paths})
    options = ("--model", str(source), "--calibration", text, "--text", text)
    assert main("tiny", *options) == 0
    found = {r["stage"]: r for r in map(json.loads, (f.read_text() for f in (tmp_path / "results").rglob("*.json")))}
    assert set(found) == {"none", "block", "distill", "pv"}
    kl = [found[stage]["kl"] for stage in ("none", "block", "distill")]
    assert kl[2] < kl[0]
    assert {r["bits_per_weight"] for r in found.values()} == {found["none"]["bits_per_weight"]}
    assert all({"model", "perplexity", "perplexity_built_in", "seed", "seconds"} <= set(r) for r in found.values())
    assert list(found["pv"]["tuning"]) == ["guided", "block", "distill", "pv"]
    capsys.readouterr()
    assert main("tiny", *options) == 0  # nothing is computed twice
    assert capsys.readouterr().out == ""
    table = tables.tuning([*found.values(), {**found["block"], "perplexity": found["block"]["perplexity"] + 1}])
    assert table.splitlines()[0] == "| method | bits per weight | none | + block | + distill | + pv |"
    assert " ± 0.71 (KL " in table


def test_bits_are_allocated_over_layers(main, tmp_path, monkeypatch):
    source, text = tiny.write(tmp_path / "model"), str(tiny.write_text(tmp_path / "text.txt"))
    over = configs.Allocated(RTNConfig(3, search="minmax"), 5.0, sequences=4)
    small = configs.WholeModel({"dense": None, "over layers": over}, sequences=4, length=16, batch_size=2)
    monkeypatch.setitem(configs.EXPERIMENTS, "tiny", small)
    assert main("tiny", "--model", str(source), "--calibration", text, "--text", text) == 0
    found = results(tmp_path)
    assert 4.5 < found["over layers"]["bits_per_weight"] <= 5.0
    assert len({layer["format"] for layer in found["over layers"]["layers"]}) > 1
    assert found["over layers"]["config"]["method"] == "allocated"


def test_every_named_experiment_is_complete():
    for experiment in configs.EXPERIMENTS.values():
        assert experiment.methods
        for config in experiment.methods.values():
            config = config.config if isinstance(config, configs.Allocated) else config
            assert config is None or type(config) in METHODS
    assert GPTQConfig(3) in configs.EXPERIMENTS["layers"].methods.values()


def test_the_tables_of_the_documentation_are_those_of_the_results():
    document = (run.RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    assert document.count("<!-- table ") == 8
    assert tables.written(document) == document


@pytest.mark.parametrize("name", ["kernels", "generation"])
def test_tables_of_one_device(name, capsys):
    assert tables.main([f"{name} H200"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert lines
    assert all(line.endswith("| NVIDIA H200 |") for line in lines)
    assert len(tables.table(name).splitlines()) > len(lines) + 2
    assert tables.main(["layers H200"]) == 1
    assert "expected names among" in capsys.readouterr().err


def test_every_stored_result_can_be_plotted(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    from experiments import plots

    monkeypatch.setattr(sys, "argv", ["plots", "--out", str(tmp_path)])
    plots.main()
    drawn = {file.stem for file in tmp_path.glob("*.svg")}
    assert drawn == {name for name in plots.PLOTS if tables.load(name)} >= {"layers", "scaling", "kernels"}
