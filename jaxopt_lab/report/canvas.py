"""What every picture of the house has in common: the colours, the spines, numbers as text, names that keep clear of one another."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxopt_lab.core.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.text import Text

__all__ = [
    "COLOURS",
    "FAINT",
    "INK",
    "PALE",
    "dress",
    "figure",
    "heading",
    "legend",
    "number",
    "place",
    "plain",
    "png",
    "shades",
    "short",
]

COLOURS = ("#3b6fb6", "#d1603d", "#4f9d69", "#8a5fa8", "#b8860b", "#2a9d9d", "#a83f5d", "#6b7280")
"""Told apart in print and by most eyes; what is drawn takes them in order."""
INK, FAINT, PALE = "#22272e", "#8b949e", "#e5e7eb"
"""Of text, of axes and what is left aside, of grids."""


def figure(width: float, height: float, dpi: int) -> "Figure":
    """An empty white figure of so many inches, which belongs to no window and to nobody else.

    Raises:
      ValueError: the dots an inch are not positive.

    >>> figure(8, 5, 40).get_dpi()
    40
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not dpi > 0:
        raise ValueError(f"dpi must be positive; got {dpi}")
    made = Figure(figsize=(width, height), dpi=dpi, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), facecolor="white")
    FigureCanvasAgg(made)
    return made


def dress(axes: "Axes", grid: str | None = "y") -> None:
    """Gives axes the spines, ticks and grid of the house; `grid` is "x", "y", "both" or None.

    >>> axes = figure(4, 3, 40).add_subplot()
    >>> dress(axes)
    >>> axes.spines["top"].get_visible()
    False
    """
    if grid is not None:
        axes.grid(axis=grid, color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def heading(made: "Figure", title: str, note: str = "") -> None:
    """Writes a title at the top left of a figure of several axes, and below its lower edge what was left out.

    >>> made = figure(4, 3, 40)
    >>> heading(made, "Slices", "3 trials")
    >>> [text.get_text() for text in made.texts]
    ['Slices', '3 trials']
    """
    width = made.get_figwidth()
    plain(made.suptitle(title, x=0.12 / width, ha="left", color=INK, fontsize=13, fontweight="bold"))
    if note:
        plain(made.supxlabel(note, x=1 - 0.12 / width, ha="right", color=FAINT, fontsize=8))


def legend(axes: "Axes", **options: Any) -> None:
    """The legend of the house: no frame that cuts off what lies below it.

    >>> axes = figure(4, 3, 40).add_subplot()
    >>> _ = axes.plot([0, 1], label="a")
    >>> legend(axes)
    >>> axes.get_legend().get_texts()[0].get_text()
    'a'
    """
    made = axes.legend(**{"loc": "best", "fontsize": 9, "labelcolor": INK, "framealpha": 0.85, "edgecolor": "none", **options})
    for text in made.get_texts():
        plain(text)


def plain(text: "Text") -> "Text":
    """The text as it stands: a dollar in somebody's name begins no formula.

    >>> from matplotlib.text import Text
    >>> plain(Text(0, 0, "$a$")).get_parse_math()
    False
    """
    text.set_parse_math(False)
    return text


def number(value: float) -> str:
    """A number for an axis or a label: three digits, few characters.

    >>> [number(x) for x in (0.1, 1e-5, 12345.0, 1e6, -0.25, 12.0)]
    ['0.1', '1e-5', '12,345', '1e6', '-0.25', '12']
    """
    if not math.isfinite(value):
        return f"{value}"
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    if "e" not in text:
        return text
    digits, power = text.split("e")
    return f"{digits}e{int(power)}"


def short(name: object, length: int) -> str:
    """A name in at most so many characters, its middle left out.

    >>> short("encoder/layers/attention/rate", 13), short("rate", 13)
    ('encode…n/rate', 'rate')
    """
    text = " ".join(str(name).split())
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def shades(reverse: bool = False) -> "Colormap":
    """From pale (the least) to dark blue (the most), or the other way round; as light in print as on a screen.

    >>> bool(shades()(0.0)[0] > shades()(1.0)[0])
    True
    """
    from matplotlib.colors import LinearSegmentedColormap

    colours = ["#ccd7e5", "#8fb0d9", COLOURS[0], "#17305a"]
    return LinearSegmentedColormap.from_list("jaxopt_lab", colours[::-1] if reverse else colours)


def png(made: "Figure", path: str | Path) -> Path:
    """Writes a figure as a PNG, whole or not at all; the same figure gives the same bytes.

    >>> import tempfile
    >>> png(figure(1, 1, 40), Path(tempfile.mkdtemp()) / "empty.png").read_bytes()[1:4]
    b'PNG'
    """
    body = io.BytesIO()
    made.canvas.print_png(body)  # pyright: ignore[reportAttributeAccessIssue]
    return write(path, body.getvalue())


def place(axes: "Axes", names: Sequence[str], centres: Sequence[Any], taken: Sequence[Any], colours: Sequence[str]) -> None:
    """Writes names beside their points, each in the first place around it that is free of boxes, names and the edge.

    The figure must have been drawn: its layout moves the axes as it makes room for their text.

    Args:
      axes: whose points they are.
      names: one a point.
      centres: where the points lie, in pixels.
      taken: boxes in pixels that names keep clear of, those of the points among them.
      colours: of the names.

    >>> axes = figure(4, 3, 40).add_subplot()
    >>> axes.get_figure().canvas.draw()
    >>> place(axes, ["a"], [axes.transData.transform((0.5, 0.5))], [], ["k"])
    >>> axes.texts[0].get_position()
    (11, 0)
    """
    canvas, inside, taken = axes.get_figure().canvas, axes.get_window_extent(), list(taken)
    for name, centre, colour in zip(names, centres, colours, strict=True):
        text = plain(axes.annotate(
            name, centre, xycoords="figure pixels", xytext=(0, 0), textcoords="offset points", fontsize=10, color=colour,
            fontweight="bold", va="center",
        ))  # fmt: skip
        best = None
        for rise in (0, 13, -13, 26, -26, 39, -39, 52, -52, 65, -65, 78, -78):
            for side in (1, -1):
                text.set_ha("left" if side > 0 else "right")
                text.set_position((11 * side, rise))
                box = text.get_window_extent(canvas.get_renderer())
                hidden = sum(_overlap(box, other) for other in taken) + box.width * box.height - _overlap(box, inside)
                if best is None or hidden < best[0] - 1e-6:
                    best = (hidden, side, rise, box)
        _, side, rise, box = best
        text.set_ha("left" if side > 0 else "right")
        text.set_position((11 * side, rise))
        taken.append(box)
        if abs(rise) > 13:
            # A name that had to move away is tied to its point by a line.
            axes.annotate(
                "", centre, xycoords="figure pixels", xytext=(10 * side, rise), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5},
            )  # fmt: skip


def _overlap(one: Any, other: Any) -> float:
    """The area that two boxes share, in pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)
