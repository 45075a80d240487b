"""Products with weights that may be quantized."""

import jax
import jax.numpy as jnp

from jaxquant.tensors import QuantizedTensor, dense


def matmul(x: jax.Array, weight: jax.Array | QuantizedTensor) -> jax.Array:
    """Returns x @ weight.T.

    Args:
      x: float [..., in].
      weight: [out, in], dense or quantized; it is cast to the dtype of `x`.

    Returns:
      [..., out] in the dtype of `x`.

    Raises:
      ValueError: the inner sizes differ.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"matmul: expected x [..., {weight.shape[-1]}] for a weight {weight.shape}, got {x.shape}")
    return jnp.einsum("...i,oi->...o", x, dense(weight).astype(x.dtype))
