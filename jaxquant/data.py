"""Calibration and evaluation texts as token windows, with a record of where they came from.

A source is a UTF-8 text file, a `.jsonl` file (field "text"), a `.npy` array of token ids, a Hugging Face dataset
("name", "name:config" or "name:config:split"), or None: the reference text of Python's own help system, which every
installation has, so that a first run needs no download. Its wording changes with the Python version, which is recorded.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

SEPARATOR = "\n\n"  # between the documents of a source, as in the usual WikiText-2 protocol
DATASET_CHARACTERS_PER_TOKEN = 16  # about four times the length of a token: how much of a hub dataset is read
_FILE_SUFFIXES = {".txt", ".md", ".rst", ".json", ".jsonl", ".npy", ".npz", ".gz", ".zst", ".parquet", ".csv"}


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """Returns the token ids of `text`, without special tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """Which tokens to calibrate on.

    Attributes:
      source: file, dataset name or None, see the module's text. None uses the calibration part of `default_text` only.
      sequences: windows to draw; 128 of 2048 tokens are the usual setting (GPTQ, https://arxiv.org/abs/2210.17323).
      length: tokens per window, a leading `bos_id` included.
      seed: of the choice of windows.
      bos_id: token put at the start of every window (Gemma models need it), or None for plain text.
    """

    source: str | None = None
    _: dataclasses.KW_ONLY
    sequences: int = 128
    length: int = 2048
    seed: int = 0
    bos_id: int | None = None

    def __post_init__(self):
        for name, least in (("sequences", 1), ("length", 2), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"CalibrationConfig.{name}: expected an integer >= {least}, got {value!r}")


class TokenSet(NamedTuple):
    """Windows of token ids, int32 [n, length], and where they came from (JSON-ready)."""

    tokens: np.ndarray
    provenance: dict[str, Any]


def load_tokens(config: CalibrationConfig, tokenizer: Tokenizer | None, *, vocab_size: int | None = None) -> TokenSet:
    """Draws non-overlapping calibration windows from a source.

    The text is tokenized once and cut from its start into windows (each row on its own for a token array [n, L]). If
    exactly `config.sequences` windows exist they are taken in order; otherwise they are drawn without replacement by
    `config.seed`, so that fewer sequences with the same seed are a subset of more. Of a hub dataset only the first
    documents are read, up to 16 characters per token needed.

    Args:
      config: source and sampling.
      tokenizer: anything with `encode`; None will do for `.npy` sources.
      vocab_size: of the model; ids outside it are an error when it is given.

    Returns:
      int32 [config.sequences, config.length] and its provenance.

    Raises:
      ValueError: the source cannot be read, is too short, or holds ids outside the vocabulary.
    """
    wanted = config.sequences * config.length
    rows, info = _token_rows(config.source, "calibration", tokenizer, wanted, vocab_size)
    cut = _cut(rows, config.length, config.bos_id)
    if len(cut) < config.sequences:
        fits = f"sequences={len(cut)}" if len(cut) else "a smaller length"
        raise ValueError(
            f"calibration source {info['source']}: expected {config.sequences} windows of {config.length} tokens "
            f"({wanted} tokens), got {rows.size} tokens; use {fits}, or a longer source"
        )
    if len(cut) > config.sequences:
        cut = cut[np.random.default_rng(config.seed).permutation(len(cut))[: config.sequences]]
    return _token_set(cut, info, seed=config.seed, bos_id=config.bos_id)


def mixed(data: TokenSet, file: Path, *, seed: int, vocab_size: int) -> TokenSet:
    """Adds the windows of a `.npy` file to others, all in random order: those held out at the end are of both kinds.

    Args:
      data: windows.
      file: integers [n, length], the length of those in `data`; see `save_tokens`.
      seed: of the order.
      vocab_size: of the model.

    Raises:
      ValueError: the file does not hold such windows.
    """
    more, info = _token_rows(str(file), "sampled", None, None, vocab_size)
    if more.shape[1] != data.tokens.shape[1]:
        raise ValueError(f"{file}: expected windows of {data.tokens.shape[1]} tokens, got {more.shape[1]}")
    both = np.concatenate([data.tokens, more]).astype(np.int32)
    both = both[np.random.default_rng(seed).permutation(len(both))]
    return _token_set(both, {"parts": [data.provenance, info]}, seed=seed)


