"""The specification: what a weight on uniform grids is, and its product.

weight[i, j] = scale[i, j // group] * (codes[i, j] - zero[i, j // group]).
"""

import jax
import jax.numpy as jnp


def decode(codes: jax.Array, scale: jax.Array, zero: jax.Array | None, *, bits: int) -> jax.Array:
    """Returns the dense weight.

    Args:
      codes: unsigned integers [..., out, in].
      scale: float [..., out, groups], with groups a divisor of in.
      zero: unsigned integers [..., out, groups], or None for 2**(bits - 1).
      bits: width of a code.

    Returns:
      float32 [..., out, in], differentiable in `scale`.
    """
    grouped = codes.astype(jnp.float32).reshape(*scale.shape, codes.shape[-1] // scale.shape[-1])
    point = jnp.float32(2 ** (bits - 1)) if zero is None else zero.astype(jnp.float32)[..., None]
    return ((grouped - point) * scale.astype(jnp.float32)[..., None]).reshape(codes.shape)


def uniform_matmul(x: jax.Array, codes: jax.Array, scale: jax.Array, zero: jax.Array | None, *, bits: int) -> jax.Array:
    """Returns x @ decode(...).T, float [tokens, out], for x [tokens, in]; in the dtype of `x`."""
    return jnp.einsum("ti,oi->to", x, decode(codes, scale, zero, bits=bits).astype(x.dtype))
