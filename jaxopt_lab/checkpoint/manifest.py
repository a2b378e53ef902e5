"""The structure of a tree as JSON, so that a fresh process rebuilds it without a target: every container, class and static field.

Arrays are listed by path, shape and dtype, and stored elsewhere under their number. Classes are written `module:qualname` and found
again only through an allow-list, and only if they are NamedTuples or dataclasses (or one of three containers of Flax and Python).
Nothing is ever unpickled.
"""

import collections
import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Array, PyTree

__all__ = ["ALLOWED_PACKAGES", "check_arrays", "children", "claimed", "describe", "differences", "part", "rebuild", "unfit"]

ALLOWED_PACKAGES = ("jaxopt_lab", "optax", "flax", "chex", "collections")
"""Packages whose NamedTuples and dataclasses may be restored; other classes are handed over by the caller."""

_FORMAT = 1
_FROZEN_DICT, _STATE, _VARIABLES = "flax.core.frozen_dict:FrozenDict", "flax.nnx.statelib:State", "flax.nnx.variablelib"


def describe(
    tree: PyTree, classes: Sequence[type] = (), *, abstract: bool = False
) -> tuple[dict[str, Any], list[Array | np.ndarray]]:
    """Takes a tree apart into its structure, which is plain JSON, and its arrays.

    Args:
      tree: nested dicts, lists, tuples, None, NamedTuples, dataclasses (of Flax, Chex, Equinox: compressed leaves among them), NNX
        states; its leaves are arrays, typed keys and Python bools, ints, floats and strings.
      classes: NamedTuple and dataclass types of the caller's own that occur in it.
      abstract: takes `jax.ShapeDtypeStruct`s for arrays as well, and computes nothing: a target to restore onto.

    Returns:
      The structure, and the arrays in the order of its `"arrays"`; typed keys come as their key data, or where the tree is abstract
      as they are.

    Raises:
      TypeError: a class is not allowed, or a leaf or static field is of a kind that cannot be stored; the message names its path.

    >>> structure, arrays = describe({"kernel": jnp.ones((2, 3)), "steps": 4})
    >>> structure["arrays"]
    [{'path': 'kernel', 'shape': [2, 3], 'dtype': 'float32'}]
    >>> rebuild(structure, arrays)["steps"]
    4
    """
    records: list[dict[str, Any]] = []
    arrays: list[Any] = []

    def leaf(x: Any, path: str) -> dict[str, Any]:
        record: dict[str, Any] = {"path": path}
        original = x
        if not isinstance(x, np.ndarray) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            record["key"] = _key_implementation(x, path)
            x = jax.eval_shape(jax.random.key_data, x) if abstract else jax.random.key_data(x)
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            raise TypeError(f"{path} has dtype {x.dtype}, which JAX narrows unless jax_enable_x64 is set; convert it first")
        if x.dtype.kind not in "biufcV" or x.dtype.names:
            raise TypeError(f"{path} has dtype {x.dtype}, which cannot be stored")
        arrays.append(original if abstract else x)
        records.append({**record, "shape": list(x.shape), "dtype": str(x.dtype)})
        return {"array": len(arrays) - 1}

    def node(x: Any, path: str) -> Any:  # noqa: PLR0911 (one return a kind of node)
        if x is None:
            return {"none": True}
        if isinstance(x, (bool, int, float, str)):
            # numpy's float64 and str_ are kinds of Python's, and are stored as those.
            return {"value": _scalar(x.item() if isinstance(x, np.generic) else x, path)}
        if isinstance(x, np.generic):
            x = np.asarray(x)
        if isinstance(x, (jax.Array, np.ndarray)) or (abstract and isinstance(x, jax.ShapeDtypeStruct)):
            return leaf(x, path)
        kind = type(x)
        if kind in (list, tuple):
            return {kind.__name__: [node(child, _join(path, i)) for i, child in enumerate(x)]}
        name = _name(kind)
        if kind is dict:
            return {"dict": items(x, path)}
        if kind is collections.OrderedDict or name in (_FROZEN_DICT, _STATE):
            return {"mapping": name, "items": items(dict(x), path)}
        _check_class(kind, classes, path)
        if kind.__module__ == _VARIABLES:
            return {"variable": name, "child": node(x.get_value(), path)}
        if _is_named_tuple(kind):
            return {"namedtuple": name, "fields": {f: node(getattr(x, f), _join(path, f)) for f in kind._fields}}
        children = _children(x)
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return {
            "dataclass": name,
            "fields": {f: node(v, _join(path, f)) for f, v in fields.items() if f in children},
            "static": {f: _scalar(v, _join(path, f)) for f, v in fields.items() if f not in children},
        }

    def items(x: dict, path: str) -> list:
        return [
            [_scalar(key, f"the key {key!r} in {path or 'the tree'}"), node(child, _join(path, key))] for key, child in x.items()
        ]

    return {"format": _FORMAT, "arrays": records, "tree": node(tree, "")}, arrays


