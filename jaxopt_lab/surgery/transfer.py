"""Weights of one network, taken into another by path."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.types import PyTree, Where

__all__ = ["Part", "Transfer", "transfer"]

Rename = Mapping[str, str | None] | Callable[[str], str | None]
"""From paths of the source to those of the target: prefixes, or a function; None leaves a leaf out."""


class Part(NamedTuple):
    """A leaf of which a corner was taken.

    Attributes:
      path: in the target.
      source: the shape there.
      target: the shape here.
    """

    path: str
    source: tuple[int, ...]
    target: tuple[int, ...]


class Transfer(NamedTuple):
    """What was taken from where; it prints as a list.

    Attributes:
      whole: paths of the target that were taken whole.
      parts: those of which a corner was taken.
      unlike: those whose shape fits in no way, or only in part and that was not asked for, or whose numbers would be others here
        (fractions as integers); they kept their values.
      kept: those that the source lacks.
      unused: paths of the source that were not taken.
    """

    whole: tuple[str, ...]
    parts: tuple[Part, ...]
    unlike: tuple[Part, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        rows = [f"{len(self.whole)} leaves taken whole"]
        rows += [f"{part.path}: a corner, {part.source} -> {part.target}" for part in self.parts]
        rows += [f"{part.path}: kept, {part.source} does not fit {part.target}" for part in self.unlike]
        rows += [f"{path}: kept, the source has none" for path in self.kept]
        return "\n".join([*rows, *(f"{path}: of the source, not used" for path in self.unused)])


def transfer(
    source: PyTree, target: PyTree, *, rename: Rename | None = None, where: Where = "**", partial: bool = False
) -> tuple[PyTree, Transfer]:
    r"""The target with the values of the source, wherever path and shape agree; and a report of all that was not so simple.

    .. math:: \theta_{i_1 \dots i_r} = \begin{cases} \theta^{source}_{i_1 \dots i_r} & i_k < n_k \text{ for all } k \\
              \theta^{target}_{i_1 \dots i_r} & \text{else} \end{cases}

    with the sides :math:`n` of the corner that both have. That is the whole leaf where shapes agree, and with `partial` one of the
    same rank otherwise: what a larger leaf has beyond it stays as it was drawn, and what a smaller one has no room for is cut. That
    is off by default, since a corner is of use only where both count the same things in the same order, and a misspelt width should
    be seen; the report names those leaves either way. A network that is cut so is another function: `slim` chooses what to cut.

    Args:
      source: any tree; compressed leaves become dense.
      target: the tree to fill, of drawn values. Its structure, shapes and dtypes stay.
      rename: how paths of the source read in the target. A mapping from beginnings of paths, in whole parts, to others
        (`{"encoder": "backbone/encoder"}`; the longest that fits counts; "" is the beginning of all), or a function of the path.
        None instead of a path leaves those leaves out.
      where: which leaves of the target may be taken (see `tree.select`).
      partial: take corners.

    Returns:
      `(params, report)`.

    Raises:
      ValueError: nothing is taken (the message names the nearest paths), two paths of the source become one, or a beginning in
        `rename` fits none.
      TypeError: a leaf of the target to be filled is compressed.

    >>> source = {"encoder": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones((3, 9))}}
    >>> target = {"body": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(4)}, "head": {"kernel": jnp.zeros((3, 2))}}
    >>> params, report = transfer(source, target, rename={"encoder": "body", "head": None}, partial=True)
    >>> params["body"]["bias"].tolist()
    [1.0, 1.0, 1.0, 0.0]
    >>> print(report)
    1 leaves taken whole
    body/bias: a corner, (3,) -> (4,)
    head/kernel: kept, the source has none
    head/kernel: of the source, not used
    """
    given = dict(zip(*tree.flatten(decompress(source))[:2], strict=True))
    names = _renamed(list(given), rename)
    chosen = tree.selected(target, where)
    found = {name: given[names[name]] for name in chosen if name in names}
    whole, parts, unlike = [], [], []
    for name, leaf in found.items():
        if tree.is_compressed(chosen[name]):
            raise TypeError(f"{name} of the target is stored as {type(chosen[name]).__name__}: fill dense weights, compress then")
        part = Part(name, tuple(jnp.shape(leaf)), tuple(jnp.shape(chosen[name])))
        alike = _alike(leaf, chosen[name])
        if part.source == part.target and alike:
            whole.append(name)
        else:
            fits = part.source and len(part.source) == len(part.target) and alike and not _is_key(leaf)
            (parts if partial and fits else unlike).append(part)
    taken = {*whole, *(part.path for part in parts)}
    if not taken:
        raise ValueError(_nothing(list(chosen), list(names), unlike))
    filled = {name: _corner(found[name], chosen[name]) for name in taken}
    report = Transfer(
        tuple(whole),
        tuple(parts),
        tuple(unlike),
        tuple(name for name in chosen if name not in found),
        tuple(path for path in given if not any(names.get(name) == path for name in taken)),
    )
    return tree.replaced(target, filled), report


def _renamed(paths: list[str], rename: Rename | None) -> dict[str, str]:
    """By path of the target, that of the source."""
    if isinstance(rename, Mapping):
        for beginning in rename:
            if not any(_begins(path, beginning) for path in paths):
                near = difflib.get_close_matches(beginning, paths, n=5, cutoff=0.0)
                raise ValueError(f"rename: no path of the source begins with {beginning}; the nearest: {', '.join(near)}")
    out: dict[str, str] = {}
    for path in paths:
        new = _new(path, rename)
        if new is None:
            continue
        if new in out:
            raise ValueError(f"rename takes both {out[new]} and {path} to {new}")
        out[new] = path
    return out


def _new(path: str, rename: Rename | None) -> str | None:
    if rename is None:
        return path
    if not isinstance(rename, Mapping):
        return rename(path)
    fitting = [beginning for beginning in rename if _begins(path, beginning)]
    if not fitting:
        return path
    longest = max(fitting, key=len)
    new = rename[longest]
    return None if new is None else "/".join(part for part in (new, path[len(longest) :].removeprefix("/")) if part)


def _begins(path: str, beginning: str) -> bool:
    return not beginning or path == beginning or path.startswith(f"{beginning}/")


def _alike(source: Any, target: Any) -> bool:
    """Whether one dtype can hold what the other does, but for digits: floats are no integers, complex numbers are not real."""
    if _is_key(source) or _is_key(target):
        return _is_key(source) == _is_key(target)
    kinds = (jnp.complexfloating, jnp.floating, jnp.integer, np.generic)
    ranks = [[jnp.issubdtype(jnp.result_type(leaf), kind) for kind in kinds].index(True) for leaf in (source, target)]
    return ranks[1] <= ranks[0]


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _corner(source: Any, target: Any) -> Any:
    """The target with what both have of the source, in its own dtype."""
    if _is_key(source):
        return source
    own = jnp.asarray(source).astype(jnp.result_type(target))
    if own.shape == jnp.shape(target):
        return own
    both = tuple(slice(min(n, m)) for n, m in zip(own.shape, jnp.shape(target), strict=True))
    return jnp.asarray(target).at[both].set(own[both])


def _nothing(wanted: list[str], names: list[str], unlike: list[Part]) -> str:
    if unlike:
        part = unlike[0]
        way = "; partial=True takes corners" if part.source and len(part.source) == len(part.target) else ""
        return f"nothing was taken: no shape fits; first of {len(unlike)}: {part.path}, {part.source} -> {part.target}{way}"
    pairs = [(difflib.get_close_matches(path, names, n=1, cutoff=0.0), path) for path in wanted[:5]]
    shown = ", ".join(f"{near[0] if near else '(nothing)'} for {path}" for near, path in pairs)
    return f"nothing was taken: no path of the source is one of the target; the nearest: {shown}; give `rename`"
