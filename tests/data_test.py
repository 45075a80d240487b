"""Texts and token arrays to windows: sampling, provenance and every error message."""

import hashlib
import json
import platform
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxquant import data
from jaxquant.data import CalibrationConfig, evaluation_tokens, load_tokens, read_text, split_text, windows


class Bytes:
    """A tokenizer whose tokens are the bytes of the text, 1 more than their values."""

    def encode(self, text):
        return [byte + 1 for byte in text.encode()]


@pytest.fixture
def counting(tmp_path):
    """A .npy source of the ids 0 .. 99, so that every token says where it came from."""
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(100))
    return str(path)


def test_windows_drop_the_tail():
    cut = windows(np.arange(11), 4)
    assert cut.dtype == np.int32
    np.testing.assert_array_equal(cut, [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(windows(list(range(11)), 4, limit=1), [[0, 1, 2, 3]])


def test_windows_begin_with_bos_once():
    expected = [[9, 0, 1, 2], [9, 3, 4, 5]]
    np.testing.assert_array_equal(windows(np.arange(7), 4, bos_id=9), expected)
    np.testing.assert_array_equal(windows(np.r_[9, np.arange(7)], 4, bos_id=9), expected)


def test_windows_cut_each_row_on_its_own():
    np.testing.assert_array_equal(windows(np.arange(10).reshape(2, 5), 2), [[0, 1], [2, 3], [5, 6], [7, 8]])


@given(st.integers(0, 200), st.integers(2, 20), st.none() | st.integers(1, 5), st.booleans())
def test_windows_are_the_text_in_order(tokens, length, limit, bos):
    ids = np.arange(1, tokens + 1)
    fresh = length - bos
    count = tokens // fresh if limit is None else min(tokens // fresh, limit)
    if not count:
        with pytest.raises(ValueError, match="expected at least"):
            windows(ids, length, limit, bos_id=0 if bos else None)
        return
    cut = windows(ids, length, limit, bos_id=0 if bos else None)
    assert cut.shape == (count, length)
    np.testing.assert_array_equal(cut[:, bos:].ravel(), ids[: count * fresh])
    assert not bos or (cut[:, 0] == 0).all()


@given(st.integers(1, 12), st.integers(2, 8), st.integers(0, 2**32), st.integers(0, 100), st.booleans())
def test_sampled_windows_are_disjoint_and_deterministic(tmp_path_factory, sequences, length, seed, spare, bos):
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.arange(1, 1 + sequences * length + spare))
    config = CalibrationConfig(str(path), sequences=sequences, length=length, seed=seed, bos_id=0 if bos else None)
    first, again = load_tokens(config, None), load_tokens(config, None)
    assert first.tokens.shape == (sequences, length)
    assert first.tokens.dtype == np.int32
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.provenance == again.provenance
    text = first.tokens[:, bos:]
    assert len(np.unique(text)) == text.size
    np.testing.assert_array_equal(np.diff(text, axis=1), 1)


def test_fewer_sequences_are_a_subset_of_more(counting):
    few, more = (load_tokens(CalibrationConfig(counting, sequences=n, length=5), None).tokens for n in (4, 9))
    np.testing.assert_array_equal(few, more[:4])
    other = load_tokens(CalibrationConfig(counting, sequences=9, length=5, seed=1), None).tokens
    assert not np.array_equal(other, more)


def test_all_windows_needed_are_taken_in_order(counting):
    tokens = load_tokens(CalibrationConfig(counting, sequences=14, length=7), None).tokens
    np.testing.assert_array_equal(tokens.ravel(), np.arange(98))


def test_provenance_is_json_and_holds_the_hash_of_the_tokens(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words " * 20, encoding="utf-8")
    tokens, provenance = load_tokens(CalibrationConfig(str(path), sequences=3, length=8, seed=5), Bytes())
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    expected = {
        "source": str(path),
        "source_tokens": 220,
        "n": 3,
        "length": 8,
        "seed": 5,
        "bos_id": None,
        "sha256": digest,
    }
    assert json.loads(json.dumps(provenance)) == expected


def test_evaluation_tokens_are_consecutive(counting):
    tokens, provenance = evaluation_tokens(counting, None, length=8, limit=5)
    np.testing.assert_array_equal(tokens.ravel(), np.arange(40))
    assert provenance["n"] == 5
    assert provenance["seed"] is None


def test_default_text_is_split_without_overlap():
    calibration, evaluation = (data.default_text(part) for part in ("calibration", "evaluation"))
    assert min(len(calibration), len(evaluation)) > 50_000
    seen = {" ".join(p.split()) for p in calibration.split("\n\n")}
    assert not seen & {" ".join(p.split()) for p in evaluation.split("\n\n")}
    assert read_text(None).startswith(calibration[:1000])


def test_default_source_calibrates_and_evaluates_on_different_parts():
    tokens, provenance = load_tokens(CalibrationConfig(sequences=10, length=64), Bytes(), vocab_size=257)
    decoded = ["".join(map(chr, row[1:-1] - 1)) for row in tokens]  # the ends may cut a character
    assert all(text in data.default_text("calibration") for text in decoded if text.isascii())
    assert provenance["source"] == "pydoc_data.topics"
    assert provenance["part"] == "calibration"
    assert provenance["python"] == platform.python_version()
    assert evaluation_tokens(None, Bytes(), length=64, limit=2).provenance["part"] == "evaluation"


def test_split_text_drops_repeated_paragraphs():
    assert split_text("one\n\ntwo\n\n  one\n\nfour", evaluation=0.5) == ("one\n\ntwo", "four")


def test_split_text_rejects_a_bad_fraction():
    with pytest.raises(ValueError, match="expected a fraction between 0 and 1"):
        split_text("a\n\nb", evaluation=1)


def test_jsonl_joins_the_texts(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "a\\u2028b"}\n\n{"text": "c", "id": 3}\n', encoding="utf-8")
    assert read_text(path) == "a\u2028b\n\nc"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{oops', "line 2: expected one JSON object per line"),
        ('{"content": "a"}', 'line 1: expected an object with a string "text"'),
        ('{"text": 3}', 'line 1: expected an object with a string "text"'),
        ('["text"]', 'line 1: expected an object with a string "text"'),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    path = tmp_path / "docs.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_text(path)


@pytest.mark.parametrize("text", ["", "short"])
def test_short_text_says_how_many_tokens(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    config = CalibrationConfig(str(path), sequences=4, length=10)
    with pytest.raises(
        ValueError, match=rf"expected 4 windows of 10 tokens \(40 tokens\), got {len(text)} tokens; use"
    ):
        load_tokens(config, Bytes())
    with pytest.raises(ValueError, match="longer text"):
        evaluation_tokens(str(path), Bytes(), length=10)


def test_short_source_says_what_fits(counting):
    with pytest.raises(ValueError, match="use sequences=10"):
        load_tokens(CalibrationConfig(counting, sequences=11, length=10), None)


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match="expected UTF-8 text"):
        read_text(path)


def test_directory(tmp_path):
    with pytest.raises(ValueError, match="expected a file, got a directory"):
        read_text(tmp_path)


def test_text_without_a_tokenizer(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("words", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a tokenizer"):
        load_tokens(CalibrationConfig(str(path)), None)


@pytest.mark.parametrize("source", ["missing.txt", "/no/such/file", "./file", "a:b:c:d", "two words"])
def test_missing_file(source):
    with pytest.raises(ValueError, match="no such file; mend the path"):
        read_text(source)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(10, np.float32), "expected integer token ids"),
        (np.zeros(10, bool), "expected integer token ids"),
        (np.zeros((2, 2, 2), np.int32), "expected integer token ids"),
        (np.array([0, -1]), r"expected token ids in \[0, 50\), got -1 to 0"),
        (np.array([0, 50]), r"expected token ids in \[0, 50\), got 0 to 50"),
        (np.array(["a"], dtype=object), "array of integers"),
    ],
)
def test_bad_arrays(tmp_path, array, message):
    path = tmp_path / "ids.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        load_tokens(CalibrationConfig(str(path), sequences=1, length=2), None, vocab_size=50)


def test_bad_array_files(tmp_path):
    with pytest.raises(ValueError, match="got no such file"):
        load_tokens(CalibrationConfig(str(tmp_path / "ids.npy")), None)
    (tmp_path / "ids.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match="array of integers"):
        load_tokens(CalibrationConfig(str(tmp_path / "ids.npy")), None)
    with pytest.raises(ValueError, match="pass it to load_tokens"):
        read_text(tmp_path / "ids.npy")


def test_ids_of_the_text_outside_the_vocabulary(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("words " * 9, encoding="utf-8")
    with pytest.raises(ValueError, match="use the model's own tokenizer"):
        load_tokens(CalibrationConfig(str(path), sequences=1, length=2), Bytes(), vocab_size=100)


@pytest.mark.parametrize(
    "bad", [{"sequences": 0}, {"length": 1}, {"seed": -1}, {"sequences": 1.5}], ids=lambda bad: next(iter(bad))
)
def test_bad_config(bad):
    with pytest.raises(ValueError, match=f"CalibrationConfig.{next(iter(bad))}: expected an integer"):
        CalibrationConfig(**bad)


@pytest.mark.parametrize(("length", "limit"), [(1, None), (4, 0)])
def test_bad_window_arguments(length, limit):
    with pytest.raises(ValueError, match="expected length >= 2 and limit >= 1"):
        windows(np.arange(9), length, limit)


def fake_datasets(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_dataset_names(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return [{"text": "a"}, {"text": "b"}]

    fake_datasets(monkeypatch, load_dataset)
    assert read_text("owner/name:config:test") == "a\n\nb"
    assert read_text("name") == "a\n\nb"
    assert asked == [("owner/name", "config", "test", True), ("name", None, "train", True)]


def test_only_as_much_of_a_dataset_is_read_as_needed(monkeypatch):
    def rows(*_, **__):
        while True:
            yield {"text": "word " * 10}

    fake_datasets(monkeypatch, rows)
    assert load_tokens(CalibrationConfig("owner/endless", sequences=4, length=16), Bytes()).tokens.shape == (4, 16)


def test_dataset_trouble(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    fake_datasets(monkeypatch, load_dataset)
    with pytest.raises(ValueError, match="got no such file and ConnectionError: no network"):
        read_text("owner/name")
    fake_datasets(monkeypatch, lambda *_, **__: [{"content": "a"}])
    with pytest.raises(ValueError, match="readable dataset with a 'text' column"):
        read_text("owner/name")


def test_datasets_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxquant\[datasets\]'"):
        read_text("owner/name")
