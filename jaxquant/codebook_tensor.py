"""Scales and an order for the columns of a weight whose codes are shared by all columns.

A codebook that serves every column wants columns of one magnitude; and vectors want company: where the inputs of a
layer differ in what their errors cost, vectors that all have the same mixture of costly and cheap columns let one
codebook learn to spend its bits on the costly ones.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxquant import linalg
from jaxquant.packing import PackedArray, pack, rounded, saturate
from jaxquant.tensors import QuantizedTensor, dense, pack_order, unpack_order

VectorOrder = Literal["natural", "variance"]

# Steps of a few percent cost nothing: weights are divided by the rounded scale.
_SCALE_BITS = 5
_ROUNDS = 6
_DAMP = 1e-4


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "low", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LogScale:
    """Positive scales on a logarithmic grid: exp2(low + step * codes).

    Attributes:
      codes: PackedArray [n] of 5 bits.
      low: float16 scalar.
      step: float16 scalar.
    """

    codes: PackedArray
    low: jax.Array
    step: jax.Array

    def dense(self) -> jax.Array:
        """Returns the scales, float32 [n]."""
        codes = self.codes.unpack().astype(jnp.float32)
        return jnp.exp2(self.low.astype(jnp.float32)[..., None] + self.step.astype(jnp.float32)[..., None] * codes)


def log_scale(scale: jax.Array) -> LogScale:
    """Rounds positive scales [n] to a grid of 32 values that spans them."""
    log, top = jnp.log2(scale), 2**_SCALE_BITS - 1
    low = saturate(log.min(), jnp.float16)
    step = saturate((log.max() - low.astype(jnp.float32)) / top, jnp.float16)
    place = (log - low.astype(jnp.float32)) / jnp.where(step > 0, step.astype(jnp.float32), 1)
    return LogScale(pack(jnp.clip(jnp.round(place), 0, top).astype(jnp.uint32), _SCALE_BITS), low, step)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "scale", "order"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ColumnTensor(QuantizedTensor):
    """weight[:, order[k]] = scale[k] * base[:, k].

    Attributes:
      base: QuantizedTensor or array [out, in].
      scale: LogScale [in], in the order of the base, or None for ones.
      order: what `tensors.pack_order` returns, a permutation [in], or None for the identity.
    """

    base: Any
    scale: LogScale | None
    order: PackedArray | jax.Array | None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        return self.base.shape[-2], self.base.shape[-1]

    def dequantize(self) -> jax.Array:
        """Returns the dense weight, float32 [out, in]."""
        weight = dense(self.base).astype(jnp.float32)
        if self.scale is not None:
            weight = weight * self.scale.dense()[..., None, :]
        return weight if self.order is None else jnp.take(weight, jnp.argsort(unpack_order(self.order)), axis=-1)

    @property
    def format(self) -> str:
        """Short description for tables."""
        base = self.base.format if isinstance(self.base, QuantizedTensor) else str(self.base.dtype)
        scaled = ", column scales" if self.scale is not None else ""
        return base + scaled + (", permuted" if self.order is not None else "")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight", "hessian", "row", "column", "order"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class ScaledProblem:
    """A layer problem after its columns were scaled and permuted: tr((W - V) H (W - V)^T) is that of the layer.

    Attributes:
      weight: float32 [out, in].
      hessian: float32 [in, in].
      row: float32 [out], root mean squares of the rows of `weight`, 1 for zero rows; in the storage dtype of row
        scales.
      column: LogScale [in] or None, scales by which the layer's columns were divided.
      order: int32 [in] or None.
    """

    weight: jax.Array
    hessian: jax.Array
    row: jax.Array
    column: LogScale | None
    order: jax.Array | None

    def restore(self, base: QuantizedTensor) -> QuantizedTensor:
        """Returns the tensor of the layer from that of this problem; `base` itself if nothing was changed."""
        if self.column is None and self.order is None:
            return base
        return ColumnTensor(base, self.column, None if self.order is None else pack_order(self.order))


def _stored_row(row: jax.Array, dtype: str) -> jax.Array:
    row = rounded(row, dtype)
    return jnp.where(row > 0, row, 1)


def _fit_scales(weight: jax.Array) -> jax.Array:
    """Root mean squares of the columns once the rows have root mean square 1, geometric mean 1."""

    def step(_, column):
        row = jnp.sqrt(jnp.mean((weight / column[None, :]) ** 2, axis=1))
        column = jnp.sqrt(jnp.mean((weight / jnp.where(row > 0, row, 1)[:, None]) ** 2, axis=0))
        column = jnp.where(column > 0, column, 1)
        return column / jnp.exp(jnp.mean(jnp.log(column)))

    return jax.lax.fori_loop(0, _ROUNDS, step, jnp.ones(weight.shape[1]))


def variance_order(hessian: jax.Array, dimension: int) -> jax.Array:
    """An order in which all vectors have the same mixture of columns.

    Columns are ranked by their conditional variance (see `linalg.upper_factor`); vector k takes the k-th column of each
    of d ranges of ranks. Conditional variances are those of columns visited from small H_jj to large, where they differ
    most.

    Args:
      hessian: float32 [in, in].
      dimension: d, a divisor of in.

    Returns:
      int32 [in].
    """
    rising = jnp.argsort(jnp.diagonal(hessian))
    factor, _ = linalg.upper_factor(hessian[rising][:, rising], _DAMP)
    ranked = rising[jnp.argsort(jnp.abs(jnp.diagonal(factor)))]
    return ranked.reshape(dimension, -1).T.reshape(-1)


def scale_problem(
    weight: jax.Array, hessian: jax.Array, *, dimension: int, columns: bool, order: VectorOrder, dtype: str
) -> ScaledProblem:
    """Scales and permutes the columns of a problem.

    Args:
      weight: float32 [out, in].
      hessian: float32 [in, in], with a positive diagonal.
      dimension: columns of a vector.
      columns: whether to scale columns.
      order: "natural", or "variance" for `variance_order` (of the scaled problem).
      dtype: storage dtype of row scales.
    """
    place, scale = None, None
    if columns:
        scale = log_scale(_fit_scales(weight))
        column = scale.dense()
        weight, hessian = weight / column[None, :], hessian * column[:, None] * column[None, :]
    if order == "variance":
        place = variance_order(hessian, dimension)
        weight, hessian = weight[:, place], hessian[place][:, place]
        if scale is not None:
            scale = dataclasses.replace(scale, codes=pack(scale.codes.unpack()[place], _SCALE_BITS))
    row = _stored_row(jnp.sqrt(jnp.mean(weight**2, axis=1)), dtype)
    return ScaledProblem(weight, hessian, row, scale, place)
