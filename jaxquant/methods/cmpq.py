"""CMPQ: bits per input channel, and what makes the most of them.

Objective: tr((W - V) H (W - V)^T). Error feedback turns it into sum_j D_j e_j^2, with D_j the variance of input j
given the inputs after it and e_j the rounding error of column j alone; reverse water-filling then gives column j of
the rows of class r about log2(D_j * variance of its weights) / 2 bits above a common level. The paper's own rule, by
activation norms, is `CMPQConfig.paper`.

Reference: Channel-Wise Mixed-Precision Quantization for Large Language Models, https://arxiv.org/abs/2410.13056.
"""

import dataclasses
import functools
from typing import Literal

import jax

from jaxquant import tile_solver
from jaxquant.methods import cmpq_levels
from jaxquant.methods.cmpq_paper import channel_norms
from jaxquant.methods.settings import check_budget, check_choice, check_integers
from jaxquant.problem import LayerProblem, check, revive
from jaxquant.tensors import OutlierTensor

Allocation = Literal["variance", "norm"]


@dataclasses.dataclass(frozen=True)
class CMPQConfig:
    """Settings of `cmpq`.

    Attributes:
      average_bits: everything that is stored, in bits over out * in: codes, levels, scales, orders, widths and
        outliers.
      allocation: "variance" gives tiles of channels 0 to 8 bits by the conditional variance of their inputs and the
        variance of their weights; "norm" is the paper's rule, two neighbouring widths by activation norm, k-means
        levels for every channel and no feedback.
      outliers: least share of weights kept in 16 bits; whatever codes cannot use of the budget goes there too.
      row_classes: classes of rows of similar magnitude that have widths of their own; "variance" only.
      rounds: of least-squares fits of levels and row scales followed by sweeps; "variance" only.
      sweeps: coordinate-descent sweeps in a round, and before the first; "variance" only.
      damp: damping of the factor, relative to mean(diag H); "variance" only.
    """

    average_bits: float = 2.25
    _: dataclasses.KW_ONLY
    allocation: Allocation = "variance"
    outliers: float = 0.0007
    row_classes: int = 8
    rounds: int = 4
    sweeps: int = 3
    damp: float = 1e-4

    def __post_init__(self) -> None:
        """Checks every field."""
        check_budget(self)
        check_choice("allocation", self.allocation, Allocation)
        check_integers(self, row_classes=1, rounds=0, sweeps=1)

    @classmethod
    def paper(cls, average_bits: float = 2.25, *, outliers: float = 0.005) -> "CMPQConfig":
        """The paper's method: two widths by activation norm, k-means per channel, 0.5 % of outliers of two kinds."""
        return cls(average_bits, allocation="norm", outliers=outliers)


@functools.partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")
def cmpq(problem: LayerProblem, config: CMPQConfig, *, key: jax.Array) -> OutlierTensor:
    """Quantizes a layer with as many bits per channel as the channel deserves.

    Args:
      problem: the layer.
      config: settings.
      key: unused; every method takes one.

    Returns:
      OutlierTensor [out, in] over a `tiles.TiledTensor` ("variance") or a ConcatTensor of two CodebookTensors ("norm").
      All shapes follow from those of the problem and the settings; which channel has which width is data.

    Raises:
      ValueError: wrong shapes or dtypes, or too few bits for what every layer needs.

    Reference: CMPQ, whose text was available only in part. "variance" differs from it: widths from 0 to 8 by
    conditional instead of plain variance and for classes of rows apart, error feedback, levels shared by all channels
    of a width.
    """
    del key
    check(problem)
    problem = revive(problem)
    if config.allocation == "norm":
        return channel_norms(problem, config.average_bits, config.outliers)
    classes = min(config.row_classes, len(problem.weight))
    budget = tile_solver.Budget(
        config.average_bits, config.outliers, classes, config.rounds, config.sweeps, config.damp
    )
    return tile_solver.solve(problem, budget, cmpq_levels.codec())
