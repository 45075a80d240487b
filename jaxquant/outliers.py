"""Sparse corrections to a quantized weight: projections onto few entries or few columns, and descent over them.

Objective: tr((V + S - W) H (V + S - W)^T) over S with few nonzero entries, or few nonzero columns, V held fixed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.tensors import QuantizedTensor, dense

# Halvings of the threshold: nonnegative float32 values have fewer than 2**31 bit patterns.
_HALVINGS = 31


def largest(values: jax.Array, count: int) -> jax.Array:
    """Marks the `count` largest of `values` >= 0.

    Bisects the threshold in the order of float32 bit patterns, which is that of nonnegative numbers: no sort of all
    values. Equal values at the threshold are taken from the front.

    Args:
      values: float32 of any shape, >= 0.
      count: how many, at most values.size (static).

    Returns:
      bool, shape of `values`, exactly `count` of them true.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32).reshape(-1)

    def halve(_, bounds):
        low, high = bounds  # at least `count` reach low, at most `count` reach high
        middle = low + (high - low) // 2
        many = jnp.sum(bits >= middle, dtype=jnp.int32) > count
        return jnp.where(many, middle, low), jnp.where(many, high, middle)

    beyond_infinity = jnp.int32(0x7F800001)
    _, threshold = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.int32(0), beyond_infinity))
    above = bits >= threshold
    at = bits == threshold - 1
    missing = count - jnp.sum(above, dtype=jnp.int32)
    chosen = above | (at & (jnp.cumsum(at, dtype=jnp.int32) <= missing))
    return chosen.reshape(values.shape)


def keep_entries(weight: jax.Array, count: int) -> jax.Array:
    """Returns `weight` with all but the `count` entries of largest magnitude set to zero."""
    return jnp.where(largest(jnp.abs(weight), count), weight, 0)


def keep_columns(weight: jax.Array, count: int) -> jax.Array:
    """Returns `weight` with all but the `count` columns of largest norm set to zero."""
    return jnp.where(largest(jnp.sum(weight**2, axis=0), count)[None, :], weight, 0)


def largest_eigenvalue(hessian: jax.Array, iterations: int = 40) -> jax.Array:
    """An estimate from above of the largest eigenvalue of a positive semidefinite matrix, float32 scalar.

    Power iteration never overestimates; 1.01 of it, but at most the largest absolute row sum, which is a bound.
    """
    rows = jnp.sum(jnp.abs(hessian), axis=1)

    def step(_, vector):
        product = hessian @ vector
        return product / jnp.maximum(jnp.linalg.norm(product), jnp.finfo(jnp.float32).tiny)

    # The row sums lean towards the leading vector and are not orthogonal to it in practice.
    vector = jax.lax.fori_loop(0, iterations, step, step(0, rows))
    return jnp.minimum(1.01 * (vector @ hessian @ vector), rows.max())


def threshold_step(
    sparse: jax.Array, residual: jax.Array, hessian: jax.Array, eigenvalue: jax.Array, keep: Callable
) -> jax.Array:
    """One step of iterative hard thresholding, S <- keep(S + (W - V - S) H / eigenvalue).

    Args:
      sparse: float32 [out, in], S.
      residual: float32 [out, in], W - V - S.
      hessian: float32 [in, in].
      eigenvalue: at least the largest of H; then the step never raises the objective.
      keep: the projection, such as `keep_entries` with its count.

    Returns:
      float32 [out, in].

    Reference: Behdin et al., QuantEase, https://arxiv.org/abs/2309.01885, outlier-aware algorithm. Differs from the
    released code: the full step 1 / eigenvalue, twice the code's.
    """
    return keep(sparse + (residual @ hessian) / eigenvalue)


def fit_support(
    sparse: jax.Array, residual: jax.Array, hessian: jax.Array, support: jax.Array, iterations: int = 20
) -> jax.Array:
    """Least squares over the entries of a support, all rows at once, by conjugate gradients.

    Args:
      sparse: float32 [out, in], S, zero outside the support.
      residual: float32 [out, in], W - V - S.
      hessian: float32 [in, in] with a positive diagonal.
      support: bool [out, in].
      iterations: at most; a row with as many entries in the support is solved exactly, up to rounding.

    Returns:
      float32 [out, in], the new S; no row's objective is higher than before, up to rounding.
    """

    def on_support(x):
        return jnp.where(support, x, 0)

    def dot(a, b):
        return jnp.sum(a * b, axis=1, keepdims=True)

    precondition = 1 / jnp.diagonal(hessian)[None, :]
    gradient = on_support(residual @ hessian)
    direction = precondition * gradient

    def step(_, state):
        change, gradient, direction, slope = state
        along = on_support(direction @ hessian)
        curvature = dot(direction, along)
        # A row that has converged stops: its slope is rounding noise or zero.
        length = jnp.where((curvature > 0) & (slope > 0), slope / jnp.where(curvature > 0, curvature, 1), 0)
        change, gradient = change + length * direction, gradient - length * along
        new = dot(gradient, precondition * gradient)
        turn = jnp.where(slope > 0, new / jnp.where(slope > 0, slope, 1), 0)
        return change, gradient, precondition * gradient + turn * direction, new

    start = (jnp.zeros_like(sparse), gradient, direction, dot(gradient, direction))
    return sparse + jax.lax.fori_loop(0, iterations, step, start)[0]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "values", "columns"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ColumnOutlierTensor(QuantizedTensor):
    """weight = dense(base), with values[:, k] added to column columns[k].

    Attributes:
      base: QuantizedTensor or array [out, in], in <= 2**16.
      values: float16, bfloat16 or float32 [out, k], differences from `base`.
      columns: uint16 [k], increasing; unused ones last, `in` or beyond, with values 0.
    """

    base: Any
    values: jax.Array
    columns: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the dense weight."""
        return self.base.shape[-2], self.base.shape[-1]

    def dequantize(self) -> jax.Array:
        """Returns the dense weight, float32 [out, in]."""
        base = dense(self.base).astype(jnp.float32)
        return base.at[:, self.columns.astype(jnp.int32)].add(self.values.astype(jnp.float32))

    @property
    def format(self) -> str:
        """Short description for tables."""
        base = self.base.format if isinstance(self.base, QuantizedTensor) else str(self.base.dtype)
        return f"{base} + {self.values.shape[-1]} outlier columns"
