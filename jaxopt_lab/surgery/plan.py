"""What is kept of every parameter, and what is copied: the plan of a surgery, and what can be done with it."""

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
from jaxopt_lab.core.coupling.walk import Walked, cut
from jaxopt_lab.core.files import write
from jaxopt_lab.core.tracing.fingerprint import Fingerprint
from jaxopt_lab.core.tracing.programs import arrays_of, like
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.surgery.coupled import walked
from jaxopt_lab.surgery.states import Source, beginning, of_parameters, state_of

__all__ = ["Plan", "bound", "mask"]

_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which indices of every axis of every parameter are kept, and which are copied.

    Attributes:
      shapes: by path, of every array in the tree before.
      kept: by path, for each axis the indices that stay, in order, one that is copied as often as there are copies; parameters of
        which all stays as it is are not among them.
      shares: by path and axis, what each of those is multiplied by: where a product sums over copies, they share what one gave.
      forced: paths of parameters whose units count for something and are cut all the same (`slim(force=...)`).
      made_of: what the function was that the plan was made for; None where any will do that couples the parameters alike.
    """

    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, tuple[np.ndarray, ...]]
    shares: Mapping[str, Mapping[int, np.ndarray]] = dataclasses.field(default_factory=dict)
    forced: tuple[str, ...] = ()
    made_of: Fingerprint | None = None

    def __str__(self) -> str:
        rows = [f"{path}: {self.shapes[path]} -> {tuple(len(own) for own in axes)}" for path, axes in self.kept.items()]
        return "\n".join(rows) or "nothing is cut"

    def cut(self, params: PyTree) -> PyTree:
        """The smaller tree (or the larger one, of a plan that copies).

        Args:
          params: a tree of the paths and shapes that the plan was made for; or a subtree of it, such as the parameters without the
            running statistics. Compressed leaves become dense; what is no array stays.

        Raises:
          ValueError: a path is unknown, has another shape, or could be of several subtrees.

        >>> plan = Plan({"w": (3, 2)}, {"w": (np.array([0, 2]), np.array([0, 1]))})
        >>> plan.cut({"w": np.arange(6.0).reshape(3, 2)})["w"].tolist()
        [[0.0, 1.0], [4.0, 5.0]]
        """
        return self._each(decompress(params), self.shapes.__getitem__, self._part)

    def shapes_of(self, params: PyTree) -> PyTree:
        """The shapes and dtypes of the smaller tree.

        Args:
          params: as `cut` takes it, or its shapes.

        >>> Plan({"w": (3,)}, {"w": (np.array([0, 2]),)}).shapes_of({"w": jax.ShapeDtypeStruct((3,), "int8")})["w"].shape
        (2,)
        """
        arrays, rebuilt = arrays_of(decompress(params))
        return rebuilt([like(array, self._small(path)) for path, array in zip(_names(decompress(params)), arrays, strict=True)])

    def scatter(self, small: PyTree) -> PyTree:
        """The tree at full size again, with zeros where it was cut.

        Args:
          small: a tree as `cut` gives it.

        Raises:
          ValueError: as `cut`; or the plan copies units, of which there is no single one any more.

        >>> plan = Plan({"w": (3,)}, {"w": (np.array([0, 2]),)})
        >>> plan.scatter({"w": np.array([1.0, 2.0])})["w"].tolist()
        [1.0, 0.0, 2.0]
        """
        for path, axes in self.kept.items():
            for axis, own in enumerate(axes):
                if len(np.unique(own)) < len(own):
                    raise ValueError(f"{path}[{axis}]: the plan copies units, and from several copies there is no way back to one")
        return self._each(small, self._small, self._full)

    def bind(self, apply: Callable[..., Any], *, same: bool = True) -> Callable[..., Any]:
        """The function of the smaller tree: `plan.bind(apply)(plan.cut(params), *args)` is `apply(mask(params, plan), *args)`.

        A mean over units, as a normalisation (LayerNorm) takes it, is of those that are left: there the two differ.

        The function is traced anew in each call, at the shapes of its arguments: batch and length are free. Jit it. Any function of
        the same parameters will do, so `plan.bind(model.apply)` trains what `slim(model.predict, ...)` cut; an output that is a
        parameter's next value comes out cut as well.

        Args:
          apply: the function, of the tree at full size.
          same: whether, in a call of the kind that the plan was made with, it has to be the same program, and not just to couple
            the parameters alike. By another version of JAX it may be written otherwise, and nothing is compared.

        Raises:
          ValueError: in a call, when the plan tears apart what this function couples, when it is not the function that the plan
            was made for, or the tree is not the cut one.
        """
        unseen = [self.made_of] if same and self.made_of is not None else []

        @functools.wraps(apply, updated=())
        def small_apply(small: PyTree, *args: Any, **kwargs: Any) -> Any:
            small = decompress(small)
            names, (arrays, rebuilt) = _names(small), arrays_of(small)
            if set(names) != set(self.shapes):
                odd = sorted(set(names) ^ set(self.shapes))
                raise ValueError(f"the plan is for other parameters; first of {len(odd)} paths: {odd[0]}")
            for name, array in zip(names, arrays, strict=True):
                if array.shape != (own := self._small(name)):
                    raise ValueError(f"{name} has shape {array.shape}, and {own} is kept of it: pass plan.cut(params)")
            shapes = [self.shapes[name] for name in names]
            full = rebuilt([like(array, shape) for shape, array in zip(shapes, arrays, strict=True)])
            found, inputs = walked(apply, full, args, kwargs, self.forced)
            copies = self.copies(found)
            if unseen and unseen[0].meets(full, *args, **kwargs):
                if unseen[0].differs(apply, full, *args, **kwargs):
                    raise ValueError(
                        f"{getattr(apply, '__qualname__', apply)} is not the function that the plan was made for: at the shapes of "
                        "that time it is another program. Bind the original, or bind(apply, same=False) if the change is meant"
                    )
                unseen.clear()
            out = cut(found, copies, [*arrays, *inputs[len(arrays) :]])
            return jax.tree.unflatten(jax.tree.structure(found.program.outputs), out)

        return small_apply

    def cut_state(self, tx: optax.GradientTransformation, state: PyTree, params: PyTree) -> tuple[PyTree, tuple[str, ...]]:
        """The state of an optimiser, cut like its parameters.

        Arrays are found by their path, which ends as that of their parameter does (numbers after it aside), and by their shape: the
        parameter's own (moments, masks, averages), behind further axes if need be (the memory of L-BFGS); its own with some axes of
        length 1 (the accumulators of sm3), or without one axis (the factors of adafactor). Packed masks are unpacked and packed
        again. What is none of these and does not fit any more begins anew. Copies have the moments of what they are copies of.

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

        seen = tree.paths(params)
        begin = beginning(seen, self.shapes)
        own = {name: begin + name for name in seen}
        sources = {name: Source(name, self.kept[path]) for name, path in own.items() if path in self.kept}
        small, begun = state_of(tx, state, params, self.cut(params), sources)
        if not self.shares:
            return small, begun
        # An average of the parameters, which begins as they do, is shared by copies as they are.
        values, (names, leaves, treedef) = dict(zip(*tree.flatten(params)[:2], strict=True)), tree.flatten(small)
        for k, (found, first) in enumerate(zip(of_parameters(names, own), tree.flatten(tx.init(params))[1], strict=True)):
            if found is not None and np.shape(first) == np.shape(values[found[1]]) and np.array_equal(first, values[found[1]]):
                leaves[k] = self._shared(own[found[1]], leaves[k])
        return jax.tree.unflatten(treedef, leaves), begun

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
        shares: dict[str, dict[int, np.ndarray]] = {}
        for path in {**self.shares, **other.shares}:
            mine, theirs = self.shares.get(path, {}), other.shares.get(path, {})
            for axis in {**mine, **theirs}:
                chosen = other._axes(path)[axis]
                shares.setdefault(path, {})[axis] = mine.get(axis, np.ones(self._small(path)[axis]))[chosen] * theirs.get(axis, 1.0)
        forced = tuple(dict.fromkeys((*self.forced, *other.forced)))
        return Plan(self.shapes, chained, shares, forced, self.made_of)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan as JSON, whole or not at all."""
        whole = {
            "format": _FORMAT,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "kept": {name: [own.tolist() for own in axes] for name, axes in self.kept.items()},
            "shares": {name: {str(axis): own.tolist() for axis, own in axes.items()} for name, axes in self.shares.items()},
            "forced": list(self.forced),
            "made_of": None if self.made_of is None else dataclasses.asdict(self.made_of),
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
                if len(axes) != len(shapes[name]) or not all(map(_is_part, axes, shapes[name])):
                    raise ValueError(f"what is kept of {name} is no part of {shapes[name]}")
            shares = {
                str(name): {int(axis): np.array(own, np.float64) for axis, own in axes.items()}
                for name, axes in whole["shares"].items()
            }
            for name, axes in shares.items():
                for axis, own in axes.items():
                    if own.shape != kept[name][axis].shape:
                        raise ValueError(f"there are {own.size} shares of {name}[{axis}] for {kept[name][axis].size} indices")
            made_of = None if whole["made_of"] is None else _fingerprint(whole["made_of"])
            return cls(shapes, kept, shares, tuple(map(str, whole["forced"])), made_of)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no plan: {error}") from error

    def copies(self, found: Walked) -> np.ndarray:
        """For every label of a program that was walked how many there are of it, as `coupling.walk.cut` takes them.

        Raises:
          ValueError: the plan tears apart what this program couples.
        """
        labels, copies = found.labels, np.ones(len(found.labels), np.int64)
        for path, axes in self.kept.items():
            for axis, own in enumerate(axes):
                of_axis, counts = found.params[path].labels(axis), np.bincount(own, minlength=self.shapes[path][axis])
                held = np.flatnonzero(labels.is_fixed(of_axis) & (counts != 1))
                if held.size:
                    done, why = "copied" if counts[held[0]] else "cut", labels.reason(of_axis[held[0]])
                    raise ValueError(f"{path}[{axis}]: index {held[0]} was {done}, and in this function it cannot be: {why}")
                copies[labels.root(of_axis[counts != 1])] = counts[counts != 1]
        for path, value in found.params.items():
            for axis, (left, own) in enumerate(zip(kept(labels, copies, value), self._axes(path), strict=True)):
                if not np.array_equal(left, own):
                    raise ValueError(
                        f"{path}[{axis}]: the plan keeps {len(own)} of {self.shapes[path][axis]} indices, but they are coupled to "
                        f"others of which {len(left)} are kept in this function: it is not the one that the plan was made for"
                    )
        return copies

    def _axes(self, path: str) -> tuple[np.ndarray, ...]:
        return self.kept.get(path) or tuple(np.arange(n) for n in self.shapes[path])

    def _small(self, path: str) -> tuple[int, ...]:
        return tuple(len(own) for own in self._axes(path))

    def _each(self, params: PyTree, shape_of: Callable[[str], tuple[int, ...]], change: Callable[[str, Any], Any]) -> PyTree:
        """The tree with `change(path, array)` for each of its arrays, whose shapes have to be those that the plan says."""
        names, (arrays, rebuilt) = _names(params), arrays_of(params)
        paths = [beginning(names, self.shapes) + name for name in names]
        for name, path, array in zip(names, paths, arrays, strict=True):
            if tuple(array.shape) != shape_of(path):
                raise ValueError(f"{name} has shape {tuple(array.shape)}, and the plan is for {shape_of(path)}")
        # One program, and not one for each shape.
        return rebuilt(jax.jit(lambda arrays: [change(path, array) for path, array in zip(paths, arrays, strict=True)])(arrays))

    def _part(self, path: str, array: Array) -> Array:
        return self._shared(path, taken(array, self._axes(path)))

    def _shared(self, path: str, array: Array) -> Array:
        for axis, own in self.shares.get(path, {}).items():
            array = array * jnp.asarray(own, array.dtype).reshape([-1 if k == axis else 1 for k in range(array.ndim)])
        return array

    def _full(self, path: str, array: Array) -> Array:
        if path not in self.kept:
            return array
        return jnp.zeros(self.shapes[path], array.dtype).at[np.ix_(*self._axes(path))].set(array)


def _is_part(own: np.ndarray, n: int) -> bool:
    return own.ndim == 1 and own.size > 0 and own.min() >= 0 and own.max() < n


def _fingerprint(held: Mapping[str, Any]) -> Fingerprint:
    return Fingerprint(held["jax"], held["signature"], tuple(tuple(map(int, shape)) for shape in held["shapes"]), held["program"])


def _names(params: PyTree) -> list[str]:
    """The paths of the arrays in a tree."""
    names, leaves, _ = tree.flatten(params)
    return [name for name, leaf in zip(names, leaves, strict=True) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]


def mask(params: PyTree, plan: Plan) -> PyTree:
    """The tree at full size, with zeros where the plan cuts: what the smaller model computes, to look at before.

    Args:
      params: as `Plan.cut` takes it.
      plan: of it.

    >>> mask({"w": np.ones(3)}, Plan({"w": (3,)}, {"w": (np.array([0, 2]),)}))["w"].tolist()
    [1.0, 0.0, 1.0]
    """
    return plan.scatter(plan.cut(params))


def bound(apply: Any, plan: Plan) -> Any:
    """The function, or the `nets.Model`, of the smaller tree, whose plan was made for just that.

    >>> plan = Plan({"w": (3,)}, {"w": (np.array([0, 2]),)})
    >>> bound(lambda p, x: x * jnp.sum(p["w"]), plan)({"w": jnp.ones(2)}, 1.0)
    Array(2., dtype=float32)
    """
    if not hasattr(apply, "predict"):
        return plan.bind(apply, same=False)
    return apply._replace(
        init=lambda *args, **kwargs: plan.cut(apply.init(*args, **kwargs)),
        apply=plan.bind(apply.apply, same=False),
        predict=plan.bind(apply.predict, same=False),
    )
