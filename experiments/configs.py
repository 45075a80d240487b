"""What can be run: named, frozen settings. Files and devices are given on the command line and recorded with results."""

import dataclasses

from jaxquant.finetune import FinetuneConfig
from jaxquant.methods import (
    AQLMConfig,
    CMPQConfig,
    Config,
    GPTQConfig,
    GPTVQConfig,
    LNQConfig,
    QuantEaseConfig,
    RTNConfig,
)
from jaxquant.recode import CodeConfig
from jaxquant.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class Layers:
    """Every method on every layer problem of a folder."""

    methods: dict[str, Config]


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """A whole model, quantized block by block, then perplexity and KL on a text."""

    methods: dict[str, Config | None]
    sequences: int = 128
    length: int = 2048
    batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds for one layer of Gaussian weights, inputs with a spectrum from 1 to 1e-4, after warm-up."""

    methods: dict[str, Config]
    out: int = 4096
    columns: int = 4096
    tokens: int = 16384


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A whole model after each stage of tuning, each stage on what the one before it left, for several seeds.

    Attributes:
      methods: settings by name.
      block: of fine-tuning while quantizing.
      distill: of distillation, after that.
      pv: of PV-tuning, after that.
      codes: of its V step.
      seeds: of the calibration windows, the methods and the order of the windows.
      sequences: calibration and tuning windows.
      length: tokens per window.
      batch_size: windows per forward pass.
    """

    methods: dict[str, Config]
    block: FinetuneConfig
    distill: TrainConfig
    pv: TrainConfig
    codes: CodeConfig = CodeConfig()  # noqa: RUF009  # frozen
    seeds: tuple[int, ...] = (0, 1, 2)
    sequences: int = 128
    length: int = 2048
    batch_size: int = 8


def _named(*configs: tuple[str, Config]) -> dict[str, Config]:
    return dict(configs)


EXPERIMENTS: dict[str, Layers | WholeModel | Speed | Tuning] = {
    "layers": Layers(
        {
            name: config
            for bits in (2, 3, 4)
            for name, config in _named(
                (f"rtn {bits}-bit paper", RTNConfig(bits, search="mse")),
                (f"gptq {bits}-bit paper", GPTQConfig.paper(bits)),
                (f"gptq {bits}-bit paper, mse grid", GPTQConfig.paper(bits, search="mse")),
                (f"quantease {bits}-bit paper", QuantEaseConfig.paper(bits)),
                (f"quantease {bits}-bit paper, mse grid", QuantEaseConfig.paper(bits, search="mse")),
                (f"rtn {bits}-bit", RTNConfig(bits)),
                (f"gptq {bits}-bit", GPTQConfig(bits)),
                (f"quantease {bits}-bit", QuantEaseConfig(bits)),
            ).items()
        }
    ),
    "smollm2": WholeModel(
        {
            "dense": None,
            "gptq 4-bit": GPTQConfig(4),
            "gptq 3-bit": GPTQConfig(3),
            "quantease 4-bit": QuantEaseConfig(4),
            "quantease 3-bit": QuantEaseConfig(3),
        }
    ),
    "pareto": WholeModel(
        {
            "cmpq 2.10 bits": CMPQConfig(2.10),
            "cmpq 3.06 bits": CMPQConfig(3.06),
            "cmpq 2.56 bits": CMPQConfig(2.56),
            "cmpq 4.06 bits": CMPQConfig(4.06),
            "gptvq 2D 3-bit": GPTVQConfig(3, 2),
            "aqlm 2x8 g8": AQLMConfig(),
            "lnq 3-bit": LNQConfig(3),
        }
    ),
    "tuning": Tuning(
        {
            "2-bit": AQLMConfig(),
            "2.5-bit": CMPQConfig(2.5),
            "3-bit": CMPQConfig(3.0),
        },
        block=FinetuneConfig(TrainConfig(4e-3, epochs=10, batch_size=8, micro_batch=4)),
        distill=TrainConfig(1e-3, epochs=4, batch_size=8, micro_batch=2, chunks=8),
        pv=TrainConfig(5e-4, epochs=4, batch_size=8, micro_batch=2, chunks=8),
    ),
    "speed": Speed(
        {
            "gptq 3-bit": GPTQConfig(3),
            "quantease 3-bit": QuantEaseConfig(3),
            "lnq 3-bit": LNQConfig(3),
            "cmpq 3.0 bits": CMPQConfig(3.0),
            "gptvq 2D 2-bit": GPTVQConfig(2, 2),
            "gptvq 4D 2-bit": GPTVQConfig(2, 4),
            "aqlm 2x8 g8 beam 1": AQLMConfig(beam_size=1),
        }
    ),
}
