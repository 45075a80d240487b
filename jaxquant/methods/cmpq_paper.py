"""CMPQ as the paper describes it: two widths by activation norm, k-means per input channel, two kinds of outliers.

Channel j of the input has the norm a_j = sqrt(H_jj). The channels of largest norm get b + 1 bits, the others b. Outliers are
the entries of largest |w_ij| a_j (O_act) and, after a first clustering, those of largest (w_ij - q_ij)^2 H_jj (O_q).

Reference: Channel-Wise Mixed-Precision Quantization for Large Language Models, https://arxiv.org/abs/2410.13056.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import codebook
from jaxquant.outliers import largest
from jaxquant.packing import pack, saturate
from jaxquant.problem import LayerProblem
from jaxquant.tensors import CodebookTensor, ConcatTensor, OutlierTensor, pack_order, with_outliers

# The paper keeps 0.45 % of one kind of outliers and 0.05 % of the other.
_SHARE_BY_ERROR = 0.9
_TOP_BITS = 8


class _Plan(NamedTuple):
    """What is known from the shape and the budget alone."""

    bits: int  # of the channels of small norm
    wide: int  # channels with one bit more
    outliers: int


def _storage(shape: tuple[int, int], plan: _Plan) -> int:
    """Bits of the tensor that a plan leads to."""
    out, n = shape
    panels = [(plan.wide, plan.bits + 1), (n - plan.wide, plan.bits)]
    panels = [(jax.ShapeDtypeStruct((1, out, m), jnp.uint8), b) for m, b in panels if m]

    def empty(codes):
        parts = [
            (pack(c, b), jnp.zeros((c.shape[-1], 2**b), jnp.float16)) for c, (_, b) in zip(codes, panels, strict=True)
        ]
        parts = tuple(CodebookTensor(c, books, None, (1, c.length)) for c, books in parts)
        base = ConcatTensor(parts, pack_order(jnp.zeros(n, jnp.int32)))
        return with_outliers(base, jnp.zeros(plan.outliers), jnp.zeros(plan.outliers, jnp.int32), "float16")

    return jax.eval_shape(empty, [c for c, _ in panels]).storage_bits()


def _plan(shape: tuple[int, int], average_bits: float, share: float) -> _Plan:
    """The most code bits that fit; what is left of the budget becomes outliers."""
    out, n = shape
    budget, least = int(average_bits * out * n), int(share * out * n)
    fixed = _storage(shape, _Plan(1, 0, least))
    if budget < fixed:
        raise ValueError(
            f"average_bits: expected at least {fixed / (out * n):.3f} for a layer {out}x{n} with {share:.2%} outliers (a bit "
            f'and two 16-bit levels per channel), got {average_bits}; allocation "variance" needs less'
        )
    # Words are padded by rows, so sizes rise in steps, but they never fall: bisection over the count of extra bits.
    low, high = 0, n * (_TOP_BITS - 1)
    while low < high:
        middle = (low + high + 1) // 2
        fits = _storage(shape, _Plan(1 + middle // n, middle % n, least)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    plan = _Plan(1 + low // n, low % n, least)
    spare = (budget - _storage(shape, plan)) // 32
    return plan._replace(outliers=min(least + spare, out * n))


def channel_norms(problem: LayerProblem, average_bits: float, share: float) -> OutlierTensor:
    """Quantizes a layer by the paper's rules.

    Args:
      problem: the layer, without dead columns.
      average_bits: all storage over out * in; met from below, to 32 bits over out * in.
      share: least share of the weights that are outliers.

    Returns:
      OutlierTensor over a ConcatTensor of one or two CodebookTensors with a table per channel.

    Raises:
      ValueError: not even one bit per channel fits.

    Reference: CMPQ, whose text was available only in part. Differs from it where it is silent: the budget counts
    everything that is stored; nine tenths of the outliers are O_q.
    """
    weight, importance = problem.weight, jnp.diagonal(problem.hessian)
    out, n = weight.shape
    plan = _plan((out, n), average_bits, share)
    by_error = round(_SHARE_BY_ERROR * plan.outliers)
    order = jnp.argsort(-importance)
    edges = [(0, plan.wide, plan.bits + 1), (plan.wide, n, plan.bits)]
    edges = [(low, high, b) for low, high, b in edges if high > low]
    points, norms = weight[:, order].T, importance[order][:, None]  # channels are rows from here on

    def cluster(keep):
        tables = [codebook.fit_rows(points[a:b], keep[a:b].astype(jnp.float32), 2**bits) for a, b, bits in edges]
        tables = [saturate(table, jnp.float16) for table in tables]
        codes = [
            codebook.assign_rows(points[a:b], t.astype(jnp.float32)) for (a, b, _), t in zip(edges, tables, strict=True)
        ]
        return tables, codes

    by_activation = largest(jnp.abs(points) * jnp.sqrt(norms), plan.outliers - by_error)
    tables, codes = cluster(~by_activation)
    values = [codebook.take_levels(t.astype(jnp.float32), c) for t, c in zip(tables, codes, strict=True)]
    error = (points - jnp.concatenate(values)) ** 2 * norms
    chosen = by_activation | largest(jnp.where(by_activation, 0, error), by_error)
    tables, codes = cluster(~chosen)

    parts = [
        CodebookTensor(pack(c.T[None], bits), table, None, (1, high - low))
        for c, table, (low, high, bits) in zip(codes, tables, edges, strict=True)
    ]
    base = ConcatTensor(tuple(parts), pack_order(order))
    chosen = chosen.T[:, jnp.argsort(order)].reshape(-1)
    (positions,) = jnp.nonzero(chosen, size=plan.outliers, fill_value=np.int32(out * n))
    difference = (weight - base.dequantize()).reshape(-1).at[positions].get(mode="fill", fill_value=0)
    return with_outliers(base, difference, positions.astype(jnp.int32), "float16")
