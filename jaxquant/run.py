"""A whole run: quantize a loaded model into a directory, committing each block, and save the result."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxquant import checkpoint, export, sensitivity
from jaxquant.data import TokenSet
from jaxquant.finetune import FinetuneConfig
from jaxquant.methods import Config
from jaxquant.models.load import LoadedModel
from jaxquant.pipeline import BlockResult, quantize_blocks


def quantize_to_directory(
    loaded: LoadedModel,
    data: TokenSet,
    plan: Mapping[str, Config | None],
    out: Path,
    *,
    seed: int = 0,
    batch_size: int = 8,
    guided: bool = False,
    finetune: FinetuneConfig | None = None,
) -> Iterator[BlockResult]:
    """Quantizes a model into `out`, taking up what an interrupted run left there.

    After the last block the packed model is saved and the blocks' checkpoints are removed. A finished run yields nothing
    and changes nothing.

    Args:
      loaded: the dense model.
      data: calibration tokens.
      plan: {path: settings or None}.
      out: the run's directory.
      seed: of the methods' keys.
      batch_size: sequences per forward pass.
      guided: weigh tokens by their importance for the predictions, see `sensitivity.token_importance`.
      finetune: settings of block fine-tuning, or None.

    Yields:
      Each block's result, those read back first.

    Raises:
      ValueError: `out` holds another run or other files; see also `quantize_blocks`.
    """
    prints = checkpoint.fingerprint(
        loaded.params, data.provenance, plan, seed=seed, batch_size=batch_size, guided=guided, finetune=finetune
    )
    checkpoint.open_run(out, prints)
    if export.is_packed(out):
        shutil.rmtree(out / "blocks", ignore_errors=True)  # there if the run was killed between its last two lines
        return
    results: list[BlockResult] = []
    with checkpoint.block_store(out) as store:
        for index in range(store.finished()):
            results.append(store.load(index))
            yield results[-1]
        importance, key = None, jax.random.key(seed)
        if guided and len(results) < len(loaded.params["blocks"]):
            options = {"key": key, "batch_size": batch_size}
            importance = sensitivity.token_importance(loaded.model, loaded.params, data.tokens, **options)
        blocks = [r.block for r in results] + loaded.params["blocks"][len(results) :]
        for result in quantize_blocks(
            loaded.model,
            {**loaded.params, "blocks": blocks},
            data.tokens,
            plan,
            key=key,
            batch_size=batch_size,
            start=len(results),
            importance=importance,
            finetune=finetune,
            dense_blocks=loaded.params["blocks"],
        ):
            store.save(result)
            results.append(result)
            yield result
    record = {
        "reports": [dataclasses.asdict(r) for result in results for r in result.reports],
        "tuning": [None if r.tuning is None else dataclasses.asdict(r.tuning) for r in results],
        "source": str(loaded.tokenizer_source),
        "run": prints,
        "environment": checkpoint.environment(),
    }
    params = {**loaded.params, "blocks": [r.block for r in results]}
    export.save_packed(out, params, loaded.config_dict, record)
    shutil.rmtree(out / "blocks")


def measure_costs(
    loaded: LoadedModel,
    data: TokenSet,
    configs: Sequence[Config],
    file: Path,
    *,
    seed: int = 0,
    batch_size: int = 8,
    skip: Sequence[str] = (),
) -> Iterator[int]:
    """Measures what each of `configs` costs in each layer, into a JSON file that is written after every block.

    A file of the same model, data and settings is taken up where it stops; read it with `read_costs`.

    Args:
      loaded: the dense model.
      data: calibration tokens.
      configs: settings to try.
      file: the costs.
      seed: of labels and methods.
      batch_size: sequences per forward pass.
      skip: paths of layers to leave out.

    Yields:
      The index of every block, once its costs are there.

    Raises:
      ValueError: `file` holds the costs of something else.
    """
    prints = {
        "model": checkpoint.hash_params(loaded.params),
        "data": dict(data.provenance),
        "configs": [checkpoint.describe_config(config) for config in configs],
        "seed": seed,
        "batch_size": batch_size,
        "skip": list(skip),
    }
    prints = json.loads(json.dumps(prints))
    blocks: dict[str, Any] = {}
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.get("fingerprint") != prints:
            raise ValueError(f"{file}: expected costs of this model, data and settings; name another file or remove it")
        blocks = stored["blocks"]
        yield from sorted(map(int, blocks))
    if len(blocks) == len(loaded.params["blocks"]):
        return
    for result in sensitivity.layer_costs(
        loaded.model,
        loaded.params,
        data.tokens,
        configs,
        key=jax.random.key(seed),
        batch_size=batch_size,
        skip=skip,
        done=tuple(map(int, blocks)),
    ):
        blocks[str(result.index)] = result.costs
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(file, {"fingerprint": prints, "blocks": blocks})
        yield result.index


def read_costs(file: Path) -> dict[str, list[float]]:
    """Returns {path: predicted KL with each of the settings} from a file of `measure_costs`, in the order of blocks."""
    blocks = json.loads(file.read_text(encoding="utf-8"))["blocks"]
    return {path: costs for index in sorted(blocks, key=int) for path, costs in blocks[index].items()}
