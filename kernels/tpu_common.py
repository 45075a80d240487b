"""What the TPU kernels share: gathers, products with bfloat16 inputs, padding."""

import jax
import jax.numpy as jnp
from jax import lax


def interpret() -> bool:
    """Kernels are interpreted unless they are lowered for a TPU, which may be one that is not there."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() != "tpu" and (device is None or "TPU" not in device.device_kind)


def gather(table: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """take_along_axis for two dimensions and indices in bounds; without the checks, which would cost a third more."""
    other = 1 - axis
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=(other,),
        start_indices_batching_dims=(other,),
    )
    return lax.gather(table, index[..., None], numbers, (1, 1), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """X @ weight, bfloat16 in, float32 out."""
    return lax.dot_general(x, weight, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def pad_to(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Appends zeros up to a multiple of the length."""
    more = -x.shape[axis] % multiple
    return x if not more else jnp.pad(x, [(0, more if a == axis % x.ndim else 0) for a in range(x.ndim)])


def rounded(x: jax.Array) -> jax.Array:
    """float32 with the values of bfloat16; a conversion there and back would be simplified away."""
    return lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)


def split_rows(x: jax.Array) -> jax.Array:
    """Inputs [tokens, in] as rows for the matrix unit, bfloat16 [rows, in], rows a multiple of 16.

    Other dtypes than bfloat16 become a rounded part and, in further rows, what rounding left: for few tokens the unit is
    not full anyway, and together they are good for 16 bits.
    """
    parts = [x.astype(jnp.bfloat16)]
    if x.dtype != jnp.bfloat16:
        parts.append((x.astype(jnp.float32) - rounded(x)).astype(jnp.bfloat16))
    return pad_to(jnp.concatenate(parts), 0, 16)


def join_rows(y: jax.Array, x: jax.Array) -> jax.Array:
    """Adds up the rows of `split_rows(x)` after a product: [tokens, out] of [rows, out]."""
    return y[: len(x)] if x.dtype == jnp.bfloat16 else y[: len(x)] + y[len(x) : 2 * len(x)]


def as_seen(x: jax.Array) -> jax.Array:
    """Inputs as `split_rows` represents them, float32 [tokens, in]."""
    x = x.astype(jnp.float32)
    return rounded(x) + rounded(x - rounded(x))
