"""Settings that the methods on uniform grids share."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxquant import grid

Order = Literal["natural", "diagonal"]


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError unless `value` is one of the members of the Literal `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def check_integers(config: Any, **least: int) -> None:
    """Raises ValueError unless each named field of `config` is an integer of at least so much."""
    for name, bound in least.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value < bound:
            raise ValueError(f"{name}: expected an integer >= {bound}, got {value!r}")


def check_budget(config: Any) -> None:
    """Raises ValueError unless `average_bits`, `outliers` and `damp` of `config` are in range."""
    if not 0 < config.average_bits <= 8:
        raise ValueError(f"average_bits: expected a number above 0 and up to 8, got {config.average_bits!r}")
    if not 0 <= config.outliers < 1:
        raise ValueError(f"outliers: expected a share of the weights, 0 <= share < 1, got {config.outliers!r}")
    if config.damp < 0:
        raise ValueError(f"damp: expected a number >= 0, got {config.damp!r}")


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """Uniform grids, as every method on such grids takes them.

    Attributes:
      bits: width of a code, 1 to 8.
      group_size: consecutive input columns that share a grid; None for one grid per row.
      symmetric: fix the zero point in the middle instead of storing it.
      search: how ranges are chosen: "minmax", "mse" (GPTQ's search) or "hessian" (least weighted squared error).
      storage_dtype: dtype in which scales are stored: "float16", "bfloat16" or "float32".
    """

    bits: int = 4
    _: dataclasses.KW_ONLY
    group_size: int | None = None
    symmetric: bool = False
    search: grid.Search = "hessian"
    storage_dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        """Checks every field."""
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits: expected an integer from 1 to 8, got {self.bits!r}")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise ValueError(f"group_size: expected a positive integer or None, got {self.group_size!r}")
        check_choice("search", self.search, grid.Search)
        check_choice("storage_dtype", self.storage_dtype, Literal["float16", "bfloat16", "float32"])

    def check_columns(self, columns: int) -> None:
        """Raises ValueError if a weight with so many input columns does not fit these settings."""
        grid.check_group_size(columns, self.group_size)

    def fit(self, weight: jax.Array, importance: jax.Array) -> grid.Grid:
        """Fits the grids of `weight` [out, in]; `importance` [in] weighs the columns if the search asks for it."""
        self.check_columns(weight.shape[1])
        return grid.fit(
            weight,
            self.bits,
            self.group_size,
            symmetric=self.symmetric,
            search=self.search,
            importance=importance if self.search == "hessian" else None,
            dtype=self.storage_dtype,
        )


def column_order(hessian: jax.Array, order: Order) -> jax.Array:
    """Returns the order in which columns are visited, int32 [in]."""
    diagonal = jnp.diagonal(hessian)
    return jnp.argsort(-diagonal) if order == "diagonal" else jnp.arange(len(diagonal))
