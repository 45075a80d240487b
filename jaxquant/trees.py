"""Parameter trees addressed by path: "blocks/3/attn/q" is params["blocks"][3]["attn"]["q"]."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def get(tree: Any, path: str) -> Any:
    """Returns the subtree at `path`; raises ValueError with the part that is missing."""
    node = tree
    for depth, part in enumerate(path.split("/")):
        try:
            node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]
        except (KeyError, IndexError, TypeError, ValueError):
            have = sorted(node) if isinstance(node, Mapping) else f"{type(node).__name__}"
            where = "/".join(path.split("/")[:depth]) or "the root"
            raise ValueError(f"path {path!r}: expected {part!r} under {where}, got {have}") from None
    return node


def replace(tree: Any, path: str, value: Any) -> Any:
    """Returns a copy of `tree` (dicts and lists on the way are copied, nothing else) with `value` at `path`."""
    if not path:
        return value
    part, _, rest = path.partition("/")
    child = get(tree, part)
    if isinstance(tree, (list, tuple)):
        return [replace(child, rest, value) if i == int(part) else x for i, x in enumerate(tree)]
    return {**tree, part: replace(child, rest, value)}


def update(tree: Any, values: Mapping[str, Any]) -> Any:
    """Returns a copy of `tree` with each `values[path]` in place."""
    for path, value in values.items():
        tree = replace(tree, path, value)
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {path: leaf} of nested dicts and lists, in order; anything else is a leaf."""
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        items = [(str(i), x) for i, x in enumerate(tree)]
    else:
        return {prefix: tree}
    join = f"{prefix}/" if prefix else ""
    return {p: leaf for name, x in items for p, leaf in flatten(x, f"{join}{name}").items()}


def is_float(x: Any) -> bool:
    """True for an array (or ShapeDtypeStruct) of floats of any width."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def cast_floats(tree: Any, dtype: jax.typing.DTypeLike | None) -> Any:
    """Returns `tree` with its float arrays in `dtype`; None leaves them as they are."""
    return tree if dtype is None else jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


def partition(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into what gradients and optimizers work on and what they must not touch.

    `jax.grad` of a function of the first part, and any optax transformation, see floats only; codes, orders and
    outlier positions are in the second part. `combine` undoes it. See equinox, https://arxiv.org/abs/2111.00254.

    Args:
      tree: any pytree, quantized tensors included.

    Returns:
      (the tree with its float arrays, None elsewhere; the tree with all other leaves, None where floats were).
    """
    floats = jax.tree.map(lambda x: x if is_float(x) else None, tree)
    return floats, jax.tree.map(lambda x: None if is_float(x) else x, tree)


def combine(floats: Any, rest: Any) -> Any:
    """Joins what `partition` split; either part may have been changed in between."""
    return jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda x: x is None)
