"""The ablation of tuning: none, block fine-tuning, then distillation, then PV-tuning, for several rates and seeds."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import models
from experiments.configs import Tuning
from jaxquant import bits_per_weight, trees
from jaxquant.checkpoint import describe_config
from jaxquant.commands import default_bos
from jaxquant.data import TokenSet, evaluation_tokens, mixed
from jaxquant.distill import prepare
from jaxquant.pipeline import tune_blocks
from jaxquant.progress import track
from jaxquant.tensors import is_quantized

STAGES = ("none", "block", "distill", "pv")


class _Chain:
    """The stages of one method and seed; each is computed when first asked for, from the one before it.

    Args:
      task: model and texts.
      experiment: settings.
      quantized: function that returns the quantized model, the same for all seeds.
      seed: of the order of the windows, and of which are held out.
      sampled: file of more windows, or None.
    """

    def __init__(
        self,
        task: models.Task,
        experiment: Tuning,
        quantized: Callable[[], Any],
        seed: int,
        sampled: str | None,
    ):
        self.task, self.experiment, self.quantized, self.seed = task, experiment, quantized, seed
        self.windows = task.tokens
        if sampled is not None:
            vocab = task.model.config.vocab_size
            self.windows = mixed(TokenSet(task.tokens, {}), Path(sampled), seed=seed, vocab_size=vocab).tokens
        self.stage = functools.cache(self._stage)

    def _stage(self, stage: str) -> tuple[Any, float]:
        """Returns (parameters, seconds of this stage alone, compilation included)."""
        before = self.stage(STAGES[STAGES.index(stage) - 1])[0] if stage != "none" else None
        began = time.perf_counter()
        if stage == "none":
            params = self.quantized()
        elif stage == "block":
            params = self._tune_blocks(before)
        else:
            params = self._distill(stage, before)
        jax.block_until_ready(params)
        return params, time.perf_counter() - began

    def _tune_blocks(self, params: Any) -> Any:
        e, task = self.experiment, self.task
        finetune = dataclasses.replace(e.block, train=dataclasses.replace(e.block.train, seed=self.seed))
        options: dict[str, Any] = {"batch_size": e.batch_size}
        results = tune_blocks(task.model, params, task.params["blocks"], task.tokens, finetune, **options)
        return {**params, "blocks": [r.block for r in track(results, "block", total=len(params["blocks"]))]}

    def _distill(self, stage: str, params: Any) -> Any:
        e, task = self.experiment, self.task
        train = dataclasses.replace(e.pv if stage == "pv" else e.distill, seed=self.seed)
        options: dict[str, Any] = {"codes": e.codes if stage == "pv" else None, "ends": e.ends, "dtype": e.dtype}
        run = prepare(task.model, params, task.params, self.windows, train, **options)
        state = run.begin()
        for progress in track(run.run(state), stage, total=run.plan.chunks):
            state = progress.state
        return run.result(state)


def run(
    experiment: Tuning,
    model: str | None,
    calibration: str | None,
    text: str | None,
    sampled: str | None,
    *,
    store: Callable[[dict[str, Any], Callable[[], dict[str, Any]]], None],
) -> None:
    """Measures every stage of every method and seed, on the given text and on the built-in one.

    Args:
      experiment: what to run.
      model: the model.
      calibration: text to calibrate and tune on.
      text: evaluation text.
      sampled: windows from `jaxquant sample`, to distil and PV-tune on beside the calibration windows, or None.
      store: (settings, function that measures) -> None; it calls the function unless the result is there.
    """
    about = {} if sampled is None else {"sampled": hashlib.sha256(Path(sampled).read_bytes()).hexdigest()}
    task = models.open_task(model, calibration, text, experiment.sequences, experiment.length)
    third = evaluation_tokens(None, task.tokenizer, length=experiment.length, bos_id=default_bos(task.model)).tokens

    @functools.cache
    def quantized(name: str) -> Any:
        config, size = experiment.methods[name], experiment.batch_size
        return models.quantize(task, config, name, size, guided=experiment.guided)[0]

    for seed in experiment.seeds:
        for name, config in experiment.methods.items():
            chain = _Chain(task, experiment, functools.partial(quantized, name), seed, sampled)
            for stage in STAGES:

                def measure(chain=chain, stage=stage):
                    params, seconds = chain.stage(stage)
                    other = models.evaluation(task._replace(text=third), params, [], f"{stage}, built-in text")
                    figures = models.evaluation(task, params, [], stage)
                    tensors = [x for x in trees.flatten(params).values() if is_quantized(x)]
                    bits = np.average(
                        [bits_per_weight(t) for t in tensors], weights=[np.prod(t.shape) for t in tensors]
                    )
                    more = {
                        "bits_per_weight": float(bits),
                        "seconds": seconds,
                        "perplexity_built_in": other["perplexity"],
                    }
                    return {k: v for k, v in figures.items() if k != "layers"} | more

                settings = {
                    "method": name,
                    "config": describe_config(config),
                    "stage": stage,
                    "seed": seed if stage != "none" else 0,
                }
                store({**task.about, **about, **settings, "tuning": _settings(experiment, stage)}, measure)


def _settings(experiment: Tuning, stage: str) -> dict[str, Any]:
    """Settings of all stages up to this one."""
    quantized = {"guided": True} if experiment.guided else {}
    more = {"ends": experiment.ends, "dtype": experiment.dtype}
    parts = {
        "block": dataclasses.asdict(experiment.block),
        "distill": dataclasses.asdict(experiment.distill) | more,
        "pv": dataclasses.asdict(experiment.pv) | more | {"codes": dataclasses.asdict(experiment.codes)},
    }
    return quantized | {k: v for k, v in parts.items() if STAGES.index(k) <= STAGES.index(stage)}
