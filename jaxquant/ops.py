"""Products with weights that may be quantized.

A product has up to four implementations. "reference" makes the weight dense and leaves the rest to XLA; "cpu", "tpu"
and "gpu" are kernels that read the codes. Tensors made of parts are taken apart here, so kernels see one format at a
time.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.book_tensor import BookTileTensor, book_tensor, has_books, why_not
from jaxquant.codebook_tensor import ColumnTensor
from jaxquant.kernels import too_old
from jaxquant.kernels.codebook_matmul import api as codebook_api
from jaxquant.kernels.uniform_matmul import api as uniform_api
from jaxquant.outliers import ColumnOutlierTensor
from jaxquant.prologue import Prologue, RMSNorm
from jaxquant.serving import (
    BankedTensor,
    LevelWordTensor,
    LookupTensor,
    ServingTensor,
    UniformWordTensor,
    banked_tensor,
    lookup_tensor,
    word_tensor,
)
from jaxquant.serving_tensor import has_row_levels
from jaxquant.tensors import (
    CodebookTensor,
    ConcatTensor,
    OutlierTensor,
    QuantizedTensor,
    UniformTensor,
    dense,
    unpack_order,
)
from jaxquant.tile_tensors import LevelTileTensor, UniformTileTensor, has_scalar_codes, tile_tensor

Implementation = Literal["reference", "cpu", "tpu", "gpu"]


def matmul(
    x: jax.Array, weight: jax.Array | QuantizedTensor, implementation: Implementation | None = None
) -> jax.Array:
    """Returns x @ weight.T.

    Args:
      x: float [..., in].
      weight: [out, in], dense or quantized; where it is made dense, it is cast to the dtype of `x`.
      implementation: "reference", or the kernels of "cpu", "tpu" or "gpu"; there is no falling back. By default the
        kernel of the first device's platform if all of `weight` lies as that kernel reads it (see `serving.for_serving`)
        and `supports` has no objection, otherwise "reference".

    Returns:
      [..., out] in the dtype of `x`, differentiable in `x` and in the float fields of `weight`. Kernels have no
      forward-mode derivative; their gradients are those of the reference.

    Raises:
      ValueError: the inner sizes differ, or the implementation does not support this product; the message says why.
    """
    return matmul_each(x, (weight,), implementation)[0]


def matmul_each(
    x: jax.Array,
    weights: Sequence[jax.Array | QuantizedTensor],
    implementation: Implementation | None = None,
    *,
    prologue: Prologue | None = None,
    residual: jax.Array | None = None,
) -> list[jax.Array]:
    """Returns [residual + prologue(x) @ weight.T for each weight], in one launch where a kernel can.

    Such a kernel computes in float32 throughout.

    Args:
      x: see `matmul`.
      weights: see `matmul`.
      implementation: see `matmul`.
      prologue: what is done to x first, or None.
      residual: float [..., out] of the only weight, in the dtype of `x`, or None.

    Returns:
      Of each weight [..., out] in the dtype of `x`, differentiable as that of `matmul`, and in prologue and residual.

    Raises:
      ValueError: see `matmul`; a residual for several weights; a prologue or residual of another shape.
    """
    if residual is not None and [residual.shape] != [(*x.shape[:-1], weight.shape[0]) for weight in weights]:
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(f"residual: expected the result's shape for x {x.shape} and {shapes}, got {residual.shape}")
    for field in jax.tree.leaves(prologue):
        expected = x.shape[-1:] if isinstance(prologue, RMSNorm) else x.shape
        if field.shape != expected:
            name = type(prologue).__name__
            raise ValueError(f"prologue: expected {name} with {expected} for x {x.shape}, got {field.shape}")
    for weight in weights:
        if x.shape[-1] != weight.shape[-1]:
            raise ValueError(f"matmul: expected x [..., {weight.shape[-1]}] for a weight {weight.shape}, got {x.shape}")
    tokens = x.size // max(1, x.shape[-1])
    names: list[Implementation] = [implementation or choose(weight, tokens=tokens) for weight in weights]
    for weight, name in zip(weights, names, strict=True):
        if reason := supports(weight, name, tokens=tokens):
            raise ValueError(f'matmul: implementation "{name}": {reason}')
    by_kernel = [
        name != "reference" and isinstance(weight, QuantizedTensor) for weight, name in zip(weights, names, strict=True)
    ]
    if all(by_kernel):
        first = prologue if isinstance(prologue, RMSNorm) else jax.tree.map(_rows, prologue)
        products: Any = _by_kernel(_rows(x), tuple(weights), first, jax.tree.map(_rows, residual), names[0])
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in products]
    x = x if prologue is None else prologue(x)
    results = [
        matmul(x, weight, name) if kernel else _reference(x, weight)
        for weight, name, kernel in zip(weights, names, by_kernel, strict=True)
    ]
    return results if residual is None else [residual + y for y in results]


def supports(weight: Any, implementation: str, *, tokens: int = 1) -> str | None:
    """Says why an implementation cannot do a product.

    Args:
      weight: [out, in], dense or quantized; shapes and dtypes suffice.
      implementation: as in `matmul`.
      tokens: rows of `x`.

    Returns:
      None if it can, otherwise the reason. A kernel may run on another platform than its own where that can interpret
      it, so platforms are no reason.
    """
    if implementation not in get_args(Implementation):
        return f"expected one of {', '.join(get_args(Implementation))}"
    if implementation == "reference":
        return None
    reasons = (_leaf_reason(leaf, implementation, tokens) for leaf in _leaves(weight))
    return next((reason for reason in reasons if reason is not None), None)


def choose(weight: Any, *, tokens: int = 1) -> Implementation:
    """The implementation that `matmul` uses where none is asked for."""
    leaves = [leaf for leaf in _leaves(weight) if isinstance(leaf, QuantizedTensor)]
    kernel: Any = jax.default_backend()
    if kernel not in ("cpu", "tpu", "gpu") or not leaves or not all(_lies_for(leaf, kernel) for leaf in leaves):
        return "reference"
    return kernel if supports(weight, kernel, tokens=tokens) is None else "reference"


def _lies_for(weight: Any, kernel: str) -> bool:
    """True for a layout that the kernel of a platform reads as it is."""
    ours = isinstance(weight, (BankedTensor, UniformTileTensor, LevelTileTensor, BookTileTensor))
    return isinstance(weight, ServingTensor) and (ours if kernel == "gpu" else not ours)


def _leaves(weight: Any) -> Iterator[Any]:
    """The tensors of one format that a weight is made of."""
    if isinstance(weight, ConcatTensor):
        for part in weight.parts:
            yield from _leaves(part)
    elif isinstance(weight, (OutlierTensor, ColumnOutlierTensor, ColumnTensor)):
        yield from _leaves(weight.base)
    else:
        yield weight


def _leaf_reason(weight: Any, implementation: str, tokens: int) -> str | None:
    if not isinstance(weight, QuantizedTensor):
        return None  # a dense part needs no kernel
    if isinstance(weight, (UniformTensor, UniformWordTensor, UniformTileTensor)):
        groups = weight.scale.shape[-2 if isinstance(weight, UniformTileTensor) else -1]
        group = None if groups == 1 else weight.shape[1] // groups
        return uniform_api.supports(
            implementation, bits=weight.bits, group=group, columns=weight.shape[1], tokens=tokens
        )
    if implementation == "gpu" and has_books(weight):
        return too_old() or why_not(weight)
    if isinstance(weight, BookTileTensor):
        if implementation == "gpu":
            return too_old()
        return _leaf_reason(jax.eval_shape(weight.original), implementation, tokens)
    if isinstance(weight, (CodebookTensor, LookupTensor, BankedTensor, LevelWordTensor, LevelTileTensor)):
        scale = None if weight.scale is None else weight.scale.shape
        if isinstance(weight, (LevelWordTensor, LevelTileTensor)) or _by_levels(weight, implementation):
            return uniform_api.supports_levels(implementation, scale=scale, columns=weight.shape[1], tokens=tokens)
        packed = isinstance(weight, CodebookTensor)
        vector, count = weight.vector if packed else (1, weight.dimension), weight.num_codebooks
        settings: dict[str, Any] = {"bits": weight.codes.bits if packed else weight.bits, "vector": vector}
        settings |= {
            "count": count,
            "blocks": weight.blocks,
            "scale": scale,
            "tokens": tokens,
            "columns": weight.shape[1],
        }
        return codebook_api.supports(implementation, **settings)
    return f"expected a uniform or codebook weight, got {weight.format}"


def _by_levels(weight: Any, implementation: str) -> bool:
    """True where the kernel for levels per row is the one to use."""
    return implementation in ("tpu", "gpu") and isinstance(weight, CodebookTensor) and has_row_levels(weight)


def _rows(x: jax.Array) -> jax.Array:
    """An array [..., n] as [rows, n]."""
    return x.reshape(-1, x.shape[-1])


def _reference(x: jax.Array, weight: Any) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, dense(weight).astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_kernel(
    x: jax.Array,
    weights: tuple[Any, ...],
    prologue: Prologue | None,
    residual: jax.Array | None,
    implementation: str,
) -> tuple[jax.Array, ...]:
    results = _products(x, weights, prologue, residual, implementation, x.dtype)
    return tuple(y.astype(x.dtype) for y in results)


def _by_kernel_forward(x: jax.Array, *arguments: Any) -> tuple[Any, Any]:
    return _by_kernel(x, *arguments), (x, *arguments[:-1])


def _by_kernel_backward(implementation: str, saved: Any, gradients: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    del implementation

    def reference(x: jax.Array, weights: tuple[Any, ...], prologue: Prologue | None, residual: Any) -> Any:
        return tuple(matmul_each(x, weights, "reference", prologue=prologue, residual=residual))

    return jax.vjp(reference, *saved)[1](gradients)


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _products(
    x: jax.Array,
    weights: tuple[Any, ...],
    prologue: Prologue | None,
    residual: jax.Array | None,
    implementation: str,
    dtype: Any,
) -> list[jax.Array]:
    """Returns [residual + _product(prologue(x), ...) for each weight]."""
    banked = [weight for weight in weights if isinstance(weight, BankedTensor)]
    if implementation == "gpu" and len(banked) == len(weights) and len({weight.dimension for weight in banked}) == 1:
        arrays = [(weight.words, dense(weight.codebooks), weight.scale) for weight in banked]
        settings: dict[str, Any] = {"dimension": banked[0].dimension, "dtype": dtype}
        return codebook_api.banked_matmuls(x, arrays, prologue, residual, **settings)
    x = x if prologue is None else prologue(x)
    results = [_product(x, weight, implementation, dtype) for weight in weights]
    return results if residual is None else [residual + y.astype(residual.dtype) for y in results]


def _product(x: jax.Array, weight: Any, implementation: str, dtype: Any = jnp.float32) -> jax.Array:
    """Returns x @ weight.T, float [tokens, out], for x [tokens, in]; sums over parts are float32.

    `dtype` is what becomes of the result in the end: a kernel that can write it saves a conversion.
    """
    if isinstance(weight, ConcatTensor):
        return _concat(x, weight, implementation)
    if isinstance(weight, ColumnTensor):
        x = x.astype(jnp.float32) if weight.order is None else x.astype(jnp.float32)[:, unpack_order(weight.order)]
        x = x if weight.scale is None else x * weight.scale.dense()[None, :]
        return _product(x, weight.base, implementation, dtype)
    if isinstance(weight, OutlierTensor):
        base = _product(x, weight.base, implementation).astype(jnp.float32)
        place = weight.positions()
        row, column = place // np.int32(weight.shape[1]), place % np.int32(weight.shape[1])
        products = x.astype(jnp.float32)[:, column] * weight.values.astype(jnp.float32)[None, :]
        return base + _row_sums(products, row, weight.shape[0])
    if isinstance(weight, ColumnOutlierTensor):
        base = _product(x, weight.base, implementation).astype(jnp.float32)
        x = jnp.take(x.astype(jnp.float32), weight.columns.astype(jnp.int32), axis=1, mode="fill", fill_value=0)
        return base + jnp.einsum("tk,ok->to", x, weight.values.astype(jnp.float32))
    return _leaf(x, weight, implementation, dtype)


def _row_sums(values: jax.Array, rows: jax.Array, count: int) -> jax.Array:
    """Sums float32 [tokens, k] over the values of the same row, of at most 2**16 each, to [tokens, count].

    GPUs add in any order, so the numbers are integers: two of 14 bits each, times a power of two per token.
    """
    bits = 14
    largest = jnp.abs(values).max(axis=1, keepdims=True, initial=0)
    exponent = jnp.maximum(jnp.frexp(largest)[1], -100)
    scaled = values * jnp.ldexp(jnp.float32(1), bits - exponent)
    high = jnp.round(scaled)
    parts = jnp.stack([high, jnp.round((scaled - high) * 2.0**bits)]).astype(jnp.int32)
    high, low = jnp.zeros((2, len(values), count), jnp.int32).at[:, :, rows].add(parts).astype(jnp.float32)
    total = (high + low * 2.0**-bits) * jnp.ldexp(jnp.float32(1), exponent - bits)
    return total + 0 * largest  # not a number, where there is one


def _concat(x: jax.Array, weight: ConcatTensor, implementation: str) -> jax.Array:
    order = None if weight.order is None else unpack_order(weight.order)
    if weight.axis == 0:
        y = jnp.concatenate([_product(x, part, implementation).astype(jnp.float32) for part in weight.parts], axis=1)
        return y if order is None else y[:, jnp.argsort(order)]
    x = x if order is None else x[:, order]
    y, start = jnp.zeros((), jnp.float32), 0
    for part in weight.parts:
        stop = start + part.shape[-1]
        y = y + _product(x[:, start:stop], part, implementation).astype(jnp.float32)
        start = stop
    return y


def _leaf(x: jax.Array, weight: Any, implementation: str, dtype: Any) -> jax.Array:
    if isinstance(weight, ServingTensor) and not _lies_for(weight, implementation):
        weight = weight.original()  # the layout of another platform
    if implementation == "gpu" and has_scalar_codes(weight):
        weight = tile_tensor(weight)
    if implementation == "gpu" and has_books(weight):
        weight = book_tensor(weight)
    if isinstance(weight, BookTileTensor):
        if weight.scale is not None:
            x = x.astype(jnp.float32) * jnp.repeat(weight.scale[0].astype(jnp.float32), weight.dimension)[None, :]
        settings = {"bits": weight.bits, "dimension": weight.dimension, "block": weight.block, "out": weight.rows}
        arrays = weight.words, weight.tables, weight.factor
        return uniform_api.book_tile_matmul(x, *arrays, **settings, dtype=dtype)
    if isinstance(weight, UniformTileTensor):
        zero = None if weight.zero is None else weight.zero.words
        return uniform_api.uniform_tile_matmul(x, weight.words, weight.scale, zero, bits=weight.bits, dtype=dtype)
    if isinstance(weight, LevelTileTensor):
        levels = dense(weight.levels)
        return uniform_api.level_tile_matmul(x, weight.words, levels, weight.scale, bits=weight.bits, dtype=dtype)
    if isinstance(weight, CodebookTensor) and implementation == "gpu":
        weight = banked_tensor(weight)
    if isinstance(weight, BankedTensor):
        (y,) = _products(x, (weight,), None, None, implementation, dtype)
        return y
    if isinstance(weight, UniformTensor):
        weight = word_tensor(weight)
    if isinstance(weight, CodebookTensor):
        weight = word_tensor(weight) if _by_levels(weight, implementation) else lookup_tensor(weight, implementation)
    if isinstance(weight, UniformWordTensor):
        zero = None if weight.zero is None else jnp.swapaxes(weight.zero.unpack(), -1, -2)
        return uniform_api.uniform_matmul(x, weight.words, weight.scale, zero, bits=weight.bits)
    if isinstance(weight, LevelWordTensor):
        return uniform_api.level_matmul(x, weight.words, dense(weight.levels), weight.scale, bits=weight.bits)
    if isinstance(weight, LookupTensor):
        settings = {"blocks": weight.blocks, "dimension": weight.dimension}
        settings |= {"out": weight.rows, "implementation": implementation}
        return codebook_api.codebook_matmul(x, weight.slots, dense(weight.codebooks), weight.scale, **settings)
    return _reference(x, weight)
