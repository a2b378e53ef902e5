"""Paths, selectors and sizes."""

import dataclasses
import fnmatch
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_lab.core import tree

PARAMS = {
    "params": {
        "Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "Block_1": {"Dense_0": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}, "scale": jnp.ones(3)},
    },
    "kernel": jnp.ones(2),
}


def chosen(where, params=PARAMS):
    return list(tree.selected(params, where))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("**/kernel", ["kernel", "params/Block_1/Dense_0/kernel", "params/Dense_0/kernel"]),
        ("*/kernel", None),
        ("*/*/kernel", ["params/Dense_0/kernel"]),
        ("params/**/kernel", ["params/Block_1/Dense_0/kernel", "params/Dense_0/kernel"]),
        ("params/**", [name for name in tree.paths(PARAMS) if name.startswith("params/")]),
        ("**", tree.paths(PARAMS)),
        ("**/Dense_?/b*", ["params/Block_1/Dense_0/bias", "params/Dense_0/bias"]),
        ("**/Dense_[0-9]/bias", ["params/Block_1/Dense_0/bias", "params/Dense_0/bias"]),
        (["**/bias", "**/scale"], ["params/Block_1/Dense_0/bias", "params/Block_1/scale", "params/Dense_0/bias"]),
        (("**/bias", "**/*_0/b[a-i]as"), ["params/Block_1/Dense_0/bias", "params/Dense_0/bias"]),
        (lambda path, leaf: leaf.ndim == 2, ["params/Block_1/Dense_0/kernel", "params/Dense_0/kernel"]),
    ],
)
def test_select(where, expected):
    if expected is None:
        with pytest.raises(ValueError, match="nothing matches"):
            chosen(where)
    else:
        assert chosen(where) == expected


def test_a_pattern_is_not_a_regular_expression():
    assert chosen("a.b", {"a.b": 1.0, "axb": 2.0}) == ["a.b"]


def test_sets_are_those_of_fnmatch():
    params = dict.fromkeys(["D_!", "D_&", "D_-", "D_0", "D_[0", "D_]", "D_^", "D_a"], 0)
    for glob in ("D_[!0-9]", "D_[^0]", "D_[!^]", "D_[]a]", "D_[!]a]", "D_[a-]", "D_[--0]", "D_[&&~|]", "D_[[]0", "D_[0"):
        expected = [name for name in params if fnmatch.fnmatchcase(name, glob)]
        assert expected
        assert chosen(glob, params) == expected


def test_a_set_stays_inside_a_part():
    assert chosen("D[!x]0", {"D": {"0": 1.0}, "D_0": 2.0}) == ["D_0"]
    with pytest.raises(ValueError, match=r"^where='a/D_\[z-a\]\*' has the set \[z-a\], in which the range z-a runs backwards$"):
        tree.select({"a": {"D_b": 1.0}}, "a/D_[z-a]*")


def test_each_of_several_globs_must_match():
    message = r"^nothing matches where='\*\*/kernle'; the nearest of 6 paths: kernel, params/Dense_0/kernel, .*$"
    for where in (["**/bias", "**/kernle"], ("**/kernle", "**/bias")):
        with pytest.raises(ValueError, match=message):
            tree.select(PARAMS, where)


def test_select_takes_its_own_result():
    flags = tree.select(PARAMS, "**/kernel")
    assert tree.select(PARAMS, flags) == flags
    with pytest.raises(ValueError, match="a tree of bool"):
        tree.select(PARAMS, {"other": True})
    with pytest.raises(ValueError, match="a tree of bool"):
        tree.select(PARAMS, jax.tree.map(lambda x: 1, PARAMS))


def test_nothing_matches_names_near_paths():
    with pytest.raises(ValueError, match=r"'\*\*/kernle'.*Dense_0/kernel") as error:
        tree.select(PARAMS, "**/kernle")
    assert "\n" not in str(error.value)


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


class Heads(NamedTuple):
    query: jax.Array
    value: jax.Array


@flax.struct.dataclass
class Struct:
    weight: jax.Array
    name: str = flax.struct.field(pytree_node=False)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ((jnp.ones(2), [jnp.ones(1)]), ["0", "1/0"]),
        (Pair(jnp.ones(2), jnp.ones(1)), ["first", "second"]),
        (Struct(jnp.ones(2), "x"), ["weight"]),
        (jnp.ones(2), [""]),
        (Heads(jnp.ones(2), jnp.ones(1)), ["query", "value"]),
        ({1: jnp.ones(2)}, ["1"]),
    ],
)
def test_paths_of_any_tree(params, expected):
    names, leaves, treedef = tree.flatten(params)
    assert names == expected
    assert jax.tree.structure(jax.tree.unflatten(treedef, leaves)) == jax.tree.structure(params)
    assert jax.tree.structure(tree.map_selected(lambda x: x + 1, params)) == jax.tree.structure(params)


def test_nnx_drops_value():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert tree.paths(state) == ["bias", "kernel"]
    doubled = tree.map_selected(lambda x: 2 * x, state, where="kernel")
    np.testing.assert_array_equal(doubled["kernel"].get_value(), 2 * state["kernel"].get_value())


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Stored:
    """As a compressed leaf looks to the tree: it knows how to materialise itself, and has a latent weight."""

    w: jax.Array
    step: jax.Array
    latent = "w"

    def materialise(self):
        return self.w


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Codes(Stored):
    latent = None


def test_a_path_stops_at_a_compressed_leaf():
    params = {"kernel": Stored(jnp.ones((2, 2)), jnp.ones(()))}
    assert tree.paths(params) == ["kernel"]
    assert tree.size(params) == 5
    changed = tree.map_selected(lambda leaf: tree.replace_latent(leaf, 3 * tree.latent(leaf)), params)
    np.testing.assert_array_equal(changed["kernel"].w, 3 * np.ones((2, 2)))
    np.testing.assert_array_equal(changed["kernel"].step, 1)
    with pytest.raises(TypeError, match="a/kernel is stored as Codes"):
        tree.latent(Codes(jnp.ones(2), jnp.ones(())), "a/kernel")


def test_sizes():
    shapes = jax.eval_shape(lambda: {"a": jnp.ones((2, 3), jnp.int8), "b": jnp.ones(4, jnp.bfloat16)})
    assert tree.size(shapes) == 10
    assert tree.nbytes(shapes) == 6 + 8
    assert tree.nbytes({"key": jax.random.key(0)}) == 8


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path a/b"):
        tree.select({"a/b": 1.0, "a": {"b": 2.0}}, "**")
