"""Load a model from a Hugging Face directory, a GGUF file or a hub id, without torch or transformers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from jaxquant.models.base import Model, ModelConfig
from jaxquant.models.config import GEMMA, parse_config, tensor_names, tensor_shape
from jaxquant.models.gguf import Checkpoint, read_gguf
from jaxquant.models.transformer import make_model

# Tensors that a checkpoint may hold beside those of the text model.
IGNORED = ("rotary_emb.inv_freq", "vision_tower.", "multi_modal_projector.")


class LoadedModel(NamedTuple):
    """A model with its weights.

    Attributes:
      model: pure functions.
      params: nested dicts of arrays, see `jaxquant.models.base`; in the dtype of the checkpoint, f32 for GGUF.
      config_dict: what config.json holds, or would hold for a GGUF file.
      tokenizer_source: argument of `jaxquant.tokenizer.load_tokenizer`.
      files: the weight files, for fingerprints.
    """

    model: Model
    params: Any
    config_dict: dict[str, Any]
    tokenizer_source: Path
    files: tuple[Path, ...]


def load_model(source: str | Path) -> LoadedModel:
    """Load a causal language model.

    Args:
      source: a Hugging Face directory (config.json and *.safetensors, sharded or not), a .gguf file, or the id of a
        repository on the Hugging Face hub, which is downloaded.

    Returns:
      A `LoadedModel`; its arrays are on JAX's default device.

    Raises:
      ValueError: nothing at `source`, an unknown architecture or variant, tensors that are missing, unexpected, of
        another shape than the configuration says, or not finite.
    """
    path = resolve(source)
    checkpoint = read_gguf(path) if path.suffix == ".gguf" else read_directory(path)
    config = parse_config(checkpoint.config)
    return LoadedModel(make_model(config), read_params(config, checkpoint), checkpoint.config, path, checkpoint.files)


def resolve(source: str | Path) -> Path:
    """The local path of a source, downloaded if it is a hub id.

    Raises:
      ValueError: neither a path that exists nor a hub id that can be downloaded.
    """
    path = Path(source).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    text, wanted = str(source), "a Hugging Face directory, a .gguf file or a hub id"
    if path.exists() or path.suffix == ".gguf" or text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise ValueError(f"source: expected {wanted}, got {text!r}, which is not there or of another kind")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub client raises a dozen types, from httpx to its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"source: expected {wanted}, got {text!r}; from the hub: {reason}") from error


def read_directory(path: Path) -> Checkpoint:
    """A Hugging Face directory as a checkpoint; a multimodal Gemma 3 gives its text model.

    Raises:
      ValueError: no config.json, no safetensors, an index that names a file that is not there, or a damaged file.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected config.json in it, got a directory without one; for GGUF, name the file")
    config = read_json(path / "config.json")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({path / name for name in read_json(index)["weight_map"].values()})
    else:
        files = sorted(path.glob("*.safetensors"))
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        raise ValueError(
            f"{path}: expected {absent or 'safetensors files'}, got {sorted(p.name for p in path.iterdir())}"
        )
    handles = [open_safetensors(file) for file in files]
    where = {text_name(key): (handle, key) for handle in handles for key in handle.keys()}  # noqa: SIM118
    shapes = {name: tuple(handle.get_slice(key).get_shape()) for name, (handle, key) in where.items()}

    def read(name: str) -> np.ndarray:
        handle, key = where[name]
        return handle.get_tensor(key)

    if "text_config" in config:
        outer = {k: v for k, v in config.items() if k in ("bos_token_id", "eos_token_id", "tie_word_embeddings")}
        config = outer | config["text_config"]
        config.setdefault("model_type", GEMMA)
    return Checkpoint(config, shapes, read, tuple(files))


def read_json(file: Path) -> dict[str, Any]:
    """The contents of a JSON file; raises ValueError with its name if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got something else ({error}); is the download complete?") from error


def open_safetensors(file: Path) -> Any:
    """A handle of a safetensors file; raises ValueError with its name if it is damaged."""
    try:
        return safetensors.safe_open(file, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file}: expected a whole safetensors file, got one that is damaged ({error}); is the download complete?"
        ) from error


def text_name(name: str) -> str:
    """The name of a tensor in the text-only model: multimodal checkpoints wrap it in language_model, in two ways."""
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    return name.replace("model.language_model.", "model.", 1)


def read_params(config: ModelConfig, checkpoint: Checkpoint) -> Any:
    """The parameters of a model, read tensor by tensor.

    Args:
      config: says which tensors there are, and their shapes.
      checkpoint: where they are.

    Returns:
      Nested dicts and lists of arrays, in the checkpoint's dtypes.

    Raises:
      ValueError: tensors that are missing, unexpected, of another shape, not floating point or not finite (named).
    """
    names = tensor_names(config)
    if missing := sorted(set(names.values()) - set(checkpoint.shapes)):
        raise ValueError(f"tensors: expected {listed(missing)}, got a checkpoint without; is it complete?")
    # A tied checkpoint may hold its head a second time.
    known = {*names.values(), "lm_head.weight"}
    extra = sorted(n for n in checkpoint.shapes if n not in known and not any(part in n for part in IGNORED))
    if extra:
        raise ValueError(f"tensors: expected none but the {config.architecture} model's, got {listed(extra)} too")
    params: Any = {"blocks": [{} for _ in range(config.num_layers)]}
    for path, name in names.items():
        *parents, leaf = path.split("/")
        node = params
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[leaf] = read_tensor(checkpoint, name, tensor_shape(config, path))
    return params


def read_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> jax.Array:
    """One tensor on the default device.

    Raises:
      ValueError: it has another shape, is not floating point or is not finite.
    """
    if checkpoint.shapes[name] != shape:
        raise ValueError(f"{name}: expected shape {shape} by the configuration, got {checkpoint.shapes[name]}")
    array = jnp.asarray(checkpoint.read(name))
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name}: expected floating point, got {array.dtype}; load the model before quantization")
    if not jnp.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity; the checkpoint is damaged")
    return array


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names and how many more."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
