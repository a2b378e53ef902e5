"""What is kept of every parameter: the plan of a surgery, and what can be done with it."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.coupling.primitives import taken
from jaxopt_lab.core.coupling.values import kept
from jaxopt_lab.core.coupling.walk import cut
from jaxopt_lab.core.files import write
from jaxopt_lab.core.types import PyTree
from jaxopt_lab.prune.state import PackedMask, pack, unpack
from jaxopt_lab.surgery.coupled import walked

__all__ = ["Plan", "mask"]

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which indices of every axis of every parameter are kept.

    Attributes:
      shapes: by path, of every parameter before.
      kept: by path, for each axis the indices that stay, in order; parameters of which all stays are not among them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, tuple[np.ndarray, ...]]

    def __str__(self) -> str:
        rows = [f"{path}: {self.shapes[path]} -> {tuple(len(own) for own in axes)}" for path, axes in self.kept.items()]
        return "\n".join(rows) or "nothing is cut"

    def cut(self, params: PyTree) -> PyTree:
        """The smaller tree.

        Args:
          params: a tree of the paths and shapes that the plan was made for; or a subtree of it, such as the parameters without the
            running statistics. Compressed leaves become dense.

        Raises:
          ValueError: a path is unknown, has another shape, or could be of several subtrees.

        >>> plan = Plan({"w": (3, 2)}, {"w": (np.array([0, 2]), np.array([0, 1]))})
        >>> plan.cut({"w": np.arange(6.0).reshape(3, 2)})["w"].tolist()
        [[0.0, 1.0], [4.0, 5.0]]
        """
        names, leaves, treedef = tree.flatten(decompress(params))
        paths = self._checked(names, leaves, self.shapes.__getitem__)
        # One program, and not one for each shape.
        small = jax.jit(lambda leaves: [taken(leaf, self._axes(path)) for path, leaf in zip(paths, leaves, strict=True)])
        return jax.tree.unflatten(treedef, small(leaves))

    def scatter(self, small: PyTree) -> PyTree:
        """The tree at full size again, with zeros where it was cut.

        Args:
          small: a tree as `cut` gives it.

        >>> plan = Plan({"w": (3,)}, {"w": (np.array([0, 2]),)})
        >>> plan.scatter({"w": np.array([1.0, 2.0])})["w"].tolist()
        [1.0, 0.0, 2.0]
        """
        names, leaves, treedef = tree.flatten(small)
        paths = self._checked(names, leaves, self._small)
        full = jax.jit(lambda leaves: [self._full(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])
        return jax.tree.unflatten(treedef, full(leaves))

    def bind(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """The function of the smaller tree: `plan.bind(apply)(plan.cut(params), *args)` is `apply(mask(params, plan), *args)`.

        A mean over units, as a normalisation (LayerNorm) takes it, is of those that are left: there the two differ.

        The function is traced anew in each call, at the shapes of its arguments: batch and length are free. Jit it. Any function of
        the same parameters will do, so `plan.bind(model.apply)` trains what `slim(model.predict, ...)` cut; an output that is a
        parameter's next value comes out cut as well.

        Raises:
          ValueError: in a call, when the plan tears apart what this function couples, or the tree is not the cut one.
        """

        @functools.wraps(apply, updated=())
        def small_apply(small: PyTree, *args: Any, **kwargs: Any) -> Any:
            names, leaves, treedef = tree.flatten(decompress(small))
            if set(names) != set(self.shapes):
                odd = sorted(set(names) ^ set(self.shapes))
                raise ValueError(f"the plan is for other parameters; first of {len(odd)} paths: {odd[0]}")
            for name, leaf in zip(names, leaves, strict=True):
                if jnp.shape(leaf) != self._small(name):
                    raise ValueError(
                        f"{name} has shape {jnp.shape(leaf)}, and {self._small(name)} is kept of it: pass plan.cut(params)"
                    )
            shapes = [
                jax.ShapeDtypeStruct(self.shapes[name], jnp.result_type(leaf)) for name, leaf in zip(names, leaves, strict=True)
            ]
            found, inputs = walked(apply, jax.tree.unflatten(treedef, shapes), *args, **kwargs)
            out = cut(found, self._keep(found), [*leaves, *inputs[len(leaves) :]])
            return jax.tree.unflatten(jax.tree.structure(found.program.outputs), out)

        return small_apply

    def cut_state(self, tx: optax.GradientTransformation, state: PyTree, params: PyTree) -> tuple[PyTree, tuple[str, ...]]:
        """The state of an optimiser, cut like its parameters.

        Arrays are found by their path, which ends as that of their parameter does (numbers after it aside), and by their shape: the
        parameter's own (moments, masks, averages); its own with some axes of length 1 (the accumulators of sm3), or without one
        axis (the factors of adafactor). Packed masks are unpacked and packed again. What is none of these and does not fit any
        more begins anew.

        Args:
          tx: the optimiser; its `init` on the smaller parameters says what the state looks like.
          state: of it, at full size.
          params: at full size, as the optimiser sees them.

        Returns:
          The smaller state, and the paths of what begins anew.

        >>> plan = Plan({"w": (3,)}, {"w": (np.array([0, 2]),)})
        >>> params, tx = {"w": jnp.arange(3.0)}, optax.trace(0.9)
        >>> plan.cut_state(tx, optax.TraceState({"w": jnp.array([1.0, 2.0, 3.0])}), params)[0].trace["w"].tolist()
        [1.0, 3.0]
        """

        def loose(state: PyTree) -> PyTree:
            return jax.tree.map(unpack, state, is_leaf=_is_packed)

        seen = tree.paths(params)
        places = dict(zip(seen, self._paths(seen), strict=True))
        names, old, treedef = tree.flatten(loose(state))
        _, new, expected = tree.flatten(loose(tx.init(self.cut(params))))
        if treedef != expected:
            raise ValueError("the state is not one of this optimiser on these parameters: their structures differ")
        out, begun = [], []
        packed = [_is_packed(leaf) for leaf in jax.tree.leaves(state, is_leaf=_is_packed)]
        for name, before, after, whole in zip(names, old, new, packed, strict=True):
            own = self._of_state(_of_parameter(name, places), jnp.shape(before), jnp.shape(after))
            begun += [name] if own is None else []
            smaller = after if own is None else taken(before, own)
            out.append(pack(smaller) if whole else smaller)
        return jax.tree.unflatten(treedef, out), tuple(begun)

    def then(self, other: "Plan") -> "Plan":
        """The plan of this surgery and another one of the smaller tree after it.

        >>> first, second = Plan({"w": (4,)}, {"w": (np.array([0, 2, 3]),)}), Plan({"w": (3,)}, {"w": (np.array([1, 2]),)})
        >>> first.then(second).kept["w"][0].tolist()
        [2, 3]
        """
        for path, shape in other.shapes.items():
            if path not in self.shapes or self._small(path) != tuple(shape):
                raise ValueError(
                    f"{path} of shape {tuple(shape)} is not what this plan leaves; make the second plan of the smaller tree"
                )
        chained = {
            path: tuple(a[b] for a, b in zip(self._axes(path), other._axes(path), strict=True))
            for path in {**self.kept, **other.kept}
        }
        return Plan(self.shapes, chained)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan as JSON, whole or not at all."""
        whole = {
            "format": _FORMAT,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "kept": {name: [own.tolist() for own in axes] for name, axes in self.kept.items()},
        }
        write(path, json.dumps(whole).encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no plan, or one of another format.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     Plan({"w": (3,)}, {"w": (np.array([0, 2]),)}).save(f"{directory}/plan.json")
        ...     print(Plan.load(f"{directory}/plan.json"))
        w: (3,) -> (2,)
        """
        try:
            whole = json.loads(Path(path).read_text(encoding="utf-8"))
            if whole["format"] != _FORMAT:
                raise ValueError(f"format {whole['format']}, and this version reads {_FORMAT}")
            shapes = {str(name): tuple(map(int, shape)) for name, shape in whole["shapes"].items()}
            kept = {str(name): tuple(np.array(own, np.int64) for own in axes) for name, axes in whole["kept"].items()}
            for name, axes in kept.items():
                sound = len(axes) == len(shapes[name]) and all(
                    own.ndim == 1 and (np.diff(own) > 0).all() and (own >= 0).all() and (own < n).all()
                    for own, n in zip(axes, shapes[name], strict=True)
                )
                if not sound:
                    raise ValueError(f"what is kept of {name} is no part of {shapes[name]}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no plan: {error}") from error
        return cls(shapes, kept)

    def _axes(self, path: str) -> tuple[np.ndarray, ...]:
        return self.kept.get(path) or tuple(np.arange(n) for n in self.shapes[path])

    def _small(self, path: str) -> tuple[int, ...]:
        return tuple(len(own) for own in self._axes(path))

    def _paths(self, names: list[str]) -> list[str]:
        """The paths in the plan of the leaves of a tree: the whole one, or a subtree, whose paths all lack the same beginning."""
        begins = {path[: len(path) - len(names[0])] for path in self.shapes if path.endswith(f"/{names[0]}")} if names else set()
        fitting = [begin for begin in ("", *sorted(begins)) if all(begin + name in self.shapes for name in names)]
        if not fitting:
            odd = next((name for name in names if name not in self.shapes), "")
            raise ValueError(f"{odd} is no parameter of the plan")
        if len(fitting) > 1 and fitting[0]:
            raise ValueError(f"{names[0]} may be {' or '.join(begin + names[0] for begin in fitting)}: pass the whole tree")
        return [fitting[0] + name for name in names]

    def _checked(self, names: list[str], leaves: list[Any], shape_of: Callable[[str], tuple[int, ...]]) -> list[str]:
        """The paths in the plan of leaves whose shapes have to be those of it."""
        paths = self._paths(names)
        for name, path, leaf in zip(names, paths, leaves, strict=True):
            if jnp.shape(leaf) != shape_of(path):
                raise ValueError(f"{name} has shape {jnp.shape(leaf)}, and the plan is for {shape_of(path)}")
        return paths

    def _full(self, path: str, leaf: Any) -> Any:
        if path not in self.kept:
            return leaf
        return jnp.zeros(self.shapes[path], jnp.result_type(leaf)).at[np.ix_(*self._axes(path))].set(leaf)

    def _keep(self, found: Any) -> np.ndarray:
        """For every label of a walk whether it is kept."""
        labels, keep = found.labels, np.ones(len(found.labels), bool)
        for path, axes in self.kept.items():
            for axis, own in enumerate(axes):
                gone = np.setdiff1d(np.arange(self.shapes[path][axis]), own)
                of_axis = found.params[path].labels(axis)
                if (held := gone[labels.is_fixed(of_axis[gone])]).size:
                    why = labels.reason(of_axis[held[0]])
                    raise ValueError(f"{path}[{axis}]: index {held[0]} was cut, and in this function it cannot be: {why}")
                keep[labels.root(of_axis[gone])] = False
        for path, value in found.params.items():
            for axis, (left, own) in enumerate(zip(kept(labels, keep, value), self._axes(path), strict=True)):
                if not np.array_equal(left, own):
                    raise ValueError(
                        f"{path}[{axis}]: the plan keeps {len(own)} of {self.shapes[path][axis]} indices, but they are coupled to "
                        f"others of which {len(left)} are kept in this function: it is not the one that the plan was made for"
                    )
        return keep

    def _of_state(self, path: str | None, before: tuple[int, ...], after: tuple[int, ...]) -> list[np.ndarray] | None:
        """What is kept of an array in an optimiser's state, for each of its axes; None where that cannot be told."""
        if before == after:
            return [np.arange(n) for n in before]
        if path is None:
            return None
        shape, axes = self.shapes[path], self._axes(path)
        if len(before) == len(shape) and all(n in (1, m) for n, m in zip(before, shape, strict=True)):
            own = [left if n == m else np.arange(1) for n, m, left in zip(before, shape, axes, strict=True)]
        else:
            without = [k for k in range(len(shape)) if shape[:k] + shape[k + 1 :] == before]
            fitting = [[*axes[:k], *axes[k + 1 :]] for k in without]
            fitting = [own for own in fitting if tuple(map(len, own)) == after]
            if not fitting or any(not all(map(np.array_equal, fitting[0], other)) for other in fitting[1:]):
                return None
            own = fitting[0]
        return own if tuple(map(len, own)) == after else None


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedMask)


def _of_parameter(name: str, places: Mapping[str, str]) -> str | None:
    """The path in the plan of the parameter that an array of a state belongs to: the longest one that its own ends in."""
    parts = name.split("/")
    while True:
        for start in range(len(parts)):
            if (path := places.get("/".join(parts[start:]))) is not None:
                return path
        if not parts or not parts[-1].isdigit():
            return None
        parts.pop()


def mask(params: PyTree, plan: Plan) -> PyTree:
    """The tree at full size, with zeros where the plan cuts: what the smaller model computes, to look at before.

    Args:
      params: as `Plan.cut` takes it.
      plan: of it.

    >>> mask({"w": np.ones(3)}, Plan({"w": (3,)}, {"w": (np.array([0, 2]),)}))["w"].tolist()
    [1.0, 0.0, 1.0]
    """
    return plan.scatter(plan.cut(params))
