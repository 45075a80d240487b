"""Plain lines away from a terminal, bars on one."""

import io
import sys

import pytest

from jaxquant import progress
from jaxquant.progress import track


class Clock:
    """Time that passes only when told."""

    now = 1000.0

    def monotonic(self):
        return self.now

    def work(self, items, seconds):
        for _ in items:
            self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "_last_line", 0.0)
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch):
    """Makes stderr a terminal; not a fixture, because pytest puts its own stderr back after the fixtures."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    for name in ("TTY_COMPATIBLE", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return sys.stderr


def test_short_work_is_silent(clock, capsys):
    clock.work(track(range(10), "blocks"), 0.19)
    assert capsys.readouterr() == ("", "")


def test_lines_have_percentage_and_time_left(clock, capsys):
    clock.work(track(range(4), "blocks"), 30)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "blocks: 25% (1/4), 1m30s left",
        "blocks: 50% (2/4), 1m00s left",
        "blocks: 75% (3/4), 30s left",
        "blocks: 100% (4/4), took 2m00s",
    ]


def test_lines_are_at_least_five_seconds_apart(clock, capsys):
    clock.work(track(range(200), "windows"), 0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "windows: 10% (20/200), 18s left"
    assert len(lines) == 5  # at 2, 7, 12 and 17 s, and the end


def test_unknown_total(clock, capsys):
    clock.work(track((x for x in range(3)), "windows"), 6)
    assert capsys.readouterr().err.splitlines() == [
        "windows: 1 done, 6s so far",
        "windows: 2 done, 12s so far",
        "windows: 3 done, 18s so far",
        "windows: 100% (3/3), took 18s",
    ]


def test_total_given(clock, capsys):
    clock.work(track((x for x in range(2)), "windows", total=2), 3700)
    assert capsys.readouterr().err.splitlines() == [
        "windows: 50% (1/2), 1h01m left",
        "windows: 100% (2/2), took 2h03m",
    ]


def test_nested_lines_show_outer_and_inner(clock, capsys):
    for _ in track(range(2), "blocks"):
        clock.work(track(range(2), "groups"), 5)
    assert capsys.readouterr().err.splitlines() == [
        "blocks: 0% (0/2) > groups: 50% (1/2), 5s left",
        "blocks: 50% (1/2), 10s left",
        "blocks: 50% (1/2), 15s left > groups: 50% (1/2), 5s left",
        "blocks: 100% (2/2), took 20s",
    ]


def test_leaving_early_clears_the_state(clock, capsys):
    for _ in track(range(3), "blocks"):
        clock.now += 60
        break
    with pytest.raises(ZeroDivisionError):
        [1 // i for i in track(range(3), "blocks")]
    assert progress._loops == []
    assert capsys.readouterr().err == ""


def test_items_come_through():
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert list(track([], "nothing")) == []


def test_nested_bars_on_a_terminal(monkeypatch):
    terminal = on_terminal(monkeypatch)
    assert [list(track(range(2), f"inner [{i}]")) for i in track(range(3), "outer")] == [[0, 1]] * 3
    assert "outer" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert progress._bars == []
    assert sys.stderr is terminal


def test_interleaved_bars_on_a_terminal(monkeypatch):
    terminal = on_terminal(monkeypatch)
    assert list(zip(track("ab", "left"), track("abc", "right"), strict=False)) == [("a", "a"), ("b", "b")]
    assert "1/3" in terminal.getvalue()
    assert progress._bars == []


def test_leaving_early_ends_the_bar(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        [1 // i for _ in track(range(3), "outer") for i in track(range(2), "inner")]
    assert progress._bars == []
    assert sys.stderr is terminal


def test_prints_in_the_loop_stay_on_stdout(monkeypatch, capsys):
    on_terminal(monkeypatch)
    for i in track(range(2), "outer"):
        print(i)
    assert capsys.readouterr().out == "0\n1\n"
