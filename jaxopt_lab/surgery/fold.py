"""Normalisation by running statistics, folded into the weights before it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_lab.core import tree
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.tracing import Affine, affine, coefficients
from jaxopt_lab.core.tracing.chains import find
from jaxopt_lab.core.tracing.programs import trace
from jaxopt_lab.core.tracing.substitution import substituted
from jaxopt_lab.core.types import Array, PyTree, Where
from jaxopt_lab.surgery.edits import GONE, Beside, by_path, edited, filled, keys, place_of_bias

__all__ = ["Fold", "FoldPlan", "fold_batch_norm"]


class Fold(NamedTuple):
    """What became of one weight.

    Attributes:
      weight: its path.
      axis: its axis that numbers the channels.
      channels: how many there are.
      bias: the path of what is added now.
      dropped: paths that the tree lost.
      formula: the operations that were folded, in order.
    """

    weight: str
    axis: int
    channels: int
    bias: str
    dropped: tuple[str, ...]
    formula: tuple[str, ...]


class FoldPlan(NamedTuple):
    """What was folded, in the order of the program; it prints as a list."""

    folds: tuple[Fold, ...]

    def __str__(self) -> str:
        rows = [f"{f.weight}: {f.channels} channels, shift in {f.bias}, without {', '.join(f.dropped)}" for f in self.folds]
        return "\n".join(rows)


def fold_batch_norm(
    apply: Callable[..., Any], variables: PyTree, *example: Any, where: Where = "**/kernel"
) -> tuple[Callable[..., Any], PyTree, FoldPlan]:
    r"""Multiplies the scales of a normalisation into the weights before it, and adds its shifts as their bias.

    .. math:: \gamma \, \frac{x * w + b - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta = x * (w A) + B, \qquad
              A = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \quad B = \beta + (b - \mu) A

    for each output channel, of dense layers and of convolutions of any kind. Nothing is known of layers: whatever follows a product
    channel by channel with coefficients of parameters and constants alone is folded (see `core.tracing.chains`), BatchNorm in
    inference or a learned scale. A weight that only a bias follows stays. A normalisation that stands before its convolution,
    behind an activation (pre-activation networks), is not folded into that one: padding would see the shift.

    B is stored beside the weight, as `.../bias`: in the place of the bias that was there, or as a new entry of the mapping; where
    the weight lies in none, in the place of a leaf of its own that the normalisation added. Leaves that nothing reads any more are
    dropped: entries of mappings vanish, elsewhere None stands. A and B are as precise as the program computes them, B is kept in at
    least float32.

    A fake-quantised weight is folded by its latent weight; what it is then rounded to is another number, unless it was trained for
    it (`compress.rounded_as_folded`). Other compressed weights are refused: fold first, compress then.

    Args:
      apply: `apply(variables, *args, **kwargs)`, which normalises by running statistics: `model.predict`, a Linen `module.apply`,
        one that merges an NNX module, a bare function.
      variables: any tree of parameters and statistics.
      example: inputs, arrays or shapes. They decide nothing but where the walk goes.
      where: which weights (see `tree.select`); those that no normalisation follows stay.

    Returns:
      `(apply, variables, plan)`. The new function takes the new tree, and all other arguments of any shapes. It traces the old one
      anew in each call, so jit it. Arguments without a shape (`train=False`) must leave the normalisation as it was.

    Raises:
      ValueError: nothing matches `where`, no weight that does is followed by a normalisation, or there is no place for a shift; the
        message names the path.
      TypeError: a weight to be folded is compressed and has no latent weight.

    >>> params = {"a": {"kernel": jnp.ones((3, 2))}, "norm": {"mean": jnp.ones((1, 2)), "var": jnp.array([[1.0, 4.0]])}}
    >>> def apply(params, x):
    ...     norm = params["norm"]
    ...     return jax.nn.relu((x @ params["a"]["kernel"] - norm["mean"]) / jnp.sqrt(norm["var"]))
    >>> folded_apply, folded, plan = fold_batch_norm(apply, params, jnp.ones((1, 3)))
    >>> print(plan)
    a/kernel: 2 channels, shift in a/bias, without norm/mean, norm/var
    >>> folded["a"]["bias"].tolist(), folded_apply(folded, jnp.ones((5, 3)))[0].tolist()
    ([-1.0, -0.5], [2.0, 1.0])

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018,
    section 3.2.
    """
    names, leaves, treedef = tree.flatten(variables)
    stored = dict(zip(names, leaves, strict=True))
    chosen = tree.selected(variables, where)
    dense = jax.tree.map(
        lambda leaf: leaf.materialise() if tree.is_compressed(leaf) else leaf, variables, is_leaf=tree.is_compressed
    )
    chains = [chain for chain in affine(apply, dense, *example) if chain.site.path in chosen and chain.scales]
    if not chains:
        raise ValueError(
            f"no normalisation by running statistics follows {', '.join(list(chosen)[:5])}; give the `apply` of inference, on an "
            "example, and check `where`"
        )
    values = coefficients(apply, dense, *example)
    ways, folds, changed = keys(dense), [], dict(stored)
    for chain in chains:
        path = chain.site.path
        w, (scale, shift) = jnp.asarray(tree.latent(stored[path], path)), values[path]
        leaf = tree.replace_latent(stored[path], (wide(w) * chain.on_weight(scale)).astype(w.dtype))
        bias, new = _place_of_shift(chain, [*names, *(fold.bias for fold in folds)], ways[path])
        dropped = tuple(own for own in chain.own if own != bias)
        folds.append(Fold(path, chain.weight_axis, chain.channels, bias, dropped, chain.formula))
        changed |= dict.fromkeys(dropped, GONE) | ({path: Beside(leaf, shift)} if new else {path: leaf, bias: shift})
    plan = FoldPlan(tuple(folds))
    folded = edited(jax.tree.unflatten(treedef, [changed[name] for name in names]))
    replaced = {path for fold in folds for path in (*fold.dropped, fold.bias)}
    dead = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in stored.items() if name in replaced}
    return _folded(apply, plan, treedef, names, dead), folded, plan


def _folded(
    apply: Callable[..., Any], plan: FoldPlan, treedef: Any, names: list[str], dead: Mapping[str, Any]
) -> Callable[..., Any]:
    """`apply` of the folded tree; `dead` are the leaves of the old one whose values it does not have."""
    expected = {*names, *(fold.bias for fold in plan.folds)} - {path for fold in plan.folds for path in fold.dropped}

    @functools.wraps(apply, updated=())
    def folded_apply(folded: PyTree, *args: Any, **kwargs: Any) -> Any:
        own = by_path(folded, expected, "folded")
        program, inputs = trace(apply, filled(names, treedef, own, dead), *args, **kwargs)
        found = {chain.site.path: chain for chain in find(program)}
        chains = [_same(found.get(fold.weight), fold, {*fold.dropped, fold.bias} & dead.keys()) for fold in plan.folds]
        shifts = {fold.weight: own[fold.bias] for fold in plan.folds}

        def shifted(chain: Affine, y: Array, z: Array) -> Array:
            return (wide(chain.laid_out(y)) + chain.on_output(shifts[chain.site.path], z)).astype(z.dtype)

        outputs, _ = substituted(program, inputs, chains, lambda chain, y: y, shifted)
        return jax.tree.unflatten(jax.tree.structure(program.outputs), outputs)

    return folded_apply


def _same(chain: Affine | None, fold: Fold, gone: set[str]) -> Affine:
    """The chain of this call, once it is seen to be the one that was folded, and to be alone in reading what is gone."""
    if chain is None or (chain.formula, chain.weight_axis) != (fold.formula, fold.axis) or not gone <= {*chain.own}:
        raise ValueError(
            f"{fold.weight} was folded with {', '.join(fold.formula)}, but in this call that is not what follows it, or is read "
            "elsewhere, too: call it as in inference (batch statistics cannot be folded), with the arguments that the example had"
        )
    return chain


def _place_of_shift(chain: Affine, names: list[str], way: tuple[Any, ...]) -> tuple[str, bool]:
    """The path of what is added, and whether it is a new entry."""
    path = chain.site.path
    place = place_of_bias(path, way, names, chain.own, [own for own in chain.own if own not in chain.scales])
    if place is None:
        raise ValueError(
            f"{path} has no place for a bias: {path[: path.rfind('/') + 1]}bias cannot be made, and no other leaf becomes free; "
            "leave it out of `where`"
        )
    return place
