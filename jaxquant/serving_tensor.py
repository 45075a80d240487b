"""What tensors in a kernel's layout, and the making of them, have in common."""

import jax

from jaxquant.tensors import CodebookTensor, QuantizedTensor


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


def has_row_levels(tensor: CodebookTensor) -> bool:
    """True for one table of at most 16 levels per row."""
    table = tensor.blocks == (tensor.shape[0], 1) and tensor.vector == (1, 1)
    return table and tensor.num_codebooks == 1 and tensor.codes.bits in (2, 3, 4)
