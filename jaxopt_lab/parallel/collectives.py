"""What a compiled program exchanges between devices, read from its text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Collective", "collectives"]

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,<=]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One exchange of a compiled program.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute" or
        "collective-broadcast".
      bytes: of its larger end on one device: what is summed, what is gathered, or what there was to scatter.
      count: how often it runs in one run of the program, by the loops that it stands in.
      arrays: how many arrays it exchanges at once.
      conditional: whether it stands in a branch, which may not be taken; `count` is for one that is.
      bounded: whether the compiler knew how long those loops are; of one that it did not know, `count` is for one turn.
    """

    kind: str
    bytes: int
    count: int
    arrays: int
    conditional: bool
    bounded: bool


def collectives(program: Any) -> list[Collective]:
    """Every collective operation of a compiled program, in the order of its text.

    What XLA has made of a program, not what was asked for: gradients that it sums together are one all-reduce of many arrays. One
    that is split in a start and an end counts once.

    Args:
      program: what `jax.jit(f).lower(...).compile()` gives, or its text.

    Raises:
      ValueError: it is no compiled program, such as one that is only lowered.

    >>> text = '''HloModule jit_f
    ... ENTRY %main (x: f32[4]) -> (f32[4], bf16[2,3]) {
    ...   %x = f32[4]{0} parameter(0)
    ...   %y = bf16[2,3]{1,0} constant(0)
    ...   ROOT %sum = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%add
    ... }'''
    >>> collectives(text)
    [Collective(kind='all-reduce', bytes=28, count=1, arrays=2, conditional=False, bounded=True)]
    """
    text = program if isinstance(program, str) else program.as_text() if hasattr(program, "as_text") else ""
    if not text.lstrip().startswith("HloModule"):
        raise ValueError(
            f"collectives reads a compiled program or its text, as jax.jit(f).lower(...).compile(); got {type(program).__name__} "
            f"{text[:40]!r}"
        )
    entry, computations = _parse(text)
    return [] if entry is None else list(_walk(entry, computations, 1, False, True))


@dataclass
class _Computation:
    """The instructions of one computation: name -> (type, operation, the rest of the line)."""

    instructions: dict[str, tuple[str, str, str]] = field(default_factory=dict)


def _parse(text: str) -> tuple[str | None, dict[str, _Computation]]:
    entry, current, computations = None, None, {}
    for line in text.splitlines():
        if (found := _INSTRUCTION.match(line)) and current is not None:
            kind, rest = _type_of(found[2])
            if operation := _OPERATION.match(rest):
                current.instructions[found[1]] = kind, operation[1], rest[operation.end() :]
        elif found := _COMPUTATION.match(line):
            current = computations[found[2]] = _Computation()
            entry = found[2] if found[1] else entry
    return entry, computations


def _type_of(text: str) -> tuple[str, str]:
    """The type at the beginning of an instruction, and what comes after."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    end = _closing(text)
    return text[: end + 1], text[end + 1 :]


def _closing(text: str, depth: int = 0) -> int:
    """Where the parenthesis closes that the text begins with, or that was opened before it."""
    for k, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return k
    return len(text)


def _walk(name: str, computations: dict[str, _Computation], count: int, conditional: bool, bounded: bool) -> Iterator[Collective]:
    """The collectives of a computation and of those that it calls."""
    if name not in computations:
        return
    here = computations[name]
    for kind, operation, rest in here.instructions.values():
        base = operation.removesuffix("-start")
        if base in _KINDS:
            size, arrays = _ends(kind, operation, rest, here)
            yield Collective(base, size, count, arrays, conditional, bounded)
            continue
        times, known = count, bounded
        if operation == "while":
            trips = _TRIPS.search(rest)
            times, known = count * int(trips[1] if trips else 1), bounded and trips is not None
        for called in _CALLED.findall(rest):
            yield from _walk(called, computations, times, conditional, known)
        for listed, yes, no in _BRANCHES.findall(rest):
            for called in re.findall(r"[\w.\-]+", f"{listed} {yes} {no}"):
                yield from _walk(called, computations, count, True, bounded)


def _ends(kind: str, operation: str, rest: str, here: _Computation) -> tuple[int, int]:
    """The bytes of the larger end of a collective, and how many arrays it exchanges."""
    names = re.findall(r"%([\w.\-]+)", rest[: _closing(rest, 1)])
    given = " ".join(here.instructions[name][0] for name in names if name in here.instructions)
    result = kind
    if operation in ("all-gather-start", "collective-permute-start"):
        # A start gives what it was given, what comes of it, and sometimes more.
        result = _parts(kind)[1]
    return max(_bytes(given), _bytes(result)), len(names)


def _parts(kind: str) -> list[str]:
    """The types of a tuple's parts."""
    parts, depth = [""], 0
    for letter in kind[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _bytes(kind: str) -> int:
    """The bytes of all arrays of a type, as their elements count."""
    bits = 0
    for name, width, sides in _ARRAY.findall(kind):
        each = int(width) if width else 8 if name == "pred" else 0
        for side in sides.split(",") if sides else ():
            each *= int(side.removeprefix("<="))
        bits += each
    return -(-bits // 8)
