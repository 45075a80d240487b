"""What is done to the inputs of a product first, by the kernel along with the product where it can."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["eps", "offset"])
@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """RMS norm over the last axis: x / sqrt(mean(x^2) + eps) * (weight + offset).

    Attributes:
      weight: [in].
      eps: what is added to the mean (static).
      offset: what is added to the weight: 1 in Gemma (static).
    """

    weight: jax.Array
    eps: float
    offset: float = 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., in] in f32, returned in the dtype of x."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        weight = jnp.broadcast_to(self.weight, x.shape)
        if self.offset:  # Gemma multiplies before the cast, Llama after it
            return (y * (weight.astype(jnp.float32) + self.offset)).astype(x.dtype)
        return weight.astype(x.dtype) * y.astype(x.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["gate"], meta_fields=["activation"])
@dataclasses.dataclass(frozen=True)
class Gate:
    """A gated linear unit: activation(gate) * x.

    Attributes:
      gate: [..., in], as x.
      activation: one of ACTIVATIONS (static).

    Raises:
      ValueError: another activation.
    """

    gate: jax.Array
    activation: str

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {self.activation!r}")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies x [..., in]."""
        return ACTIVATIONS[self.activation](self.gate) * x


Prologue = RMSNorm | Gate
