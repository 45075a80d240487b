"""Plot the stored results: `python -m experiments.plots [NAME ...] [--out DIR]`, one SVG per experiment."""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.tables import Result, load

Series = dict[str, list[tuple[float, float]]]


def families(results: list[Result], x: str, y: str) -> Series:
    """Points of the methods' families, such as "gptq paper" for "gptq 3-bit paper", sorted by x."""
    series: Series = defaultdict(list)
    for r in results:
        if r["config"] is not None:
            words = [word for word in r["method"].replace(",", "").split() if not any(c.isdigit() for c in word)]
            series[" ".join(word for word in words if word not in ("bit", "bits"))].append((r[x], r[y]))
    return {name: sorted(points) for name, points in sorted(series.items())}


def lines(axis: Any, series: Series) -> None:
    """Draws every family as a line with a marker per result; colours and markers stay the same from panel to panel."""
    for k, (name, points) in enumerate(series.items()):
        if not points:
            continue
        axis.plot(*zip(*points, strict=True), color=f"C{k % 10}", marker="osD^v<>"[k // 10 % 7], ms=3, lw=1, label=name)


def ticks(axis: Any, sizes: set[int]) -> None:
    """Puts ticks at these sizes alone: labels of others would cover theirs."""
    axis.set_xticks(sorted(sizes), map(str, sorted(sizes)))
    axis.set_xticks([], minor=True)


def layers(results: list[Result]) -> Any:
    """A panel per problem: bits wasted against bits spent."""
    problems = sorted({r["model"] for r in results})
    figure, axes = plt.subplots(1, len(problems), figsize=(3.2 * len(problems), 3.6), sharey=True, squeeze=False)
    for axis, problem in zip(axes[0], problems, strict=True):
        lines(axis, families([r for r in results if r["model"] == problem], "bits_per_weight", "excess_bits"))
        axis.set(title=problem, xlabel="bits per weight")
    axes[0, 0].set_ylabel("bits beyond the rate-distortion bound")
    axes[0, -1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def whole_model(results: list[Result]) -> Any:
    """Perplexity against bits, and the dense model."""
    figure, axis = plt.subplots(figsize=(5, 4))
    lines(axis, families(results, "bits_per_weight", "perplexity"))
    for r in results:
        if r["config"] is None:
            axis.axhline(r["perplexity"], color="0.5", lw=1, ls=":", label=f"dense {r['perplexity']:.2f}")
    axis.set(xlabel="bits per weight", ylabel="perplexity", yscale="log")
    axis.legend(fontsize=7)
    return figure


def codebooks(results: list[Result]) -> Any:
    """As `speed`, for one size of layer, against the entries of a codebook."""
    return speed([{**r, "method": "aqlm", "entries": 2 ** r["config"]["codebook_bits"]} for r in results], "entries")


def speed(results: list[Result], against: str = "columns") -> Any:
    """Seconds, and bytes of device memory beyond the problem, against the size of a square layer."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
    for axis, name, label in zip(axes, ("seconds", "peak_bytes"), ("seconds", "peak device bytes"), strict=True):
        series: Series = defaultdict(list)
        for r in results:
            if r.get(name):
                series[r["method"]].append((r[against], r[name]))
        lines(axis, {method: sorted(points) for method, points in sorted(series.items())})
        axis.set(xlabel={"columns": "in = out"}.get(against, against), ylabel=label, xscale="log", yscale="log")
        ticks(axis, {r[against] for r in results})
    axes[0].legend(fontsize=6)
    return figure


def kernels(results: list[Result]) -> Any:
    """A row of panels per device, a panel per shape: microseconds of a product against its tokens."""
    times: dict[str, dict[tuple[int, int], dict[str, dict[int, float]]]] = {}
    for r in (row for result in results for row in result["rows"]):
        name = {"dense": f"dense {r['dtype']}", "reference": f"{r['format']} made dense"}.get(r["implementation"])
        panels = times.setdefault(r["environment"]["device"], {})
        points = panels.setdefault((r["k"], r["n"]), {}).setdefault(name or r["format"], {})
        points[r["batch"]] = r["microseconds"]
    shapes = sorted({shape for panels in times.values() for shape in panels})
    names = sorted({name for panels in times.values() for panel in panels.values() for name in panel})
    size = (3.6 * len(shapes), 3.6 * len(times))
    figure, axes = plt.subplots(len(times), len(shapes), figsize=size, squeeze=False, layout="constrained")
    for row, (device, panels) in zip(axes, sorted(times.items()), strict=True):
        for axis, shape in zip(row, shapes, strict=True):
            panel = panels.get(shape, {})
            lines(axis, {name: sorted(panel.get(name, {}).items()) for name in names})
            axis.set(title="{} x {}".format(*shape), xlabel="tokens", xscale="log", yscale="log")
            ticks(axis, {batch for points in panel.values() for batch in points})
        row[0].set_ylabel(f"microseconds, {device}")
    found = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in figure.axes]
    handles = {label: handle for panel in found for handle, label in panel}
    figure.legend([handles[name] for name in names], names, fontsize=6, loc="outside right upper")
    return figure


PLOTS: dict[str, Callable[[list[Result]], Any]] = {
    "layers": layers,
    "pareto": whole_model,
    "guided": whole_model,
    "smollm2": whole_model,
    "scaling": speed,
    "codebooks": codebooks,
    "kernels": kernels,
}


def main() -> None:
    """Draws the named plots, or all that have results."""
    parser = argparse.ArgumentParser(prog="python -m experiments.plots", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*PLOTS, []], help="by default all that have results")
    parser.add_argument("--out", type=Path, default=Path("plots"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or PLOTS:
        results = load(name)
        if results:
            file = args.out / f"{name}.svg"
            PLOTS[name](results).savefig(file, bbox_inches="tight")
            print(file)


if __name__ == "__main__":
    main()
