"""A run's directory: every finished block is committed, so that the same command resumes after any interruption.

OUT/costs.json        what widths cost in each layer, if bits are allocated over layers, see `jaxquant.run`
OUT/run.json          what makes the result: model, data, plan, seed (the fingerprint), and where it runs
OUT/blocks/<index>/   one orbax checkpoint per finished block, removed once the model is saved
OUT/state/            of a training run: one orbax checkpoint of its last state
OUT/model.safetensors the result, see `jaxquant.export`
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxquant import trees
from jaxquant.finetune import FinetuneConfig, TuneReport
from jaxquant.methods import METHODS, Config
from jaxquant.pipeline import BlockResult, LayerReport
from jaxquant.serialize import decode, encode

FORMAT = 1
RUN_FILE, COSTS_FILE = "run.json", "costs.json"


def describe_config(config: Config | None) -> dict[str, Any] | None:
    """Returns the method's name and its settings, ready for JSON."""
    return None if config is None else {"method": METHODS[type(config)].__name__, **dataclasses.asdict(config)}


def hash_params(params: Any) -> str:
    """Returns a SHA-256 over names, dtypes, shapes and bytes of all arrays."""
    digest = hashlib.sha256()
    for path, array in trees.flatten(params).items():
        array = np.asarray(array)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def fingerprint(
    params: Any,
    data: Mapping[str, Any],
    plan: Mapping[str, Config | None],
    *,
    seed: int,
    batch_size: int,
    guided: bool = False,
    finetune: FinetuneConfig | None = None,
) -> dict[str, Any]:
    """Returns all that determines the result of a run, ready for JSON.

    Args:
      params: the dense parameters.
      data: provenance of the calibration tokens.
      plan: {path: settings or None}.
      seed: of the run's key.
      batch_size: sequences per forward pass; it moves float rounding.
      guided: see `run.quantize_to_directory`.
      finetune: settings of block fine-tuning, or None.
    """
    plan_json = {path: describe_config(config) for path, config in plan.items()}
    return json.loads(
        json.dumps(
            {
                "format": FORMAT,
                "model": hash_params(params),
                "data": dict(data),
                "plan": plan_json,
                "seed": seed,
                "batch_size": batch_size,
                "guided": guided,
                "finetune": None if finetune is None else dataclasses.asdict(finetune),
            }
        )
    )


def environment() -> dict[str, str]:
    """Returns the versions and the device that a run's last bits depend on."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": device.platform,
        "device": device.device_kind,
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that `path` is either the old file or the whole new one, whatever happens."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), f"{at}.{name}" if at else name)
    elif old != new:
        yield f"{at}: {old!r} there, {new!r} now"


def check_directory(out: Path) -> None:
    """Raises ValueError if `out` holds files and no run."""
    # what a run can leave that was killed before its record was written
    early = {f"{name}{end}" for name in (RUN_FILE, COSTS_FILE) for end in ("", ".part")}
    if out.exists() and not (out / RUN_FILE).exists() and any(p.name not in early for p in out.iterdir()):
        raise ValueError(f"{out}: expected a new, an empty or a run's directory, got one with other files in it")


def open_run(out: Path, prints: dict[str, Any]) -> dict[str, str] | None:
    """Starts a run in `out`, or takes up one with the same fingerprint.

    Args:
      out: the run's directory; it is created.
      prints: from `fingerprint`.

    Returns:
      The environment of the run that is taken up; None for a new one.

    Raises:
      ValueError: `out` holds a run with another fingerprint (with what differs), or something that is no run.
    """
    file = out / RUN_FILE
    check_directory(out)
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, {"fingerprint": prints, "environment": environment()})
        return None
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        old = run["fingerprint"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{file}: expected a run's record, got something else; use another directory") from None
    changed = list(_differences(old, prints))
    if changed:
        shown = "\n  ".join(changed[:8] + ([f"... and {len(changed) - 8} more"] if len(changed) > 8 else []))
        raise ValueError(
            f"{out}: expected the run that began there, got another one:\n  {shown}\n"
            "use another directory, or remove this one to start over"
        )
    return run["environment"]


class BlockStore:
    """Commits finished blocks to `OUT/blocks` and reads them back; a block that is there is whole."""

    def __init__(self, out: Path):
        import orbax.checkpoint as ocp  # takes most of a second to import

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(out.resolve() / "blocks", options=options)

    def finished(self) -> int:
        """Returns how many blocks, from the first on, are committed."""
        steps = set(self._manager.all_steps())
        return next(i for i in range(len(steps) + 1) if i not in steps)

    def save(self, result: BlockResult) -> None:
        """Commits a block; either all of it is there afterwards or nothing."""
        arrays, manifest = encode(result.block)
        info = {"manifest": manifest, "reports": [dataclasses.asdict(r) for r in result.reports]}
        info["tuning"] = None if result.tuning is None else dataclasses.asdict(result.tuning)
        # As numpy arrays, so that a run can be taken up on other devices.
        args = self._ocp.args.Composite(
            arrays=self._ocp.args.StandardSave(jax.device_get(arrays)), info=self._ocp.args.JsonSave(info)
        )
        self._manager.save(result.index, args=args)

    def load(self, index: int) -> BlockResult:
        """Reads a committed block."""
        args = self._ocp.args.Composite(arrays=self._ocp.args.StandardRestore(), info=self._ocp.args.JsonRestore())
        restored: Any = self._manager.restore(index, args=args)
        arrays = {name: jax.numpy.asarray(x) for name, x in restored.arrays.items()}
        reports = [LayerReport(**{**r, "shape": tuple(r["shape"])}) for r in restored.info["reports"]]
        tuning = restored.info.get("tuning")
        tuning = None if tuning is None else TuneReport(**tuning)
        return BlockResult(index, decode(arrays, restored.info["manifest"]), reports, tuning)

    def close(self) -> None:
        """Releases the manager's threads."""
        self._manager.close()


@contextlib.contextmanager
def block_store(out: Path) -> Iterator[BlockStore]:
    """Opens the block store of a run and closes it at the end."""
    store = BlockStore(out)
    try:
        yield store
    finally:
        store.close()


class StateStore:
    """Keeps the last state of a training run in `OUT/state`; a state that is there is whole."""

    def __init__(self, out: Path):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(out.resolve() / "state", options=options)

    def save(self, step: int, state: Any) -> None:
        """Commits the arrays of a state; those of the step before are removed afterwards."""
        arrays = {f"{i:06}": x for i, x in enumerate(jax.device_get(jax.tree.leaves(state)))}
        self._manager.save(step, args=self._ocp.args.StandardSave(arrays))

    def load(self, state: Any) -> Any:
        """Returns the last state saved; `state`, which is of the same structure, if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return state
        arrays: Any = self._manager.restore(step, args=self._ocp.args.StandardRestore())
        leaves = [jax.numpy.asarray(arrays[name]) for name in sorted(arrays)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def close(self) -> None:
        """Releases the manager's threads."""
        self._manager.close()


@contextlib.contextmanager
def state_store(out: Path) -> Iterator[StateStore]:
    """Opens the state store of a run and closes it at the end."""
    store = StateStore(out)
    try:
        yield store
    finally:
        store.close()