def save_tokens(file: Path, tokens: np.ndarray) -> None:
    """Writes windows [n, length] to a `.npy` file, whole or not at all, in as few bytes per id as do."""
    kind = np.uint16 if tokens.max() < 2**16 else np.uint32
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as stream:
        np.save(stream, tokens.astype(kind))
    part.replace(file)


def evaluation_tokens(
    source: str | None,
    tokenizer: Tokenizer | None,
    *,
    length: int = 2048,
    limit: int | None = None,
    bos_id: int | None = None,
    vocab_size: int | None = None,
) -> TokenSet:
    """Cuts a source from its start into consecutive windows for `jaxquant.evaluate`, dropping the tail.

    Args:
      source: as in `CalibrationConfig`, but None is the evaluation part of `default_text`.
      tokenizer: anything with `encode`; None will do for `.npy` sources.
      length: tokens per window, a leading `bos_id` included; figures of different lengths do not compare.
      limit: largest number of windows, or None for all.
      bos_id: token put at the start of every window, or None for plain text.
      vocab_size: of the model; ids outside it are an error when it is given.

    Returns:
      int32 [n, length] and its provenance.

    Raises:
      ValueError: as `load_tokens`.
    """
    wanted = None if limit is None else limit * length
    rows, info = _token_rows(source, "evaluation", tokenizer, wanted, vocab_size)
    return _token_set(windows(rows, length, limit, bos_id), info, seed=None, bos_id=bos_id)


def windows(token_ids: Any, length: int, limit: int | None = None, bos_id: int | None = None) -> np.ndarray:
    """Cuts token ids into consecutive non-overlapping windows, dropping the tail.

    Args:
      token_ids: integers [tokens], or [rows, tokens] whose rows are cut each on its own.
      length: tokens per window, `bos_id` included, at least 2.
      limit: largest number of windows, or None for all.
      bos_id: token put at the start of every window, or None. Where the text (every row) begins with it already, that
        one is not doubled.

    Returns:
      int32 [n, length].

    Raises:
      ValueError: there is not one full window, or the arguments are out of range.
    """
    if length < 2 or (limit is not None and limit < 1):
        raise ValueError(f"windows: expected length >= 2 and limit >= 1 or None, got {length=} and {limit=}")
    rows = _check_ids(np.asarray(token_ids), "windows", None)
    cut = _cut(rows, length, bos_id)[:limit]
    if not len(cut):
        got = f"{rows.size} in {len(rows)} row(s); use a longer text or a smaller length"
        raise ValueError(f"windows: expected at least {length} tokens for one window, got {got}")
    return cut


def read_text(source: str | Path | None, *, limit: int | None = None) -> str:
    """Returns the text of a source, documents joined by a blank line.

    Args:
      source: text file, `.jsonl` file, dataset name, or None for all of the default text.
      limit: stop reading a hub dataset after this many characters; files are read whole.

    Raises:
      ValueError: there is no such source, or it does not hold text.
    """
    if source is None:
        return SEPARATOR.join(text for _, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()))
    path = Path(source)
    if path.suffix == ".npy":
        raise ValueError(f"text source {path}: expected text, got an array of token ids; pass it to load_tokens")
    if path.is_dir():
        raise ValueError(f"text source {path}: expected a file, got a directory; name one text or .jsonl file in it")
    if not path.exists():
        return SEPARATOR.join(_dataset_texts(str(source), math.inf if limit is None else limit))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text source {path}: expected UTF-8 text, got {error}; convert it first") from error
    return SEPARATOR.join(_json_texts(path, text)) if path.suffix == ".jsonl" else text


def default_text(part: Literal["calibration", "evaluation"]) -> str:
    """Returns one part of the reference text of Python's help system; see `split_text`."""
    calibration, evaluation = split_text(read_text(None))
    return {"calibration": calibration, "evaluation": evaluation}[part]


def split_text(text: str, evaluation: float = 0.25) -> tuple[str, str]:
    """Splits a text at a paragraph into (calibration, evaluation), with no paragraph in both.

    Reference texts repeat themselves (many topics of Python's help are parts of other topics), so paragraphs of the
    second part that also stand in the first, whatever their indentation, are dropped.

    Args:
      text: paragraphs separated by blank lines.
      evaluation: fraction of the characters behind the cut, in (0, 1).
    """
    if not 0 < evaluation < 1:
        raise ValueError(f"split_text.evaluation: expected a fraction between 0 and 1, got {evaluation}")
    paragraphs = re.split(r"\n\s*\n", text)
    ends = np.cumsum([len(p) + len(SEPARATOR) for p in paragraphs])
    cut = int(np.searchsorted(ends, (1 - evaluation) * ends[-1]))
    seen = {" ".join(p.split()) for p in paragraphs[:cut]}
    held_out = [p for p in paragraphs[cut:] if " ".join(p.split()) not in seen]
    return SEPARATOR.join(paragraphs[:cut]), SEPARATOR.join(held_out)


