"""Run an experiment: `python -m experiments.run NAME ...`. One JSON per result, in experiments/results/NAME.

A result is found again by the hash of its settings and data, so an interrupted experiment takes up where it stopped.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import models, tuning
from experiments.configs import EXPERIMENTS, Layers, Speed, Tuning, WholeModel
from jaxquant import METHODS, LayerProblem, bits_per_weight, relative_error
from jaxquant.checkpoint import describe_config, environment, write_json
from jaxquant.ratedistortion import excess_bits
from jaxquant.xla import compile_fast

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Run an experiment.

    Attributes:
      name: one of experiments.configs.EXPERIMENTS.
      problems: folder of layer problems, .npz files with W [out, in] and the upper triangle H of E[x x^T].
      model: model of a whole-model experiment.
      calibration: its calibration text.
      text: its evaluation text.
      sampled: windows of text from the model itself (`jaxquant sample`), for experiments that tune.
      only: run only the method of this name, or, if there is none, those in whose names this regular expression is found.
      results: where results go.
      seeds: of an experiment that tunes, in place of its own.
      shared: other work runs on the device, so seconds would mean nothing: whole-model results are stored without.
    """

    name: Annotated[str, tyro.conf.Positional]
    problems: Path | None = None
    model: str | None = None
    calibration: str | None = None
    text: str | None = None
    sampled: str | None = None
    only: str = ""
    results: Path = RESULTS
    shared: bool = False
    seeds: tuple[int, ...] | None = None


def wanted(only: str, methods: dict[str, Any]) -> dict[str, Any]:
    """The methods that `--only` asks for."""
    if only in methods:
        return {only: methods[only]}
    try:
        return {name: config for name, config in methods.items() if re.search(only, name)}
    except re.error as error:
        raise ValueError(f"--only: expected a name or a regular expression, got {only!r}: {error}") from error


