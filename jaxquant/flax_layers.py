"""Linear layers with quantized weights for Flax NNX and Flax Linen: thin shells around `jaxquant.matmul`.

The floats of a weight (codebooks, scales, levels) are ordinary parameters, which any optax transformation trains; its
codes are variables of their own, which no gradient reaches. `jaxquant` itself does not need this module, nor flax.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxquant import trees
from jaxquant.masters import masters, rounded, stored
from jaxquant.ops import matmul
from jaxquant.tensors import QuantizedTensor


class Codes(nnx.Variable):
    """What a quantized weight holds beside floats; not a `nnx.Param`."""


def _apply(x: jax.Array, floats: Any, rest: Any, low_rank: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Returns x W^T, plus x A^T B^T for the low-rank factors (A [rank, in], B [out, rank])."""
    y = matmul(x, rounded(trees.combine(floats, rest)))
    return y if low_rank is None else y + (x @ low_rank[0].T) @ low_rank[1].T


def _low_rank(key: jax.Array, weight: QuantizedTensor, rank: int) -> tuple[jax.Array, jax.Array]:
    """A normal of variance 1 / in, B zero: the product is zero at first (LoRA, https://arxiv.org/abs/2106.09685)."""
    out, n = weight.shape
    return jax.random.normal(key, (rank, n)) / jnp.sqrt(jnp.float32(n)), jnp.zeros((out, rank))


class QuantizedLinear(nnx.Module):
    """x [..., in] -> [..., out] with a quantized weight, for Flax NNX.

    Attributes:
      floats: `nnx.Param`, the masters of the weight's floats.
      codes: `Codes`, all else.
      down: `nnx.Param` [rank, in], LoRA's A; None without.
      up: `nnx.Param` [out, rank], LoRA's B; None without.
    """

    def __init__(self, weight: QuantizedTensor, *, rank: int = 0, rngs: nnx.Rngs | None = None):
        """Takes a weight [out, in]; with `rank`, low-rank factors from `rngs.params()` are added to it.

        Raises:
          ValueError: a rank without rngs.
        """
        floats, rest = trees.partition(masters(weight))
        self.floats, self.codes = nnx.Param(floats), Codes(rest)
        down = up = None
        if rank:
            if rngs is None:
                raise ValueError(f"rngs: expected nnx.Rngs for factors of rank {rank}, got None")
            down, up = map(nnx.Param, _low_rank(rngs.params(), weight, rank))
        self.down, self.up = nnx.data(down), nnx.data(up)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer."""
        factors = None if self.down is None or self.up is None else (self.down.get_value(), self.up.get_value())
        return _apply(x, self.floats.get_value(), self.codes.get_value(), factors)

    def weight(self) -> QuantizedTensor:
        """Returns the quantized weight as it is stored, without the low-rank part."""
        return stored(trees.combine(self.floats.get_value(), self.codes.get_value()))


class LinenQuantizedLinear(linen.Module):
    """x [..., in] -> [..., out] with a quantized weight, for Flax Linen.

    Collections: "params" with "floats" and, with a rank, "down" [rank, in] and "up" [out, rank]; "codes" with "rest".

    Attributes:
      initial: the quantized weight [out, in] that `init` puts into the collections.
      rank: of the low-rank factors that are added, 0 for none.
    """

    initial: QuantizedTensor
    rank: int = 0

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer."""
        floats = self.param("floats", lambda _: trees.partition(masters(self.initial))[0])
        rest = self.variable("codes", "rest", lambda: trees.partition(masters(self.initial))[1]).value
        if not self.rank:
            return _apply(x, floats, rest, None)
        down = self.param("down", lambda key: _low_rank(key, self.initial, self.rank)[0])
        up = self.param("up", lambda key: _low_rank(key, self.initial, self.rank)[1])
        return _apply(x, floats, rest, (down, up))
