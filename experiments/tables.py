"""Print every table of the documentation from the stored results: `python -m experiments.tables [NAME ...]`.

`python -m experiments.tables --write README.md` puts them between `<!-- table NAME -->` and `<!-- end -->`.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]


def load(name: str, results: Path = RESULTS) -> list[Result]:
    """All stored results of an experiment, in the order of their files' names."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((results / name).glob("*.json"))]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def layers(results: list[Result]) -> str:
    """Our settings: methods down, problems across; relative error @bits (excess bits)."""
    return _layers([r for r in results if "paper" not in r["method"]])


def layers_paper(results: list[Result]) -> str:
    """The authors' settings, likewise."""
    return _layers([r for r in results if "paper" in r["method"]])


def _layers(results: list[Result]) -> str:
    problems = sorted({r["model"] for r in results})
    methods = list(dict.fromkeys(r["method"] for r in sorted(results, key=_by_bits)))
    cell = {
        (r["method"], r["model"]): f"{r['relative_error']:.5f} @{r['bits_per_weight']:.2f} ({r['excess_bits']:+.2f})"
        for r in results
    }
    return markdown(["method", *problems], [[m, *(cell.get((m, p), "") for p in problems)] for m in methods])


def whole_model(results: list[Result]) -> str:
    """A line per method: bits, perplexity, KL, seconds."""
    rows = [
        [
            r["method"],
            f"{r['bits_per_weight']:.3f}",
            f"{r['perplexity']:.2f}",
            f"{r['kl']:.4f}",
            "" if r["seconds"] is None else f"{r['seconds']:.0f}",
            r["environment"]["device"],
        ]
        for r in sorted(results, key=lambda r: (-r["bits_per_weight"], r["perplexity"]))
    ]
    return markdown(["method", "bits per weight", "perplexity", "KL (nats)", "seconds", "device"], rows)


def tuning(results: list[Result]) -> str:
    """A line per method, a column per stage: perplexity, mean and spread over the seeds, and KL."""
    stages = list(dict.fromkeys(r["stage"] for r in sorted(results, key=lambda r: len(r["tuning"]))))
    rows = []
    for method in sorted({r["method"] for r in results}):
        mine = [r for r in results if r["method"] == method]
        bits = statistics.mean(r["bits_per_weight"] for r in mine)
        cells = [[r for r in mine if r["stage"] == stage] for stage in stages]
        rows.append([method, f"{bits:.3f}", *map(_spread, cells)])
    return markdown(["method", "bits per weight", *(f"+ {s}" if s != "none" else s for s in stages)], rows)


def _spread(results: list[Result]) -> str:
    if not results:
        return ""
    values = [r["perplexity"] for r in results]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    kl, other = (statistics.mean(r[k] for r in results) for k in ("kl", "perplexity_built_in"))
    return f"{statistics.mean(values):.2f}{spread} (KL {kl:.3f}; built-in text {other:.2f})"


def speed(results: list[Result]) -> str:
    """A line per method: seconds, error, bits."""
    rows = [
        [
            r["method"],
            f"{r['out']} x {r['columns']}",
            f"{r['seconds']:.3f}",
            f"{r['relative_error']:.5f}",
            f"{r['bits_per_weight']:.3f}",
            r["device"],
        ]
        for r in sorted(results, key=lambda r: (r["method"], r["out"]))
    ]
    return markdown(["method", "layer", "seconds", "relative error", "bits per weight", "device"], rows)


