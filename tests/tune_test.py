"""The tuning command on a tiny model: every stage, resuming to the same bits, and errors of one line."""

import json
import re

import jax
import numpy as np
import pytest

from jaxquant import checkpoint, cli, export, pipeline
from jaxquant.evaluate import kl_divergence
from jaxquant.models.load import load_model
from jaxquant.tensors import dense_tree
from tests import tiny
from tests.checkpoint_test import tensor_bytes
from tests.contract_test import assert_same_bits

STAGES = ("block", "pv")  # "distill" is "pv" without codes, see distill_test.py
METHOD = ["--skip", ".*/(attn|gate|down).*", "rtn", "--bits", "2", "--search", "minmax"]
SHORT = ["--sequences", "10", "--length", "16", "--batch-size", "4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a model, its quantized form, and a text."""
    folder = tmp_path_factory.mktemp("files")
    tiny.write(folder / "model")
    tiny.write_text(folder / "text.txt")
    command = ["quantize", str(folder / "model"), "--out", str(folder / "q"), "--calibration", str(folder / "text.txt")]
    assert cli.main([*command, *SHORT, "--skip", ".*/(attn/.|mlp/gate|mlp/down)", *METHOD[2:]]) == 0
    return folder


def command(files, out, stage, *more):
    arguments = ["tune", str(files / "q"), "--text", str(files / "text.txt"), "--stage", stage, "--out", str(out)]
    return [*arguments, *SHORT, "--micro-batch", "2", "--epochs", "3", "--learning-rate", "0.01", *more]


@pytest.fixture(scope="module")
def finished(files):
    """Output folder of each stage."""
    for stage in STAGES:
        assert cli.main(command(files, files / stage, stage)) == 0
    return files


def divergence(files, name):
    model = load_model(files / "model")
    tokens = (
        np.random.default_rng(3).choice(np.frombuffer(b"the cat sat on a mat ", np.uint8), (8, 16)).astype(np.int32)
    )
    params = dense_tree(export.load_packed(files / name).params)
    return kl_divergence(model.model, model.params, params, tokens)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_tunes_and_says_so(finished, stage, capsys):
    assert cli.main(command(finished, finished / stage, stage)) == 0  # a finished run does nothing
    assert cli.main(["inspect", str(finished / stage)]) == 0
    text = capsys.readouterr().out
    assert f"tuned: {stage}; relative errors above are those before" in text
    assert "held-out loss" not in text
    before, after = (export.load_packed(finished / name) for name in ("q", stage))
    assert jax.tree.structure(after.params) == jax.tree.structure(before.params)
    assert after.record["tuned"][0]["tuning"]["stage"] == stage
    assert sorted(p.name for p in (finished / stage).iterdir()) == sorted(p.name for p in (finished / "q").iterdir())
    assert divergence(finished, stage) < divergence(finished, "q")


def test_progress_tells_the_loss(files, tmp_path, capsys):
    assert cli.main(command(files, tmp_path / "o", "block")) == 0
    lines = re.findall(r"block (\d)/2: held-out loss ([\d.e-]+) -> ([\d.e-]+)", capsys.readouterr().out)
    assert [line[0] for line in lines] == ["1", "2"]
    assert all(float(after) <= float(before) for _, before, after in lines)


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_run_ends_with_the_same_bytes(finished, stage, tmp_path, monkeypatch, capsys):
    store = checkpoint.BlockStore if stage == "block" else checkpoint.StateStore
    save, seen = store.save, []

    def fail(self, *args):
        if len(seen) == 1:
            raise OSError(28, "No space left on device")
        seen.append(args)
        save(self, *args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(store, "save", fail)
        assert cli.main(command(finished, out, stage)) == 1
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not export.is_packed(out)
    assert cli.main(command(finished, out, stage)) == 0
    assert re.findall(rf"{stage} (\S+):", capsys.readouterr().out)[0].startswith("2/")
    assert tensor_bytes(out) == tensor_bytes(finished / stage)


def test_tuning_on_sampled_text(finished, tmp_path, capsys):
    """Windows of the dense model's own text, beside those of the text; a file that is there is not written over."""
    file = tmp_path / "sampled.npy"
    draw = ["sample", str(finished / "model"), "--text", str(finished / "text.txt"), "--out", str(file)]
    draw += ["--windows", "7", "--length", "16", "--prompt", "4", "--batch-size", "3"]
    assert cli.main(draw) == 0
    assert "7 x 16 tokens" in capsys.readouterr().out
    windows = np.load(file)
    assert (windows.shape, windows.dtype) == ((7, 16), np.uint16)
    assert len(np.unique(windows, axis=0)) == 7
    assert cli.main(draw) == 1
    assert "expected the name of a new .npy file" in capsys.readouterr().err
    tune = command(finished, tmp_path / "out", "distill", "--sampled", str(file), "--dtype", "float32", "--epochs", "1")
    assert cli.main(tune) == 0
    record = export.load_packed(tmp_path / "out").record["tuned"][0]
    assert record["data"]["n"] == 17
    assert record["tuning"]["dtype"] == "float32"
    np.save(tmp_path / "short.npy", windows[:, :8])
    assert cli.main(command(finished, tmp_path / "o", "distill", "--sampled", str(tmp_path / "short.npy"))) == 1
    assert "short.npy: expected windows of 16 tokens, got 8" in capsys.readouterr().err


def test_stages_follow_each_other(finished, tmp_path):
    arguments = command(finished, tmp_path / "two", "pv")
    arguments[1] = str(finished / "block")
    assert cli.main(arguments) == 0
    record = export.load_packed(tmp_path / "two").record
    assert [t["tuning"]["stage"] for t in record["tuned"]] == ["block", "pv"]


ERRORS = {
    "other settings": (
        lambda f, t: command(f, f / "block", "block", "--seed", "1"),
        "expected the run that began there",
    ),
    "not quantized": (
        lambda f, t: ["tune", str(f / "model"), "--text", "t"],
        "expected the output of `jaxquant quantize`, got something else",
    ),
    "another dense model": (
        lambda f, t: command(
            f, t / "o", "distill", "--reference", str(tiny.write(t / "m", tensors=tiny.weights(seed=1)))
        ),
        r"dense model: expected the one that was quantized \(sha256 .*\), got another .*; pass it as --reference",
    ),
    "no such text": (
        lambda f, t: [*command(f, t / "o", "distill")[:2], "--text", str(t / "none.txt"), "--out", str(t / "o")],
        "expected a file or a dataset",
    ),
    "too few windows": (
        lambda f, t: command(f, t / "o", "distill", "--sequences", "4"),
        "batch_size: expected at most 2 windows",
    ),
    "a prompt as long as a window": (
        lambda f, t: [
            "sample",
            str(f / "model"),
            "--text",
            str(f / "text.txt"),
            "--out",
            str(t / "o.npy"),
            "--length",
            "8",
        ],
        "sample: expected 0 < prompt < length <= 128, got 32 and 8",
    ),
    "micro-batch": (lambda f, t: command(f, t / "o", "pv", "--micro-batch", "3"), "micro_batch: expected a divisor"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line_and_nothing_is_written(name, finished, tmp_path, capsys):
    arguments, message = ERRORS[name]
    assert cli.main(arguments(finished, tmp_path)) == 1
    error = capsys.readouterr().err
    assert re.search(f"error: .*{message}", error), error
    assert not (tmp_path / "o").exists()


def test_quantize_fine_tunes_each_block_and_resumes(files, tmp_path, monkeypatch, capsys):
    def run(out, epochs="3"):
        arguments = ["quantize", str(files / "model"), "--out", str(out), "--calibration", str(files / "text.txt")]
        tuning = ["--finetune", epochs, "--finetune-rate", "0.01"]
        return cli.main([*arguments, *SHORT, *tuning, "--skip", ".*/(attn/.|mlp/gate|mlp/down)", *METHOD[2:]])

    assert run(tmp_path / "a") == 0
    text = capsys.readouterr().out
    share = float(re.search(r"held-out error of blocks fell to ([\d.]+)%", text)[1])
    assert 0 < share < 100
    assert "tuned: block fine-tuning" in text
    tuning = export.load_packed(tmp_path / "a").record["tuning"]
    assert all(t["after"] <= t["before"] for t in tuning)
    assert "finetune" in json.loads((tmp_path / "a" / "run.json").read_text())["fingerprint"]

    original = checkpoint.BlockStore.save

    def fail(self, result):
        if result.index == 1:
            raise OSError(28, "No space left on device")
        original(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.BlockStore, "save", fail)
        assert run(tmp_path / "b") == 1
    assert run(tmp_path / "b", epochs="2") == 1
    assert "finetune.train.epochs: 3 there, 2 now" in capsys.readouterr().err
    assert run(tmp_path / "b") == 0
    assert tensor_bytes(tmp_path / "b") == tensor_bytes(tmp_path / "a")


def test_the_model_s_own_outputs_as_targets(files):
    """With targets "model" the second block is tuned towards the dense model, and going on from it changes nothing."""
    from jaxquant.finetune import FinetuneConfig
    from jaxquant.training import TrainConfig

    loaded, saved = load_model(files / "model"), export.load_packed(files / "q")
    tokens = np.random.default_rng(0).integers(0, 256, (10, 16))
    config = FinetuneConfig(TrainConfig(0.01, epochs=3, batch_size=4, micro_batch=2, held_out=0.2), "model")
    dense = loaded.params["blocks"]
    first, second = pipeline.tune_blocks(saved.model, saved.params, dense, tokens, config)
    hidden, clean = (jax.jit(loaded.model.embed)(loaded.params, tokens[8:]) for _ in range(2))
    for ours, block in zip((first.block, saved.params["blocks"][1]), dense, strict=True):
        hidden = loaded.model.block(dense_tree(ours), hidden, "full")
        clean = loaded.model.block(block, clean, "full")
    expected = np.mean((np.asarray(hidden, np.float64) - np.asarray(clean)) ** 2)
    assert second.tuning.before == pytest.approx(expected, rel=1e-3)
    assert second.tuning.after < second.tuning.before
    params = {**saved.params, "blocks": [first.block, saved.params["blocks"][1]]}
    with pytest.raises(ValueError, match='dense_blocks: expected the dense blocks for targets "model" from block 1'):
        next(pipeline.tune_blocks(saved.model, params, None, tokens, config, start=1))
    (resumed,) = pipeline.tune_blocks(saved.model, params, dense, tokens, config, start=1)
    assert_same_bits(resumed.block, second.block)
