"""How much each unit of a group matters: `(group, weights by path) -> [units]`."""

import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import require
from jaxopt_lab.core.types import Array, PyTree, Where
from jaxopt_lab.surgery.coupled import Group, Member

__all__ = ["Criterion", "activation", "fisher", "geometric_median", "magnitude", "random", "scales", "taylor"]

Criterion = Callable[[Group, Mapping[str, Array]], Array]
"""`(group, weights by path) -> [units]`: how much each unit matters."""


def magnitude(p: float = 2.0) -> Criterion:
    r"""A unit matters by the size of its weights, in each member against the mean of the group.

    .. math:: s_u = \frac{1}{|M|} \sum_{m \in M} \frac{s_{m,u}}{\mathrm{mean}_v \, s_{m,v}}, \qquad s_{m,u} = \sum_{i \in u} |w_i|^p

    over the members :math:`M` of the group, so that none outweighs the others by its number of weights.

    Args:
      p: the power.

    Raises:
      ValueError: `p` is not positive.

    >>> group = Group((Member("w", 1, jnp.array([[0], [1]])),))
    >>> magnitude()(group, {"w": jnp.array([[1.0, 3.0], [1.0, 1.0]])}).tolist()  # doctest: +ELLIPSIS
    [0.33..., 1.66...]

    Source: Li et al., "Pruning filters for efficient ConvNets", 2017; Fang et al., "DepGraph: towards any structural pruning",
    2023.
    """
    require(lambda p: p > 0, "be positive", p=p)
    return _by_entries(lambda path, w: jnp.abs(w) ** p)


def taylor(gradients: PyTree) -> Criterion:
    r"""A unit matters by what the loss would change without it, to first order: :math:`s_u = |\sum_{i \in u} w_i g_i|`.

    Members are weighed against each other as in `magnitude`.

    Args:
      gradients: of the loss, a tree with the paths of the parameters; weights that it lacks do not count.

    >>> group = Group((Member("w", 0, jnp.array([[0], [1]])),))
    >>> taylor({"w": jnp.array([3.0, -1.0])})(group, {"w": jnp.array([1.0, 1.0])}).tolist()
    [1.5, 0.5]

    Source: Molchanov et al., "Importance estimation for neural network pruning", 2019.
    """
    given = _by_path(gradients)
    return _by_entries(lambda path, w: jnp.zeros_like(w) if path not in given else w * given[path])


def fisher(gradients: PyTree) -> Criterion:
    r"""A unit matters by the Fisher information of a gate on it, over examples n:

    .. math:: s_u = \frac{1}{N} \sum_n \left( \sum_{i \in u} w_i g_{n,i} \right)^2

    which is, where the loss is a log-likelihood, twice what it changes without the unit, to second order. Members are weighed
    against each other as in `magnitude`.

    Args:
      gradients: of the loss of each example, a tree with the paths of the parameters, of arrays `[N, *shape]` (`jax.vmap` of
        `jax.grad`); weights that it lacks do not count.

    Raises:
      ValueError: in a call, when an array is not one gradient for each of N examples.

    >>> group = Group((Member("w", 0, jnp.array([[0], [1]])),))
    >>> fisher({"w": jnp.array([[3.0, -1.0], [-3.0, -1.0]])})(group, {"w": jnp.array([1.0, 1.0])}).tolist()
    [1.8..., 0.2...]

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018; Liu et al., "Group Fisher pruning
    for practical network compression", 2021.
    """
    given = _by_path(gradients)

    def of_member(member: Member, w: Array) -> Array:
        if member.path not in given:
            return jnp.zeros(len(member.indices))
        each = given[member.path]
        if each.ndim != w.ndim + 1 or each.shape[1:] != w.shape:
            raise ValueError(
                f"the gradients of {member.path} have shape {each.shape}, and must be [examples, *{w.shape}]: one for each example"
            )
        return jnp.mean(jax.vmap(lambda g: jnp.sum(slices(member, (w * g).astype(jnp.float32)), axis=1))(each) ** 2, axis=0)

    return _by_members(of_member)


def activation(inputs: PyTree) -> Criterion:
    r"""A unit matters by its weights, each by the size of the input that it meets: :math:`s_u = \sum_{i \in u} |w_i| \, a_i`.

    So a unit counts by what it is made of, and by what is made of it. Members are weighed against each other as in `magnitude`.

    Args:
      inputs: the mean size of the input that each weight meets, as `mean_inputs` gives it; weights that it lacks do not count.

    >>> group = Group((Member("w", 0, jnp.array([[0], [1]])),))
    >>> activation({"w": jnp.array([[3.0], [1.0]])})(group, {"w": jnp.array([[1.0], [1.0]])}).tolist()
    [1.5, 0.5]

    Source: Sun et al., "A simple and effective pruning approach for large language models", 2024 (Wanda); by units as in An et al.,
    "Fluctuation-based adaptive structured pruning for large language models", 2024.
    """
    given = _by_path(inputs)
    return _by_entries(lambda path, w: jnp.zeros_like(w) if path not in given else jnp.abs(w) * given[path])


