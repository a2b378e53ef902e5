"""Masks as they are stored, found again in an optimiser's state, and what they leave in the parameters."""

from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["PackedMask", "SparsifyState", "Sparsity", "apply_masks", "masks", "pack", "sparsity", "unpack"]


class SparsifyState(NamedTuple):
    """The state of `sparsify`.

    Attributes:
      count: how many updates were made, int32 `[]`.
      masks: the structure of the parameters: a bool array or a `PackedMask` where a leaf is pruned, `optax.MaskedNode()` elsewhere.
      inner_state: the state of the wrapped optimiser.
    """

    count: Array
    masks: PyTree
    inner_state: PyTree


@struct.dataclass
class PackedMask:
    """A mask at one bit a weight, packed along the axis that wastes the fewest bits, so that other axes keep their sharding.

    Attributes:
      bits: uint8, the mask's shape but for `axis`, which has `ceil(width / 8)` entries; the lowest bit comes first.
      axis: the packed axis, counted from the end (leading axes that vmap adds do not move it).
      width: the mask's extent along `axis`.
    """

    bits: Array
    axis: int = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)


def pack(mask: Array) -> PackedMask:
    """Packs a bool array of one axis or more, eight to a byte.

    >>> packed = pack(jnp.array([True, False, True]))
    >>> packed.bits, packed.width
    (Array([5], dtype=uint8), 3)
    """
    # The last axis on a tie: it is the contiguous one.
    axis = min(range(-1, -mask.ndim - 1, -1), key=lambda axis: -(-mask.shape[axis] // 8) * 8 / mask.shape[axis])
    return PackedMask(jnp.packbits(mask, axis=axis, bitorder="little"), axis, mask.shape[axis])


def unpack(mask: Array | PackedMask) -> Array:
    """The bool array of a packed mask; a bool array is returned as it is.

    >>> unpack(pack(jnp.array([True, False, True])))
    Array([ True, False,  True], dtype=bool)
    """
    if not isinstance(mask, PackedMask):
        return mask
    return jnp.unpackbits(mask.bits, axis=mask.axis, count=mask.width, bitorder="little").astype(bool)


def sparsify_states(opt_state: PyTree) -> list[SparsifyState]:
    """Every `sparsify` state inside a state, however deep, and those inside the optimisers that they wrap."""

    def is_state(node: Any) -> bool:
        return isinstance(node, SparsifyState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    return found + [nested for node in found for nested in sparsify_states(node.inner_state)]


def masked_paths(state: SparsifyState) -> list[str]:
    """The paths of the leaves that a `sparsify` state has masks for."""
    nodes = jax.tree.map(lambda node: 0, state.masks, is_leaf=lambda node: isinstance(node, PackedMask))
    return tree.paths(nodes)


def masks(opt_state: PyTree) -> PyTree:
    """The masks of an optimiser's state, as one tree of bool arrays with the structure of the parameters.

    Every `sparsify` state is found, however deep in `chain`, `partition`, `MultiSteps` or other wrappers, and disjoint ones are
    merged. A leaf that no mask covers is a scalar True, which broadcasts; so is a whole subtree that `partition` keeps from them.

    Args:
      opt_state: the state of any optimiser that holds at least one `sparsify`; packed masks come unpacked.

    Raises:
      ValueError: no `sparsify` state is found, or two are for different parameters.

    >>> from jaxopt_lab.prune import sparsify
    >>> tx = sparsify(optax.sgd(0.1), 0.5, where="kernel")
    >>> masks(tx.init({"kernel": jnp.ones(2), "bias": jnp.ones(2)}))
    {'bias': Array(True, dtype=bool), 'kernel': Array([ True,  True], dtype=bool)}
    """
    found = [state.masks for state in sparsify_states(opt_state)]
    if not found:
        raise ValueError(
            "prune.masks: the state holds no `sparsify` state; pass the state of an optimiser that prune.sparsify wraps"
        )
    return _merged(found)


def _merged(nodes: list[Any]) -> PyTree:
    """One tree of masks from several; where one has `MaskedNode`, for a leaf or for a whole subtree, the others decide."""
    nodes = [node for node in nodes if not isinstance(node, optax.MaskedNode)]
    if not nodes:
        return jnp.ones((), bool)
    if any(isinstance(node, PackedMask) or jax.tree_util.all_leaves([node]) for node in nodes):
        return reduce(jnp.logical_and, map(unpack, nodes))
    children, structures = zip(*(jax.tree.flatten(node, is_leaf=lambda x, node=node: x is not node) for node in nodes), strict=True)
    if any(structure != structures[0] for structure in structures):
        raise ValueError("prune.masks: the state holds `sparsify` states for different parameters; pass each of them by itself")
    return jax.tree.unflatten(structures[0], [_merged(list(column)) for column in zip(*children, strict=True)])


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    r"""Parameters with every masked weight exactly 0.0: :math:`w \odot m`.

    Args:
      params: any tree; a compressed leaf is masked in its latent weight.
      masks: bool arrays in the same structure, as `masks` or `one_shot` return them; a scalar stands for a leaf or a subtree.

    >>> apply_masks({"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([True, False])})
    {'kernel': Array([1., 0.], dtype=float32)}
    """

    def masked(mask: Array, leaf: Any) -> Any:
        # A scalar True stands for "not pruned": what it covers is left alone, and need not have a latent weight.
        if jnp.ndim(mask) == 0:
            return leaf
        weight = tree.latent(leaf)
        return tree.replace_latent(leaf, jnp.where(mask, weight, jnp.zeros_like(weight)))

    return jax.tree.map(masked, masks, params)


class Sparsity(NamedTuple):
    """Fractions of zeros.

    Attributes:
      per_leaf: path -> fraction, a scalar from 0 to 1.
      total: the fraction over all those leaves together.
    """

    per_leaf: dict[str, Array]
    total: Array


def sparsity(params: PyTree, where: Where = "**/kernel") -> Sparsity:
    r"""The fraction of weights that are exactly zero, per leaf and in all: :math:`|\{i : w_i = 0\}| / n`.

    Args:
      params: any tree; a compressed leaf is counted as the weight it stands for, and an empty one is left out.
      where: which leaves are counted; those that `sparsify` prunes by default.

    Raises:
      ValueError: nothing matches `where`, or only empty leaves do.

    >>> sparsity({"a": {"kernel": jnp.array([0.0, 0.0, 1.0, 2.0])}}).total
    Array(0.5, dtype=float32)
    """
    chosen = {
        path: leaf.materialise() if tree.is_compressed(leaf) else jnp.asarray(leaf)
        for path, leaf in tree.selected(params, where).items()
    }
    empty = [path for path, leaf in chosen.items() if not leaf.size]
    if len(empty) == len(chosen):
        raise ValueError(f"prune.sparsity: every chosen leaf is empty ({', '.join(empty)}); choose others by `where`")
    chosen = {path: leaf for path, leaf in chosen.items() if leaf.size}
    zeros = {path: jnp.mean(leaf == 0, dtype=jnp.float32) for path, leaf in chosen.items()}
    weights = sum(leaf.size for leaf in chosen.values())
    # Shares of the whole rather than counts: float32 holds no integer above 2**24.
    total = sum((zeros[path] * (leaf.size / weights) for path, leaf in chosen.items()), jnp.zeros(()))
    return Sparsity(zeros, total)
