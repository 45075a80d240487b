"""A whole tuning run: a quantized model into another directory, going on after any interruption.

OUT/run.json           what makes the result, see `tuning_fingerprint`
OUT/blocks, OUT/state  finished blocks, or the state after the last chunk; removed once the model is saved
OUT/model.safetensors  the tuned model, in the formats of the given one
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxquant import checkpoint, distill, export
from jaxquant.data import TokenSet
from jaxquant.export import SavedModel
from jaxquant.finetune import FinetuneConfig
from jaxquant.models.load import LoadedModel
from jaxquant.pipeline import BlockResult, tune_blocks
from jaxquant.projection import CodeConfig
from jaxquant.serialize import encode
from jaxquant.training import TrainConfig, split

Stage = Literal["block", "distill", "pv"]


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """What to tune, and how.

    Attributes:
      stage: "block" tunes block after block (`finetune`), "distill" all floats of the blocks at once (`distill`), "pv"
        also the codes (`recode`).
      train: of the training.
      codes: of the V step; used by "pv" only.
      targets: of "block", see `finetune.FinetuneConfig`.
      ends: "distill" and "pv": also train the embedding and the head, which are dense.
      dtype: "distill" and "pv": of activations, see `distill.prepare`.
    """

    stage: Stage
    train: TrainConfig
    codes: CodeConfig | None = None
    targets: Literal["prefix", "model"] = "prefix"
    ends: bool = False
    dtype: str | None = None

    @classmethod
    def preset(cls, stage: Stage, **train: Any) -> "TuneConfig":
        """The settings we recommend for a stage; `train` replaces fields of its TrainConfig.

        Raises:
          ValueError: an unknown stage, or a value out of range.
        """
        presets: dict[str, dict[str, Any]] = {
            "block": {"learning_rate": 4e-3, "epochs": 10},
            "distill": {"learning_rate": 1e-3, "epochs": 2, "held_out": 0.0625, "chunks": 8},
            "pv": {"learning_rate": 1e-3, "epochs": 2, "held_out": 0.0625, "chunks": 8},
        }
        if stage not in presets:
            raise ValueError(f"stage: expected one of {', '.join(presets)}, got {stage!r}")
        return cls(stage, TrainConfig(**{**presets[stage], **train}), CodeConfig() if stage == "pv" else None)


class TuneProgress(NamedTuple):
    """One step of a run: units (blocks or chunks) done and in all, and the held-out loss at their beginning and now."""

    done: int
    total: int
    before: float
    after: float


def tuning_fingerprint(
    saved: SavedModel, dense: LoadedModel, data: TokenSet, config: TuneConfig, batch_size: int
) -> dict[str, Any]:
    """Returns all that determines the result of a tuning run, ready for JSON."""
    prints = {
        "format": checkpoint.FORMAT,
        "model": checkpoint.hash_params(encode(saved.params)[0]),
        "dense": checkpoint.hash_params(dense.params),
        "data": data.provenance,
        "tuning": dataclasses.asdict(config),
        "batch_size": batch_size,
    }
    return json.loads(json.dumps(prints))


def tune_to_directory(
    saved: SavedModel, dense: LoadedModel, data: TokenSet, config: TuneConfig, out: Path, *, batch_size: int = 8
) -> Iterator[TuneProgress]:
    """Tunes a quantized model into `out`, taking up what an interrupted run left there.

    A finished run yields nothing and changes nothing.

    Args:
      saved: the quantized model.
      dense: the model that it was made from.
      data: tuning tokens.
      config: settings.
      out: the run's directory.
      batch_size: windows per forward pass outside the training, stage "block" only.

    Yields:
      TuneProgress after each block or chunk; those of an interrupted run are not repeated.

    Raises:
      ValueError: `dense` is not the model that was quantized; too few windows; `out` holds another run or other files.
    """
    prints = tuning_fingerprint(saved, dense, data, config, batch_size)
    origin = saved.record["run"].get("model")
    if origin != prints["dense"]:
        raise ValueError(
            f"dense model: expected the one that was quantized (sha256 {str(origin)[:12]}), got another "
            f"({prints['dense'][:12]}); pass it as --reference"
        )
    split(config.train, len(data.tokens))
    checkpoint.open_run(out, prints)
    if not export.is_packed(out):
        run = _tune_blocks if config.stage == "block" else _distill
        params = yield from run(saved, dense, data.tokens, config, out, batch_size)
        history = [*saved.record.get("tuned", []), {**prints, "environment": checkpoint.environment()}]
        export.save_packed(out, params, saved.config_dict, {**saved.record, "tuned": history})
    for folder in ("blocks", "state"):
        shutil.rmtree(out / folder, ignore_errors=True)


def _tune_blocks(
    saved: SavedModel, dense: LoadedModel, tokens: np.ndarray, config: TuneConfig, out: Path, batch_size: int
) -> Any:
    finetune = FinetuneConfig(config.train, config.targets)
    results: list[BlockResult] = []
    with checkpoint.block_store(out) as store:
        results += [store.load(index) for index in range(store.finished())]
        blocks = [r.block for r in results] + saved.params["blocks"][len(results) :]
        params = {**saved.params, "blocks": blocks}
        options = {"batch_size": batch_size, "start": len(results)}
        for result in tune_blocks(saved.model, params, dense.params["blocks"], tokens, finetune, **options):
            store.save(result)
            results.append(result)
            assert result.tuning is not None
            yield TuneProgress(len(results), len(blocks), result.tuning.before, result.tuning.after)
    return {**saved.params, "blocks": [r.block for r in results]}


def _distill(
    saved: SavedModel, dense: LoadedModel, tokens: np.ndarray, config: TuneConfig, out: Path, batch_size: int
) -> Any:
    del batch_size  # the held-out windows are judged in micro-batches
    run = distill.prepare(
        saved.model,
        saved.params,
        dense.params,
        tokens,
        config.train,
        codes=config.codes,
        ends=config.ends,
        dtype=config.dtype,
    )
    state = run.begin()
    with checkpoint.state_store(out) as store:
        state = store.load(state)
        before = float(state.best_loss)
        for progress in run.run(state):
            state = progress.state
            store.save(progress.done, state)
            yield TuneProgress(progress.done, progress.total, before, progress.best)
            before = progress.best
    return run.result(state)
