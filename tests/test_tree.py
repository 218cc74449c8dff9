import jax
import jax.numpy as jnp
import pytest

from sam2jq.errors import suggest
from sam2jq.tree import flatten, kernels, layer_name, pytree, under, unflatten


def test_unflatten_inverts_flatten():
    tree = {"a.0": {"b": {"kernel": 1, "bias": 2}}, "token.weight": 3}
    assert flatten(tree) == {"a.0/b/kernel": 1, "a.0/b/bias": 2, "token.weight": 3}
    assert unflatten(flatten(tree)) == tree
    assert list(kernels(flatten(tree))) == ["a.0/b/kernel"]
    assert layer_name("a.0/b/kernel") == "a.0.b"


@pytest.mark.parametrize(
    ("prefix", "names"),
    [("t.blocks.1", True), ("t.blocks", True), ("t.blocks.1.attn", True), ("t.blocks.1.attn.weight", True)]
    + [("t.blocks.10", False), ("t.block", False), ("blocks.1", False), ("t.blocks.1.at", False)],
)
def test_a_prefix_matches_whole_names_only(prefix, names):
    assert under("t.blocks.1.attn", prefix) is names


def test_the_closest_name_is_suggested():
    assert suggest("dtpe", ["dtype", "skips"]) == "; did you mean 'dtype'?"
    assert suggest("blocks.1", ["trunk.blocks.1", "trunk.blocks.10"]) == "; did you mean 'trunk.blocks.1'?"
    assert suggest("zzz", ["dtype"]) == ""


def test_static_fields_of_a_pytree_are_no_leaves():
    @pytree(static=["name"])
    class Leaf:
        x: jax.Array
        name: str

    leaf = jax.jit(lambda leaf: jax.tree.map(lambda x: x + 1, leaf))(Leaf(jnp.zeros(2), "kept"))
    assert leaf.name == "kept"
    assert leaf.x.tolist() == [1, 1]


def test_classes_with_equal_fields_have_different_structures():
    """Otherwise jit may run the program of one class for the other."""

    @pytree(static=["name"])
    class Leaf:
        x: jax.Array
        name: str

    @pytree(static=["name"])
    class Other:
        x: jax.Array
        name: str

    assert jax.tree.structure(Leaf(1, "a")) != jax.tree.structure(Other(1, "a"))
    assert jax.tree.structure(Leaf(1, "a")) != jax.tree.structure(Leaf(1, "b"))
    assert jax.tree.structure(Leaf(1, "a")) == jax.tree.structure(Leaf(2, "a"))
