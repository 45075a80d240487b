"""Print every table of the documentation from the stored results: `python -m experiments.tables [NAME ...]`."""

import json
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
    """Methods down, problems across: relative error @bits (excess bits)."""
    problems = sorted({r["model"] for r in results})
    methods = list(dict.fromkeys(r["method"] for r in sorted(results, key=_by_bits)))
    cell = {
        (r["method"], r["model"]): f"{r['relative_error']:.5f} @{r['bits_per_weight']:.2f} (+{r['excess_bits']:.2f})"
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
            f"{r['seconds']:.0f}",
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


def _by_bits(result: Result) -> tuple[Any, ...]:
    return (result["config"].get("bits", 0), result["method"])


TABLES: dict[str, Callable[[list[Result]], str]] = {
    "layers": layers,
    "smollm2": whole_model,
    "pareto": whole_model,
    "speed": speed,
    "tuning": tuning,
}


def main(names: list[str]) -> int:
    """Prints the named tables, or all."""
    for name in names or TABLES:
        if name not in TABLES:
            print(f"error: expected names among {', '.join(TABLES)}, got {name!r}", file=sys.stderr)
            return 1
        print(f"## {name}\n\n{TABLES[name](load(name))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
