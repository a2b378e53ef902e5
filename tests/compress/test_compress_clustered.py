"""Shared values: k-means against scikit-learn and an exact optimum, and a leaf whose codebook trains."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import compress
from jaxopt_lab.compress.arrays import kmeans, packing
from jaxopt_lab.compress.leaves import strips
from jaxopt_lab.compress.leaves.clustered import Clustered, cluster
from jaxopt_lab.core import tree

_k_means = jax.jit(kmeans.k_means, static_argnames=("k", "start", "preserve_zero"))


_pack, _unpack = jax.jit(packing.pack, static_argnums=(1, 2)), jax.jit(packing.unpack)
_dense = jax.jit(lambda leaf: leaf.materialise())


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def _leaf(*shape: int, k: int = 16, axis: int = -2, zero: bool = False, dtype=jnp.float32) -> Clustered:
    """Random indices of `k` values, of which one is 0 where `zero`."""
    indices = jax.device_put(np.random.default_rng(3).integers(0, k, shape).astype(np.uint8))
    bits = (k - 1).bit_length()
    packed = indices if bits == 8 else _pack(indices, bits, axis)
    return Clustered(_normal(*(1,) * len(shape), k - zero, seed=4), packed, zero, dtype)


@pytest.mark.parametrize(("k", "weighted"), [(16, False), (5, True)])
def test_k_means_equals_that_of_scikit_learn_from_the_same_start(k, weighted):
    # Imported here, for its two seconds: every worker imports this file.
    from sklearn.cluster import KMeans

    # No cluster of the linear start is empty on these: one that is, scikit-learn moves to the farthest weight, and ours to the
    # widest cluster.
    w, mass = jnp.tanh(_normal(40, 40)), jax.random.uniform(jax.random.key(1), (40, 40)) if weighted else None
    ours = _k_means(w, k, mass, iterations=200)
    start = np.linspace(w.min(), w.max(), k)[:, None]
    points, counts = np.asarray(w, np.float64).reshape(-1, 1), None if mass is None else np.ravel(mass)
    theirs = KMeans(k, init=start, n_init=1, tol=0, max_iter=200).fit(points, sample_weight=counts)
    np.testing.assert_allclose(ours.inertia, theirs.inertia_, rtol=1e-4)
    np.testing.assert_allclose(ours.centroids, np.sort(theirs.cluster_centers_[:, 0]), atol=1e-4)
    np.testing.assert_array_equal(ours.labels, kmeans.assign(w, ours.centroids))


def test_weights_go_to_the_nearest_of_few_and_of_many_centroids():
    for k in (1, 2, 16, 60):
        w, centroids = np.asarray(_normal(7, 5)), np.sort(np.asarray(_normal(k, seed=1)))
        want = np.argmin(np.abs(w[..., None] - centroids), axis=-1)
        np.testing.assert_array_equal(kmeans.assign(jnp.asarray(w), jnp.asarray(centroids)), want)


def _optimum(w: np.ndarray, k: int) -> float:
    """The smallest inertia there is: in one dimension clusters are intervals of the sorted weights."""
    w = np.sort(w.astype(np.float64))
    cost = [[np.var(w[a:b]) * (b - a) if b > a else 0.0 for b in range(len(w) + 1)] for a in range(len(w) + 1)]
    best = [[np.inf] * (len(w) + 1) for _ in range(k + 1)]
    best[0][0] = 0.0
    for clusters, b in itertools.product(range(1, k + 1), range(len(w) + 1)):
        best[clusters][b] = min(best[clusters - 1][a] + cost[a][b] for a in range(b + 1))
    return best[k][len(w)]


def test_k_means_never_beats_the_optimum_and_reaches_it_from_one_of_many_starts():
    w = _normal(14)
    run = jax.jit(jax.vmap(lambda key: kmeans.k_means(w, 4, start=kmeans.plus_plus(key)).inertia))
    found = run(jax.random.split(jax.random.key(0), 12))
    best = _optimum(np.asarray(w), 4)
    np.testing.assert_allclose(found.min(), best, rtol=1e-5)
    assert float(found.max()) > best * 1.01


def test_starts_are_those_worked_by_hand():
    w, mass = jnp.array([[0.0, 8.0], [2.0, 100.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
    np.testing.assert_allclose(kmeans.linear(w, mass, 5), [0, 2, 4, 6, 8])
    density = jax.jit(kmeans.density, static_argnums=2)
    many = _normal(40, 30)
    quantiles = np.quantile(np.asarray(many), (np.arange(8) + 0.5) / 8, method="inverted_cdf")
    np.testing.assert_allclose(density(many, jnp.ones(()), 8), quantiles, atol=1e-5)
    # A mass of 3 is three weights.
    np.testing.assert_allclose(density(jnp.arange(4.0), jnp.array([3.0, 1.0, 0.0, 0.0]), 4), [0, 0, 0, 1], atol=1e-5)
    # All three that have a mass are drawn. From 0, which the mass draws first, 8 is sixteen times as likely as 2.
    draw = jax.jit(jax.vmap(lambda key, mass, k: kmeans.plus_plus(key)(w, mass, k), in_axes=(0, None, None)), static_argnums=2)
    keys = jax.random.split(jax.random.key(0), 500)
    np.testing.assert_array_equal(draw(keys, mass, 3), np.tile([0.0, 2.0, 8.0], (500, 1)))
    second = draw(keys, mass.at[0, 0].set(1e9), 2)[:, 1]
    assert abs(float(np.mean(second == 8)) - 16 / 17) < 0.04
    assert not np.any(draw(keys[:2], jnp.zeros((2, 2)), 3))


def test_an_outlier_leaves_no_centroid_without_weights():
    # A linear start puts all but two of sixteen centroids where no weight is.
    w = _normal(40, 40).at[3, 3].set(300.0)
    clusters = _k_means(w, 16)
    assert set(np.unique(clusters.labels)) == set(range(16))
    assert float(clusters.inertia) < 1.3 * float(_k_means(w.at[3, 3].set(0.0), 16).inertia)
    # Fewer values than centroids: all are found, and nothing is NaN.
    for few in (jnp.array([2.0, 2.0, -1.0, 5.0]), jnp.full(4, -7.0)):
        clusters = _k_means(few, 8)
        np.testing.assert_array_equal(clusters.centroids[clusters.labels], few)
        assert bool(jnp.isfinite(clusters.centroids).all())


def test_means_of_a_million_weights_keep_their_digits():
    w = np.random.default_rng(0).normal(1000.0, 1e-3, (2, 2**19)).astype(np.float32)
    w[1] += 50
    clusters = _k_means(jnp.asarray(w), 2, iterations=3)
    np.testing.assert_allclose(clusters.centroids, w.mean(axis=1, dtype=np.float64), rtol=1e-7)


def test_zero_keeps_its_centroid():
    w = jnp.where(_normal(40, 40) > 0.5, _normal(40, 40, seed=1), 0.0)
    clusters = _k_means(w, 5, preserve_zero=True)
    assert int(jnp.sum(clusters.centroids == 0)) == 1
    assert set(np.unique(clusters.labels[w == 0])) == {int(jnp.argmax(clusters.centroids == 0))}
    free = _k_means(w, 16)
    assert not bool((free.centroids == 0).any())
    # Nothing but zeros, and no zeros at all.
    assert not _k_means(jnp.zeros((40, 40)), 5, preserve_zero=True).centroids.any()
    assert float(_k_means(jnp.tile(jnp.array([1.0, 2.0]), (40, 20)), 5, preserve_zero=True).inertia) == 0.0


def test_sharded_weights_are_never_gathered():
    w, mesh = _normal(16, 24), Mesh(np.array(jax.devices()), ("d",))
    run = jax.jit(lambda w: kmeans.k_means(w, 4, start=kmeans.density))
    for spec in (PartitionSpec("d"), PartitionSpec(None, "d")):
        placed = jax.device_put(w, NamedSharding(mesh, spec))
        compiled = run.lower(placed).compile()
        np.testing.assert_allclose(compiled(placed).centroids, run(w).centroids, rtol=1e-5)
        assert "all-gather" not in compiled.as_text()
        assert "all-to-all" not in compiled.as_text()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"k=0: at least 1 centroids are needed", lambda: kmeans.k_means(jnp.ones(3), 0)),
        (r"k=1: at least 2 centroids are needed, one of which is 0", lambda: kmeans.k_means(jnp.ones(3), 1, preserve_zero=True)),
        (r"weights of shape \(0, 3\) are none", lambda: kmeans.k_means(jnp.ones((0, 3)), 2)),
    ],
)
def test_k_means_names_what_it_cannot_do(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_clustered_weight_is_the_one_worked_by_hand():
    w = jnp.array([[1.0, 2.0, 0.0], [9.0, 0.0, 8.0]])
    # The 1 counts three times as much as the 2: their mean is 5 / 4. The importance of zeros changes nothing.
    importance = jnp.array([[3.0, 1.0, 7.0], [1.0, 0.0, 1.0]])
    leaf = cluster({"kernel": w}, k=3, preserve_zero=True, importance={"kernel": importance})["kernel"]
    np.testing.assert_array_equal(leaf.codebook, [[[1.25, 8.5]]])
    np.testing.assert_array_equal(_unpack(leaf.indices), [[1, 1, 0], [2, 0, 2]])
    np.testing.assert_array_equal(_dense(leaf), [[1.25, 1.25, 0.0], [8.5, 0.0, 8.5]])
    assert leaf.format() == "2 shared values and 0, 2 bits"


@pytest.mark.parametrize(("k", "shape"), [(33, (3, 3, 1, 8)), (256, (40,))])
def test_any_codebook_and_shape_is_stored_in_as_many_bits(k, shape):
    w = _normal(*shape).astype(jnp.bfloat16)
    leaf = cluster({"kernel": w}, k=k, iterations=2)["kernel"]
    assert _dense(leaf).shape == shape
    assert leaf.dtype == jnp.bfloat16
    bits = (k - 1).bit_length()
    assert tree.nbytes(leaf.indices) <= w.size * bits / 8 + 5
    # The last step of k-means places weights after it has moved the values, so each is with its nearest.
    nearest = jnp.min(jnp.abs(w[..., None] - leaf.codebook.reshape((1,) * w.ndim + (-1,))), axis=-1)
    np.testing.assert_allclose(jnp.abs(_dense(leaf) - w), nearest, atol=0.02)


def test_every_axis_can_have_codebooks_of_its_own():
    w = _normal(4, 6, 5) * jnp.arange(1.0, 5).reshape(4, 1, 1)
    leaf = cluster({"kernel": w}, k=3, axis=(0, -1))["kernel"]
    assert leaf.codebook.shape == (4, 1, 5, 3)
    assert leaf.format() == "3 shared values per channel 0x2, 2 bits"
    one = jax.jit(functools.partial(kmeans.k_means, k=3))
    w, dense = np.asarray(w), np.asarray(_dense(leaf))
    for i, j in np.ndindex(4, 5):
        clusters = one(w[i, :, j])
        np.testing.assert_allclose(dense[i, :, j], np.asarray(clusters.centroids)[clusters.labels], rtol=1e-6)


def test_the_codebook_s_gradient_is_the_sum_over_its_weights():
    x = _normal(5, 8)
    for zero in (False, True):
        leaf = _leaf(8, 6, k=4, zero=zero)

        def loss(kernel, x):
            return jnp.sum(jnp.sin(x @ kernel))

        got, of_x = jax.jit(jax.grad(compress.lift(loss), argnums=(0, 1), allow_int=True))(leaf, x)
        dense, dense_of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(_dense(leaf), x)
        want = np.zeros(4)
        np.add.at(want, np.asarray(_unpack(leaf.indices)), np.asarray(dense))
        np.testing.assert_allclose(got.codebook[0, 0], want[zero:], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(of_x, dense_of_x, rtol=1e-5)
        assert got.indices.planes[0].dtype == jax.dtypes.float0


def test_centroids_train_and_zeros_stay():
    x, y = _normal(64, 8, seed=2), _normal(64, 6, seed=3)
    start = {"kernel": _leaf(8, 6, k=5, zero=True), "bias": jnp.zeros(6)}
    tx = compress.optimizer(optax.adamw(0.05, weight_decay=0.1))

    def loss(params):
        return jnp.mean(jnp.square(x @ params["kernel"] + params["bias"][None] - y))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(compress.lift(loss), allow_int=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, values = start, tx.init(start), []
    for _ in range(60):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    np.testing.assert_array_equal(params["kernel"].indices.planes[0], start["kernel"].indices.planes[0])
    assert not np.any(_dense(params["kernel"])[_dense(start["kernel"]) == 0])
    assert bool((params["kernel"].codebook != start["kernel"].codebook).all())


def test_every_layout_of_a_product_equals_the_dense_one():
    cases = [
        (_normal(3, 24), _leaf(24, 10), (((1,), (0,)), ((), ()))),
        (_normal(3, 24), _leaf(10, 24), (((1,), (1,)), ((), ()))),
        (_normal(24, 2, 3), _leaf(24, 10), (((0,), (0,)), ((), ()))),
        (_normal(2, 3, 4), _leaf(2, 4, 6), (((2,), (1,)), ((0,), (0,)))),
    ]

    def pairs(operands):
        for (x, leaf), (_, _, numbers) in zip(operands, cases, strict=True):
            right = lambda w, x, n=numbers: lax.dot_general(x, w, n)  # noqa: E731
            left = lambda w, x, n=(numbers[0][::-1], numbers[1][::-1]): lax.dot_general(w, x, n)  # noqa: E731
            yield from ((compress.lift(fn)(leaf, x), fn(leaf.materialise(), x)) for fn in (right, left))

    for got, want in jax.jit(lambda operands: list(pairs(operands)))([case[:2] for case in cases]):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "axis", "dtype"), [(16, -1, jnp.float32), (5, -2, jnp.float32), (256, None, jnp.bfloat16)])
def test_products_in_strips_equal_the_dense_ones(k, axis, dtype, monkeypatch):
    monkeypatch.setattr(strips, "cut", functools.partial(strips.cut, strip=64))
    leaf, x, y = _leaf(32, 24, k=k, axis=axis, dtype=dtype), _normal(2, 5, 32).astype(dtype), _normal(24, 7, seed=1).astype(dtype)
    indices = leaf.indices if axis is None else _unpack(leaf.indices)
    assert str(jax.make_jaxpr(compress.lift(lambda w: w @ y))(leaf)).count(" scan[") == 1

    def outputs(product, w):
        """Both sides of the weight, under vmap, and the derivatives, forwards and backwards."""
        left = lambda w, y: product(lambda w, y: w @ y, w, y)  # noqa: E731
        loss = lambda w, y: jnp.sum(jnp.sin(left(w, y)))  # noqa: E731
        values = left(w, y), product(lambda w, x: x @ w, w, x), jax.vmap(left, in_axes=(None, 1))(w, y)
        tangent = jax.jvp(lambda y: left(w, y), (y,), (jnp.ones_like(y),))[1]
        return (*values, tangent, jax.grad(loss, argnums=1)(w, y)), jax.grad(loss, allow_int=True)(w, y)

    got, of_codebook = jax.jit(lambda leaf: outputs(lambda fn, w, x: compress.lift(fn)(w, x), leaf))(leaf)
    want, of_weight = jax.jit(lambda w: outputs(lambda fn, w, x: fn(w, x), w))(_dense(leaf))
    summed = np.bincount(np.ravel(indices), np.ravel(of_weight).astype(np.float64), minlength=k)
    tolerance = 1e-4 if dtype == jnp.float32 else 0.1
    for a, b in zip((*got, of_codebook.codebook[0, 0]), (*want, summed), strict=True):
        assert a.dtype == (dtype if a.ndim > 1 else jnp.float32)
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(np.float32), rtol=tolerance, atol=5 * tolerance)


def test_strips_of_a_sharded_weight_stay_on_their_devices(monkeypatch):
    monkeypatch.setattr(strips, "cut", functools.partial(strips.cut, strip=2048))
    leaf, x = _leaf(512, 16), _normal(3, 512)
    mesh = Mesh(np.array(jax.devices()), ("d",))
    run = jax.jit(compress.lift(lambda w, x: x @ w))
    for spec in (PartitionSpec("d"), PartitionSpec(None, "d")):
        placed = Clustered(leaf.codebook, jax.device_put(leaf.indices, NamedSharding(mesh, spec)))
        compiled = run.lower(placed, x).compile()
        np.testing.assert_allclose(compiled(placed, x), x @ _dense(leaf), rtol=1e-4, atol=1e-4)
        assert " while(" in compiled.as_text()
        assert "all-gather" not in compiled.as_text()


def test_strips_are_cut_where_they_can_be():
    assert strips.cut(4096, 4096) == (32, 16)
    assert strips.cut(4096, 4096, unit=8) == (32, 16)
    assert strips.cut(4090, 4096, unit=8) == (1, 8)
    assert strips.cut(7 * 1024, 1024, unit=1024) == (7, 1024)
    assert strips.cut(4096, 4096, unit=2048) == (1, 2048)  # two strips would be sixteen times too large
    assert strips.cut(1024, 1023) == (1, 1)
    assert strips.cut(24, 30, strip=64) == (8, 1)  # 24 rows come out even in 8 strips of 3, and not in 9, 10 or 11


@pytest.mark.parametrize(("k", "axis"), [(16, -1), (5, -2)])
def test_look_ups_equal_those_of_the_dense_table(k, axis):
    leaf = _leaf(20, 6, k=k, axis=axis)
    outside, rows = jnp.array([[0, 19, 7], [-1, 25, -30]]), jnp.array([3, 3, 0])

    def read(w):
        return [
            jnp.take(w, outside, axis=0),
            jnp.take(w, outside, axis=0, mode="clip"),
            jnp.take(w, outside, axis=0, fill_value=2.0),
            jnp.take(w, outside, axis=1),
            w[outside],
            w[outside[0], outside[1]],
            w[2],
            w[1:3, ::2],
        ]

    for got, want in zip(*jax.jit(lambda leaf: (compress.lift(read)(leaf), read(leaf.materialise())))(leaf), strict=True):
        np.testing.assert_array_equal(got, want)
    # Nothing of the size of the table is computed.
    assert "[20,6]" not in str(jax.make_jaxpr(compress.lift(lambda w: w[rows]))(leaf))
    got = jax.jit(jax.grad(compress.lift(lambda w: jnp.sum(jnp.sin(w[rows]))), allow_int=True))(leaf)
    indices = _unpack(leaf.indices)
    want = np.bincount(np.ravel(indices[rows]), np.ravel(jnp.cos(_dense(leaf)[rows])), minlength=k)
    np.testing.assert_allclose(got.codebook[0, 0], want, rtol=1e-5, atol=1e-6)


def test_reshaping_keeps_the_leaf_where_the_codebooks_allow_it():
    shared = _leaf(2, 8, 4, k=5)
    stacked = Clustered(_normal(2, 1, 1, 4), shared.indices, True)
    # The packed axis itself has length 1.
    thin = Clustered(jnp.array([[[1.0, 2.0]]]), packing.pack(jnp.array([[1, 0, 1]], jnp.uint8), 1, -2))
    cases = [
        (shared, lambda w: w.reshape(16, 4), True),
        (shared, lambda w: w.reshape(-1), True),
        (shared, lambda w: w.transpose(2, 0, 1), True),
        (shared, lambda w: jnp.squeeze(w[None], 0).astype(jnp.bfloat16), True),
        (shared, lambda w: w.astype(jnp.int32), False),
        (shared, lambda w: w * 2, False),
        (stacked, lambda w: w.reshape(16, 4), False),
        (stacked, lambda w: w.reshape(2, 2, 4, 4), True),
        (stacked, lambda w: w.transpose(2, 0, 1)[None], True),
        (stacked, lambda w: jnp.broadcast_to(w, (5, 2, 8, 4)), True),
        (thin, lambda w: jnp.broadcast_to(w, (4, 3)), True),
        (thin, lambda w: jnp.squeeze(w, 0), True),
    ]
    kept = []

    def record(w, fn):
        kept.append(isinstance(getattr(out := fn(w), "value", out), Clustered))
        return out

    leaves, fns = [case[0] for case in cases], [case[1] for case in cases]
    both = jax.jit(
        lambda leaves: [
            (compress.lift(lambda w, fn=fn: record(w, fn))(leaf), fn(leaf.materialise()))
            for leaf, fn in zip(leaves, fns, strict=True)
        ]
    )
    for got, want in both(leaves):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert kept == [case[2] for case in cases]


def test_layers_stacked_for_a_scan_and_for_vmap():
    apply = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0]  # noqa: E731
    x, kernel = _normal(2, 8), _normal(4, 8, 8)
    stacked = cluster({"kernel": kernel}, k=4, axis=0)["kernel"]
    # As many layers as values: a shared codebook must not be taken for one a layer.
    for stored in (_leaf(4, 8, 8, k=4), stacked):
        got, want = jax.jit(lambda p, x: (compress.lift(apply)(p, x), apply(p.materialise(), x)))(stored, x)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    many = jax.jit(jax.vmap(lambda v: cluster({"kernel": v}, k=4)["kernel"]))(kernel)
    np.testing.assert_allclose(_dense(many), _dense(stacked), rtol=1e-6)
    y = jax.jit(jax.vmap(compress.lift(lambda w, x: x @ w), in_axes=(0, None)))(many, x)
    np.testing.assert_allclose(y[1], x @ _dense(stacked)[1], rtol=1e-5, atol=1e-6)


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        w = jax.device_put(np.random.default_rng(0).normal(size=(8, 4)))
        leaf = cluster({"kernel": w}, k=4, start=kmeans.plus_plus(jax.random.key(0)))["kernel"]
        assert leaf.codebook.dtype == _dense(leaf).dtype == jnp.float64
        members = [np.asarray(w)[np.asarray(_unpack(leaf.indices)) == i] for i in range(4)]
        np.testing.assert_allclose(leaf.codebook[0, 0], [m.mean() for m in members], rtol=1e-12)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"k=1: weights share 2 to 256 values", lambda p: cluster(p, 1)),
        (ValueError, r"k=257: weights share 2 to 256 values", lambda p: cluster(p, 257)),
        (TypeError, r"a/kernel has dtype int32; only floating", lambda p: cluster({"a": {"kernel": jnp.arange(3)}})),
        (TypeError, r"a/kernel is compressed already, as Clustered", lambda p: cluster({"a": {"kernel": _leaf(4, 2)}})),
        (ValueError, r"nothing matches where='\*\*/kernal'; the nearest.*a/kernel", lambda p: cluster(p, where="**/kernal")),
        (ValueError, r"a/kernel of shape \(4, 2\): axis=2 does not", lambda p: cluster(p, axis=2)),
        (ValueError, r"a/kernel of shape \(2,\) holds NaN", lambda p: cluster({"a": {"kernel": jnp.array([1, jnp.nan])}})),
        (ValueError, r"a/kernel of shape \(0, 2\) has no weights", lambda p: cluster({"a": {"kernel": jnp.ones((0, 2))}})),
        (ValueError, r"importance has other paths than params; first of 2: a/kernel, b", lambda p: cluster(p, importance={"b": 1})),
        (
            ValueError,
            r"importance of a/kernel has shape \(2,\), and the weight \(4, 2\)",
            lambda p: cluster(p, importance={"a": {"kernel": jnp.ones(2)}}),
        ),
        (
            ValueError,
            r"indices \(4, 2\) need a codebook of one axis more.*got \(2,\)",
            lambda p: Clustered(jnp.ones(2), jnp.zeros((4, 2), jnp.uint8)),
        ),
    ],
)
def test_errors_are_one_line_and_name_the_leaf(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call({"a": {"kernel": jnp.ones((4, 2))}})
    assert "\n" not in str(caught.value)
