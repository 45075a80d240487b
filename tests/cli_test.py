"""The command line on a tiny model: what it prints is what was done, and errors are one line."""

import re
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import cli, dense_tree
from jaxquant.export import MODEL_FILE, load_packed
from jaxquant.models.load import load_model
from jaxquant.tokenizer import load_tokenizer
from tests import tiny
from tests.checkpoint_test import tensor_bytes

ROOT = Path(__file__).parents[1]
SHORT = ["--sequences", "2", "--length", "32"]
METHOD = ["rtn", "--bits", "3", "--search", "minmax"]
SKIP = ["--skip", "blocks/0/attn/.*"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a model and two texts."""
    folder = tmp_path_factory.mktemp("files")
    tiny.write(folder / "model")
    tiny.write_text(folder / "text.txt")
    tiny.write_text(folder / "other.txt", 200, seed=1)
    return folder


def quantize(files, out, *more):
    calibration = ["--calibration", str(files / "text.txt")]
    return cli.main(["quantize", str(files / "model"), "--out", str(out), *calibration, *SHORT, *more])


@pytest.fixture(scope="module")
def out(files):
    assert quantize(files, files / "out", "--dense", *SKIP, *METHOD) == 0
    return files / "out"


def printed(capsys, arguments):
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert "error" not in captured.err
    return captured.out


def number(pattern, text):
    return float(re.search(pattern, text)[1])


def test_plan_tells_what_quantize_does(files, out, capsys):
    plan = printed(capsys, ["plan", str(files / "model"), *SHORT, *SKIP, *METHOD])
    assert "quantized: 10 of 14 linear layers" in plan
    assert "dense: 4 linear layers by --skip, such as blocks/0/attn/q" in plan
    saved = load_packed(out)
    reports = saved.record["reports"]
    bits, weights = sum(r["bits"] for r in reports), sum(r["shape"][0] * r["shape"][1] for r in reports)
    assert number(r"linear layers: ([\d.]+) bits per weight", plan) == pytest.approx(bits / weights, abs=5e-5)
    model = sum(x.nbytes for x in jax.tree.leaves(saved.params))
    assert number(r"whole model ([\d.]+) MB", plan) == pytest.approx(model / 1e6, abs=5e-3)
    assert number(r"peak memory: device (\d+) MB", plan) < 100
    guided = printed(capsys, ["plan", str(files / "model"), *SHORT, *SKIP, "--guided", *METHOD])
    assert number(r", host (\d+) MB", guided) >= number(r", host (\d+) MB", plan)
    for report in reports:
        assert re.search(rf"{report['path']} .*{report['bits'] / np.prod(report['shape']):.4f} ", plan)


def test_quantize_and_inspect_print_the_reports(files, out, capsys):
    calibration = ["--calibration", str(files / "text.txt")]
    command = ["quantize", str(files / "model"), "--out", str(out), *calibration, *SHORT, *SKIP, *METHOD]
    repeated = printed(capsys, command)
    inspected = printed(capsys, ["inspect", str(out)])
    reports = load_packed(out).record["reports"]
    assert len(reports) == 14
    for text in (repeated, inspected):
        for r in reports:
            assert f"{r['path']} " in text
            if r["relative_error"] is not None:
                assert f"{r['relative_error']:.3e}" in text
        assert text.count("uniform 3-bit row") == 10
        assert text.count("float32") == 4
    bits = sum(r["bits"] for r in reports) / sum(r["shape"][0] * r["shape"][1] for r in reports)
    assert number(r"average: ([\d.]+) bits per weight", inspected) == pytest.approx(bits, abs=5e-5)
    assert "seed 0, batch size 8" in inspected
    assert f"'source': '{files / 'text.txt'}'" in inspected


def test_24_accounted_bytes_are_on_disk(out, capsys):
    text = printed(capsys, ["inspect", str(out)])
    file = out / MODEL_FILE
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    accounted, on_disk = (number(rf"{word} ([\d.]+) MB", text) for word in ("accounted", "on disk"))
    assert on_disk == pytest.approx(file.stat().st_size / 1e6, abs=5e-4)
    # The header names every tensor; beside a model of 80 kB it counts, so it is left out here.
    assert accounted == pytest.approx((file.stat().st_size - 8 - header) / 1e6, rel=0.01)


def test_guided_quantization(files, tmp_path, capsys):
    """Weights of the tokens change the result, and are the same in every run."""
    common = ["quantize", str(files / "model"), "--calibration", str(files / "text.txt"), *SHORT]
    common += ["--skip", ".*/(attn/.|mlp/gate|mlp/down)"]
    for name, more in (("plain", []), ("guided", ["--guided"]), ("again", ["--guided"])):
        assert cli.main([*common, "--out", str(tmp_path / name), *more, "gptq", "--bits", "3"]) == 0
    capsys.readouterr()
    guided, again, plain = (tensor_bytes(tmp_path / name) for name in ("guided", "again", "plain"))
    assert guided == again != plain
    assert load_packed(tmp_path / "guided").record["run"]["guided"]


def test_inspect_a_dense_model(files, capsys):
    text = printed(capsys, ["inspect", str(files / "model")])
    assert re.search(r"blocks/1/mlp/down .* 32 x 48 .* float32 .* 0\.006", text)


def test_evaluate(files, out, capsys):
    common = ["--text", str(files / "other.txt"), "--length", "32", "--windows", "6"]
    dense = printed(capsys, ["evaluate", str(files / "model"), *common])
    text = printed(capsys, ["evaluate", str(out), *common, "--reference", str(files / "model")])
    value = number(r"perplexity ([\d.]+) \(6 windows of 32, BOS no, float32, default precision", dense)
    assert number(r"reference ([\d.]+)", text) == pytest.approx(value, rel=1e-4)
    assert value > 1
    assert 0 < number(r"KL ([\d.]+) nats", text) < 5
    assert number(r"perplexity ([\d.]+)", text) != value
    itself = printed(capsys, ["evaluate", str(files / "model"), *common, "--reference", str(files / "model")])
    assert number(r"KL ([\d.]+) nats", itself) == 0
    begun = printed(capsys, ["evaluate", str(files / "model"), *common, "--bos", "True"])
    assert "BOS yes" in begun


def test_the_dense_copy_is_the_packed_model(out):
    dense, saved = load_model(out / "dense"), load_packed(out)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dense_tree(saved.params))
    assert jax.tree.structure(dense.params) == jax.tree.structure(expected)
    for ours, wanted in zip(jax.tree.leaves(dense.params), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(wanted, np.float32))
    ids = load_tokenizer(out / "dense").encode("a grey cat")
    assert ids == load_tokenizer(out).encode("a grey cat")
    assert load_tokenizer(out).decode(ids) == "a grey cat"


def test_doctor(capsys):
    text = printed(capsys, ["doctor"])
    for name in ("python 3.", "device 0:", "jax ", "safetensors ", "torch: ", "matplotlib: "):
        assert name in text


def changed(files, folder, change):
    """A copy of the model with another config.json."""
    return str(tiny.write(folder, tiny.CONFIG | change, tiny.weights()))


ERRORS = {
    "no such model": (lambda f, t: ["plan", str(t / "none"), *METHOD], "source: expected a Hugging Face directory"),
    "architecture": (
        lambda f, t: ["plan", changed(f, t / "m", {"model_type": "mamba"}), *METHOD],
        "model_type: expected one of .* got 'mamba'",
    ),
    "shape": (
        lambda f, t: ["plan", changed(f, t / "m", {"intermediate_size": 64}), *METHOD],
        r"gate_proj.weight: expected shape \(64, 32\)",
    ),
    "group size": (
        lambda f, t: ["plan", str(f / "model"), *METHOD, "--group-size", "32"],
        "blocks/0/mlp/down 32x48: group_size: expected a divisor of the 48 input columns, got 32; use 16, 24",
    ),
    "group size, quantize": (
        lambda f, t: ["quantize", str(f / "model"), "--out", str(t / "o"), *METHOD, "--group-size", "32"],
        "blocks/0/mlp/down 32x48: group_size",
    ),
    "skip": (
        lambda f, t: ["plan", str(f / "model"), "--skip", "layers/0/.*", *METHOD],
        "rules: 'layers/0/.*' decides no layer",
    ),
    "bad pattern": (
        lambda f, t: ["plan", str(f / "model"), "--skip", "blocks/(", *METHOD],
        r"expected a regular expression, got 'blocks/\(",
    ),
    "bits": (lambda f, t: ["plan", str(f / "model"), "rtn", "--bits", "9"], "bits: expected an integer from 1 to 8"),
    "empty text": (
        lambda f, t: ["quantize", str(f / "model"), "--out", str(t / "o"), "--calibration", empty(t), *SHORT, *METHOD],
        "expected 2 windows of 32 tokens .* got 0 tokens",
    ),
    "empty text, evaluate": (
        lambda f, t: ["evaluate", str(f / "model"), "--text", empty(t), "--length", "32"],
        "expected at least 32 tokens for one window",
    ),
    "no text": (
        lambda f, t: ["evaluate", str(f / "model"), "--text", str(t / "none.txt")],
        "expected a file or a dataset",
    ),
    "unfinished": (lambda f, t: ["evaluate", unfinished(t)], "expected a finished run, got one that stopped"),
    "unfinished, inspect": (lambda f, t: ["inspect", unfinished(t)], "expected a finished run"),
    "cut packed model": (lambda f, t: ["inspect", cut(f / "out", t / "c")], "got one that is damaged"),
    "cut dense model": (
        lambda f, t: ["evaluate", cut(f / "model", t / "c")],
        "expected a whole safetensors file, got one that is damaged",
    ),
    "not json": (lambda f, t: ["inspect", not_json(t)], "config.json: expected JSON, got something else"),
    "empty folder": (lambda f, t: ["inspect", str(t)], "expected config.json in it"),
    "context": (
        lambda f, t: ["evaluate", str(f / "model"), "--text", str(f / "other.txt"), "--length", "0"],
        "expected length >= 2",
    ),
}


def empty(folder):
    (folder / "empty.txt").write_text("")
    return str(folder / "empty.txt")


def unfinished(folder):
    (folder / "run.json").write_text("{}")
    return str(folder)


def cut(source, folder):
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file():
            data = file.read_bytes()
            (folder / file.name).write_bytes(data[:-100] if file.name == MODEL_FILE else data)
    return str(folder)


def not_json(folder):
    (folder / "config.json").write_text("{,")
    return str(folder)


@pytest.mark.usefixtures("out")
@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(name, files, tmp_path, capsys):
    arguments, message = ERRORS[name]
    try:
        status = cli.main(arguments(files, tmp_path))
    except SystemExit as exit:  # of the argument parser
        status = exit.code
        assert status == 2
    error = capsys.readouterr().err
    assert status
    assert "Traceback" not in error
    if status == 1:
        assert len(re.findall("^error: ", error, flags=re.MULTILINE)) == 1
        assert re.search(f"error: .*{message}", error), error
    else:
        assert re.search(message, error), error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["plan", "m", "rtn", "--bitz", "3"], "bitz"), (["quantise"], "quantise"), (["quantize", "m", "rtn"], "--out")],
)
def test_wrong_options_show_the_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out


def test_the_process_exits_with_the_status(tmp_path):
    arguments = [sys.executable, "-m", "jaxquant.cli", "inspect", str(tmp_path / "none")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: source: expected a Hugging Face directory")
    assert len(done.stderr.splitlines()) == 1


def test_a_traceback_on_demand(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXQUANT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="expected a Hugging Face directory"):
        cli.main(["inspect", str(tmp_path / "none")])


def test_interrupts_tell_how_to_go_on(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxquant.doctor.run", interrupted)
    assert cli.main(["doctor"]) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_bits_over_layers(files, tmp_path, capsys):
    budget = ["--average-bits", "4.5", "rtn", "--search", "minmax"]
    assert quantize(files, tmp_path / "out", *budget) == 0
    capsys.readouterr()
    assert quantize(files, tmp_path / "out", *budget) == 0  # a finished run, and costs that are known
    text = capsys.readouterr().out
    assert 4.2 < number(r"average: ([\d.]+) bits per weight", text) <= 4.5
    assert len(set(re.findall(r"uniform \d-bit", text))) > 1
    costs = ["--costs", str(tmp_path / "out" / "costs.json"), "--calibration", str(files / "text.txt")]
    planned = printed(capsys, ["plan", str(files / "model"), *costs, *SHORT, *budget])
    assert number(r"linear layers: ([\d.]+) bits", planned) == number(r"average: ([\d.]+) bits per weight", text)
    assert quantize(files, tmp_path / "other", "--average-bits", "1.0", "rtn", "--search", "minmax") == 1
    assert "error: average_bits: expected at least" in capsys.readouterr().err