def result_file(args: Arguments, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Where a result of these settings is or will be, and the settings with the experiment's name."""
    settings = {"experiment": args.name, **settings}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return args.results / args.name / f"{digest}.json", settings


def stored(args: Arguments, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Writes `settings` with what `measure` returns, unless a result of the same settings is there."""
    file, settings = result_file(args, settings)
    if file.exists():
        return
    result = settings | measure() | {"environment": environment(), "commit": commit(), "hash": file.stem}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    shown = {k: v for k, v in result.items() if isinstance(v, (int, float, str)) and k not in ("hash", "commit")}
    print(json.dumps(shown), flush=True)


def commit() -> str:
    """The commit of the working tree, marked if files differ from it; outside a checkout, $GIT_COMMIT or "unknown"."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT", "unknown")


def load_problem(path: Path) -> LayerProblem:
    """Reads a problem: W float16 [out, in] and H, the upper triangle of E[x x^T], float32."""
    with np.load(path, allow_pickle=False) as file:
        weight, triangle = file["W"].astype(np.float32), file["H"]
    n = weight.shape[1]
    hessian = np.zeros((n, n), np.float32)
    hessian[np.triu_indices(n)] = triangle
    return LayerProblem(jnp.asarray(weight), jnp.asarray(hessian + np.triu(hessian, 1).T))


def run_layers(args: Arguments, experiment: Layers) -> None:
    """Measures all methods on all problems."""
    if args.problems is None:
        raise ValueError("--problems: expected a folder of .npz files for this experiment, got nothing")
    for path in sorted(args.problems.glob("*.npz")):
        problem = load_problem(path)
        data = hashlib.sha256(path.read_bytes()).hexdigest()
        for name, config in experiment.methods.items():
            settings = {"model": path.stem, "method": name, "config": describe_config(config), "data": data}

            def measure(problem=problem, config=config):
                began = time.perf_counter()
                tensor = METHODS[type(config)](problem, config, key=jax.random.key(0))
                jax.block_until_ready(tensor)
                return {
                    "bits_per_weight": bits_per_weight(tensor),
                    "relative_error": float(relative_error(problem, tensor)),
                    "excess_bits": float(excess_bits(problem, tensor)),
                    "seconds": time.perf_counter() - began,  # compilation included
                }

            stored(args, settings, measure)
            jax.clear_caches()  # every layer has its own shape, and a CPU process can hold only so many programs


def run_model(args: Arguments, experiment: WholeModel) -> None:
    """Quantizes a model by each method and measures perplexity and KL."""
    task = models.open_task(args.model, args.calibration, args.text, experiment.sequences, experiment.length)
    for name, config in experiment.methods.items():

        def measure(name=name, config=config):
            began = time.perf_counter()
            params, reports = task.params, []
            if config is not None:
                params, reports = models.quantize(task, config, name, experiment.batch_size, guided=experiment.guided)
            jax.block_until_ready(params)
            seconds = time.perf_counter() - began  # compilation included
            figures = models.evaluation(task, params, reports, name)
            return {**figures, "seconds": None if args.shared else seconds}

        settings = {**task.about, "method": name, "config": models.describe(config)}
        stored(args, settings | ({"guided": True} if experiment.guided else {}), measure)


def square_problem(n: int, tokens: int) -> LayerProblem:
    """Gaussian weights [n, n], and inputs whose second moments have eigenvalues from 1 to 1e-4 in random directions."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((n, n)), jnp.float32)
    with jax.default_matmul_precision("highest"):
        mix = jnp.linalg.qr(jnp.asarray(rng.standard_normal((n, n)), jnp.float32))[0]
        mix = mix * jnp.sqrt(jnp.geomspace(1, 1e-4, n, dtype=jnp.float32))[None, :]
        x = jnp.asarray(rng.standard_normal((tokens, n)), jnp.float32) @ mix.T
        return LayerProblem(weight, x.T @ x / tokens)


def run_speed(args: Arguments, experiment: Speed) -> None:
    """Times methods on layers: the median of up to three runs after one that warms up, and the memory they need."""
    for n in experiment.sizes:
        problem, key = square_problem(n, experiment.tokens), jax.random.key(0)
        shape = {"out": n, "columns": n, "tokens": experiment.tokens, "device": environment()["device"]}
        settings = {
            name: {**shape, "method": name, "config": describe_config(config)}
            for name, config in experiment.methods.items()
        }
        missing = [name for name in settings if not result_file(args, settings[name])[0].exists()]

        def compiled(name: str, problem=problem, key=key) -> Any:
            config = experiment.methods[name]
            return METHODS[type(config)].lower(problem, config, key=key).compile()

        with ThreadPoolExecutor() as pool:  # each takes one core for ten seconds or more
            programs = dict(zip(missing, pool.map(compiled, missing), strict=True))
        for name in missing:

            def measure(solve=programs[name], problem=problem, key=key):
                memory, times = solve.memory_analysis(), []
                while len(times) < 4 and (not times or times[-1] < 5):  # if slow, one run tells enough
                    began = time.perf_counter()
                    tensor = jax.block_until_ready(solve(problem, key=key))
                    times.append(time.perf_counter() - began)
                return {
                    "seconds": float(np.median(times[1:] or times)),
                    "peak_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
                    "bits_per_weight": bits_per_weight(tensor),
                    "relative_error": float(relative_error(problem, tensor)),
                }

            stored(args, settings[name], measure)


def main() -> int:
    """Runs the experiment named on the command line."""
    args = tyro.cli(Arguments, prog="python -m experiments.run")
    compile_fast()
    if args.name not in EXPERIMENTS:
        print(f"error: name: expected one of {', '.join(EXPERIMENTS)}, got {args.name!r}", file=sys.stderr)
        return 1
    experiment = EXPERIMENTS[args.name]
    try:
        experiment = dataclasses.replace(experiment, methods=wanted(args.only, experiment.methods))
        if isinstance(experiment, Layers):
            run_layers(args, experiment)
        elif isinstance(experiment, WholeModel):
            run_model(args, experiment)
        elif isinstance(experiment, Tuning):
            experiment = dataclasses.replace(experiment, seeds=args.seeds or experiment.seeds)
            options = (args.model, args.calibration, args.text, args.sampled)
            tuning.run(experiment, *options, store=functools.partial(stored, args))
        else:
            run_speed(args, experiment)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
