"""Packed and dense files: what is in them, how large they are, who can read them."""

import json
import struct
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import PackedArray, UniformTensor, dense_tree, export, trees
from jaxquant.export import MODEL_FILE, is_packed, load_packed, save_dense, save_packed
from jaxquant.models.load import load_model
from tests import tiny

RECORD = {"reports": [], "note": "é"}


def random_tensor(out, columns, bits=3, groups=1, seed=0):
    rng = np.random.default_rng(seed)

    def packed(rows, length):
        words = rng.integers(0, 2**32, (rows, -(-length * bits // 32)), np.uint32)
        return PackedArray(jnp.asarray(words), bits, length)

    scale = jnp.asarray(rng.uniform(0.01, 0.1, (out, groups)), jnp.float16)
    return UniformTensor(packed(out, columns), scale, packed(groups, out))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(source):
    return load_model(source)


@pytest.fixture(scope="module")
def params(loaded):
    values = {
        f"blocks/{i}/{name}/weight": random_tensor(*trees.get(loaded.params["blocks"][i], name)["weight"].shape, seed=i)
        for i in range(2)
        for group in loaded.model.groups
        for name in group
    }
    return trees.update(loaded.params, values)


def assert_same_bits(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_packed_round_trip(tmp_path, loaded, params):
    save_packed(tmp_path / "new" / "out", params, loaded.config_dict, RECORD)
    assert is_packed(tmp_path / "new" / "out")
    saved = load_packed(tmp_path / "new" / "out")
    assert_same_bits(saved.params, params)
    assert saved.model is loaded.model
    assert (saved.config_dict, saved.record) == (loaded.config_dict, RECORD)
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == ["config.json", MODEL_FILE]


def test_24_bytes_on_disk_are_the_accounted_bits(tmp_path):
    """Of a block of realistic width the whole file, header included, is within 1 %."""
    shapes = {"q": (512, 512), "k": (128, 512), "up": (1536, 512), "down": (512, 1536)}
    block = {n: {"weight": random_tensor(*s, groups=s[1] // 128)} for n, s in shapes.items()}
    save_packed(tmp_path, {"blocks": [block]}, tiny.CONFIG, RECORD)
    bits = sum(layer["weight"].storage_bits() for layer in block.values())
    size = (tmp_path / MODEL_FILE).stat().st_size
    assert bits / 8 <= size <= 1.01 * bits / 8


def test_dense_files_hold_the_dequantized_weights(tmp_path, loaded, params):
    save_dense(tmp_path, params, loaded.config_dict)
    assert not is_packed(tmp_path)
    dense = load_model(tmp_path)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dense_tree(params))
    assert_same_bits(dense.params, expected)
    assert dense.model.config == loaded.model.config
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_dense_files_load_in_transformers(tmp_path, loaded, params):
    torch = pytest.importorskip("torch", reason="torch runs the transformers model")
    transformers = pytest.importorskip("transformers", reason="transformers reads the dense files")
    save_dense(tmp_path, params, loaded.config_dict)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        expected = model(torch.tensor(tokens)).logits.numpy()
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), load_model(tmp_path).params)
    ours = jax.jit(loaded.model.forward)(weights, jnp.asarray(tokens))
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def test_full_disks_are_seen_beforehand(tmp_path, loaded, params, monkeypatch):
    usage = export.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(ValueError, match=r"expected 1 MB of free disk space, got 0 MB"):
        save_packed(tmp_path, params, loaded.config_dict, RECORD)
    assert not is_packed(tmp_path)


def test_a_failed_save_keeps_the_old_file(tmp_path, loaded, params, monkeypatch):
    save_packed(tmp_path, params, loaded.config_dict, RECORD)
    before = (tmp_path / MODEL_FILE).read_bytes()

    def fail(arrays, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_packed(tmp_path, loaded.params, loaded.config_dict, {"note": 2})
    assert (tmp_path / MODEL_FILE).read_bytes() == before
    assert load_packed(tmp_path).record == RECORD


def rewrite_header(file, change):
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    ours = json.loads(header["__metadata__"]["jaxquant"])
    change(ours)
    header["__metadata__"]["jaxquant"] = json.dumps(ours)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-100]), "expected a whole safetensors file, got one that is damaged"),
        (lambda f: f.write_bytes(b""), "expected a safetensors file, got 0 bytes"),
        (lambda f: f.write_bytes(b"\x10" + 7 * b"\0" + b"no json at all!!"), "expected a safetensors file"),
        (lambda f: f.write_bytes(b"\xff" * 64), "expected a safetensors file, got something else"),
        (lambda f: rewrite_header(f, lambda h: h.update(format=99)), "expected format 1 or older, got 99; update"),
        (
            lambda f: rewrite_header(f, lambda h: h["tensors"]["embed/weight"].update(array="gone")),
            "embed/weight: expected an array named 'gone', which is missing",
        ),
    ],
    ids=["cut", "empty", "no-json", "huge-header", "newer", "array-missing"],
)
def test_damage_is_named(tmp_path, loaded, params, damage, message):
    save_packed(tmp_path, params, loaded.config_dict, RECORD)
    damage(tmp_path / MODEL_FILE)
    with pytest.raises(ValueError, match=message):
        load_packed(tmp_path)


def test_other_files_are_not_packed(tmp_path, source):
    assert not is_packed(source)
    assert not is_packed(tmp_path)
    with pytest.raises(ValueError, match="expected a packed jaxquant model, got another safetensors file"):
        load_packed(source)
