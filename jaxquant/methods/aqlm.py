"""AQLM: every vector of input columns is a sum of entries of a few codebooks that the whole weight shares.

Objective: tr((W - V) H (W - V)^T) with v_iP = scale_i * sum_m book_m[code_iPm]. Codes of a vector minimise
(t - v) H_PP (t - v)^T at t = v_P + G_P H_PP^-1, with G = (W - V) H; codebooks and scales are least squares in between.

Reference: Egiazarian et al., AQLM, https://arxiv.org/abs/2401.06118.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxquant import linalg, vector, vector_fit, vector_sweep
from jaxquant.codebook_tensor import ScaledProblem, VectorOrder, scale_problem
from jaxquant.methods.settings import check_choice, check_integers
from jaxquant.problem import LayerProblem, check, revive
from jaxquant.tensors import QuantizedTensor

_SCALE = "float16"
# Damping of the objective of fits and sweeps, which need positive definite blocks H_PP; relative to mean(diag H).
_RIDGE = 1e-6


@dataclasses.dataclass(frozen=True)
class AQLMConfig:
    """Settings of `aqlm`: num_codebooks * codebook_bits / group_size code bits per weight.

    Attributes:
      num_codebooks: codebook entries that add up to a vector.
      codebook_bits: width of a code, 1 to 16.
      group_size: consecutive input columns in a vector.
      beam_size: partial sums kept in the search for a vector's codes.
      entry_bits: width of a stored codebook entry: 16 for float16, 2 to 8 for integers with a scale per codebook.
      column_scale: a 5-bit scale per input column, so that one codebook suits them all.
      order: "natural", or "variance": vectors gather columns that matter much and little, see
        `codebook_tensor.variance_order`.
      start: "feedback" chooses the first codes by error feedback from vector to vector; "kmeans" takes those of
        residual k-means.
      window: vectors whose codes are searched together, `beam_size` partial solutions of a row at a time; rounded down to a
        divisor of their number.
      iterations: of k-means, for each codebook.
      rounds: of least-squares fits of codebooks and row scales, each followed by `sweeps` of coordinate descent over
        codes.
      sweeps: see `rounds`.
      steps: conjugate-gradient steps of a fit.
      damp: damping of the error feedback, relative to mean(diag H); raised tenfold until the factor exists.
    """

    num_codebooks: int = 2
    codebook_bits: int = 8
    group_size: int = 8
    beam_size: int = 8
    _: dataclasses.KW_ONLY
    entry_bits: int = 8
    column_scale: bool = True
    order: VectorOrder = "variance"
    start: Literal["feedback", "kmeans"] = "feedback"
    window: int = 1
    iterations: int = 30
    rounds: int = 6
    sweeps: int = 2
    steps: int = 20
    damp: float = 0.01

    def __post_init__(self) -> None:
        """Checks every field."""
        check_integers(self, num_codebooks=1, codebook_bits=1, group_size=1, beam_size=1, window=1)
        check_integers(self, iterations=1, sweeps=1, steps=1, rounds=0)
        if self.codebook_bits > 16:
            raise ValueError(f"codebook_bits: expected an integer from 1 to 16, got {self.codebook_bits!r}")
        if self.entry_bits not in (*range(2, 9), 16):
            raise ValueError(f"entry_bits: expected 16 or an integer from 2 to 8, got {self.entry_bits!r}")
        check_choice("order", self.order, VectorOrder)
        check_choice("start", self.start, Literal["feedback", "kmeans"])
        if self.damp < 0:
            raise ValueError(f"damp: expected a number >= 0, got {self.damp!r}")

    @classmethod
    def paper(
        cls, num_codebooks: int = 2, codebook_bits: int = 8, group_size: int = 8, beam_size: int = 1
    ) -> "AQLMConfig":
        """The authors' format and start: float16 codebooks, columns as they are, residual k-means."""
        return cls(
            num_codebooks,
            codebook_bits,
            group_size,
            beam_size,
            entry_bits=16,
            column_scale=False,
            order="natural",
            start="kmeans",
            iterations=100,
            rounds=20,
            sweeps=1,
        )


@functools.partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")
def aqlm(problem: LayerProblem, config: AQLMConfig, *, key: jax.Array) -> QuantizedTensor:
    """Quantizes a layer to sums of codebook entries.

    Args:
      problem: the layer.
      config: settings.
      key: unused; every method takes one.

    Returns:
      CodebookTensor [out, in] with one block and a float16 scale per row, in a `codebook_tensor.ColumnTensor` if
      columns are scaled or permuted.

    Raises:
      ValueError: wrong shapes or dtypes, or a group size that does not divide in.

    Reference: AQLM, section 3, without its fine-tuning of blocks. Differs from the released code: the first codes come
    from error feedback; codebooks and scales are solved for instead of trained with Adam; vectors are visited in order,
    and the beam lives inside a vector; a fixed number of rounds instead of a tolerance, so that the work is known
    beforehand.
    """
    del key
    check(problem)
    columns = problem.weight.shape[1]
    if columns % config.group_size:
        raise ValueError(f"group_size: expected a divisor of the {columns} input columns, got {config.group_size}")
    problem = revive(problem)
    vectors = columns // config.group_size
    window = max(s for s in range(1, vectors + 1) if vectors % s == 0 and s <= config.window)
    scaled = scale_problem(
        problem.weight,
        problem.hessian,
        dimension=config.group_size,
        columns=config.column_scale,
        order=config.order,
        dtype=_SCALE,
    )
    code = vector_fit.alternate(
        scaled.weight,
        linalg.damped(scaled.hessian, _RIDGE),
        _start(scaled, window, config),
        rounds=config.rounds,
        sweeps=config.sweeps,
        window=window,
        beam_size=config.beam_size,
        entry_bits=config.entry_bits,
        scale_dtype=_SCALE,
        steps=config.steps,
    )
    base = vector.codebook_tensor(
        code.codes, code.books, code.scale.astype(_SCALE), config.entry_bits, config.codebook_bits
    )
    return scaled.restore(base)


def _start(scaled: ScaledProblem, window: int, config: AQLMConfig) -> vector_fit.VectorCode:
    """Codebooks by residual k-means and the first codes."""
    d = config.group_size
    factor = linalg.inverse_factor(scaled.hessian, config.damp)
    metric = vector_sweep.feedback_factors(factor, d)
    # One metric for all vectors, the mean one: with the order "variance" they are alike.
    mean = jnp.linalg.cholesky(jnp.mean(metric @ metric.swapaxes(1, 2), axis=0))
    points = vector_sweep.to_vectors(scaled.weight / scaled.row[:, None], d)
    books, codes = vector.residual_entries(
        points,
        jnp.broadcast_to(mean[None], metric.shape),
        scaled.row**2,
        blocks=(1, 1),
        count=config.num_codebooks,
        size=2**config.codebook_bits,
        iterations=config.iterations,
    )
    books = vector.rounded_books(books, config.entry_bits)
    if config.start == "feedback":
        choose = vector_fit.encoding(books, scaled.row, len(points) // window, config.beam_size)
        codes, _, _ = vector_sweep.error_feedback(scaled.weight, factor, choose, dimension=window * d)
        codes = vector_fit.split(codes, window)
    return vector_fit.VectorCode(codes, books, scaled.row)
