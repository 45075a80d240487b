"""The methods: pure functions from a layer problem and a config to a quantized tensor. A config's type names its method."""

from typing import Any

from jaxquant.methods.gptq import GPTQConfig as GPTQConfig
from jaxquant.methods.gptq import gptq as gptq
from jaxquant.methods.quantease import QuantEaseConfig as QuantEaseConfig
from jaxquant.methods.quantease import quantease as quantease
from jaxquant.methods.rtn import RTNConfig as RTNConfig
from jaxquant.methods.rtn import rtn as rtn

Config = RTNConfig | GPTQConfig | QuantEaseConfig

# (problem, config, *, key) -> QuantizedTensor, each jitted with its config static
METHODS: dict[type, Any] = {RTNConfig: rtn, GPTQConfig: gptq, QuantEaseConfig: quantease}