def rebuild(structure: dict[str, Any], arrays: Sequence[Any], classes: Sequence[type] = ()) -> PyTree:
    """Puts a tree together again: the inverse of `describe`.

    Args:
      structure: what `describe` gave, perhaps through JSON.
      arrays: its arrays, in order; they come back as JAX arrays.
      classes: the caller's own classes, as in `describe`.

    Raises:
      TypeError: the structure names a class that is not allowed.
      ValueError: arrays differ from what the structure says, or it was written by a later version.

    >>> rebuild(*describe((1.5, None, {"mask": jnp.array([True])})))
    (1.5, None, {'mask': Array([ True], dtype=bool)})
    """
    if structure.get("format") != _FORMAT:
        raise ValueError(f"the manifest has format {structure.get('format')!r}; this version reads {_FORMAT}")
    check_arrays(structure, arrays)
    ready = [_restored(record, array) for record, array in zip(structure["arrays"], arrays, strict=True)]

    def node(x: dict[str, Any]) -> Any:  # noqa: PLR0911 (one return a kind of node)
        match x:
            case {"array": index}:
                return ready[index]
            case {"value": value}:
                return _unscalar(value)
            case {"none": True}:
                return None
            case {"list": children}:
                return [node(child) for child in children]
            case {"tuple": children}:
                return tuple(node(child) for child in children)
            case {"dict": pairs}:
                return items(pairs)
            case {"mapping": name, "items": pairs}:
                return _mapping(name)(items(pairs))
            case {"variable": name, "child": child}:
                return _resolve(name, classes)(node(child))
            case {"namedtuple": name, "fields": fields}:
                return _resolve(name, classes)(**{f: node(child) for f, child in fields.items()})
            case {"dataclass": name, "fields": fields, "static": static}:
                values = {f: node(child) for f, child in fields.items()} | {f: _unscalar(v) for f, v in static.items()}
                return _build(_resolve(name, classes), values)
            case _:
                raise ValueError(f"the manifest holds a node of unknown kind: {str(x)[:80]}")

    def items(pairs: list) -> dict:
        return {_unscalar(key): node(child) for key, child in pairs}

    return node(structure["tree"])


def differences(structure: dict[str, Any], shapes: Sequence[tuple[tuple[int, ...], str] | None]) -> list[str]:
    """What is wrong with the arrays found, by path; nothing where they fit.

    Args:
      structure: what `describe` gave.
      shapes: the `(shape, dtype)` found for each of its arrays, or None where there is none.

    >>> structure, _ = describe({"kernel": jnp.ones((2, 3))})
    >>> differences(structure, [((2, 4), "float32")])
    ['kernel: expected float32(2, 3), found float32(2, 4)']
    """
    found = []
    for record, got in zip(structure["arrays"], shapes, strict=True):
        want = (tuple(record["shape"]), record["dtype"])
        if got is None:
            found.append(f"{record['path']}: missing")
        elif got != want:
            found.append(f"{record['path']}: expected {want[1]}{want[0]}, found {got[1]}{got[0]}")
    return found


def check_arrays(structure: dict[str, Any], arrays: Sequence[Any], source: str = "the checkpoint") -> None:
    """Raises a ValueError in one line if any array (None is a missing one) has another shape or dtype than the structure says.

    >>> check_arrays(describe({"a": jnp.ones(2)})[0], [jnp.ones(3)], "step 3")
    Traceback (most recent call last):
      ...
    ValueError: step 3 does not fit its manifest: a: expected float32(2,), found float32(3,)
    """
    wrong = differences(structure, [None if a is None else (tuple(a.shape), str(a.dtype)) for a in arrays])
    if wrong:
        raise ValueError(unfit(wrong, source))


