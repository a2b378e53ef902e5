"""Bars of how much each hyper-parameter mattered, with intervals."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxopt_lab.report import canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_importances", "importances"]


def importances(
    found: Mapping[str, Any], path: str | Path, *, title: str = "How much each dimension matters", dpi: int = 160, most: int = 20
) -> Path:
    """Draws importances as bars with their intervals, the largest above, and writes it as a PNG, whole or not at all.

    Args:
      found: of `search.importance`, or numbers by name, such as Optuna's `get_param_importances` returns. Where there is a
        first-order index, it is the dark part of the bar: the rest is interaction.
      path: the PNG file.
      title: what stands above.
      dpi: dots an inch; the picture is 8 inches wide.
      most: how many bars; of the others the foot says how many they are.

    Raises:
      TypeError: a value is neither a number nor an importance.
      ValueError: there is none, or one that is not finite.

    >>> import tempfile
    >>> importances({"rate": 0.8, "width": 0.2}, Path(tempfile.mkdtemp()) / "a.png", dpi=40).read_bytes()[1:4]
    b'PNG'
    """
    return canvas.png(draw_importances(found, title=title, dpi=dpi, most=most), path)


def draw_importances(
    found: Mapping[str, Any], *, title: str = "How much each dimension matters", dpi: int = 160, most: int = 20
) -> "Figure":
    """The figure that `importances` writes.

    >>> axes = draw_importances({"width": 0.2, "rate": 0.8}).axes[0]
    >>> [label.get_text() for label in axes.get_yticklabels()], [float(bar.get_width()) for bar in axes.patches]
    (['rate', 'width'], [0.8, 0.2])
    """
    if not found or most < 1:
        raise ValueError("there is no importance to draw" if not found else f"most must be at least 1; got {most}")
    rows = {name: _read(name, value) for name, value in found.items()}
    order = sorted(rows, key=lambda name: -rows[name][0])
    shown, left = order[:most], order[most:]
    figure = canvas.figure(8, 1.5 + 0.36 * max(len(shown), 2), dpi)
    axes = figure.add_subplot()
    canvas.dress(axes, "x")
    values, lows, highs = np.array([rows[name][:3] for name in shown]).T
    alone = [rows[name][3] for name in shown]
    places = np.arange(len(shown))
    both = any(each is not None for each in alone)
    axes.barh(places, values, height=0.62, color="#b9cde6" if both else canvas.COLOURS[0], zorder=2, label="with interactions")
    if both:
        first = np.array([0.0 if each is None else each for each in alone])
        axes.barh(places, first, height=0.62, color=canvas.COLOURS[0], zorder=3, label="alone")
    spread = highs > lows
    if spread.any():
        axes.hlines(places[spread], lows[spread], highs[spread], color=canvas.INK, linewidth=1.3, zorder=4)
        for ends in (lows, highs):
            axes.plot(ends[spread], places[spread], linestyle="none", marker="|", markersize=6, color=canvas.INK, zorder=4)
    reach = max(float(np.maximum(values, highs).max()), 1e-12)
    for place, value, high in zip(places, values, np.maximum(values, highs), strict=True):
        axes.annotate(
            f"{value:.2f}" if reach < 100 else canvas.number(value), (high, place), xytext=(8, 0), textcoords="offset points",
            va="center", color=canvas.INK, fontsize=9,
        )  # fmt: skip
    axes.set_xlim(0, 1.12 * reach)
    axes.set_ylim(max(len(shown), 2) - 0.4, -0.6)
    axes.set_yticks(places, [canvas.short(name, 40) for name in shown])
    for label in axes.get_yticklabels():
        canvas.plain(label)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("share of the variance of the scores" if both else "importance", color=canvas.INK)
    if both:
        canvas.legend(axes, loc="lower right")
    rest = f"{len(left)} more, none above {canvas.number(rows[left[0]][0])}" if left else ""
    canvas.heading(figure, title, rest)
    return figure


def _read(name: str, value: Any) -> tuple[float, float, float, float | None]:
    """Value, interval and first-order index of one."""
    if hasattr(value, "value"):
        alone = getattr(value, "alone", None)
        numbers = (float(value.value), float(value.low), float(value.high), None if alone is None else float(alone[0]))
    else:
        try:
            numbers = (float(value), float(value), float(value), None)
        except (TypeError, ValueError):
            raise TypeError(f"{name} must have a number or an importance of search.importance; got {value!r}") from None
    if not all(math.isfinite(each) for each in numbers if each is not None):
        raise ValueError(f"the importance of {name} is not finite: {value}")
    return numbers
