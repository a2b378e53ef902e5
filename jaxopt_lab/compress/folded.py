"""BatchNorm folded while training: weights are rounded as they will be stored once the scales behind them are multiplied in."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from jaxopt_lab.compress.leaf import Leaf
from jaxopt_lab.compress.leaves.dense import Dense
from jaxopt_lab.compress.leaves.fake_quantized import FakeQuantized
from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.tracing import affine, coefficients
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["rounded_as_folded"]


def rounded_as_folded(model: Any, variables: PyTree, *example: Any, where: Where = "**/kernel") -> Any:
    r"""The same model, whose fake-quantised weights are rounded as `surgery.fold_batch_norm` and `freeze` will store them.

    .. math:: \hat w = Q(w A) / A, \qquad A = \gamma / \sqrt{\sigma^2 + \epsilon}

    for each output channel that a normalisation follows, with its running statistics: in training it goes on with those of the
    batch, as it did. What trains so is, in inference, what is stored. Where every output channel has its own scale this changes
    nothing but roundings; where channels share one, the folded weights have other ranges than the latent ones.

    The gradient passes through A, too: what :math:`\gamma` gets by the two ways that it enters is the straight-through gradient of
    the folded weight, as in the sources. A channel whose A is 0 is stored as zeros and is not rounded, so that it can come back.

    Args:
      model: a `nets.Model`, or any named tuple of `apply` and `predict`; or one function `apply(variables, *args, **kwargs)`, which
        called on the example normalises by running statistics.
      variables: any tree that the model takes, with fake-quantised leaves or without; only its shapes matter.
      example: inputs of inference, arrays or shapes.
      where: which weights (see `tree.select`). Of those, fake-quantised ones that a normalisation follows are rounded so.

    Returns:
      The model, or the function, of the same signatures and trees. Call it as the old one on leaves: through `lift`, as `make_step`
      does. On dense weights it is the old one.

    Raises:
      ValueError: nothing matches `where`, or no weight that does is followed by a normalisation.

    >>> from jaxopt_lab.compress.leaves.fake_quantized import fake_quantize
    >>> from jaxopt_lab.compress.lift import lift
    >>> params = {"kernel": jnp.array([[1.0, 0.3]]), "scale": jnp.array([[1.0, 10.0]])}
    >>> apply = lambda p, x: (x @ p["kernel"]) * p["scale"]
    >>> rounded = rounded_as_folded(apply, params, jnp.ones((1, 1)), where="kernel")
    >>> coarse = fake_quantize(params, bits=2, axis=None, where="kernel")
    >>> lift(apply)(coarse, jnp.ones((1, 1))).tolist(), lift(rounded)(coarse, jnp.ones((1, 1))).tolist()
    ([[1.0, 0.0]], [[0.0, 3.0]])

    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: a whitepaper", 2018; Jacob et al.,
    "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018, section 3.2.
    """
    predict = getattr(model, "predict", model)
    chosen = tree.selected(variables, where)
    shapes = _shapes(example)
    found = affine(predict, _shapes(variables), *shapes)
    # A scale that comes from the weight itself would be another one of the rounded weight.
    chains = {path: chain for chain in found if (path := chain.site.path) in chosen and chain.scales and path not in chain.reads}
    if not chains:
        raise ValueError(f"no normalisation by running statistics follows {', '.join(list(chosen)[:5])}; check `where`")

    def rounded(variables: PyTree) -> PyTree:
        names, leaves, treedef = tree.flatten(variables)
        scales = {path: values.scale for path, values in coefficients(predict, decompress(variables), *shapes).items()}
        rows = zip(names, leaves, strict=True)
        return jax.tree.unflatten(treedef, [_rounded(x, chains[n].on_weight(scales[n])) if n in chains else x for n, x in rows])

    def wrapped(apply: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(apply, updated=())(lambda variables, *args, **kwargs: apply(rounded(variables), *args, **kwargs))

    return wrapped(model) if predict is model else model._replace(apply=wrapped(model.apply), predict=wrapped(predict))


def _shapes(whole: PyTree) -> PyTree:
    """A tree of dense arrays, by their shapes."""

    def shaped(leaf: Any) -> Any:
        leaf = leaf.aval() if tree.is_compressed(leaf) else leaf
        return jax.ShapeDtypeStruct(leaf.shape, jnp.result_type(leaf)) if hasattr(leaf, "dtype") else leaf

    return jax.tree.map(shaped, whole, is_leaf=tree.is_compressed)


def _rounded(weight: Any, scale: Array) -> Any:
    return _of_leaf(weight, scale) if tree.is_compressed(weight) else _round_p.bind(weight, scale)


def _of_leaf(leaf: Any, scale: Array) -> Any:
    """The leaf that acts as its folded self does, before the scale that follows."""
    if isinstance(leaf, FakeQuantized):
        folded = tree.replace_latent(leaf, (wide(leaf.w) * scale).astype(leaf.w.dtype))
        unfolded = wide(folded.materialise()) / jnp.where(scale == 0, 1, scale)
        return Dense(jnp.where(scale == 0, wide(leaf.w), unfolded).astype(leaf.w.dtype))
    held = getattr(leaf, leaf.latent) if leaf.latent else None
    return dataclasses.replace(leaf, **{leaf.latent: _of_leaf(held, scale)}) if tree.is_compressed(held) else leaf


# Inside of a lift a leaf is seen by primitives alone. This one asks it for its folded self; of a dense weight it is the identity.
_round_p = Primitive("round_as_folded")
_round_p.def_impl(lambda w, scale: w)
_round_p.def_abstract_eval(lambda w, scale: w)
mlir.register_lowering(_round_p, mlir.lower_fun(lambda w, scale: w, multiple_results=False))
ad.defjvp(_round_p, lambda tangent, w, scale: tangent, None)


@quax.register(_round_p)
def _(w: Leaf, scale: ArrayLike):
    return _of_leaf(w, jnp.asarray(scale))


def _batched(args: Any, dims: Any) -> Any:
    if dims[0] is None:
        raise NotImplementedError("vmap over the statistics alone, inside of a lift: lift inside of the vmap instead")
    return args[0], dims[0]


batching.primitive_batchers[_round_p] = _batched
