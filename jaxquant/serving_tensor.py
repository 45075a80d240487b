"""What tensors in a kernel's layout have in common."""

import jax

from jaxquant.tensors import QuantizedTensor


class ServingTensor(QuantizedTensor):
    """A tensor in a kernel's layout."""

    def original(self) -> QuantizedTensor:
        """Returns the tensor that this one was made from, bit for bit."""
        raise NotImplementedError

    def dequantize(self) -> jax.Array:
        """Returns the dense weight, float32 [out, in]."""
        return self.original().dequantize()

    @property
    def format(self) -> str:
        """Short description for tables."""
        return jax.eval_shape(self.original).format + ", kernel layout"
