"""Interrupted runs: what is committed, what is refused, and that the same command ends with the same model."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import GPTQConfig, RTNConfig, checkpoint, cli, export
from jaxquant.checkpoint import block_store, fingerprint, open_run, write_json
from jaxquant.export import MODEL_FILE
from jaxquant.pipeline import BlockResult
from tests import tiny

ROOT = Path(__file__).parents[1]
BLOCKS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Blocks enough that a run can be caught between the first and the last."""
    config = tiny.CONFIG | {"num_hidden_layers": BLOCKS}
    path = tiny.write(tmp_path_factory.mktemp("model"), config)
    tiny.write_text(path / "text.txt")
    return path


def command(source, out, *more):
    data = ["--calibration", str(source / "text.txt"), "--sequences", "2", "--length", "32"]
    method = ["rtn", "--bits", "3", "--search", "minmax", *more]
    return ["quantize", str(source), "--out", str(out), *data, *method]


def tensor_bytes(out):
    """Names and places of the tensors, and their bytes; all but the record with its timings."""
    data = (out / MODEL_FILE).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    ours = json.loads(header.pop("__metadata__")["jaxquant"])
    return header, ours["tensors"], data[8 + size :]


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert cli.main(command(source, out)) == 0
    return out


def interrupt(source, out, **environment):
    """Starts the command in a process of its own and kills it once the first block is committed."""
    arguments = [sys.executable, "-m", "jaxquant.cli", *command(source, out)]
    process = subprocess.Popen(arguments, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / "blocks" / "0").is_dir():
        assert process.poll() is None, "ended before its first block"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_killed_run_resumes_to_the_same_bytes(source, finished, tmp_path, capfd):
    out = tmp_path / "out"
    interrupt(source, out)
    assert not (out / MODEL_FILE).exists()
    assert (out / "run.json").is_file()
    assert cli.main(["evaluate", str(out), "--length", "32"]) == 1
    assert "expected a finished run, got one that stopped; repeat its command" in capfd.readouterr().err
    with block_store(out) as store:
        assert 1 <= store.finished() < BLOCKS
    kept = tmp_path / "kept"
    shutil.copytree(out, kept)
    arguments = [sys.executable, "-m", "jaxquant.cli", *command(source, out)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tensor_bytes(out) == tensor_bytes(finished)
    assert not (out / "blocks").exists()
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in finished.iterdir())
    # Another block whose writing was cut off is not taken for a block.
    with block_store(kept) as store:
        count = store.finished()
    shutil.copytree(kept / "blocks" / "0", kept / "blocks" / f"{count}.orbax-checkpoint-tmp")
    with block_store(kept) as store:
        assert store.finished() == count
    assert cli.main(command(source, kept)) == 0
    assert tensor_bytes(kept) == tensor_bytes(finished)


def test_a_finished_run_repeated_does_nothing(source, finished, monkeypatch, capsys):
    def no_work(*_, **__):
        raise AssertionError("a finished run must not quantize")

    monkeypatch.setattr("jaxquant.run.quantize_blocks", no_work)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (finished / MODEL_FILE, finished / "run.json")}
    assert cli.main(command(source, finished)) == 0
    assert before == {n: ((finished / n).stat().st_mtime_ns, (finished / n).read_bytes()) for n in before}
    assert "bits per weight in linear layers" in capsys.readouterr().out


