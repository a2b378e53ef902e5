"""The table: every stage in one row, for a terminal, for a document, and for a program."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxopt_lab.core.files import finite, write
from jaxopt_lab.report.measure import Stage

__all__ = ["from_json", "markdown", "table", "to_json"]


def table(rows: Sequence[Stage], title: str | None = None) -> Any:
    """The stages as a `rich.table.Table`, to be printed by a `rich.console.Console`.

    >>> from rich.console import Console
    >>> Console(width=120).print(table([_EXAMPLE]))  # doctest: +ELLIPSIS
    <BLANKLINE>
    ...dense...97.50 %...96.62-98.16...
    """
    from rich import box
    from rich.table import Table

    titles, body = _cells(rows)
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False, pad_edge=False, padding=0)
    for k, heading in enumerate(titles):
        made.add_column(heading, justify="left" if k == 0 else "right", vertical="bottom", no_wrap=k > 0)
    for row in body:
        made.add_row(*row)
    return made


def markdown(rows: Sequence[Stage]) -> str:
    """The stages as a Markdown table.

    >>> print(markdown([_EXAMPLE]).splitlines()[1])
    | --- | ---: | ---: | ---: | ---: | ---: | ---: |
    """
    titles, body = _cells(rows)
    rule = ["---"] + ["---:"] * (len(titles) - 1)
    lines = [
        [heading.replace("-\n", "-").replace("\n", " ") for heading in titles],
        rule,
        *([cell.replace("|", "\\|") for cell in row] for row in body),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_json(rows: Sequence[Stage], path: str | Path) -> Path:
    """Writes the stages as a JSON list of objects, whole or not at all; a number that is not finite becomes null.

    >>> import tempfile
    >>> from_json(to_json([_EXAMPLE], Path(tempfile.mkdtemp()) / "stages.json")) == [_EXAMPLE]
    True
    """
    body = json.dumps([finite(row._asdict()) for row in rows], indent=2, allow_nan=False)
    return write(path, body.encode() + b"\n")


def from_json(path: str | Path) -> list[Stage]:
    """Reads the stages that `to_json` wrote.

    Raises:
      ValueError: the file holds something else.

    >>> import tempfile
    >>> from_json(to_json([], Path(tempfile.mkdtemp()) / "stages.json"))
    []
    """
    try:
        rows = [Stage(**row) for row in json.loads(Path(path).read_bytes())]
        return [r._replace(interval=tuple(r.interval), latency_ms={int(b): ms for b, ms in r.latency_ms.items()}) for r in rows]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds no stages of a report ({' '.join(str(error).split())}); write it with to_json") from None


def _cells(rows: Sequence[Stage]) -> tuple[list[str], list[list[str]]]:
    """Titles and a line of text a stage; a column that no stage fills is left out. Breaks in titles keep a table to 80 columns."""
    sizes = sorted({size for row in rows for size in row.latency_ms})
    extras = list(dict.fromkeys(title for row in rows for title in row.extra))
    columns: list[tuple[str, list[str]]] = [
        ("stage", [row.name for row in rows]),
        ("acc.", [f"{100 * row.accuracy:.2f} %" for row in rows]),
        ("95 %\ninterval", [f"{100 * row.interval[0]:.2f}-{100 * row.interval[1]:.2f}" for row in rows]),
        ("params", [f"{row.parameters:,}" for row in rows]),
        ("non-\nzeros", [f"{row.nonzeros:,}" for row in rows]),
        ("arrays", [_bytes(row.array_bytes) for row in rows]),
        ("dir", [_bytes(row.directory_bytes) for row in rows]),
        *((f"ms\nat {size}", [_number(row.latency_ms.get(size)) for row in rows]) for size in sizes),
        ("train\ns", [_number(row.seconds) for row in rows]),
        *((title, [_number(row.extra.get(title)) for row in rows]) for title in extras),
    ]
    kept = [(title, cells) for title, cells in columns if not rows or any(cell != "-" for cell in cells)]
    return [title for title, _ in kept], [list(line) for line in zip(*(cells for _, cells in kept), strict=True)]


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count} B"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


_EXAMPLE = Stage("dense", 0.975, (0.9662, 0.9816), 1000, 44_426, 44_426, 177_704, None, {1: 0.08})
