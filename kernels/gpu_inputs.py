"""Inputs and factors of the GPU kernel for several tokens, as it reads them."""

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


def factors(
    of_tokens: jax.Array | None, of_rows: Sequence[jax.Array | None], out: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """The factors of `matmul` from what `as_half` says of tokens and from factors [out or 1] of rows, None for ones."""
    product = None
    for factor in of_rows:
        if factor is not None:
            product = factor.astype(jnp.float32) if product is None else product * factor
    product = None if product is None else jnp.broadcast_to(product, (out,))
    return None if of_tokens is None else of_tokens[:, 0], product


def permute_columns(x: jax.Array) -> jax.Array:
    """Inputs [tokens, in] for decoders that bring a thread 8 consecutive columns of 32, padded to a multiple of 32.

    In a fragment thread (., c) has columns 8 k + 2 c and the next; of its columns 8 c .. 8 c + 7 it puts the pair number
    k there. So what is column 8 c + 2 k in the weight is column 8 k + 2 c in the fragment.
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 32)))
    # As a gather, and before any cast: XLA's transposition of such small axes takes 20 times longer, a pass of its own.
    place = jnp.arange(x.shape[1], dtype=jnp.int32)
    pair, octet = place >> 1 & 3, place >> 3 & 3
    source = place & ~30 | pair << 3 | octet << 1
    return x.at[:, source].get(mode="promise_in_bounds", unique_indices=True)


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
