"""The picture: accuracy against bytes, every stage a point with its interval."""

import math
from collections.abc import Sequence
from pathlib import Path

from jaxopt_lab.report import canvas
from jaxopt_lab.report.measure import Stage

__all__ = ["picture"]

_APART = 9
"""Points of length between two intervals that would else hide one another."""


def picture(rows: Sequence[Stage], path: str | Path, *, title: str = "Accuracy against size", dpi: int = 160) -> Path:
    """Draws accuracy (with its 95 % interval) against bytes on a logarithmic axis, and writes it as a PNG, whole or not at all.

    The bytes are those of the arrays as stored: a checkpoint's directory is compressed besides, and would show what a format gains
    and what the zeros in it gain as one.

    Args:
      rows: at least one stage. Points of all but the same size are set apart by a few dots, in the order of their sizes, so that
        their intervals can be told.
      path: the PNG file.
      title: what stands above.
      dpi: dots an inch; the picture is 8 by 5 inches.

    Raises:
      ValueError: there is no stage.

    >>> import tempfile
    >>> stage = Stage("dense", 0.975, (0.9662, 0.9816), 1000, 44_426, 44_426, 177_704, None, {1: 0.08})
    >>> picture([stage], Path(tempfile.mkdtemp()) / "stages.png", dpi=40).read_bytes()[1:4]
    b'PNG'
    """
    if not rows:
        raise ValueError("a picture needs at least one stage; there are none")
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    sizes = [max(1, row.array_bytes) for row in rows]
    accuracies = [100 * row.accuracy for row in rows]

    figure = canvas.figure(8, 5, dpi)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
    low, high = 100 * min(row.interval[0] for row in rows), 100 * max(row.interval[1] for row in rows)
    margin = max(0.1 * (high - low), 0.05)
    axes.set_ylim(low - margin, high + margin)

    shifts = _shifts(axes, sizes)
    for k, (row, size, accuracy) in enumerate(zip(rows, sizes, accuracies, strict=True)):
        colour = _colour(k)
        axes.vlines(
            size, 100 * row.interval[0], 100 * row.interval[1], color=colour, alpha=0.35, linewidth=5, capstyle="round", zorder=2,
            transform=axes.transData + shifts[k],
        )  # fmt: skip
        axes.plot(
            size, accuracy, color=colour, marker="o", markersize=9, markeredgecolor="white", markeredgewidth=1.4, zorder=3,
            transform=axes.transData + shifts[k],
        )  # fmt: skip

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _unit(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("bytes of arrays as stored", color=canvas.INK)
    axes.set_ylabel(f"accuracy on {rows[0].examples:,} held-out examples", color=canvas.INK)
    axes.set_title(title, loc="left", color=canvas.INK, fontsize=13, fontweight="bold", pad=12)
    canvas.dress(axes)
    _label(axes, rows, sizes, accuracies, shifts)
    return canvas.png(figure, path)


def _colour(k: int) -> str:
    return canvas.COLOURS[k % len(canvas.COLOURS)]


def _unit(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


def _shifts(axes, sizes: Sequence[float]) -> list:
    """For each point a translation by a few dots, so that the intervals of points of nearly the same size stand side by side."""
    from matplotlib.transforms import ScaledTranslation

    width = axes.get_figure().get_figwidth() * 72 * 0.85
    low, high = (math.log(end) for end in axes.get_xlim())
    places = [(math.log(size) - low) / (high - low) * width for size in sizes]
    moved = [there - place for there, place in zip(_apart(places), places, strict=True)]
    return [ScaledTranslation(points / 72, 0, axes.get_figure().dpi_scale_trans) for points in moved]


def _apart(places: Sequence[float]) -> list[float]:
    """The places nearest to those given (by least squares) that keep their order and lie `_APART` from one another.

    With k times that length taken off the k-th, only the order is left to keep: isotonic regression, by its max-min formula.
    """
    order = sorted(range(len(places)), key=lambda k: places[k])
    wanted = [places[k] - rank * _APART for rank, k in enumerate(order)]
    moved = [0.0] * len(places)
    for rank, k in enumerate(order):
        best = max(
            min(sum(wanted[low : high + 1]) / (high + 1 - low) for high in range(rank, len(wanted))) for low in range(rank + 1)
        )
        moved[k] = best + rank * _APART
    return moved


def _label(axes, rows: Sequence[Stage], sizes: Sequence[float], accuracies: Sequence[float], shifts: Sequence) -> None:
    """Writes each stage's name beside its point, clear of points and bars."""
    from matplotlib.transforms import Bbox

    # The layout moves the axes as it makes room for their text: only after one drawing do points have their places.
    axes.get_figure().canvas.draw()
    dot = axes.get_figure().dpi / 72
    centres = [(axes.transData + shift).transform(p) for shift, *p in zip(shifts, sizes, accuracies, strict=True)]
    taken = []
    for row, (x, _) in zip(rows, centres, strict=True):
        low, high = (axes.transData.transform((1, 100 * end))[1] for end in row.interval)
        taken.append(Bbox.from_extents(x - 5 * dot, low - 3 * dot, x + 5 * dot, high + 3 * dot))
    canvas.place(axes, [row.name for row in rows], centres, taken, [_colour(k) for k in range(len(rows))])