def unfit(wrong: Sequence[str], source: str) -> str:
    """What to say of arrays that differ from their manifest, in one line.

    >>> unfit(["a: missing"], "step 3")
    'step 3 does not fit its manifest: a: missing'
    """
    more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return f"{source} does not fit its manifest: {'; '.join(wrong[:5])}{more}"


def part(structure: dict[str, Any], path: str) -> dict[str, Any]:
    """The structure of one branch of a tree, by the path of its root; its `"numbers"` are those of its arrays in the whole.

    Args:
      structure: what `describe` gave.
      path: keys, fields and numbers, joined by "/".

    Raises:
      ValueError: there is no such branch; the message lists those there are at the last place that is.

    >>> structure, _ = describe({"params": {"kernel": jnp.ones(2)}, "opt": (jnp.zeros(3),)})
    >>> branch = part(structure, "opt")
    >>> branch["numbers"], branch["arrays"]
    ([1], [{'path': 'opt/0', 'shape': [3], 'dtype': 'float32'}])
    >>> part(structure, "params/bias")
    Traceback (most recent call last):
      ...
    ValueError: the checkpoint has no 'params/bias'; in 'params' there are: kernel
    """
    node, here, rest = structure["tree"], "", path
    while rest:
        below = {str(name): child for name, child in children(node)}
        # A key may hold a "/" itself; of two that fit the longer is meant.
        name = max((name for name in below if rest == name or rest.startswith(f"{name}/")), key=len, default=None)
        if name is None:
            there = ", ".join(below) or "no branches"
            raise ValueError(f"the checkpoint has no {path!r}; in {here or 'the tree'!r} there are: {there}")
        node, here, rest = below[name], _join(here, name), rest[len(name) + 1 :]
    numbers: list[int] = []

    def renumbered(node: dict[str, Any]) -> dict[str, Any]:
        match node:
            case {"array": index}:
                numbers.append(index)
                return {"array": len(numbers) - 1}
            case {"list": below} | {"tuple": below}:
                return {next(iter(node)): [renumbered(child) for child in below]}
            case {"dict": pairs} | {"items": pairs}:
                return {**node, "dict" if "dict" in node else "items": [[key, renumbered(child)] for key, child in pairs]}
            case {"fields": fields}:
                return {**node, "fields": {name: renumbered(child) for name, child in fields.items()}}
            case {"child": child}:
                return {**node, "child": renumbered(child)}
            case _:
                return node

    branch = renumbered(node)
    return {**structure, "tree": branch, "arrays": [structure["arrays"][i] for i in numbers], "numbers": numbers}


