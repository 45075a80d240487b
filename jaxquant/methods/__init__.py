"""The methods: pure functions from a layer problem and a config to a quantized tensor. A config's type names its method."""

from typing import Any, Protocol

import jax

from jaxquant.methods.gptq import GPTQConfig as GPTQConfig
from jaxquant.methods.gptq import gptq as gptq
from jaxquant.methods.quantease import QuantEaseConfig as QuantEaseConfig
from jaxquant.methods.quantease import quantease as quantease
from jaxquant.methods.rtn import RTNConfig as RTNConfig
from jaxquant.methods.rtn import rtn as rtn
from jaxquant.problem import LayerProblem
from jaxquant.tensors import QuantizedTensor


class Method(Protocol):
    """What a method looks like."""

    def __call__(self, problem: LayerProblem, config: Any, *, key: jax.Array) -> QuantizedTensor:
        """Quantizes a layer."""
        ...


Config = RTNConfig | GPTQConfig | QuantEaseConfig

METHODS: dict[type, Method] = {RTNConfig: rtn, GPTQConfig: gptq, QuantEaseConfig: quantease}