def test_a_full_disk_while_saving_leaves_a_run_that_resumes(source, finished, tmp_path, monkeypatch, capfd):
    def fail(arrays, file, **_):
        Path(file).write_bytes(b"\0" * 100)
        raise OSError(28, "No space left on device", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", fail)
        assert cli.main(command(source, tmp_path)) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
    assert not export.is_packed(tmp_path)
    assert not (tmp_path / MODEL_FILE).exists()
    with block_store(tmp_path) as store:
        assert store.finished() == BLOCKS
    monkeypatch.setattr("jaxquant.pipeline.quantize_layer", None)  # every block is there
    assert cli.main(command(source, tmp_path)) == 0
    assert tensor_bytes(tmp_path) == tensor_bytes(finished)


def test_a_full_disk_while_committing_a_block(source, finished, tmp_path, monkeypatch, capfd):
    save = checkpoint.BlockStore.save

    def fail(self, result):
        if result.index == 2:
            raise OSError(28, "No space left on device")
        save(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.BlockStore, "save", fail)
        assert cli.main(command(source, tmp_path)) == 1
    assert "error: [Errno 28] No space left on device" in capfd.readouterr().err
    with block_store(tmp_path) as store:
        assert store.finished() == 2
    assert cli.main(command(source, tmp_path)) == 0
    assert tensor_bytes(tmp_path) == tensor_bytes(finished)


def test_another_run_in_the_same_directory_is_refused(source, finished, capsys):
    assert cli.main([*command(source, finished)[:-3], "2", "--search", "minmax"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {finished}: expected the run that began there, got another one:")
    assert "plan.blocks/0/attn/q.bits: 3 there, 2 now" in error
    assert f"... and {7 * BLOCKS - 8} more" in error
    assert "use another directory, or remove this one to start over" in error
    assert cli.main(["quantize", str(source), "--seed", "1", *command(source, finished)[2:]]) == 1
    assert "seed: 0 there, 1 now" in capsys.readouterr().err


def test_other_directories_are_refused(source, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert cli.main(command(source, tmp_path)) == 1
    assert "expected a new, an empty or a run's directory, got one with other files in it" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


PARAMS = {"embed": {"weight": jnp.ones((3, 2))}, "blocks": [{"q": {"weight": jnp.zeros((2, 2))}}]}
PLAN = {"blocks/0/q": GPTQConfig(3), "blocks/0/k": None}


def test_fingerprints_tell_runs_apart():
    first = fingerprint(PARAMS, {"sha256": "x"}, PLAN, seed=0, batch_size=8)
    assert first == json.loads(json.dumps(first))
    assert first["plan"]["blocks/0/q"]["method"] == "gptq"
    assert first["plan"]["blocks/0/k"] is None
    assert fingerprint(PARAMS, {"sha256": "x"}, dict(PLAN), seed=0, batch_size=8) == first
    changed = {"embed": PARAMS["embed"], "blocks": [{"q": {"weight": jnp.full((2, 2), 1e-20)}}]}
    others = [
        fingerprint(changed, {"sha256": "x"}, PLAN, seed=0, batch_size=8),
        fingerprint(PARAMS, {"sha256": "y"}, PLAN, seed=0, batch_size=8),
        fingerprint(PARAMS, {"sha256": "x"}, PLAN | {"blocks/0/k": RTNConfig(3)}, seed=0, batch_size=8),
        fingerprint(PARAMS, {"sha256": "x"}, PLAN, seed=1, batch_size=8),
        fingerprint(PARAMS, {"sha256": "x"}, PLAN, seed=0, batch_size=4),
    ]
    assert all(other != first for other in others)


def test_runs_are_opened_once_and_taken_up(tmp_path):
    prints = {"seed": 0, "plan": {"a": 1}}
    out = tmp_path / "new" / "run"
    assert open_run(out, prints) is None
    assert open_run(out, prints) == checkpoint.environment()
    with pytest.raises(ValueError, match=r"plan\.a: 1 there, None now\n  plan\.b: None there, 2 now"):
        open_run(out, {"seed": 0, "plan": {"b": 2}})
    for text in ("{}", "not json", "[]"):
        (out / "run.json").write_text(text)
        with pytest.raises(ValueError, match="expected a run's record, got something else; use another directory"):
            open_run(out, prints)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "run.json.part").write_text('{"finger')
    assert open_run(cut, prints) is None


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": [1, 2]})
    with pytest.raises(TypeError):
        write_json(file, {"b": object()})
    assert json.loads(file.read_text()) == {"a": [1, 2]}


def test_blocks_count_from_the_first_without_gaps(tmp_path):
    block = {"q": {"weight": jnp.asarray(np.arange(6.0).reshape(2, 3), jnp.bfloat16)}}
    with block_store(tmp_path) as store:
        assert store.finished() == 0
        store.save(BlockResult(0, block, []))
        store.save(BlockResult(2, block, []))
        assert store.finished() == 1
        assert store.load(0).block["q"]["weight"].dtype == jnp.bfloat16
