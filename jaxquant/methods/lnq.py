"""LNQ: a table of learned levels per row; coordinate descent on the codes and least squares on the levels in turn.

Objective: tr((W - V) H (W - V)^T) with v_ij = c_i[code_ij]. Codes: v_ij <- the level nearest to v_ij + ((W - V) H)_ij /
H_jj, column after column. Levels: c_i = (P_i^T H P_i)^-1 P_i^T H w_i, where P_i is the 0/1 matrix of the row's codes.

Reference: Kim et al., GuidedQuant, https://arxiv.org/abs/2505.07004, section on layer-wise non-uniform quantization.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxquant import codebook, linalg, sweep
from jaxquant.methods.settings import Order, check_choice, check_integers, column_order
from jaxquant.packing import pack, rounded
from jaxquant.problem import LayerProblem, check, revive, row_objective
from jaxquant.tensors import CodebookTensor


@dataclasses.dataclass(frozen=True)
class LNQConfig:
    """Settings of `lnq`.

    Attributes:
      bits: width of a code, 1 to 8; every row has a table of 2**bits levels.
      restarts: rounds of error feedback from the weights followed by a least-squares fit of the levels; they bring the
        levels from what suits the weights to what suits weights that carry the errors of others.
      rounds: of a least-squares fit of the levels followed by sweeps over the codes.
      sweeps: coordinate-descent sweeps in a round.
      damp: damping of the factor behind error feedback; the rounds need none.
      order: order of the columns in all sweeps: "natural", or "diagonal" (large H_jj first).
      storage_dtype: dtype in which levels are stored: "float16", "bfloat16" or "float32".
    """

    bits: int = 3
    _: dataclasses.KW_ONLY
    restarts: int = 8
    rounds: int = 6
    sweeps: int = 3
    damp: float = 0.01
    order: Order = "diagonal"
    storage_dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        """Checks every field."""
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits: expected an integer from 1 to 8, got {self.bits!r}")
        check_integers(self, restarts=0, rounds=1, sweeps=1)
        if self.damp < 0:
            raise ValueError(f"damp: expected a number >= 0, got {self.damp!r}")
        check_choice("order", self.order, Order)
        check_choice("storage_dtype", self.storage_dtype, Literal["float16", "bfloat16", "float32"])

    @classmethod
    def paper(cls, bits: int) -> "LNQConfig":
        """The authors' schedule: two rounds of four sweeps, columns in their natural order."""
        return cls(bits, restarts=0, rounds=2, sweeps=4, order="natural")


def _rounding(levels: jax.Array) -> sweep.Rounding:
    """Rounding to the nearest of each row's levels [out, K], increasing."""

    def rounding(state, column, target):
        del state, column
        code = codebook.nearest(target, levels)
        return code.astype(jnp.uint8), jnp.take_along_axis(levels, code[:, None], axis=1)[:, 0]

    return rounding


def _stored(levels: jax.Array, dtype: str) -> jax.Array:
    """Levels as the tensor will hold them, in increasing order, float32."""
    return jnp.sort(rounded(levels, dtype), axis=1)


@functools.partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")
def lnq(problem: LayerProblem, config: LNQConfig, *, key: jax.Array) -> CodebookTensor:
    """Quantizes a layer to a table of levels per row.

    Starts from k-means of each row, weighted by what an error of each column costs under error feedback, and the codes
    that error feedback chooses; then alternates the two exact minimisations and keeps the best codes and levels of each
    row.

    Args:
      problem: the layer.
      config: settings.
      key: unused; every method takes one.

    Returns:
      CodebookTensor [out, in] with blocks (out, 1): one table of 2**bits entries per row, no scale.

    Raises:
      ValueError: wrong shapes or dtypes.

    Reference: Kim et al., GuidedQuant, algorithm LNQ. Differs from the released code: starts from k-means under the
    conditional variances and from error feedback instead of SqueezeLLM's codes, and rounds levels to their storage
    dtype before codes are chosen for them.
    """
    del key
    check(problem)
    problem = revive(problem)
    size = 2**config.bits
    order = column_order(problem.hessian, config.order)
    back = jnp.argsort(order)
    weight, hessian = problem.weight[:, order], problem.hessian[order][:, order]
    factor = linalg.inverse_factor(hessian, config.damp)
    levels = _stored(codebook.fit_rows(weight, 1 / jnp.diagonal(factor) ** 2, size), config.storage_dtype)

    def feedback(levels, value):
        del value
        return sweep.error_feedback(weight, factor, _rounding(levels))[:2]

    def descend(levels, value):
        def one(_, state):
            return sweep.coordinate_descent(weight, state[1], hessian, _rounding(levels))

        return jax.lax.fori_loop(0, config.sweeps, one, (jnp.zeros(weight.shape, jnp.uint8), value))

    def step(i, state):
        levels, value, best = state
        # A descent need not start on the new levels: every column is rounded when its turn comes.
        codes, value = jax.lax.cond(i <= config.restarts, feedback, descend, levels, value)
        objective = row_objective(weight - value, hessian)
        better = objective < best[2]
        best = (
            jnp.where(better[:, None], codes, best[0]),
            jnp.where(better[:, None], levels, best[1]),
            jnp.where(better, objective, best[2]),
        )
        levels = _stored(levels + codebook.solve_rows(weight - value, codes, hessian, size), config.storage_dtype)
        return levels, value, best

    best = (jnp.zeros(weight.shape, jnp.uint8), levels, jnp.full(len(weight), jnp.inf))
    total = config.restarts + 1 + config.rounds
    _, _, (codes, levels, _) = jax.lax.fori_loop(0, total, step, (levels, weight, best))
    books = levels.astype(config.storage_dtype)
    return CodebookTensor(pack(codes[None, :, back], config.bits), books, None, (len(weight), 1), (1, 1))