def scales(where: Where = "**/scale", *, others: Criterion | None = None) -> Criterion:
    r"""A unit matters by the scale that a normalisation gives it: :math:`s_u = \mathrm{mean}_{i \in u} |\gamma_i|`.

    Train with `regularize.l1` on the scales before, so that those of units that matter little become small.

    Args:
      where: the scales (see `tree.select`).
      others: for groups that hold no scale.

    Raises:
      ValueError: in a call, when a group holds no scale and there is no other criterion; or nothing matches `where`.

    >>> group = Group((Member("conv/kernel", 1, jnp.array([[0], [1]])), Member("norm/scale", 0, jnp.array([[0], [1]]))))
    >>> weights = {"conv/kernel": jnp.ones((3, 2)), "norm/scale": jnp.array([-2.0, 0.1])}
    >>> scales()(group, weights).tolist()  # doctest: +ELLIPSIS
    [2.0, 0.1...]

    Source: Liu et al., "Learning efficient convolutional networks through network slimming", 2017.
    """

    def score(group: Group, weights: Mapping[str, Array]) -> Array:
        chosen = set(tree.selected(dict(weights), where))
        own = [slices(member, jnp.abs(weights[member.path])) for member in group.members if member.path in chosen]
        if own:
            return jnp.mean(jnp.concatenate(own, axis=1).astype(jnp.float32), axis=1)
        if others is None:
            raise ValueError(
                f"the group of {group.name} holds no scale: exclude {group.members[0].path}, or give `others` for its units"
            )
        return others(group, weights)

    return score


def geometric_median() -> Criterion:
    r"""A unit matters by how far it lies from all others of its group: what others can stand for goes first.

    .. math:: s_u = \sum_v \lVert w_u - w_v \rVert_2

    >>> group = Group((Member("w", 0, jnp.array([[0], [1], [2]])),))
    >>> geometric_median()(group, {"w": jnp.array([0.0, 1.0, 5.0])}).tolist()
    [6.0, 5.0, 9.0]

    Source: He et al., "Filter pruning via geometric median for deep convolutional neural networks acceleration", 2019.
    """

    def score(group: Group, weights: Mapping[str, Array]) -> Array:
        members = [member for member in group.members if member.path in weights]
        rows = jnp.concatenate([slices(member, weights[member.path]) for member in members], axis=1)
        return jnp.sum(jnp.sqrt(jnp.sum((rows[:, None] - rows[None]) ** 2, axis=2)), axis=1)

    return score


def random(key: Array) -> Criterion:
    """Units matter at random: what every criterion has to beat.

    Args:
      key: a typed PRNG key; each group draws its own numbers.

    >>> random(jax.random.key(0))(Group((Member("w", 0, jnp.array([[0], [1]])),)), {}).shape
    (2,)
    """

    def score(group: Group, weights: Mapping[str, Array]) -> Array:
        del weights
        return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(group.name.encode())), (group.units,))

    return score


def slices(member: Member, w: Array) -> Array:
    """The entries of each unit in a member, `[units, entries]`.

    >>> slices(Member("w", 1, jnp.array([[0], [2]])), jnp.arange(6).reshape(2, 3)).tolist()
    [[0, 3], [2, 5]]
    """
    return jnp.moveaxis(w, member.axis, 0)[member.indices].reshape(len(member.indices), -1)


def _by_path(given: PyTree) -> dict[str, Array]:
    names, leaves, _ = tree.flatten(given)
    return {name: jnp.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}


def _by_entries(entries: Callable[[str, Array], Array]) -> Criterion:
    """A criterion that sums over entries, each member against its mean."""

    def of_member(member: Member, w: Array) -> Array:
        return jnp.abs(jnp.sum(slices(member, entries(member.path, w).astype(jnp.float32)), axis=1))

    return _by_members(of_member)


def _by_members(of_member: Callable[[Member, Array], Array]) -> Criterion:
    """A criterion of numbers for each member, `[units]`, each against its mean."""

    def score(group: Group, weights: Mapping[str, Array]) -> Array:
        total = jnp.zeros(group.units)
        members = [member for member in group.members if member.path in weights]
        for member in members:
            own = of_member(member, weights[member.path])
            mean = jnp.mean(own)
            total += own / jnp.where(mean > 0, mean, 1) / len(members)
        return total

    return score
