import numpy as np
import pytest

from jaxquant import trees

TREE = {"embed": {"weight": 1}, "blocks": [{"q": {"weight": 2}}, {"q": {"weight": 3, "bias": 4}}]}


def test_flatten_names_every_leaf_in_order():
    expected = {
        "embed/weight": 1,
        "blocks/0/q/weight": 2,
        "blocks/1/q/weight": 3,
        "blocks/1/q/bias": 4,
    }
    assert trees.flatten(TREE) == expected
    assert list(trees.flatten(TREE)) == list(expected)
    assert trees.flatten(7) == {"": 7}
    for path, leaf in expected.items():
        assert trees.get(TREE, path) == leaf


def test_replace_copies_only_what_is_on_the_way():
    changed = trees.replace(TREE, "blocks/1/q/weight", 9)
    assert changed["blocks"][1]["q"] == {"weight": 9, "bias": 4}
    assert TREE["blocks"][1]["q"]["weight"] == 3
    assert changed["embed"] is TREE["embed"]
    assert changed["blocks"][0] is TREE["blocks"][0]
    assert isinstance(changed["blocks"], list)
    assert trees.replace(TREE, "", 5) == 5


def test_update_applies_all():
    changed = trees.update(TREE, {"embed/weight": 10, "blocks/0/q": "dense"})
    assert trees.flatten(changed) == {
        "embed/weight": 10,
        "blocks/0/q": "dense",
        "blocks/1/q/weight": 3,
        "blocks/1/q/bias": 4,
    }
    assert trees.update(TREE, {}) is TREE


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("head/weight", r"path 'head/weight': expected 'head' under the root, got \['blocks', 'embed'\]"),
        ("blocks/2/q", "expected '2' under blocks, got list"),
        ("blocks/x", "expected 'x' under blocks, got list"),
        ("blocks/1/k", r"expected 'k' under blocks/1, got \['q'\]"),
        ("embed/weight/deeper", "expected 'deeper' under embed/weight, got int"),
    ],
)
def test_what_is_missing_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        trees.get(TREE, path)
    with pytest.raises(ValueError, match="expected"):
        trees.replace(TREE, path, 0)


def test_indexing_an_array_is_not_descending():
    with pytest.raises(ValueError, match="expected '0' under weight, got ndarray"):
        trees.get({"weight": np.zeros((2, 2))}, "weight/0")
