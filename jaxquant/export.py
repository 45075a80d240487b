"""Saved models: our own packed safetensors with a JSON header, and dense checkpoints that transformers loads.

DIR/model.safetensors  all arrays as they are held in memory; the header's "jaxquant" entry says what they are
DIR/config.json        the model's configuration, as in a Hugging Face checkpoint
DIR/tokenizer*.json    the tokenizer
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import safetensors
from safetensors.flax import save_file

from jaxquant import trees
from jaxquant.checkpoint import write_json
from jaxquant.models.base import Model
from jaxquant.models.config import parse_config, tensor_names
from jaxquant.models.transformer import make_model
from jaxquant.serialize import decode, encode
from jaxquant.tensors import dense_tree

FORMAT = 1
MODEL_FILE = "model.safetensors"


class SavedModel(NamedTuple):
    """A packed model read back: its functions, parameters (some quantized), config.json, and the record it was saved with."""

    model: Model
    params: Any
    config_dict: dict[str, Any]
    record: dict[str, Any]


def _check_space(directory: Path, need: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < need:
        raise ValueError(f"{directory}: expected {need / 1e6:.0f} MB of free disk space, got {free / 1e6:.0f} MB")


def _save(directory: Path, arrays: dict[str, jax.Array], metadata: dict[str, str]) -> None:
    """Writes MODEL_FILE; a reader finds the old file or the whole new one."""
    _check_space(directory, sum(x.nbytes for x in arrays.values()) + 2**20)
    temporary = directory / (MODEL_FILE + ".part")
    save_file(arrays, temporary, metadata=metadata)
    temporary.replace(directory / MODEL_FILE)


def save_packed(directory: Path, params: Any, config_dict: dict[str, Any], record: dict[str, Any]) -> None:
    """Saves a model, quantized weights in packed form.

    Args:
      directory: where to; it is created.
      params: parameters; weights may be QuantizedTensors.
      config_dict: the model's config.json.
      record: anything JSON that should stay with the model, such as reports and the origin of the calibration data.

    Raises:
      ValueError: not enough disk space.
    """
    directory.mkdir(parents=True, exist_ok=True)
    arrays, manifest = encode(params)
    header = {"format": FORMAT, "tensors": manifest, "record": record}
    write_json(directory / "config.json", config_dict)
    _save(directory, arrays, {"format": "jaxquant", "jaxquant": json.dumps(header)})


def is_packed(directory: Path) -> bool:
    """True if `directory` holds a model that `save_packed` wrote."""
    file = directory / MODEL_FILE
    return file.is_file() and "jaxquant" in _metadata(file)


def _metadata(file: Path) -> dict[str, str]:
    """The header's string entries, without touching the arrays."""
    with file.open("rb") as stream:
        size = stream.read(8)
        if len(size) < 8:
            raise ValueError(f"{file}: expected a safetensors file, got {len(size)} bytes")
        try:
            return json.loads(stream.read(struct.unpack("<Q", size)[0])).get("__metadata__") or {}
        except (json.JSONDecodeError, UnicodeDecodeError, OverflowError, MemoryError):
            raise ValueError(f"{file}: expected a safetensors file, got something else") from None


def load_packed(directory: Path) -> SavedModel:
    """Reads what `save_packed` wrote.

    Raises:
      ValueError: the file is of another kind, of a newer format, or damaged.
    """
    file = directory / MODEL_FILE
    header = json.loads(_metadata(file).get("jaxquant", "null"))
    if header is None:
        raise ValueError(f"{file}: expected a packed jaxquant model, got another safetensors file")
    if header["format"] > FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT} or older, got {header['format']}; update jaxquant")
    try:
        with safetensors.safe_open(file, framework="flax") as handle:
            arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: expected a whole safetensors file, got one that is damaged ({error})") from error
    config_dict = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    params = decode(arrays, header["tensors"])
    return SavedModel(make_model(parse_config(config_dict)), params, config_dict, header["record"])


def save_dense(directory: Path, params: Any, config_dict: dict[str, Any], dtype: str = "bfloat16") -> None:
    """Saves a dense Hugging Face checkpoint that transformers loads: dequantized weights in one dtype.

    Args:
      directory: where to; it is created.
      params: parameters; weights may be QuantizedTensors.
      config_dict: the model's config.json.
      dtype: of all tensors.

    Raises:
      ValueError: not enough disk space.
    """
    directory.mkdir(parents=True, exist_ok=True)
    leaves = trees.flatten(dense_tree(params))
    names = tensor_names(parse_config(config_dict))
    arrays = {name: leaves[path].astype(jnp.dtype(dtype)) for path, name in names.items()}
    write_json(directory / "config.json", {**config_dict, "dtype": dtype})
    _save(directory, arrays, {"format": "pt"})