def _token_rows(source, part, tokenizer, wanted, vocab_size) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns ids [rows, tokens] of a source and the first entries of its provenance; `wanted` tokens will do."""
    if source is not None and Path(source).suffix == ".npy":
        rows = _check_ids(_load_array(Path(source)), str(source), vocab_size)
        return rows, {"source": str(source), "source_tokens": rows.size}
    if tokenizer is None:
        raise ValueError(f"source {source}: expected a tokenizer for text, got None; pass one or a .npy of token ids")
    if source is None:
        info = {"source": "pydoc_data.topics", "part": part, "python": platform.python_version()}
        text = default_text(part)
    else:
        info = {"source": str(source)}
        text = read_text(source, limit=None if wanted is None else wanted * DATASET_CHARACTERS_PER_TOKEN)
    ids = np.asarray(tokenizer.encode(text), np.int64)
    return _check_ids(ids, info["source"], vocab_size), info | {"source_tokens": ids.size}


def _token_set(tokens: np.ndarray, info: dict[str, Any], **sampling) -> TokenSet:
    digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
    return TokenSet(tokens, info | {"n": tokens.shape[0], "length": tokens.shape[1], "sha256": digest} | sampling)


def _cut(rows: np.ndarray, length: int, bos_id: int | None) -> np.ndarray:
    """Cuts each of rows [r, tokens] into windows, int32 [n, length]; n may be 0."""
    if bos_id is not None and rows.size and (rows[:, 0] == bos_id).all():
        rows = rows[:, 1:]
    fresh = length - (bos_id is not None)
    per_row = rows.shape[1] // fresh
    cut = rows[:, : per_row * fresh].reshape(len(rows) * per_row, fresh).astype(np.int32)
    return cut if bos_id is None else np.pad(cut, ((0, 0), (1, 0)), constant_values=bos_id)


def _load_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"token source {path}: expected a .npy file, got no such file")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"token source {path}: expected a .npy array of integers, got {error}") from error


def _check_ids(ids: np.ndarray, what: str, vocab_size: int | None) -> np.ndarray:
    """Returns ids as [rows, tokens] after checking their type and range."""
    if (ids.size and ids.dtype.kind not in "iu") or ids.ndim not in (1, 2):
        raise ValueError(f"{what}: expected integer token ids [tokens] or [n, tokens], got {ids.dtype} {ids.shape}")
    top = 2**31 if vocab_size is None else vocab_size
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < top:
        got = f"{ids.min()} to {ids.max()}"
        raise ValueError(f"{what}: expected token ids in [0, {top}), got {got}; use the model's own tokenizer")
    return ids[None] if ids.ndim == 1 else ids


def _json_texts(path: Path, lines: str) -> Iterator[str]:
    # Not str.splitlines: JSON strings may hold U+2028 and other characters which that takes for line ends.
    for number, line in enumerate(lines.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: expected one JSON object per line, got {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'{path} line {number}: expected an object with a string "text", got {line[:80]!r}')
        yield record["text"]


def _dataset_texts(source: str, limit: float) -> Iterator[str]:
    """Yields the "text" of the rows of a Hugging Face dataset until `limit` characters; any trouble is a ValueError."""
    name, config, split, *more = [*source.split(":"), "", ""]
    if len(more) > 2 or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or Path(name).suffix in _FILE_SUFFIXES:
        what = f"text source {source!r}"
        raise ValueError(f"{what}: expected a file or a dataset name:config:split, got no such file; mend the path")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"text source {source!r}: expected a file, or a dataset and the datasets package, got no such file and no "
            "such package; mend the path or pip install 'jaxquant[datasets]'"
        ) from error
    try:
        rows: Iterable = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            yield row["text"]
            limit -= len(row["text"])
            if limit <= 0:
                return
    except Exception as error:  # the hub client raises many types
        raise ValueError(
            f"text source {source!r}: expected a file or a readable dataset with a 'text' column, got no such file and "
            f"{type(error).__name__}: {error}; mend the path or name, or download the text and pass the file"
        ) from error
