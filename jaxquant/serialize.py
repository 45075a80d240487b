"""Parameter trees as flat named arrays plus a JSON manifest, the form in which everything is written to disk."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import trees
from jaxquant.codebook_tensor import ColumnTensor, LogScale
from jaxquant.packing import PackedArray
from jaxquant.tensors import CodebookTensor, ConcatTensor, OutlierTensor, UniformTensor
from jaxquant.tiles import TiledTensor

# Classes that may appear in a file, by name.
CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        PackedArray,
        UniformTensor,
        CodebookTensor,
        OutlierTensor,
        ConcatTensor,
        TiledTensor,
        ColumnTensor,
        LogScale,
    )
}


def _encode(value: Any, name: str, arrays: dict[str, Any]) -> Any:
    """Stores the arrays of `value` under names that begin with `name`; returns its JSON description."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_encode(x, f"{name}.{i}", arrays) for i, x in enumerate(value)]
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__} | {k: _encode(v, f"{name}.{k}", arrays) for k, v in fields.items()}
    if value.dtype == jnp.float8_e4m3fn:  # safetensors writes it but cannot read it back as a JAX array
        arrays[name] = jax.lax.bitcast_convert_type(value, jnp.uint8)
        return {"array": name, "view": "float8_e4m3fn"}
    arrays[name] = value
    return {"array": name}


def _decode(description: Any, arrays: dict[str, Any]) -> Any:
    if isinstance(description, list):
        return tuple(_decode(x, arrays) for x in description)
    if not isinstance(description, dict):
        return description
    if "array" in description:
        array = arrays[description["array"]]
        return jax.lax.bitcast_convert_type(array, description["view"]) if "view" in description else array
    fields = {k: _decode(v, arrays) for k, v in description.items() if k != "class"}
    if description["class"] not in CLASSES:
        raise ValueError(f"manifest: expected one of {sorted(CLASSES)}, got {description['class']!r}: a newer file?")
    return CLASSES[description["class"]](**fields)


def encode(tree: Any) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Flattens nested dicts and lists of arrays and QuantizedTensors.

    Args:
      tree: the parameters.

    Returns:
      ({name: array}, {path: description}). A plain array is named by its path, the arrays of a quantized tensor by path
      and field, such as "blocks/0/attn/q/weight.codes.words". The manifest is JSON and holds all that is static.
    """
    arrays: dict[str, jax.Array] = {}
    manifest = {path: _encode(leaf, path, arrays) for path, leaf in trees.flatten(tree).items()}
    return arrays, manifest


def decode(arrays: dict[str, jax.Array], manifest: dict[str, Any]) -> Any:
    """Inverse of `encode`; nodes whose keys are 0, 1, ... become lists.

    Raises:
      ValueError: a class or an array that is not known.
    """
    tree: dict[str, Any] = {}
    for path, description in manifest.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        try:
            node[last] = _decode(description, arrays)
        except KeyError as error:
            raise ValueError(f"{path}: expected an array named {error}, which is missing; is the file whole?") from None
    return _lists(tree)


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    node = {k: _lists(v) for k, v in node.items()}
    if node and all(k.isdigit() for k in node) and sorted(map(int, node)) == list(range(len(node))):
        return [node[str(i)] for i in range(len(node))]
    return node