def generation(results: list[Result]) -> str:
    """A line per device, model and format: speed and bytes of weights, and both against bfloat16."""
    lines = []
    for rows in (result["rows"] for result in results):
        dense = {r["model"]: r for r in rows if r["format"] == "bfloat16"}
        for r in rows:
            base, megabytes = dense.get(r["model"]), f"{r['weight_bytes'] / 1e6:.1f}"
            faster = "" if base is None else f"{r['tokens_per_second'] / base['tokens_per_second']:.2f}"
            share = "" if base is None else f"{r['weight_bytes'] / base['weight_bytes']:.3f}"
            accounted = f"{r['accounted_bytes'] / 1e6:.1f}"
            peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.1f}"
            speed = [f"{r['tokens_per_second']:.1f}", f"{r['milliseconds_per_token']:.3f}", faster]
            device = r["environment"]["device"]
            lines.append([r["model"], r["format"], *speed, megabytes, share, accounted, peak, device])
    header = ["model", "weights", "tokens per second", "ms per token", "times bfloat16"]
    header += ["weights MB", "of bfloat16", "accounted MB", "peak MB", "device"]
    return markdown(header, lines)


def kernels(results: list[Result]) -> str:
    """A line per format, shape and batch: our kernel, other ways, and the time of reading the weight."""
    lines = []
    for rows in (result["rows"] for result in results):
        times = {
            tuple(r[key] for key in ("implementation", "format", "k", "n", "batch")): r["microseconds"] for r in rows
        }
        for r in (r for r in rows if r["implementation"] not in ("dense", "reference")):
            case, time, floor = (r["format"], r["k"], r["n"], r["batch"]), r["microseconds"], r["floor_microseconds"]
            base, other = times.get(("dense", *case)), times.get(("reference", *case))
            compared = ["", ""] if base is None else [f"{base:.1f}", f"{time / base:.2f}"]
            compared.append("" if other is None else f"{other:.1f}")
            share = "" if floor is None else f"{floor / time:.0%}"
            shape, device = f"{r['k']} x {r['n']}", r["environment"]["device"]
            lines.append([r["format"], shape, str(r["batch"]), f"{time:.1f}", *compared, share, device])
    header = ["format", "K x N", "batch", "us", "dense us", "of dense", "made dense us", "of the bandwidth", "device"]
    return markdown(header, lines)


def table_bytes(results: list[Result]) -> str:
    """A line per model and rounding of the tables of partial products: perplexity on the first windows of the text."""
    lines = []
    for result in results:
        for r in result["rows"]:
            rounding = "dense weights" if r["bytes"] is None else f"{r['bytes']} bytes" if r["bytes"] > 1 else "1 byte"
            lines.append([result["method"], rounding, f"{r['perplexity']:.2f}", str(r["evaluation"]["windows"])])
    return markdown(["method", "tables", "perplexity", "windows"], lines)


def _by_bits(result: Result) -> tuple[Any, ...]:
    return (round(result["bits_per_weight"]), result["method"])


TABLES: dict[str, Callable[[list[Result]], str]] = {
    "layers": layers,
    "layers paper": layers_paper,
    "smollm2": whole_model,
    "pareto": whole_model,
    "guided": whole_model,
    "speed": speed,
    "scaling": speed,
    "codebooks": speed,
    "generation": generation,
    "kernels": kernels,
    "table_bytes": table_bytes,
    "tuning": tuning,
}


BY_DEVICE = ("kernels", "generation")  # tables that a device's name may follow


def table(name: str) -> str:
    """A table of the documentation; the first word of its name is that of the experiment, the others may be a device's."""
    experiment, _, device = name.partition(" ")
    if name in TABLES:
        return TABLES[name](load(experiment))
    results = [result for result in load(experiment) if device in result["rows"][0]["environment"]["device"]]
    return TABLES[experiment](results)


def written(text: str) -> str:
    """Returns a document with the tables between its markers brought up to date."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n\n{table(match[1])}\n\n<!-- end -->"

    return re.sub(r"<!-- table ([\w -]+?) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    """Prints the named tables, or all that have results; or writes them into a document."""
    if arguments[:1] == ["--write"] and len(arguments) == 2:
        document = Path(arguments[1])
        document.write_text(written(document.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for name in arguments or TABLES:
        if name not in TABLES and name.partition(" ")[0] not in BY_DEVICE:
            print(f"error: expected names among {', '.join(TABLES)}, or --write FILE, got {name!r}", file=sys.stderr)
            return 1
        if arguments or load(name.split()[0]):
            print(f"## {name}\n\n{table(name)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
