"""Slices: the score against each dimension, a panel each."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxopt_lab.report import canvas
from jaxopt_lab.report.search.trials import Dimension, Trials, extent, trials_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_slices", "scale", "slices"]

_MOST, _ACROSS = 48, 4
_GOLDEN = 0.6180339887498949


def slices(
    study: Any,
    path: str | Path,
    *,
    title: str = "Score against each dimension",
    dpi: int = 160,
    params: Sequence[str] | None = None,
    objective: int = 0,
    space: Any = None,
) -> Path:
    """Draws the score against each dimension, a panel each, and writes it as a PNG, whole or not at all.

    Points are the darker the later their trials came; the best is drawn in another colour. Scores so bad that they would press
    the others together are triangles at the edge. A panel says how many trials have its dimension where not all do; points of an
    option are spread a little, so that they do not hide one another.

    Args:
      study, path, title, dpi, params, objective, space: as for `parallel_coordinates`; at most 48 dimensions.

    Raises:
      TypeError, ValueError: as for `parallel_coordinates`.

    >>> import tempfile
    >>> from jaxopt_lab.search.trial import Result
    >>> scores = np.array([0.3, 0.1])
    >>> result = Result(scores, (), [{"rate": 0.1}, {"rate": 0.2}], scores[:, None], (10,), {}, 1, ())
    >>> slices(result, Path(tempfile.mkdtemp()) / "a.png", dpi=40).read_bytes()[1:4]
    b'PNG'
    """
    return canvas.png(draw_slices(study, title=title, dpi=dpi, params=params, objective=objective, space=space), path)


def draw_slices(
    study: Any,
    *,
    title: str = "Score against each dimension",
    dpi: int = 160,
    params: Sequence[str] | None = None,
    objective: int = 0,
    space: Any = None,
) -> "Figure":
    """The figure that `slices` writes.

    >>> from jaxopt_lab.search.trial import Result
    >>> scores = np.array([0.3, 0.1])
    >>> result = Result(scores, (), [{"rate": 0.1}, {"rate": 0.2}], scores[:, None], (10,), {}, 1, ())
    >>> draw_slices(result).axes[0].collections[0].get_offsets().tolist()
    [[0.1, 0.3], [0.2, 0.1]]
    """
    trials = trials_of(study, space)
    objective = trials.objective(objective)
    dimensions = trials.chosen(params, _MOST, "slices")
    scores, maximize = trials.scores[:, objective], trials.maximize[objective]
    reach = extent(scores, maximize)
    across = min(len(dimensions), _ACROSS)
    down = math.ceil(len(dimensions) / across)
    figure = canvas.figure(max(5.0, 2.7 * across + 1), 2.6 * down + 0.9, dpi)
    panels = figure.subplots(down, across, squeeze=False)
    drawn = None
    for k, axes in enumerate(panels.ravel()):
        if k >= len(dimensions):
            axes.set_axis_off()
            continue
        canvas.dress(axes)
        drawn = _panel(axes, trials, dimensions[k], scores, reach, trials.best(objective), maximize)
        reach.apply(axes.yaxis)
        if k % across == 0:
            canvas.plain(axes.set_ylabel(canvas.short(trials.names[objective], 24), color=canvas.INK))
        else:
            axes.tick_params(labelleft=False)
    if drawn is not None and len(scores) > 1:
        bar = figure.colorbar(drawn, ax=panels, pad=0.015, aspect=30 * down / 2, fraction=0.04)
        bar.set_label("trial", color=canvas.INK)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=canvas.INK, length=3)
        bar.ax.yaxis.get_major_locator().set_params(integer=True)
    canvas.heading(figure, title, trials.told(objective))
    return figure


def _panel(axes: Any, trials: Trials, dimension: Dimension, scores: np.ndarray, reach: Any, best: int, maximize: bool) -> Any:
    """One panel; what a bar of its colours needs."""
    from matplotlib.colors import Normalize

    have = np.flatnonzero([dimension.path in values for values in trials.params])
    x = np.array([dimension.position(trials.params[k][dimension.path]) for k in have])
    if dimension.options is not None:
        # A sequence that no two trials near in number are near in.
        x = x + 0.5 * ((trials.numbers[have] * _GOLDEN) % 1 - 0.5)
    y, numbers = scores[have], trials.numbers[have]
    inside = (y >= reach.low) & (y <= reach.high)
    drawn = axes.scatter(
        x[inside], y[inside], c=numbers[inside], cmap=canvas.shades(), norm=Normalize(0, max(int(trials.numbers.max()), 1)),
        s=26 if len(scores) <= 100 else 12, edgecolors="white", linewidths=0.5, zorder=2,
    )  # fmt: skip
    if not inside.all():
        axes.plot(
            x[~inside], reach.clipped(y[~inside]), linestyle="none", marker="v" if maximize else "^", markersize=5,
            color=canvas.FAINT, markeredgecolor="white", markeredgewidth=0.5, clip_on=False, zorder=2,
        )  # fmt: skip
    if best in have:
        axes.plot(
            x[have == best], scores[[best]], linestyle="none", marker="o", markersize=8, color=canvas.COLOURS[1],
            markeredgecolor="white", markeredgewidth=1.2, zorder=3,
        )  # fmt: skip
    scale(axes.xaxis, dimension, room=27)
    name = canvas.short(dimension.path, 30)
    canvas.plain(axes.set_xlabel(name, color=canvas.INK))
    if len(have) < len(scores):
        canvas.plain(axes.set_title(f"{len(have)} of {len(scores)} have it", loc="right", fontsize=8, color=canvas.FAINT, pad=4))
    return drawn


def scale(axis: Any, dimension: Dimension, room: int = 60) -> None:
    """Gives a matplotlib axis the range and the ticks of a dimension, in about so many characters along it.

    >>> axes = canvas.figure(4, 3, 40).add_subplot()
    >>> scale(axes.xaxis, Dimension("act", ("relu", "gelu")))
    >>> [label.get_text() for label in axes.get_xticklabels()], [float(end) for end in axes.get_xlim()]
    (['relu', 'gelu'], [-0.6, 1.6])
    """
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    # The fewest that there are, if even these are too long.
    tried = [dimension.ticks(most) for most in (6, 5, 4, 3)]
    ticks = next((ticks for ticks in tried if sum(len(text) + 2 for _, text in ticks) <= room), tried[-1])
    if dimension.options is not None:
        ticks = tried[0]
    set_scale, limits = (
        (axis.axes.set_xscale, axis.axes.set_xlim) if axis.axis_name == "x" else (axis.axes.set_yscale, axis.axes.set_ylim)
    )
    if dimension.options is not None:
        limits(-0.6, len(dimension.options) - 0.4)
    elif dimension.log:
        set_scale("log")
        factor = (dimension.high / dimension.low) ** 0.05 if dimension.high > dimension.low else 1.2
        limits(dimension.low / factor, dimension.high * factor)
    else:
        margin = 0.05 * (dimension.high - dimension.low) or max(abs(dimension.high) * 0.05, 0.5)
        limits(dimension.low - margin, dimension.high + margin)
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator([place for place, _ in ticks]))
    texts = [canvas.short(text, 16) for _, text in ticks]
    leaning = dimension.options is not None and axis.axis_name == "x" and sum(len(text) + 2 for text in texts) > room
    axis.set_major_formatter(FixedFormatter([canvas.short(text, 12) for text in texts] if leaning else texts))
    if leaning:
        for label in axis.get_ticklabels():
            label.set(rotation=35, ha="right", rotation_mode="anchor")
    for label in axis.get_ticklabels():
        canvas.plain(label)
