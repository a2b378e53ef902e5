"""The shape of the package: floors, no circles, documented names, imports that cost nothing, nothing unpickled."""

import ast
import functools
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import jaxopt_lab

PACKAGE = "jaxopt_lab"
ROOT = Path(jaxopt_lab.__file__).parent

FLOORS = {
    "core": 0,
    "schedules": 1,
    "losses": 1,
    "regularize": 1,
    "prune": 1,
    "compress": 1,
    "nets": 1,
    "surgery": 2,
    "checkpoint": 2,
    "data": 2,
    "train": 3,
    "parallel": 3,
    "report": 4,
    "search": 4,
    "export": 4,
    "auto": 5,
    "cli": 6,
    "supervise": 6,
}

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def module_name(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def folder(name: str) -> str | None:
    """The part of the package that a module belongs to; None for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def is_type_checking(node: ast.AST) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def import_nodes(node: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Every import below a node, those inside functions too; what only a type checker reads is left out."""
    if is_type_checking(node):
        return [found for child in node.orelse for found in import_nodes(child)]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [node]
    return [found for child in ast.iter_child_nodes(node) for found in import_nodes(child)]


def imported(source: str, name: str, is_package: bool) -> list[tuple[str, int]]:
    """The full names that a module imports, with the line of each: `from a import b` gives `a.b`, be `b` a module or not."""
    found = []
    for node in import_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
            continue
        base = name.split(".")
        base = base[: len(base) - node.level + is_package] if node.level else []
        prefix = ".".join([*base, *([node.module] if node.module else [])])
        found += [(f"{prefix}.{alias.name}", node.lineno) for alias in node.names]
    return found


def own_module(full: str) -> str | None:
    """The module of this package that a full name lies in: the name itself, or the nearest above it."""
    while full and full not in MODULES:
        full = full.rpartition(".")[0]
    return full or None


@functools.cache
def imports_of(name: str) -> list[tuple[str, int]]:
    """What a module imports; read when it is asked for, since every worker imports this file."""
    return imported(MODULES[name].read_text(), name, MODULES[name].name == "__init__.py")


def upward(name: str, imports: list[tuple[str, int]]) -> list[str]:
    """What a module imports from its own height or above, outside its own folder."""
    here, wrong = folder(name), []
    for full, line in imports:
        target = own_module(full) if full.split(".")[0] == PACKAGE else None
        if target is None:
            continue
        there = folder(target)
        if there is None:
            wrong.append(f"{name}:{line} imports the package itself; import the part that it needs")
        elif here is not None and there != here and FLOORS[there] >= FLOORS[here]:
            wrong.append(f"{name}:{line} (floor {FLOORS[here]}) imports {full} (floor {FLOORS[there]})")
    return wrong


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """A circle among the edges, if there is one, as the way round it."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str] | None:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return None
        for target in sorted(edges.get(node, ())):
            if found := walk(target, [*way, node]):
                return found
        done.add(node)
        return None

    return next((found for node in sorted(edges) if (found := walk(node, []))), None)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_lower_floors(name):
    here = folder(name)
    assert here is None or here in FLOORS, f"{name}: {here} has no floor; give it one in this table and in the package's docstring"
    faults = upward(name, imports_of(name))
    assert not faults, "; ".join(faults)


def test_there_are_no_circles():
    edges = {name: {target for full, _ in imports_of(name) if (target := own_module(full)) and target != name} for name in MODULES}
    assert circle(edges) is None


def test_the_walk_sees_what_it_should():
    """The checks above can fail: each kind of import is found, and an upward one, a circle and the package itself are told."""
    source = """
import os, jaxopt_lab.train.step
from typing import TYPE_CHECKING
from jaxopt_lab.core import tree
from . import sibling
from ..core.types import Array
if TYPE_CHECKING:
    from jaxopt_lab import cli
else:
    import json
def later():
    from jaxopt_lab import auto
"""
    names = [full for full, _ in imported(source, "jaxopt_lab.prune.masks", is_package=False)]
    assert names == [
        "os", "jaxopt_lab.train.step", "typing.TYPE_CHECKING", "jaxopt_lab.core.tree", "jaxopt_lab.prune.sibling",
        "jaxopt_lab.core.types.Array", "json", "jaxopt_lab.auto",
    ]  # fmt: skip
    assert imported("from . import a", "jaxopt_lab.prune", is_package=True) == [("jaxopt_lab.prune.a", 1)]
    assert upward("jaxopt_lab.core.tree", [("jaxopt_lab.data.streams.batches", 7)]) == [
        "jaxopt_lab.core.tree:7 (floor 0) imports jaxopt_lab.data.streams.batches (floor 2)"
    ]
    assert upward("jaxopt_lab.prune.masks", [("jaxopt_lab.regularize", 1)])
    assert upward("jaxopt_lab.prune.masks", [("jaxopt_lab.__version__", 1)])
    assert not upward("jaxopt_lab.prune.masks", [("jaxopt_lab.core.tree.select", 1), ("jaxopt_lab.prune", 2), ("jax", 3)])
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def is_ours(thing: object) -> bool:
    return (getattr(thing, "__module__", None) or "").split(".")[0] == PACKAGE


def undocumented(name: str, module: ModuleType) -> list[str]:
    """What the public names of a module lack."""
    faults = []
    if not (module.__doc__ or "").strip():
        faults.append(f"{name} has no docstring")
    listed = getattr(module, "__all__", None)
    if listed is None:
        public = [
            key for key, value in vars(module).items() if not key.startswith("_") and getattr(value, "__module__", "") == name
        ]
        return faults + ([f"{name} has no __all__, and defines {', '.join(public)}"] if public else [])
    for key in listed:
        if not hasattr(module, key):
            faults.append(f"{name}.__all__ lists {key}, which does not exist")
            continue
        thing = getattr(module, key)
        # A name is judged where it is defined, not wherever it is passed on; a plain value has its comment, not a docstring.
        if not callable(thing) or not is_ours(thing) or thing.__module__ != name:
            continue
        doc = inspect.getdoc(thing) or ""
        if not doc.strip() or (inspect.isclass(thing) and not (thing.__doc__ or "").strip()):
            faults.append(f"{name}.{key} has no docstring")
        elif not inspect.isclass(thing) and ">>>" not in doc:
            faults.append(f"{name}.{key} has no doctest")
    return faults


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name):
    faults = undocumented(name, importlib.import_module(name))
    assert not faults, "; ".join(faults)


def test_the_check_of_documentation_can_fail():
    module = ModuleType("jaxopt_lab.made_up")
    exec("def bare(): ...\ndef told(): 'Told.'\ndef shown(): 'Shown: >>> 1'\nclass Bare: ...", vars(module))
    assert undocumented(module.__name__, module) == [
        "jaxopt_lab.made_up has no docstring",
        "jaxopt_lab.made_up has no __all__, and defines bare, told, shown, Bare",
    ]
    module.__doc__, module.__all__ = "Made up.", ["bare", "told", "shown", "Bare", "missing"]
    assert undocumented(module.__name__, module) == [
        "jaxopt_lab.made_up.bare has no docstring",
        "jaxopt_lab.made_up.told has no doctest",
        "jaxopt_lab.made_up.Bare has no docstring",
        "jaxopt_lab.made_up.__all__ lists missing, which does not exist",
    ]


@pytest.mark.parametrize(
    ("statement", "kept_out"),
    [
        ("import jaxopt_lab", {"jax", "numpy", "flax", "optax"}),
        ("import jaxopt_lab.cli", {"jax", "numpy", "flax", "optax", "tyro"}),
        ("import jaxopt_lab.supervise", {"jax", "numpy", "flax", "optax", "tyro"}),
        ("import jaxopt_lab.data", {"jax", "sklearn", "scipy"}),
        (
            "import jaxopt_lab as lab; lab.prune.sparsify",
            {"quax", "orbax", "sklearn", "matplotlib", "tyro", "flax.nnx"},
        ),
        ("import jaxopt_lab as lab; lab.search.population", {"optuna", "ray", "sqlalchemy", "quax", "orbax", "matplotlib", "tyro"}),
    ],
)
def test_an_import_brings_in_no_more_than_it_needs(statement, kept_out):
    program = f"import sys; {statement}; print(' '.join(sorted({kept_out!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.split() == []


def test_nothing_is_unpickled():
    """A file from elsewhere must never run code: neither a pickle's, nor one that hides in an array file."""
    found = [
        f"{name}:{line} imports {full}" for name in MODULES for full, line in imports_of(name) if UNPICKLERS & set(full.split("."))
    ]
    found += [
        f"{name}:{node.value.lineno} passes allow_pickle"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True) is not False
    ]
    assert not found
