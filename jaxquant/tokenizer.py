"""Text to token ids and back, without torch: from a Hugging Face directory, a GGUF file or a hub id.

A GGUF file holds a vocabulary, not a tokenizer: the rules that cut text before the vocabulary applies are known by name
only. They are written out here, so that the ids equal those of transformers' own conversion of the same file.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxquant.models.gguf import metadata, open_gguf
from jaxquant.models.load import resolve

# Token types in GGUF: gguf-py/gguf/constants.py of llama.cpp.
CONTROL, USER_DEFINED = 3, 4

# Patterns that cut text into words, by tokenizer.ggml.pre: the `Split` of each model's own tokenizer.json.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# None is GPT-2's pattern, built into the tokenizers library. SmolLM's own tokenizer.json cuts out single digits first,
# as does llama.cpp; transformers' conversion of the GGUF file does not, and ids must equal the latter's. No merge has
# two digits, so this matters only next to a digit: 8 of 304,986 tokens of WikiText-2's test set.
SPLITS = {"gpt-2": None, "default": None, "smollm": None, "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3}
SPLITS |= {"qwen2": QWEN2, "deepseek-r1-qwen": QWEN2}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: of the tokenizers library.
      bos_id: beginning-of-sequence token, or None.
      eos_id: end-of-sequence token, or None.
      config: what tokenizer_config.json holds, chat template included.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int | None
    config: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of a text; no special token is added but, on demand, the first.

        Raises:
          ValueError: add_bos without a beginning-of-sequence token.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if not add_bos:
            return ids
        if self.bos_id is None:
            raise ValueError("add_bos: expected a tokenizer with a beginning-of-sequence token, got one without")
        return [self.bos_id, *ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens written out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        special = {k: v for k, v in self.config.items() if k.endswith("_token") and isinstance(v, str | dict)}
        for name, content in (("tokenizer_config", self.config), ("special_tokens_map", special)):
            (directory / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
      source: a Hugging Face directory (tokenizer.json; other formats need transformers), a .gguf file or a hub id.

    Returns:
      A `Tokenizer`.

    Raises:
      ValueError: nothing at `source`, no tokenizer in it, or one of a kind that is not known.
    """
    path = resolve(source)
    return from_gguf(path) if path.suffix == ".gguf" else from_directory(path)


def from_directory(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
      ValueError: no tokenizer in it that can be read.
    """
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    if (template := path / "chat_template.jinja").is_file():
        config.setdefault("chat_template", template.read_text())
    if (path / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    else:
        backend = from_slow_files(path)
    return Tokenizer(backend, special_id(backend, config, "bos"), special_id(backend, config, "eos"), config)


def from_slow_files(path: Path) -> tokenizers.Tokenizer:
    """Conversion of vocabulary files by transformers.

    Raises:
      ValueError: transformers cannot do it.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path).backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"{path}: expected tokenizer.json or files that transformers reads, got: {error}") from error


def special_id(backend: tokenizers.Tokenizer, config: dict[str, Any], name: str) -> int | None:
    """Id of the "bos" or "eos" token that tokenizer_config.json names, as text or as a dict with its content."""
    token = config.get(f"{name}_token")
    token = token["content"] if isinstance(token, dict) else token
    return None if token is None else backend.token_to_id(token)


def from_gguf(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
      ValueError: no tokenizer in it, or one of a kind that is not known.
    """
    fields = metadata(open_gguf(path))
    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or tokens is None:
        raise ValueError(f"{path}: tokenizer.ggml.model: expected 'gpt2' or 'llama' with tokens, got {kind!r}")
    types = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if kind == "gpt2":
        backend = byte_level(tokens, fields)
    elif str(fields.get("general.architecture")).startswith("gemma"):
        backend = gemma(tokens, fields)
    else:
        backend = sentencepiece(tokens, fields)
    backend.add_special_tokens(added(tokens, types, CONTROL, special=True))
    vocab = backend.get_vocab()  # Gemma's runs of spaces are spelled otherwise there and must not be added twice
    backend.add_tokens([t for t in added(tokens, types, USER_DEFINED, special=False) if t.content in vocab])
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    config = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in config.values()])
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    add_bos = fields.get("tokenizer.ggml.add_bos_token", kind == "llama")
    if add_bos and ids["bos"] is not None:
        bos = config["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids["bos"])]
        )
    return Tokenizer(backend, ids["bos"], ids["eos"], config)


SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def added(tokens: Sequence[str], types: Sequence[int], kind: int, special: bool) -> list[AddedToken]:
    """Tokens of one type, which are matched whole before anything else."""
    return [
        AddedToken(token, normalized=False, special=special)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type == kind
    ]


def byte_level(tokens: Sequence[str], fields: dict[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM).

    Raises:
      ValueError: a pre-tokenizer that is not known, or no merges.
    """
    pre, merges = fields.get("tokenizer.ggml.pre", "default"), fields.get("tokenizer.ggml.merges")
    if pre not in SPLITS or merges is None:
        raise ValueError(
            f"tokenizer.ggml.pre: expected one of {sorted(SPLITS)} and merges, got {pre!r}; "
            "load the tokenizer from the model's Hugging Face directory"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))  # pyright: ignore[reportArgumentType]
    split = SPLITS[pre]
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        cut = pre_tokenizers.Split(Regex(split), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece(tokens: Sequence[str], fields: dict[str, Any]) -> tokenizers.Tokenizer:
    """SentencePiece BPE of Llama 2 and Mistral: the text gets a space in front, merges go by score.

    Raises:
      ValueError: a vocabulary without scores.
    """
    if "tokenizer.ggml.scores" not in fields:
        raise ValueError("tokenizer.ggml.scores: expected one score for each token, got a file without scores")
    merges = derived_merges(tokens, fields["tokenizer.ggml.scores"])
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    space = fields.get("tokenizer.ggml.add_space_prefix", True)
    scheme = "first" if space else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space else steps)
    return backend


def gemma(tokens: Sequence[str], fields: dict[str, Any]) -> tokenizers.Tokenizer:
    """SentencePiece BPE of Gemma: no space in front; merges go by the order of the vocabulary.

    The file spells runs of spaces with spaces, and its scores are not those of the merges.
    """
    tokens = ["▁" * len(t) if " " in t and not t.strip() else t for t in tokens]
    merges = derived_merges(tokens, range(0, -len(tokens), -1))
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 3)]
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, unk_token=unknown, byte_fallback=True)
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def derived_merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """BPE merges that a SentencePiece vocabulary implies.

    SentencePiece joins the neighbours whose union scores best, whatever the two are; so every way to cut a token into
    two tokens is a merge, ranked by the token's score, long left parts first (as transformers' generate_merges does).
    """
    known = set(tokens)
    cuts = [
        (-score, -cut, cut - len(token), token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    return [(left, right) for *_, left, right in sorted(cuts, key=lambda c: c[:3])]
