"""Which layer gets which method: rules over paths, resolved before anything runs."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import trees
from jaxquant.methods import METHODS, AQLMConfig, CMPQConfig, Config, GPTVQConfig, TrellisConfig
from jaxquant.models.base import Model
from jaxquant.problem import LayerProblem
from jaxquant.tensors import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Rule:
    """Assigns a method to layers.

    Attributes:
      pattern: regular expression that must match a whole path such as "blocks/3/attn/q".
      config: settings of the method, whose type names the method; None leaves the layer dense.
    """

    pattern: str
    config: Config | None

    def __post_init__(self) -> None:
        """Checks the pattern."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"rules: expected a regular expression, got {self.pattern!r}: {error}") from None


def linear_paths(model: Model, params: Any) -> list[str]:
    """Returns the paths of all linear layers of the model's blocks, in the order in which they are quantized."""
    return [f"blocks/{i}/{name}" for i in range(len(params["blocks"])) for group in model.groups for name in group]


def resolve(rules: Sequence[Rule], paths: Sequence[str]) -> dict[str, Config | None]:
    """Returns {path: config or None}; the first rule whose pattern matches wins.

    Raises:
      ValueError: a rule that decides nothing, or a path that no rule matches.
    """
    plan, used = {}, set()
    for path in paths:
        index = next((i for i, rule in enumerate(rules) if re.fullmatch(rule.pattern, path)), None)
        if index is None:
            raise ValueError(f"rules: no rule matches {path!r}; end with Rule('.*', config or None)")
        plan[path] = rules[index].config
        used.add(index)
    for i, rule in enumerate(rules):
        if i not in used:
            raise ValueError(
                f"rules: {rule.pattern!r} decides no layer (matches nothing, or earlier rules win); layers are such as "
                f"{paths[0]!r}"
            )
    return plan


def variants(config: Config) -> tuple[Config, ...]:
    """Returns the same settings at other widths, for an allocation to choose from.

    CMPQ and trellis codes: their average bits, 1.5 to 5; AQLM: 1 to 4 codebooks; GPTVQ: 1 to 4 bits per weight, as far
    as codes of 16 bits go; the others: 2 to 6 bits.
    """
    if isinstance(config, (CMPQConfig, TrellisConfig)):
        return tuple(dataclasses.replace(config, average_bits=b) for b in (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0))
    if isinstance(config, AQLMConfig):
        return tuple(dataclasses.replace(config, num_codebooks=n) for n in (1, 2, 3, 4))
    if isinstance(config, GPTVQConfig):
        return tuple(dataclasses.replace(config, bits=b) for b in (1, 2, 3, 4) if b * config.vector_dim <= 16)
    return tuple(dataclasses.replace(config, bits=b) for b in (2, 3, 4, 5, 6))


def abstract_problem(shape: tuple[int, int]) -> Any:
    """Returns the problem of a layer [out, in] with ShapeDtypeStructs instead of arrays."""
    out, n = shape
    weight: Any = jax.ShapeDtypeStruct((out, n), jnp.float32)
    hessian: Any = jax.ShapeDtypeStruct((n, n), jnp.float32)
    return LayerProblem(weight, hessian)


def abstract_tensor(shape: tuple[int, int], config: Config) -> QuantizedTensor:
    """Returns the quantized tensor of a layer as ShapeDtypeStructs, without running its method.

    Raises:
      ValueError: the shape does not fit the settings.
    """
    method = METHODS[type(config)]
    return jax.eval_shape(lambda p, k: method(p, config, key=k), abstract_problem(shape), jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """One line of a plan: the layer, its method, and what it will cost in bits (16 per weight if left dense)."""

    path: str
    shape: tuple[int, int]
    config: Config | None
    format: str
    bits: int


def plan_layers(plan: Mapping[str, Config | None], params: Any) -> list[PlannedLayer]:
    """Returns the plan's layers with formats and bits; no weight is read.

    Raises:
      ValueError: a layer that does not fit its settings, with its path.
    """
    abstract: dict[Any, QuantizedTensor] = {}
    layers = []
    for path, config in plan.items():
        weight = trees.get(params, path)["weight"]
        out, n = weight.shape
        if config is None:
            layers.append(
                PlannedLayer(path, (out, n), None, str(weight.dtype), weight.size * weight.dtype.itemsize * 8)
            )
            continue
        if (out, n, config) not in abstract:
            try:
                abstract[out, n, config] = abstract_tensor((out, n), config)
            except ValueError as error:
                raise ValueError(f"{path} {out}x{n}: {error}") from None
        tensor = abstract[out, n, config]
        layers.append(PlannedLayer(path, (out, n), config, tensor.format, tensor.storage_bits()))
    return layers