def children(node: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """The children of a node of a structure, with their keys, fields or numbers; none of a leaf.

    >>> children(describe({"a": (1, 2)})[0]["tree"])
    [('a', {'tuple': [{'value': 1}, {'value': 2}]})]
    """
    match node:
        case {"list": below} | {"tuple": below}:
            return list(enumerate(below))
        case {"dict": pairs} | {"items": pairs}:
            return [(_unscalar(key), child) for key, child in pairs]
        case {"fields": fields}:
            return list(fields.items())
        case {"child": child}:
            return [("", child)]
        case _:
            return []


def claimed(structure: dict[str, Any]) -> int:
    """How many bytes the arrays of a manifest say that they have.

    Raises:
      ValueError: a shape or dtype is none.

    >>> claimed(describe({"a": jnp.ones((2, 3)), "b": jnp.ones(2, jnp.bool_)})[0])
    26
    """
    total = 0
    for record in structure["arrays"]:
        shape, name = record["shape"], record["dtype"]
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{record['path']} has the shape {str(shape)[:80]}")
        try:
            dtype = jnp.dtype(name) if isinstance(name, str) else np.dtype(object)
        except TypeError:
            dtype = np.dtype(object)
        if str(dtype) != name or dtype.kind not in "biufcV" or dtype.names:
            raise ValueError(f"{record['path']} has the dtype {str(name)[:40]!r}, which is none of an array")
        total += math.prod(shape) * dtype.itemsize
    return total


def _join(path: str, part: Any) -> str:
    return f"{path}/{part}" if path else str(part)


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _is_named_tuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def _children(x: Any) -> set[str]:
    """The fields of a dataclass that are nodes of the tree; the others are static."""
    one_level, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    return {jax.tree_util.keystr(path[:1], simple=True) for path, _ in one_level}


def _check_class(kind: type, classes: Sequence[type], path: str = "") -> None:
    where = f"{path} is a {_name(kind)}" if path else _name(kind)
    package = kind.__module__.split(".")[0]
    if kind not in classes and (package not in ALLOWED_PACKAGES or "<locals>" in kind.__qualname__):
        raise TypeError(f"{where}, a class that is not allowed in a checkpoint; pass classes=({kind.__name__},) if you trust it")
    variable = kind.__module__ == _VARIABLES and hasattr(kind, "get_value")
    if not (_is_named_tuple(kind) or dataclasses.is_dataclass(kind) or variable):
        raise TypeError(f"{where}, which is neither a NamedTuple nor a dataclass and cannot be stored in a checkpoint")


def _resolve(name: str, classes: Sequence[type]) -> type:
    for kind in classes:
        if _name(kind) == name:
            _check_class(kind, classes)
            return kind
    module, _, qualname = name.partition(":")
    if module.split(".")[0] not in ALLOWED_PACKAGES:
        raise TypeError(f"the checkpoint names {name}, a class that is not allowed; pass classes=({qualname},) if you trust it")
    try:
        kind = importlib.import_module(module)
        for part in qualname.split("."):
            kind = getattr(kind, part)
    except (ImportError, AttributeError):
        raise TypeError(f"the checkpoint names {name}, which does not exist in this installation") from None
    if not isinstance(kind, type) or _name(kind) != name:
        raise TypeError(f"the checkpoint names {name}, which is not a class of that name")
    _check_class(kind, classes)
    return kind


def _mapping(name: str) -> Any:
    if name == _name(collections.OrderedDict):
        return collections.OrderedDict
    if name == _FROZEN_DICT:
        from flax.core import FrozenDict

        return FrozenDict
    if name == _STATE:
        from flax.nnx import State

        return State
    raise TypeError(f"the checkpoint names {name}, which is not a mapping that is allowed")


def _build(kind: type, values: dict[str, Any]) -> Any:
    expected = {f.name for f in dataclasses.fields(kind)}
    if set(values) != expected:
        odd = ", ".join(sorted(expected ^ set(values)))
        raise ValueError(f"the checkpoint's {_name(kind)} has other fields than this installation's: {odd}")
    # A generated constructor checks what the class checks; one written by hand may want other arguments, and is passed by.
    if kind.__dataclass_params__.init and all(f.init for f in dataclasses.fields(kind)):
        return kind(**values)
    made = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _key_implementation(key: Array, path: str) -> str:
    if isinstance(key, jax.Array):
        name = jax.random.key_impl(key)
    else:
        # The dtype alone says it, and within a trace there is no more.
        found: list[Any] = []
        jax.eval_shape(lambda x: found.append(jax.random.key_impl(x)), key)
        name = found[0]
    if not isinstance(name, str):
        raise TypeError(f"{path} is a key of an implementation without a name, {key.dtype}; store the key it was made from")
    return name


def _restored(record: dict[str, Any], array: Any) -> Array:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(f"{record['path']} has dtype {array.dtype}, which needs jax_enable_x64; it is never narrowed silently")
    out = array if isinstance(array, jax.Array) else jnp.asarray(array)
    return jax.random.wrap_key_data(out, impl=record["key"]) if "key" in record else out


def _scalar(x: Any, path: str) -> Any:
    """A Python scalar, dtype or tuple of them as JSON that remembers its type and every bit."""
    if x is None or type(x) in (bool, int, str):
        return x
    if type(x) is float:
        return x if math.isfinite(x) else {"float": str(x)}
    if isinstance(x, np.dtype) or (isinstance(x, type) and issubclass(x, np.generic)):
        return {"dtype": str(jnp.dtype(x))}
    if type(x) is tuple:
        return {"tuple": [_scalar(child, path) for child in x]}
    raise TypeError(f"{path} holds a {type(x).__name__}, which cannot be stored; arrays, numbers, strings, dtypes and tuples can")


def _unscalar(x: Any) -> Any:
    match x:
        case {"float": text}:
            return float(text)
        case {"dtype": name}:
            return jnp.dtype(name)
        case {"tuple": children}:
            return tuple(_unscalar(child) for child in children)
        case None | bool() | int() | float() | str():
            return x
        case _:
            raise ValueError(f"the manifest holds a value of unknown kind: {str(x)[:80]}")
