"""Decoder-only language models as pure functions, and their loading."""

from jaxquant.models.base import Model as Model
from jaxquant.models.base import ModelConfig as ModelConfig
from jaxquant.models.load import LoadedModel as LoadedModel
from jaxquant.models.load import load_model as load_model
from jaxquant.models.transformer import make_model as make_model
