"""GPTVQ: vectors of input columns, a codebook for every block of the weight, error feedback from vector to vector.

Objective: tr((W - V) H (W - V)^T). With P the columns of a vector and H_d^-1 = U^T U, the vector takes the entry c that
minimises |(t_P - c) U_PP^-1|^2 at its target t_P = w_P - (what earlier errors fed back); later sweeps of coordinate
descent minimise (t_P - c) H_PP (t_P - c)^T at t_P = v_P + G_P H_PP^-1, with G = (W - V) H.

Reference: van Baalen et al., GPTVQ, https://arxiv.org/abs/2402.15319.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxquant import linalg, vector, vector_fit, vector_sweep
from jaxquant.codebook_tensor import VectorOrder, scale_problem
from jaxquant.methods.settings import check_choice, check_integers
from jaxquant.problem import LayerProblem, check, revive
from jaxquant.tensors import QuantizedTensor

# Codebooks weigh so many bits per weight where no group size is given: all of the authors' main settings.
_OVERHEAD = 0.125
# Damping of the objective of fits and sweeps, which need positive definite blocks H_PP; relative to mean(diag H).
_RIDGE = 1e-6
_SCALE = "float16"


@dataclasses.dataclass(frozen=True)
class GPTVQConfig:
    """Settings of `gptvq`.

    Attributes:
      bits: code bits per weight; bits * vector_dim is the width of a code, an integer from 1 to 16.
      vector_dim: consecutive input columns in a vector.
      group_size: weights that share a codebook; None for as many as make codebooks and scales
        cost about 0.125 bits per weight.
      columns: input columns of a group; the group's rows follow.
      entry_bits: width of a stored codebook entry: 16 for float16, 2 to 8 for integers with a scale per codebook.
      row_scale: a float16 scale per row.
      column_scale: a 5-bit scale per input column.
      order: "natural", or "variance": vectors gather columns that matter much and little, see
        `codebook_tensor.variance_order`.
      codebooks: "static" fits all codebooks to the weights before the sweep; "running" fits those of a run of columns
        when the sweep reaches it, to weights that have absorbed all errors so far.
      iterations: of k-means.
      rounds: of least-squares fits of the codebooks, each followed by `sweeps` of coordinate descent over the codes.
      sweeps: see `rounds`; 0 leaves the codes of the first sweep.
      steps: conjugate-gradient steps of a fit.
      window: input columns whose codes are searched together, a multiple of vector_dim; rounded down to a divisor of a
        group's columns.
      beam_size: partial solutions kept in that search.
      damp: damping of the error feedback, relative to mean(diag H); raised tenfold until the factor exists.
    """

    bits: float = 2
    vector_dim: int = 2
    _: dataclasses.KW_ONLY
    group_size: int | None = None
    columns: int = 256
    entry_bits: int = 8
    row_scale: bool = True
    column_scale: bool = True
    order: VectorOrder = "natural"
    codebooks: Literal["static", "running"] = "static"
    iterations: int = 40
    rounds: int = 9
    sweeps: int = 1
    steps: int = 5
    window: int = 8
    beam_size: int = 4
    damp: float = 0.01

    def __post_init__(self) -> None:
        """Checks every field."""
        check_integers(self, vector_dim=1, columns=1, iterations=1, rounds=0, sweeps=0, steps=1, window=1, beam_size=1)
        width = self.bits * self.vector_dim
        if width != int(width) or not 1 <= width <= 16:
            raise ValueError(
                f"bits: expected bits * vector_dim to be an integer from 1 to 16, got {self.bits!r} * {self.vector_dim}"
            )
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise ValueError(f"group_size: expected a positive integer or None, got {self.group_size!r}")
        if self.entry_bits not in (*range(2, 9), 16):
            raise ValueError(f"entry_bits: expected 16 or an integer from 2 to 8, got {self.entry_bits!r}")
        check_choice("order", self.order, VectorOrder)
        check_choice("codebooks", self.codebooks, Literal["static", "running"])
        if self.damp < 0:
            raise ValueError(f"damp: expected a number >= 0, got {self.damp!r}")

    @property
    def code_bits(self) -> int:
        """Width of a code."""
        return int(self.bits * self.vector_dim)

    @classmethod
    def paper(cls, bits: float, vector_dim: int, *, group_size: int | None = None) -> "GPTVQConfig":
        """The authors' settings: codebooks fitted on the way, 100 iterations, one update of the codebooks, no descent."""
        return cls(
            bits,
            vector_dim,
            group_size=group_size,
            row_scale=False,
            column_scale=False,
            codebooks="running",
            iterations=100,
            rounds=1,
            sweeps=0,
            window=1,
            steps=20,
        )

    def blocks(self, out: int, columns: int) -> tuple[int, int]:
        """Blocks (R, C) of rows and columns that share a codebook, equal ones with at least `group_size` weights each.

        Raises:
          ValueError: the vectors do not fit the columns.
        """
        if columns % self.vector_dim:
            raise ValueError(f"vector_dim: expected a divisor of the {columns} input columns, got {self.vector_dim}")
        vectors = columns // self.vector_dim
        across = max(c for c in range(1, vectors + 1) if vectors % c == 0 and c <= max(1, columns // self.columns))
        book = self.entry_bits * 2**self.code_bits * self.vector_dim
        # What scales and the order take is taken from the codebooks, but never more than half of it.
        order_bits = (columns - 1).bit_length() * (self.order != "natural")
        spent = 16 / columns * self.row_scale + (5 * self.column_scale + order_bits) / out
        group = self.group_size or int(book / max(_OVERHEAD - spent, _OVERHEAD / 2))
        rows = -(-group * across // columns)
        down = max(r for r in range(1, out + 1) if out % r == 0 and r <= max(1, out // rows))
        return down, across

    def window_vectors(self, out: int, columns: int) -> int:
        """Vectors in a window: as many as `window` allows and divide the vectors of a column block."""
        vectors = columns // self.vector_dim // self.blocks(out, columns)[1]
        return max(s for s in range(1, vectors + 1) if vectors % s == 0 and s <= max(1, self.window // self.vector_dim))


@functools.partial(jax.jit, static_argnames="config")
@jax.default_matmul_precision("highest")
def gptvq(problem: LayerProblem, config: GPTVQConfig, *, key: jax.Array) -> QuantizedTensor:
    """Quantizes a layer to vectors of codebooks that blocks of the weight share.

    Args:
      problem: the layer.
      config: settings.
      key: unused; every method takes one.

    Returns:
      CodebookTensor [out, in] with one codebook per block, blocks `config.blocks(out, in)`.

    Raises:
      ValueError: wrong shapes or dtypes, or a vector dimension that does not divide in.

    Reference: van Baalen et al., GPTVQ, algorithm 1. Differs from the released code: the feedback and the metric of
    k-means and assignment are exact for a vector; codebooks are updated by conjugate gradients instead of Adam and
    rounded before codes are chosen; by default coordinate descent over the codes follows, in turn with codebook
    updates. Block scales are left out: their own ablation finds them useless or harmful but for one setting.
    """
    del key
    check(problem)
    problem = revive(problem)
    blocks = config.blocks(*problem.weight.shape)
    scaled = scale_problem(
        problem.weight,
        problem.hessian,
        dimension=config.vector_dim,
        columns=config.column_scale,
        order=config.order,
        dtype=_SCALE,
    )
    row = scaled.row if config.row_scale else jnp.ones(len(scaled.row))
    factor = linalg.inverse_factor(scaled.hessian, config.damp)
    fit = _static if config.codebooks == "static" else _running
    code = fit(scaled.weight, row, factor, blocks, config)
    code = vector_fit.alternate(
        scaled.weight,
        linalg.damped(scaled.hessian, _RIDGE),
        code,
        rounds=config.rounds,
        sweeps=config.sweeps,
        window=config.window_vectors(*problem.weight.shape),
        beam_size=config.beam_size,
        entry_bits=config.entry_bits,
        scale_dtype=_SCALE if config.row_scale else None,
        steps=config.steps,
    )
    scale = code.scale.astype(_SCALE) if config.row_scale else None
    return scaled.restore(vector.codebook_tensor(code.codes, code.books, scale, config.entry_bits, config.code_bits))


def _fit(points, scale, metric, blocks, config) -> jax.Array:
    """Codebooks [C, R, 1, K, d] of points [vectors, out, d] as they will be stored."""
    books, _ = vector.residual_entries(
        points / scale[None, :, None],
        metric,
        scale**2,
        blocks=blocks,
        count=1,
        size=2**config.code_bits,
        iterations=config.iterations,
    )
    return vector.rounded_books(books, config.entry_bits)


def _static(weight, scale, factor, blocks, config) -> vector_fit.VectorCode:
    """Codebooks for the weight as it is, then one sweep of error feedback."""
    d = config.vector_dim
    points = vector_sweep.to_vectors(weight, d)
    books = _fit(points, scale, vector_sweep.feedback_factors(factor, d), blocks, config)
    window = config.window_vectors(*weight.shape)
    encode = vector_fit.encoding(books, scale, len(points) // window, config.beam_size)
    codes, _, _ = vector_sweep.error_feedback(weight, factor, encode, dimension=window * d)
    return vector_fit.VectorCode(vector_fit.split(codes, window), books, scale)


def _running(weight, scale, factor, blocks, config) -> vector_fit.VectorCode:
    """One sweep of error feedback that fits codebooks when it reaches their columns."""
    d, (down, across) = config.vector_dim, blocks
    block = weight.shape[1] // across
    metric = vector_sweep.feedback_factors(factor, d)

    def begin_block(start, targets):
        own = jax.lax.dynamic_slice_in_dim(metric, start // d, block // d)
        return _fit(vector_sweep.to_vectors(targets, d), scale, own, (down, 1), config)[0]

    def encode(books, index, target, factor, incumbent):
        del index
        return vector_fit.encode(target, factor, books, scale, config.beam_size, incumbent)

    window = config.window_vectors(*weight.shape)
    codes, _, books = vector_sweep.error_feedback(
        weight, factor, encode, dimension=window * d, begin_block=begin_block, block_size=block
    )
    return vector_fit.VectorCode(vector_fit.split(codes, window), books, scale)
