"""The score over two dimensions, as contours between the trials."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxopt_lab.report import canvas
from jaxopt_lab.report.search.slices import scale
from jaxopt_lab.report.search.trials import Dimension, Trials, extent, trials_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["contour", "draw_contour"]


def contour(
    study: Any,
    path: str | Path,
    *,
    title: str = "Score over two dimensions",
    dpi: int = 160,
    params: Sequence[str] | None = None,
    objective: int = 0,
    space: Any = None,
) -> Path:
    """Draws the score over two dimensions of numbers, and writes it as a PNG, whole or not at all.

    Between trials it is linear over the triangles that they make (Delaunay's, in the logarithm where the axis is): what lies
    outside of them is not guessed. All other dimensions are as they were in each trial: where these matter, contours are ragged.

    Args:
      study, path, title, dpi, objective, space: as for `parallel_coordinates`.
      params: the two dimensions; the first two of numbers if None.

    Raises:
      TypeError: it is neither a study nor a `Result`.
      ValueError: there are no two dimensions of numbers, or fewer than three trials that do not lie on one line.

    >>> import tempfile
    >>> from jaxopt_lab.search.trial import Result
    >>> scores, configs = np.array([0.3, 0.1, 0.2]), [{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}]
    >>> result = Result(scores, (), configs, scores[:, None], (10,), {}, 1, ())
    >>> contour(result, Path(tempfile.mkdtemp()) / "a.png", dpi=40).read_bytes()[1:4]
    b'PNG'
    """
    return canvas.png(draw_contour(study, title=title, dpi=dpi, params=params, objective=objective, space=space), path)


def draw_contour(
    study: Any,
    *,
    title: str = "Score over two dimensions",
    dpi: int = 160,
    params: Sequence[str] | None = None,
    objective: int = 0,
    space: Any = None,
) -> "Figure":
    """The figure that `contour` writes.

    >>> from jaxopt_lab.search.trial import Result
    >>> scores, configs = np.array([0.3, 0.1, 0.2]), [{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}]
    >>> axes = draw_contour(Result(scores, (), configs, scores[:, None], (10,), {}, 1, ())).axes[0]
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('a', 'b')
    """
    from matplotlib.tri import Triangulation

    trials = trials_of(study, space)
    objective = trials.objective(objective)
    x, y = _pair(trials, params)
    have = [k for k, values in enumerate(trials.params) if x.path in values and y.path in values]
    places = np.array([[each.position(trials.params[k][each.path]) for each in (x, y)] for k in have]).reshape(-1, 2)
    scores, maximize = trials.scores[have, objective], trials.maximize[objective]
    unit = np.array([[each.unit(at) for each, at in zip((x, y), place, strict=True)] for place in places]).reshape(-1, 2)
    # Trials at one place are one corner, of their mean.
    unit, first, which = np.unique(unit.round(12), axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    corners = np.bincount(which, scores) / np.maximum(np.bincount(which), 1)
    if len(unit) < 3 or np.linalg.matrix_rank(unit - unit.mean(axis=0), tol=1e-9) < 2:
        raise ValueError(
            f"a contour over {x.path} and {y.path} needs three trials that do not lie on one line; "
            f"{len(have)} trials have both, at {len(unit)} places"
        )
    reach = extent(scores, maximize)
    figure = canvas.figure(7, 5, dpi)
    axes = figure.add_subplot()
    canvas.dress(axes, None)
    scale(axes.xaxis, x)
    scale(axes.yaxis, y, room=40)
    triangles = Triangulation(*unit.T).triangles
    levels = np.geomspace(reach.low, reach.high, 13) if reach.log else np.linspace(reach.low, reach.high, 13)
    drawn = axes.tricontourf(
        Triangulation(*places[first].T, triangles), reach.clipped(corners), levels=levels, cmap=canvas.shades(reverse=not maximize),
        norm=reach.norm(), zorder=1,
    )  # fmt: skip
    axes.plot(
        *places.T, linestyle="none", marker="o", markersize=4 if len(have) <= 100 else 2.5, color="white",
        markeredgecolor=canvas.INK, markeredgewidth=0.6, zorder=2,
    )  # fmt: skip
    best = int(scores.argmax() if maximize else scores.argmin())
    axes.plot(
        *places[best], linestyle="none", marker="o", markersize=9, color=canvas.COLOURS[1], markeredgecolor="white",
        markeredgewidth=1.4, zorder=3,
    )  # fmt: skip
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, aspect=30)
    reach.apply(bar.ax.yaxis)
    canvas.plain(bar.ax.yaxis.label).set(text=canvas.short(trials.names[objective], 40), color=canvas.INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=canvas.INK, length=3)
    canvas.plain(axes.set_xlabel(canvas.short(x.path, 60), color=canvas.INK))
    canvas.plain(axes.set_ylabel(canvas.short(y.path, 40), color=canvas.INK))
    best_of = f"best: trial {trials.numbers[have[best]]}, {canvas.number(scores[best])}"
    canvas.heading(figure, title, f"{trials.note}; {len(have)} of them have both   ({best_of})")
    return figure


def _pair(trials: Trials, params: Sequence[str] | None) -> tuple[Dimension, Dimension]:
    if params is None:
        pair = [each for each in trials.dimensions.values() if each.options is None and each.high > each.low][:2]
    else:
        pair = trials.chosen(params, 2, "a contour")
        if odd := [each.path for each in pair if each.options is not None]:
            raise ValueError(f"{odd[0]} is a choice, between whose options there are no contours; see slices")
    if len(pair) != 2:
        raise ValueError(f"a contour needs two dimensions of numbers; got {', '.join(each.path for each in pair) or 'none'}")
    return pair[0], pair[1]
