"""The methods: pure functions from a layer problem and a config to a quantized tensor. A config's type names its method."""

from typing import Any

from jaxquant.methods.aqlm import AQLMConfig as AQLMConfig
from jaxquant.methods.aqlm import aqlm as aqlm
from jaxquant.methods.cmpq import CMPQConfig as CMPQConfig
from jaxquant.methods.cmpq import cmpq as cmpq
from jaxquant.methods.gptq import GPTQConfig as GPTQConfig
from jaxquant.methods.gptq import gptq as gptq
from jaxquant.methods.gptvq import GPTVQConfig as GPTVQConfig
from jaxquant.methods.gptvq import gptvq as gptvq
from jaxquant.methods.lnq import LNQConfig as LNQConfig
from jaxquant.methods.lnq import lnq as lnq
from jaxquant.methods.quantease import QuantEaseConfig as QuantEaseConfig
from jaxquant.methods.quantease import quantease as quantease
from jaxquant.methods.quantease_outlier import OutlierQuantEaseConfig as OutlierQuantEaseConfig
from jaxquant.methods.quantease_outlier import quantease_outlier as quantease_outlier
from jaxquant.methods.rtn import RTNConfig as RTNConfig
from jaxquant.methods.rtn import rtn as rtn
from jaxquant.methods.trellis import TrellisConfig as TrellisConfig
from jaxquant.methods.trellis import trellis_quantize as trellis_quantize

Config = (
    RTNConfig
    | GPTQConfig
    | QuantEaseConfig
    | OutlierQuantEaseConfig
    | LNQConfig
    | CMPQConfig
    | GPTVQConfig
    | AQLMConfig
    | TrellisConfig
)

# (problem, config, *, key) -> QuantizedTensor, each jitted with its config static
METHODS: dict[type, Any] = {
    RTNConfig: rtn,
    GPTQConfig: gptq,
    QuantEaseConfig: quantease,
    OutlierQuantEaseConfig: quantease_outlier,
    LNQConfig: lnq,
    CMPQConfig: cmpq,
    GPTVQConfig: gptvq,
    AQLMConfig: aqlm,
    TrellisConfig: trellis_quantize,
}
