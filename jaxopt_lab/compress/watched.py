"""What runs on the stored form of a leaf, and where it becomes dense: a leaf that looks on."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax import lax

from jaxopt_lab.compress import rules  # noqa: F401 (imported for its effect: it tells quax what to do)
from jaxopt_lab.compress.leaf import Leaf
from jaxopt_lab.compress.leaves.dense import Dense
from jaxopt_lab.compress.trace import quaxified
from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array, PyTree

__all__ = ["Ran", "ran"]


class Ran(NamedTuple):
    """What a function did with one leaf: the names of JAX's primitives, each once, in the order in which they were first met.

    Attributes:
      native: those that ran on the stored form.
      materialised: those for which it became dense; `elsewhere` is where no primitive can be named, as in a function with its own
        derivative, or in what a loop carries.
    """

    native: tuple[str, ...]
    materialised: tuple[str, ...]


def ran(apply: Callable[..., Any], params: PyTree, *inputs: Any) -> dict[str, Ran]:
    """What `lift(apply)(params, *inputs)` does with each compressed leaf, by shapes alone.

    Args:
      apply: any function of a tree and inputs.
      params: a tree with compressed leaves among others.
      inputs: arrays, or `jax.ShapeDtypeStruct`.

    Returns:
      One `Ran` for the path of every compressed leaf, in tree order.

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> params = quantize({"kernel": jax.numpy.ones((3, 2))})
    >>> ran(lambda params, x: x @ params["kernel"], params, jax.numpy.ones((1, 3)))
    {'kernel': Ran(native=('dot_general',), materialised=())}
    """
    names, leaves, treedef = tree.flatten(params)
    met: dict[str, tuple[dict[str, None], dict[str, None]]] = {}

    def note(name: str, primitive: str, native: bool) -> None:
        met[name][0 if native else 1].setdefault(primitive)

    def watched(name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Leaf):
            return leaf
        met[name] = {}, {}
        return _Watched(leaf, name, note)

    looked_at = jax.tree.unflatten(treedef, [watched(name, leaf) for name, leaf in zip(names, leaves, strict=True)])
    jax.eval_shape(quaxified(apply), looked_at, *inputs)
    return {name: Ran(tuple(native), tuple(materialised)) for name, (native, materialised) in met.items()}


class _Watched(Leaf):
    """A leaf that does what another one does, and tells of it."""

    inner: Leaf
    name: str = eqx.field(static=True)
    note: Callable[[str, str, bool], None] = eqx.field(static=True)

    def aval(self):
        return self.inner.aval()

    def materialise(self) -> Array:
        self.note(self.name, "elsewhere", False)
        return self.inner.materialise()

    @staticmethod
    def default(primitive: Any, values: Any, params: dict[str, Any]) -> Any:
        """What every primitive does for which there is no rule."""
        arrays = [value.dense(primitive.name) if isinstance(value, _Watched) else value for value in values]
        return primitive.bind(*arrays, **params)

    def dense(self, primitive: str) -> Array:
        self.note(self.name, primitive, False)
        return self.inner.materialise()

    def stepwise(self, length):
        inner = self.inner.stepwise(length)
        if inner is NotImplemented:
            return Dense(self.dense("scan"))
        self.note(self.name, "scan", True)
        return dataclasses.replace(self, inner=inner)

    def dot_general(self, x, **params):
        return self._done(lax.dot_general_p, "dot_general", (x,), (), params)

    def conv_general_dilated(self, x, **params):
        return self._done(lax.conv_general_dilated_p, "conv_general_dilated", (x,), (), params)

    def gather(self, indices, **params):
        return self._done(lax.gather_p, "gather", (), (indices,), params)

    def convert_element_type(self, **params):
        return self._done(lax.convert_element_type_p, "convert_element_type", (), (), params)

    def transpose(self, **params):
        return self._done(lax.transpose_p, "transpose", (), (), params)

    def reshape(self, **params):
        return self._done(lax.reshape_p, "reshape", (), (), params)

    def squeeze(self, **params):
        return self._done(lax.squeeze_p, "squeeze", (), (), params)

    def broadcast_in_dim(self, **params):
        return self._done(lax.broadcast_in_dim_p, "broadcast_in_dim", (), (), params)

    def _done(self, primitive: Any, method: str, before: tuple, after: tuple, params: dict[str, Any]) -> Any:
        """What a method of the leaf does with the other operands, or else the primitive on the dense weight between them."""
        out = getattr(self.inner, method)(*before, *after, **params)
        if out is NotImplemented:
            return primitive.bind(*before, self.dense(method), *after, **params)
        self.note(self.name, method, True)
        return dataclasses.replace(self, inner=out) if tree.is_compressed(out) else out
