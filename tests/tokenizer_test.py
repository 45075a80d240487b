"""Tokenizers built from GGUF files give the ids of the algorithms they name, and survive being saved."""

import itertools
import json

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.tokenizer import Tokenizer, derived_merges, from_gguf, load_tokenizer

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
TEXTS = [
    "the cat, the  hat 1234 it's",
    " \n\n\n 12 théâtre\t½ <|end|> 漢字",
    "",
    "   a b",
    "<b>bold</b> \U0001f600 \x00 they'LL",
]


def byte_alphabet():
    """The 256 characters in which byte-level vocabularies spell bytes, in order of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def write_tokenizer(path, kind, tokens, types, arch="llama", **fields):
    writer = gguf.GGUFWriter(path, arch)
    # transformers wants the keys of a model beside those of a tokenizer
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_key_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_file(path, pre, **fields):
    merges = ["t h", "th e", "Ġ the", "Ġ a", "1 2", "12 3", "123 4", "Ċ Ċ", "ĊĊ Ċ", "Ġ Ġ", "Ċ Ġ", "' s"]
    tokens = ["<|end|>", "<think>", *byte_alphabet(), *(m.replace(" ", "") for m in merges)]
    types = [CONTROL, USER_DEFINED] + [NORMAL] * (len(tokens) - 2)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    fields = special | {"tokenizer_pre": pre, "token_merges": merges} | fields
    return write_tokenizer(path, "gpt2", tokens, types, **fields)


def sentencepiece_vocabulary(space="▁"):
    pieces = ["the", "th", "he", "▁the", "▁t", "▁th", "at", "hat", "▁hat", "a", "t", "h", "e", "c", "▁", "▁c", "cat"]
    pieces += ["▁▁", "▁▁▁", "b", "o", "l", "d", "ol", "old", "▁a", "it", "i", "s", "\n\n"]
    pieces = [piece.replace("▁", space) if set(piece) == {"▁"} and len(piece) > 1 else piece for piece in pieces]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "<b>", *pieces]
    types = [CONTROL] * 3 + [2] + [BYTE] * 256 + [USER_DEFINED] + [NORMAL] * len(pieces)
    scores = [0.0] * 260 + [-1000.0] + [-float(i) for i in range(len(pieces))]
    return tokens, types, scores


def sentencepiece_file(path, arch="llama", **fields):
    tokens, types, scores = sentencepiece_vocabulary(" " if arch == "gemma3" else "▁")
    special = {"bos_token_id": 2, "eos_token_id": 1, "unk_token_id": 3, "pad_token_id": 0, "token_scores": scores}
    return write_tokenizer(path, "llama", tokens, types, arch, **(special | fields))


FILES = {
    "gpt-2": lambda path: byte_level_file(path, "gpt-2"),
    "smollm": lambda path: byte_level_file(path, "smollm", add_bos_token=False),
    "llama-bpe": lambda path: byte_level_file(path, "llama-bpe", add_bos_token=True),
    "qwen2": lambda path: byte_level_file(path, "qwen2"),
    "llama": sentencepiece_file,
    "gemma3": lambda path: sentencepiece_file(path, "gemma3", add_space_prefix=False),
}


@pytest.fixture(scope="module", params=FILES)
def file(request, tmp_path_factory):
    return FILES[request.param](tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf")


@pytest.fixture(scope="module")
def tokenizer(file):
    return load_tokenizer(file)


def test_ids_equal_transformers_conversion(file, tokenizer):
    pytest.importorskip("torch", reason="transformers reads GGUF through torch")
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    reference = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"], text


def test_decode_inverts_encode(file, tokenizer):
    # Llama 2's rule puts a space in front of a text that has none, so a space that was there cannot be told from it.
    texts = [text.lstrip(" ") if file.stem == "llama" else text for text in TEXTS]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_stay_whole(tokenizer):
    special = tokenizer.config["bos_token"]
    assert tokenizer.encode(f"a{special}b").count(tokenizer.bos_id) == 1
    assert tokenizer.encode("a", add_bos=True) == [tokenizer.bos_id, *tokenizer.encode("a")]
    assert tokenizer.vocab_size == max(tokenizer.backend.get_vocab().values()) + 1


def test_save_and_load_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.bos_id, again.eos_id, again.config) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.config)
    assert [again.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    transformers = pytest.importorskip("transformers", reason="transformers loads what was saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs(t, add_special_tokens=False)["input_ids"] for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize(("name", "adds"), [("llama", True), ("smollm", False), ("llama-bpe", True), ("qwen2", False)])
def test_saved_tokenizer_adds_bos_as_the_file_says(name, adds, tmp_path):
    tokenizer = load_tokenizer(FILES[name](tmp_path / "t.gguf"))
    ids = tokenizer.backend.encode("the cat").ids
    assert ids == tokenizer.encode("the cat", add_bos=adds)


@pytest.mark.parametrize(("pre", "pieces"), [("gpt-2", 1), ("llama-bpe", 2), ("qwen2", 4)])
def test_digits_are_cut_as_the_pre_tokenizer_says(pre, pieces, tmp_path):
    tokenizer = from_gguf(byte_level_file(tmp_path / "t.gguf", pre))
    assert len(tokenizer.encode("1234")) == pieces


def merge_by_score(text, scores):
    """SentencePiece BPE, from its definition: join the neighbours whose union scores best, the leftmost first."""
    pieces = list(text)
    while True:
        unions = [(scores.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(itertools.pairwise(pieces))]
        best, place = max(unions, default=(-np.inf, 0))
        if best == -np.inf:
            return pieces
        pieces[-place : 2 - place] = ["".join(pieces[-place : 2 - place])]


@settings(max_examples=60, deadline=None)
@given(st.text("▁thecaold", min_size=1, max_size=12))
def test_derived_merges_are_sentencepiece(text):
    import tokenizers

    tokens, _, scores = sentencepiece_vocabulary()
    known = dict(zip(tokens, scores, strict=True))
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.models.BPE(vocab=vocab, merges=derived_merges(tokens, scores))
    assert tokenizers.Tokenizer(bpe).encode(text).tokens == merge_by_score(text, known)


def test_space_prefix_as_the_file_says(tmp_path):
    with_space = load_tokenizer(sentencepiece_file(tmp_path / "a.gguf"))
    without = load_tokenizer(sentencepiece_file(tmp_path / "b.gguf", add_space_prefix=False))
    assert with_space.backend.encode("the", add_special_tokens=False).tokens == ["▁the"]
    assert without.backend.encode("the", add_special_tokens=False).tokens == ["the"]
    assert with_space.decode(with_space.encode("the")) == without.decode(without.encode("the")) == "the"


def test_chat_template_is_kept(tmp_path):
    template = "{{ messages[0].content }}"
    tokenizer = load_tokenizer(byte_level_file(tmp_path / "t.gguf", "smollm", chat_template=template))
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").config["chat_template"] == template
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    del saved["chat_template"]
    (tmp_path / "saved/tokenizer_config.json").write_text(json.dumps(saved))
    (tmp_path / "saved/chat_template.jinja").write_text(template + "!")
    assert load_tokenizer(tmp_path / "saved").config["chat_template"] == template + "!"


def test_directory_with_tokens_spelled_as_dicts(tmp_path):
    load_tokenizer(byte_level_file(tmp_path / "t.gguf", "smollm")).save(tmp_path)
    config = {"bos_token": None, "eos_token": {"content": "<|end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0)
    with pytest.raises(ValueError, match="add_bos: expected a tokenizer with a beginning-of-sequence token"):
        tokenizer.encode("a", add_bos=True)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre: expected one of .* got 'klingon'; load the tokenizer"):
        load_tokenizer(byte_level_file(tmp_path / "a.gguf", "klingon"))
    tokens, types, _ = sentencepiece_vocabulary()
    with pytest.raises(ValueError, match="expected 'gpt2' or 'llama' with tokens, got 't5'"):
        load_tokenizer(write_tokenizer(tmp_path / "b.gguf", "t5", tokens, types))
    with pytest.raises(ValueError, match="scores: expected one score for each token"):
        load_tokenizer(write_tokenizer(tmp_path / "c.gguf", "llama", tokens, types))
    with pytest.raises(ValueError, match="source: expected a Hugging Face directory"):
        load_tokenizer(tmp_path / "nothing")


def test_directory_without_a_tokenizer(tmp_path):
    pytest.importorskip("transformers", reason="transformers reads other formats")
    with pytest.raises(ValueError, match=r"expected tokenizer.json or files that transformers reads"):
        load_tokenizer(tmp_path)
