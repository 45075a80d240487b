"""Uniform grids: value = scale * (code - zero), with integer codes and zero points of `bits` bits."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxquant.packing import pack, rounded, saturate
from jaxquant.tensors import UniformTensor

Search = Literal["minmax", "mse", "hessian"]

# GPTQ's search: 80 shrinks of the range in steps of 1 %, errors to the power 2.4.
_SHRINKS, _STEP, _NORM = 80, 0.01, 2.4


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scale", "zero"], meta_fields=["bits", "symmetric"])
@dataclasses.dataclass(frozen=True)
class Grid:
    """Grids of all rows and groups of a weight.

    Attributes:
      scale: float32 [out, groups], positive, exactly representable in the storage dtype.
      zero: float32 [out, groups], integers in [0, 2**bits - 1].
      bits: width of a code (static).
      symmetric: zero is 2**(bits - 1) everywhere and not stored (static).
    """

    scale: jax.Array
    zero: jax.Array
    bits: int
    symmetric: bool


def encode(value: jax.Array, scale: jax.Array, zero: jax.Array, bits: int) -> jax.Array:
    """Returns the nearest code, clip(round(value / scale) + zero, 0, 2**bits - 1), as float32."""
    return jnp.clip(jnp.round(value / scale) + zero, 0, 2**bits - 1)


def stored_scale(scale: jax.Array, dtype: str) -> jax.Array:
    """Returns positive scales rounded to the nearest positive finite number of their storage dtype, as float32."""
    return rounded(jnp.maximum(scale, float(jnp.finfo(dtype).smallest_subnormal)), dtype)


def _range_grid(low: jax.Array, high: jax.Array, bits: int, symmetric: bool, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Scale and zero of the grid that spans [low, high], low <= 0 <= high."""
    top = 2**bits - 1
    if symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    scale = (high - low) / top
    # An all-zero group gets (-1, 1), as in GPTQ's code.
    scale = stored_scale(jnp.where(scale > 0, scale, 2 / top), dtype)
    zero = jnp.full_like(scale, 2 ** (bits - 1)) if symmetric else jnp.clip(jnp.round(-low / scale), 0, top)
    return scale, zero


def fit_group(
    weight: jax.Array,
    bits: int,
    *,
    symmetric: bool = False,
    search: Search = "minmax",
    importance: jax.Array | None = None,
    dtype: str = "float16",
) -> tuple[jax.Array, jax.Array]:
    """Fits one grid to each run of weights along the last axis.

    Args:
      weight: float32 [..., n].
      bits: width of a code.
      symmetric: fix the zero point at 2**(bits - 1).
      search: "minmax" spans the range; "mse" tries 80 shrunken ranges and keeps the least sum |error|^2.4; "hessian"
        does so for the least sum of importance * error^2.
      importance: float32, broadcastable to `weight`; needed by "hessian".
      dtype: storage dtype to which scales are rounded before they are judged.

    Returns:
      (scale, zero), float32 [...].

    Reference: Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323, released code. Differs from it: the symmetric
    range is the largest magnitude also for rows of one sign, and scales are rounded to their storage dtype first.
    """
    low = jnp.minimum(weight.min(-1), 0)
    high = jnp.maximum(weight.max(-1), 0)
    if search == "minmax":
        return _range_grid(low, high, bits, symmetric, dtype)
    if search == "hessian" and importance is None:
        raise ValueError('search "hessian": expected an importance per weight, got None')

    def cost(scale, zero):
        scale, zero = scale[..., None], zero[..., None]
        error = scale * (encode(weight, scale, zero, bits) - zero) - weight
        return jnp.sum(jnp.abs(error) ** _NORM if search == "mse" else importance * error**2, axis=-1)

    def shrink(i, best):
        p = 1 - i * _STEP
        trial = _range_grid(p * low, p * high, bits, symmetric, dtype)
        trial = (*trial, cost(*trial))
        better = trial[2] < best[2]
        return tuple(jnp.where(better, t, b) for t, b in zip(trial, best, strict=True))

    first = _range_grid(low, high, bits, symmetric, dtype)
    scale, zero, _ = jax.lax.fori_loop(1, _SHRINKS, shrink, (*first, cost(*first)))
    return scale, zero


def fit(
    weight: jax.Array,
    bits: int,
    group_size: int | None,
    *,
    symmetric: bool,
    search: Search,
    importance: jax.Array | None,
    dtype: str,
) -> Grid:
    """Fits the grids of a weight [out, in], one per row and run of `group_size` columns (None: the whole row).

    `importance` is float32 [in] or None; the rest is as in `fit_group`.
    """
    out, n = weight.shape
    groups = n // (group_size or n)
    grouped = weight.reshape(out, groups, n // groups)
    if importance is not None:
        importance = importance.reshape(1, groups, n // groups)
    scale, zero = fit_group(grouped, bits, symmetric=symmetric, search=search, importance=importance, dtype=dtype)
    return Grid(scale, zero, bits, symmetric)


def symmetric_scale(values: jax.Array, bits: int, dtype: str) -> jax.Array:
    """Returns the scale of each row's symmetric grid that spans it, in `dtype`, [..., rows, 1]."""
    scale = jnp.max(jnp.abs(values), axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return saturate(jnp.maximum(scale, float(jnp.finfo(dtype).tiny)), dtype)


def symmetric_tensor(values: jax.Array, scale: jax.Array, bits: int) -> UniformTensor:
    """Rounds rows of values float32 [..., rows, n] to symmetric grids with the scales [..., rows, 1]."""
    top = 2 ** (bits - 1) - 1
    codes = jnp.clip(jnp.round(values / scale.astype(jnp.float32)), -top - 1, top) + (top + 1)
    return UniformTensor(pack(codes.astype(jnp.uint32), bits), scale, None)


def tensor(codes: jax.Array, grid: Grid, dtype: str) -> UniformTensor:
    """Packs codes [out, in] and their grids into a UniformTensor."""
    zero = None if grid.symmetric else pack(grid.zero.T.astype(jnp.uint32), grid.bits)
    return UniformTensor(pack(codes, grid.bits), grid.scale.astype(dtype), zero)


def check_group_size(columns: int, group_size: int | None) -> None:
    """Raises ValueError unless `group_size` divides `columns` (or is None)."""
    if group_size is not None and columns % group_size:
        fits = [g for g in range(16, columns) if columns % g == 0 and g <= 4 * group_size]
        near = sorted(sorted(fits, key=lambda g: abs(g - group_size))[:3])
        raise ValueError(
            f"group_size: expected a divisor of the {columns} input columns, got {group_size}; "
            f"use {', '.join(map(str, near)) or columns}, or None for one grid per row"
        )
