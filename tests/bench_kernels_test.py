"""The benchmark of kernels on tiny shapes: what it stores, not how fast anything is."""

import json

import pytest

from experiments import bench_kernels


def test_a_row_per_measurement(tmp_path, capsys):
    settings = ["--shapes", "64x32", "--batches", "1", "8", "--formats", "2x8", "uniform 4-bit"]
    more = ["--cache", "20000", "--passes", "2", "--calls", "3", "--seconds", "0.001"]
    more += ["--bandwidth", "1e9", "--results", str(tmp_path)]
    assert bench_kernels.main([*settings, *more]) == 0
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert all({"jax", "device", "platform"} <= set(row["environment"]) for row in result["rows"])
    seen = {(row["format"], row["batch"], row["implementation"]) for row in result["rows"]}
    both = {
        (name, batch, how) for name in ("2x8", "uniform 4-bit") for batch in (1, 8) for how in ("dense", "reference")
    }
    assert seen == both | {("2x8", 1, "cpu")}
    for row in result["rows"]:
        assert (row["k"], row["n"]) == (64, 32)
        assert row["microseconds"] > 0
        assert row["floor_microseconds"] == pytest.approx(row["bytes"] / 1e3)
    dense, packed = (next(r for r in result["rows"] if r["implementation"] == how) for how in ("dense", "cpu"))
    assert dense["bytes"] == 64 * 32 * 4
    assert packed["bytes"] == 2 * 8 * 32 + 2 * 2 * 2048 + 2 * 32
    assert len(capsys.readouterr().out.splitlines()) == len(result["rows"])

    again = ["--shapes", "64x32", "32x32", "--batches", "1", "--formats", "2x8", "--implementations", "kernel"]
    assert bench_kernels.main([*again, *more]) == 0
    held = json.loads(file.read_text())["rows"]
    assert len(held) == len(result["rows"]) + 1
    changed = [row for row in held if row not in result["rows"]]
    assert [(row["k"], row["n"], row["implementation"]) for row in changed] == [(32, 32, "cpu"), (64, 32, "cpu")]


def test_unknown_formats(capsys):
    assert bench_kernels.main(["--formats", "3x3"]) == 1
    assert "error: formats: expected some of 1x8, 2x8" in capsys.readouterr().err
