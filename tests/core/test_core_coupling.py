"""Labels against a graph's components, shapes that come apart, and what an operation that nobody knows does."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jaxopt_lab.core.coupling.labels import Labels
from jaxopt_lab.core.coupling.primitives import taken
from jaxopt_lab.core.coupling.values import Field, Value, fixed, fresh, kept, reshaped, separated
from jaxopt_lab.core.coupling.walk import walk
from jaxopt_lab.core.shapes import equal_blocks
from jaxopt_lab.core.tracing.programs import trace


def test_what_is_one_is_a_component_of_the_graph():
    rng = np.random.default_rng(0)
    for n, pairs in ((3, 2), (50, 20), (3000, 2500)):
        labels, edges = Labels(), rng.integers(0, n, (2, pairs))
        labels.fresh(n)
        held = rng.integers(0, n, max(n // 20, 1))
        labels.fix(held[:1], "early")
        for part in np.array_split(edges, 4, axis=1):
            labels.unite(part[0], part[1])
        labels.fix(held, "late")
        _, expected = connected_components(coo_array((np.ones(pairs), edges), shape=(n, n)), directed=False)
        roots = labels.root(np.arange(n))
        # The same parts, each named by its least label.
        least = np.array([np.flatnonzero(expected == part)[0] for part in range(expected.max() + 1)])
        np.testing.assert_array_equal(roots, least[expected])
        np.testing.assert_array_equal(labels.is_fixed(np.arange(n)), np.isin(expected, expected[held]))
        assert {labels.reason(label) for label in np.flatnonzero(labels.is_fixed(np.arange(n)))[:5]} <= {"early", "late"}
        assert labels.reason(held[0]) == "early"


def test_what_is_fixed_stays_so_along_a_chain():
    labels = Labels()
    chain = labels.fresh(9)
    labels.fix(chain[-1:], "the end")
    labels.own(chain[4:5])
    labels.unite(chain[:-1], chain[1:])
    assert labels.is_fixed(chain).all()
    assert labels.is_owned(chain).all()


def test_an_axis_that_came_apart_keeps_a_rectangle():
    labels = Labels()
    heads = reshaped(labels, fresh(labels, (5, 12)), (5, 3, 4), equal_blocks((5, 12), (5, 3, 4)))
    outer = separated(labels, heads, [2])
    keep = np.ones(len(labels), bool)
    keep[labels.root(outer.labels(1)[1:2])] = False
    assert [own.tolist() for own in kept(labels, keep, heads)[1:]] == [[0, 2], [0, 1, 2, 3]]
    loose = Value((5, 3, 4), (heads.fields[0], Field((1, 2), labels.fresh(3, 4))))
    torn = np.ones(len(labels), bool)
    torn[loose.fields[1].labels[0, 0]] = False
    with pytest.raises(ValueError, match=r"what is kept of axes \(1, 2\) of a value of shape \(5, 3, 4\) is no rectangle"):
        kept(labels, torn, loose)


def test_of_two_axes_that_are_merged_one_can_be_cut():
    labels = Labels()
    value = fresh(labels, (2, 3))
    labels.own(value.labels(0))
    fixed(labels, value, "an input", [1])
    flat = reshaped(labels, value, (6,), equal_blocks((2, 3), (6,)))
    assert labels.root(flat.labels(0)).tolist() == [0, 0, 0, 1, 1, 1]


def test_parts_of_arrays():
    array = jnp.arange(24).reshape(4, 6)
    for rows, columns in (([0, 1, 2, 3], [1, 2, 3]), ([3], [5, 0]), ([], [0])):
        got = taken(array, [np.array(rows, int), np.array(columns, int)])
        np.testing.assert_array_equal(got, np.asarray(array)[np.ix_(np.array(rows, int), np.array(columns, int))])


def test_what_is_not_understood_is_never_cut():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    program, _ = trace(lambda p, x: jnp.linalg.cholesky(p["a"].T @ p["a"]) @ p["b"] + x.sum(), params, jnp.ones((1, 3)))
    walked = walk(program)
    labels = walked.labels
    assert labels.is_fixed(walked.params["a"].labels(1)).all()
    assert labels.reason(walked.params["b"].labels(0)[0]) == "cholesky is not understood"
