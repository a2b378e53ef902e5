"""The leaves of a tree that are pruned, taken out of it and put back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array, PyTree, Where
from jaxopt_lab.prune.criteria import Criterion
from jaxopt_lab.prune.growth import Growth
from jaxopt_lab.prune.patterns import Pattern

__all__ = ["Chosen"]


class Chosen(NamedTuple):
    """The pruned leaves of a tree: their paths and (latent) weights, and where they stand among all leaves.

    Attributes:
      paths: the path of each pruned leaf.
      weights: its weight, or the latent weight of a compressed leaf.
      positions: where it stands among all leaves.
      every_path: the paths of all leaves.
      treedef: the structure of the whole tree.
    """

    paths: list[str]
    weights: list[Array]
    positions: list[int]
    every_path: list[str]
    treedef: Any

    @classmethod
    def of(cls, params: PyTree, where: Where, pattern: Pattern) -> "Chosen":
        """Chooses the leaves, and refuses by name one that cannot be pruned."""
        paths, leaves, treedef = tree.flatten(params)
        flags = jax.tree.leaves(tree.select(params, where))
        chosen = {i: tree.latent(leaves[i], paths[i]) for i, flag in enumerate(flags) if flag}
        # An empty leaf has nothing to cut.
        positions = [i for i, weight in chosen.items() if jnp.size(weight)]
        weights = [chosen[i] for i in positions]
        for i, weight in zip(positions, weights, strict=True):
            if not jnp.issubdtype(jnp.result_type(weight), jnp.floating) or jnp.ndim(weight) == 0:
                raise TypeError(
                    f"sparsify: {paths[i]} is {jnp.result_type(weight)}{list(jnp.shape(weight))}; only floating arrays of one axis "
                    "or more are pruned: leave it out of `where`"
                )
            pattern.check(paths[i], weight.shape)
        return cls([paths[i] for i in positions], [jnp.asarray(weight) for weight in weights], positions, paths, treedef)

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """The shape of each pruned weight by path, and None at the paths of all other leaves."""
        return dict.fromkeys(self.every_path) | {path: w.shape for path, w in zip(self.paths, self.weights, strict=True)}

    def gradients(self, updates: PyTree) -> list[Array]:
        """The same leaves of a tree of gradients or updates, each of its weight's shape."""
        paths, leaves, _ = tree.flatten(updates)
        if len(leaves) != self.treedef.num_leaves:
            raise ValueError(
                f"sparsify: {len(leaves)} gradients for {self.treedef.num_leaves} parameters; pass trees of one structure"
            )
        gradients = [tree.latent(leaves[i], paths[i]) for i in self.positions]
        for path, weight, gradient in zip(self.paths, self.weights, gradients, strict=True):
            if jnp.shape(gradient) != weight.shape:
                raise ValueError(f"sparsify: the gradient of {path} has shape {jnp.shape(gradient)}, the weight {weight.shape}")
        return gradients

    def into(self, whole: PyTree, values: Sequence[Array]) -> PyTree:
        """`whole` with the pruned leaves replaced."""
        leaves, treedef = jax.tree.flatten(whole, is_leaf=tree.is_compressed)
        for i, value in zip(self.positions, values, strict=True):
            leaves[i] = tree.replace_latent(leaves[i], value)
        return jax.tree.unflatten(treedef, leaves)

    def among_masks(self, stored: Sequence[Any]) -> PyTree:
        """The tree of masks as it is stored: `MaskedNode` where nothing is pruned."""
        leaves: list[Any] = [optax.MaskedNode()] * self.treedef.num_leaves
        for i, mask in zip(self.positions, stored, strict=True):
            leaves[i] = mask
        return jax.tree.unflatten(self.treedef, leaves)

    def masks_of(self, masks: PyTree) -> list[Any]:
        """The stored masks of the pruned leaves."""
        nodes = self.treedef.flatten_up_to(masks)
        return [nodes[i] for i in self.positions]

    def scores(self, criterion: Criterion, gradients: Sequence[Array]) -> list[Array]:
        """What the criterion makes of each weight; nothing is differentiated through it."""
        weights, gradients = jax.lax.stop_gradient((self.weights, list(gradients)))
        return [criterion.score(*row) for row in zip(self.paths, weights, gradients, strict=True)]

    def growth(self, growth: Growth, gradients: Sequence[Array], count: Array) -> list[Array]:
        """What ranks each weight for coming back."""
        weights, gradients = jax.lax.stop_gradient((self.weights, list(gradients)))
        return [growth.score(*row, count) for row in zip(self.paths, weights, gradients, strict=True)]
