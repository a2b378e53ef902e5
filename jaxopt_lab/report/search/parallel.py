"""Parallel coordinates: every trial a line across its dimensions, dark where it was good."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxopt_lab.report import canvas
from jaxopt_lab.report.search.trials import Dimension, Trials, extent, trials_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_parallel_coordinates", "parallel_coordinates"]

_MOST = 24
_ABSENT = -0.09  # The height at which a line passes a dimension that its trial did not have.
_BAND = 0.3  # Of the share of an option, over which the lines through it are spread.


def parallel_coordinates(
    study: Any,
    path: str | Path,
    *,
    title: str = "Configurations and their scores",
    dpi: int = 160,
    params: Sequence[str] | None = None,
    objective: int = 0,
    space: Any = None,
) -> Path:
    """Draws every trial as a line across its dimensions, and writes it as a PNG, whole or not at all.

    The last axis is the score, by whose rank lines are shaded; the best is drawn over all in another colour. Logarithmic dimensions
    have logarithmic axes. A line passes below an axis whose dimension its trial did not have; through an option, lines are spread
    in the order of their scores. Trials that failed or have no finite score are left out, and counted at the foot.

    Args:
      study: of Optuna's, or the `Result` of a population.
      path: the PNG file.
      title: what stands above.
      dpi: dots an inch; the picture is 5 inches high and as wide as the dimensions need.
      params: which dimensions, in this order; all if None.
      objective: which of several.
      space: of a `Result`: what was searched, for ranges and logarithms; read off the values if None.

    Raises:
      TypeError: it is neither a study nor a `Result`.
      ValueError: there is nothing to draw, or more than 24 dimensions.

    >>> import tempfile
    >>> from jaxopt_lab.search.trial import Result
    >>> scores = np.array([0.3, 0.1])
    >>> result = Result(scores, (), [{"rate": 0.1}, {"rate": 0.2}], scores[:, None], (10,), {}, 1, ())
    >>> parallel_coordinates(result, Path(tempfile.mkdtemp()) / "a.png", dpi=40).read_bytes()[1:4]
    b'PNG'
    """
    return canvas.png(draw_parallel_coordinates(study, title=title, dpi=dpi, params=params, objective=objective, space=space), path)


def draw_parallel_coordinates(
    study: Any,
    *,
    title: str = "Configurations and their scores",
    dpi: int = 160,
    params: Sequence[str] | None = None,
    objective: int = 0,
    space: Any = None,
) -> "Figure":
    """The figure that `parallel_coordinates` writes.

    >>> from jaxopt_lab.search.trial import Result
    >>> scores = np.array([0.3, 0.1])
    >>> result = Result(scores, (), [{"rate": 0.1}, {"rate": 0.2}], scores[:, None], (10,), {}, 1, ())
    >>> [line.tolist() for line in draw_parallel_coordinates(result).axes[0].collections[0].get_segments()]
    [[[0.0, 0.0], [1.0, 0.95...]], [[0.0, 1.0], [1.0, 0.04...]]]
    """
    from matplotlib.collections import LineCollection

    trials = trials_of(study, space)
    objective = trials.objective(objective)
    dimensions = trials.chosen(params, _MOST, "parallel coordinates")
    scores, maximize = trials.scores[:, objective], trials.maximize[objective]
    reach = extent(scores, maximize)
    score = Dimension(trials.names[objective], None, reach.low, reach.high, reach.log)

    # The worst first, so that the best lie on top.
    order = np.argsort(scores if maximize else -scores, kind="stable")
    heights = np.column_stack(
        [*(_heights(trials, each, order) for each in dimensions), [score.unit(y) for y in reach.clipped(scores)]]
    )
    places = np.arange(len(dimensions) + 1.0)
    lines = np.stack([np.broadcast_to(places, heights.shape), heights], axis=-1)[order]

    figure = canvas.figure(max(8.0, 1.35 * (len(dimensions) + 2)), 5, dpi)
    axes = figure.add_subplot()
    # By rank: where most are nearly as good as the best, their values would make all of them dark.
    colours = canvas.shades()(np.linspace(0, 1, len(order)))
    dense = len(lines) > 100
    axes.add_collection(
        LineCollection(
            list(lines),
            colors=colours,
            linewidths=0.6 if dense else 1.2,
            alpha=0.4 if dense else 0.85,
            zorder=2,
        )
    )
    best = trials.best(objective)
    axes.plot(places, heights[best], color=canvas.COLOURS[1], linewidth=2.2, zorder=3)
    lowest = _ABSENT if (heights == _ABSENT).any() else 0.0
    for k, dimension in enumerate([*dimensions, score]):
        _axis(axes, k, dimension, lowest, last=k == len(dimensions))
    if lowest:
        canvas.plain(
            axes.text(-0.06, _ABSENT, "not there", ha="right", va="center", color=canvas.FAINT, fontsize=8, style="italic")
        )
    axes.set_xlim(-0.45, len(dimensions) + 0.45)
    axes.set_ylim(lowest - 0.04, 1.03)
    axes.set_axis_off()
    canvas.heading(figure, title, trials.told(objective))
    return figure


def _heights(trials: Trials, dimension: Dimension, order: np.ndarray) -> np.ndarray:
    """Where each trial's line crosses an axis [n]."""
    rank = np.empty(len(order))
    rank[order] = np.arange(len(order)) / max(len(order) - 1, 1) - 0.5
    heights = np.full(len(order), _ABSENT)
    for k, values in enumerate(trials.params):
        if dimension.path in values:
            heights[k] = dimension.unit(dimension.position(values[dimension.path]))
            if dimension.options is not None:
                heights[k] += _BAND * rank[k] / len(dimension.options)
    return heights


def _axis(axes: Any, k: int, dimension: Dimension, lowest: float, *, last: bool) -> None:
    from matplotlib.patheffects import withStroke

    axes.plot([k, k], [lowest and lowest - 0.02, 1], color=canvas.FAINT, linewidth=1, zorder=4)
    canvas.plain(
        axes.text(
            k,
            1.045,
            _wrapped(dimension.path),
            ha="center",
            va="bottom",
            color=canvas.INK,
            fontsize=9,
            fontweight="bold" if last else "normal",
        )
    )
    halo = [withStroke(linewidth=2.5, foreground="white", alpha=0.85)]
    for place, label in dimension.ticks():
        height = dimension.unit(place)
        axes.plot([k - 0.02, k + 0.02], [height, height], color=canvas.FAINT, linewidth=1, zorder=4)
        canvas.plain(
            axes.text(
                k + (0.06 if last else -0.06), height, canvas.short(label, 14), ha="left" if last else "right", va="center",
                color=canvas.INK, fontsize=8, zorder=5, path_effects=halo,
            )
        )  # fmt: skip


def _wrapped(path: str) -> str:
    """A path in three lines at most, broken after slashes and underscores where that serves."""
    lines = wrap(canvas.short(path, 44).replace("/", "/ ").replace("_", "_ "), 16, break_long_words=True)
    joined = [line.replace("/ ", "/").replace("_ ", "_") for line in lines]
    return "\n".join(joined if len(joined) <= 3 else [*joined[:2], canvas.short("".join(joined[2:]), 16)])
