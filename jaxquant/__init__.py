"""Extreme weight compression of large language models in JAX."""

from jaxquant.methods import METHODS as METHODS
from jaxquant.methods import GPTQConfig as GPTQConfig
from jaxquant.methods import QuantEaseConfig as QuantEaseConfig
from jaxquant.methods import RTNConfig as RTNConfig
from jaxquant.methods import gptq as gptq
from jaxquant.methods import quantease as quantease
from jaxquant.methods import rtn as rtn
from jaxquant.ops import matmul as matmul
from jaxquant.packing import PackedArray as PackedArray
from jaxquant.packing import pack as pack
from jaxquant.pipeline import quantize_blocks as quantize_blocks
from jaxquant.pipeline import quantize_layer as quantize_layer
from jaxquant.plan import Rule as Rule
from jaxquant.plan import resolve as resolve
from jaxquant.problem import LayerProblem as LayerProblem
from jaxquant.problem import objective as objective
from jaxquant.problem import relative_error as relative_error
from jaxquant.tensors import QuantizedTensor as QuantizedTensor
from jaxquant.tensors import UniformTensor as UniformTensor
from jaxquant.tensors import bits_per_weight as bits_per_weight
from jaxquant.tensors import dense as dense
from jaxquant.tensors import dense_tree as dense_tree
