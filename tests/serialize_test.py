import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import PackedArray, UniformTensor
from jaxquant.serialize import CLASSES, decode, encode
from jaxquant.tensors import CodebookTensor, ConcatTensor, OutlierTensor


def words(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).integers(0, 2**32, shape, np.uint32))


UNIFORM = UniformTensor(PackedArray(words(4, 3), 3, 32), jnp.ones((4, 2), jnp.float16), PackedArray(words(2, 1), 3, 4))
SYMMETRIC = UniformTensor(PackedArray(words(4, 2), 2, 32), jnp.ones((4, 1), jnp.bfloat16), None)
CODEBOOK = CodebookTensor(PackedArray(words(2, 4, 2), 4, 16), jnp.ones((4, 32)), None, blocks=(2, 1), vector=(1, 2))
OUTLIERS = OutlierTensor(SYMMETRIC, jnp.ones(3), jnp.arange(3, dtype=jnp.uint16), jnp.asarray([0, 3], jnp.uint32))
CONCAT = ConcatTensor((UNIFORM, jnp.ones((4, 8))), PackedArray(words(8), 6, 40), axis=1)
TREE = {
    "embed": {"weight": jnp.ones((3, 2), jnp.bfloat16)},
    "blocks": [
        {"q": {"weight": UNIFORM, "bias": jnp.zeros(4)}, "k": {"weight": SYMMETRIC}},
        {"q": {"weight": CODEBOOK}, "k": {"weight": OUTLIERS}, "v": {"weight": CONCAT}},
    ],
}


def test_round_trip_through_json():
    arrays, manifest = encode(TREE)
    restored = decode(arrays, json.loads(json.dumps(manifest)))
    assert jax.tree.structure(restored) == jax.tree.structure(TREE)  # classes, static fields, None and lists
    for ours, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(TREE), strict=True):
        assert ours is expected
    assert isinstance(restored["blocks"], list)


def test_names_say_where_an_array_belongs():
    arrays, manifest = encode(TREE)
    assert arrays["embed/weight"] is TREE["embed"]["weight"]
    assert arrays["blocks/0/q/weight.codes.words"] is UNIFORM.codes.words
    assert arrays["blocks/1/k/weight.base.scale"] is SYMMETRIC.scale
    assert arrays["blocks/1/v/weight.parts.0.zero.words"] is UNIFORM.zero.words
    assert manifest["blocks/0/k/weight"]["zero"] is None
    assert manifest["blocks/1/q/weight"]["vector"] == [1, 2]
    assert len(arrays) == len(jax.tree.leaves(TREE))


def test_every_tensor_class_can_be_stored():
    assert {UniformTensor, CodebookTensor, OutlierTensor, ConcatTensor, PackedArray} <= set(CLASSES.values())
    assert all(name == cls.__name__ for name, cls in CLASSES.items())
    assert "QuantizedTensor" not in CLASSES


def test_ten_and_more_blocks_stay_in_order():
    tree = {"blocks": [{"w": jnp.full(1, i)} for i in range(12)]}
    arrays, manifest = encode(tree)
    restored = decode(arrays, dict(sorted(manifest.items())))
    assert [int(block["w"][0]) for block in restored["blocks"]] == list(range(12))


def test_damage_is_named():
    arrays, manifest = encode(TREE)
    unknown = json.loads(json.dumps(manifest).replace("CodebookTensor", "LatticeTensor"))
    with pytest.raises(ValueError, match=r"manifest: expected one of \[.*'UniformTensor'\], got 'LatticeTensor'"):
        decode(arrays, unknown)
    del arrays["blocks/0/q/weight.scale"]
    with pytest.raises(ValueError, match=r"blocks/0/q/weight: expected an array named 'blocks/0/q/weight\.scale'"):
        decode(arrays, manifest)
