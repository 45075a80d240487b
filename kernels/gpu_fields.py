"""Fields of weights as the GPU kernel for several tokens reads them."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def as_half(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Rows as float16 and the float32 factors [rows, 1] that undo their scaling, None for ones.

    Rows of other dtypes are multiplied by powers of two that bring their largest number to between 1 and 2 to the 14th,
    so that nothing overflows and little underflows.
    """
    if x.dtype == jnp.float16:
        return x, None
    x = x.astype(jnp.float32)
    exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=1, keepdims=True))[1] - 14
    return jnp.ldexp(x, -exponent).astype(jnp.float16), jnp.ldexp(jnp.float32(1), exponent)


def row_factor(factors: Sequence[jax.Array | None], out: int) -> jax.Array | None:
    """The product, float [out], of factors of rows, each [out or 1] or None for ones."""
    given = [factor for factor in factors if factor is not None]
    if len(given) > 1:
        given = [functools.reduce(jnp.multiply, [factor.astype(jnp.float32) for factor in given])]
    return jnp.broadcast_to(given[0], (out,)) if given else None


def pad_lines(array: jax.Array) -> jax.Array:
    """An array [lines, elements] with zeros up to a multiple of 16 bytes, of which copies consist."""
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % (16 // array.dtype.itemsize))))


def unpack(words: jax.Array, bits: int, count: int) -> jax.Array:
    """Codes packed along the last axis without gaps, uint32 [lines, words], as uint8 [lines, count]."""
    place = np.arange(count) * bits
    first, shift = place // 32, (place % 32).astype(np.uint32)[None]
    low = words[:, first] >> shift
    high = words[:, np.minimum(first + 1, words.shape[1] - 1)] << (-shift & np.uint32(31))
    codes = jnp.where(shift + bits > 32, low | high, low) & np.uint32(2**bits - 1)
    return codes.astype(jnp.uint8)
