"""The Pareto front of several objectives: what is best for its price."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxopt_lab.report import canvas
from jaxopt_lab.report.search.trials import Trials, extent, trials_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_front", "front", "is_on_front"]

_NAMED = 10
_SEEN = 300  # As many faint points, at most, as names keep clear of.


def front(
    study: Any, path: str | Path, *, title: str = "What is best for its price", dpi: int = 160, names: Sequence[str] | None = None
) -> Path:
    """Draws the first objective against each of the others with the Pareto front, and writes it as a PNG, whole or not at all.

    Trials that another is no worse than in any objective, and better than in one, are faint. The front is joined by steps: what can
    be had for a price. With three objectives and more, a trial on the front of all may lie behind the steps of one panel, which are
    those of its two objectives alone.

    Args:
      study: of Optuna's, of two objectives or more: accuracy, bytes, milliseconds.
      path: the PNG file.
      title: what stands above.
      dpi: dots an inch; a panel is 7 by 5 inches, or 5 by 4.5 of several.
      names: of the objectives; the study's own if None.

    Raises:
      TypeError: it is no study.
      ValueError: it has one objective, no trial has a finite value of each, or names are of another number.

    >>> import optuna, tempfile
    >>> study = optuna.create_study(directions=["maximize", "minimize"])
    >>> study.add_trials([optuna.trial.create_trial(values=each) for each in ([0.9, 100.0], [0.8, 10.0], [0.7, 20.0])])
    >>> front(study, Path(tempfile.mkdtemp()) / "a.png", dpi=40, names=["accuracy", "bytes"]).read_bytes()[1:4]
    b'PNG'
    """
    return canvas.png(draw_front(study, title=title, dpi=dpi, names=names), path)


def draw_front(
    study: Any, *, title: str = "What is best for its price", dpi: int = 160, names: Sequence[str] | None = None
) -> "Figure":
    """The figure that `front` writes.

    >>> import optuna
    >>> study = optuna.create_study(directions=["maximize", "minimize"])
    >>> study.add_trials([optuna.trial.create_trial(values=each) for each in ([0.9, 100.0], [0.8, 10.0], [0.7, 20.0])])
    >>> [text.get_text() for text in draw_front(study).axes[0].texts]
    ['1', '0']
    """
    trials = trials_of(study)
    count = trials.scores.shape[1]
    if count < 2:
        raise ValueError("a front is of two objectives or more; this has one: see history")
    names = trials.names if names is None else tuple(names)
    if len(names) != count:
        raise ValueError(f"names must be one for each of {count} objectives; got {', '.join(names) or 'none'}")
    best = is_on_front(trials.scores, trials.maximize)
    panels = count - 1
    figure = canvas.figure(7 if panels == 1 else 5 * min(panels, 3), 5 if panels == 1 else 4.5 * -(-panels // 3), dpi)
    grid = figure.subplots(-(-panels // 3), min(panels, 3), squeeze=False)
    for k, axes in enumerate(grid.ravel()):
        if k >= panels:
            axes.set_axis_off()
            continue
        _panel(axes, trials, k + 1, best)
        canvas.plain(axes.set_xlabel(canvas.short(names[k + 1], 40), color=canvas.INK))
        if k % 3 == 0:
            canvas.plain(axes.set_ylabel(canvas.short(names[0], 40), color=canvas.INK))
    canvas.heading(figure, title, f"{best.sum()} on the front of {trials.note}")
    _label(figure, grid.ravel()[:panels], trials, best)
    return figure


def is_on_front(scores: np.ndarray, maximize: Sequence[bool]) -> np.ndarray:
    """Which rows no other dominates `[n]`: no worse in any objective and better in one. Equal rows are all on it, or none.

    Args:
      scores: `[n, k]`, finite.
      maximize: of each of the k objectives, whether the largest is the best.

    >>> is_on_front(np.array([[0.9, 100.0], [0.8, 10.0], [0.7, 20.0]]), (True, False)).tolist()
    [True, True, False]
    """
    costs = scores * np.where(maximize, -1.0, 1.0)[None, :]
    return np.array([not ((costs <= own[None, :]).all(axis=1) & (costs < own[None, :]).any(axis=1)).any() for own in costs])


def _panel(axes: Any, trials: Trials, objective: int, best: np.ndarray) -> None:
    """The first objective against another."""
    canvas.dress(axes)
    y, x = trials.scores[:, 0], trials.scores[:, objective]
    up, right = trials.maximize[0], trials.maximize[objective]
    along, upward = extent(x, right, decades=1.5), extent(y, up)
    along.apply(axes.xaxis)
    upward.apply(axes.yaxis)
    faint = ~best & (x == along.clipped(x)) & (y == upward.clipped(y))
    axes.scatter(
        x[faint],
        y[faint],
        s=20 if len(x) <= 100 else 10,
        color=canvas.FAINT,
        alpha=0.45,
        edgecolors="white",
        linewidths=0.5,
        zorder=2,
    )
    own = np.flatnonzero(is_on_front(trials.scores[:, [0, objective]], (up, right)))
    own = own[np.lexsort((-y[own] if up else y[own], -x[own] if right else x[own]))]
    corners = np.column_stack([x[own], y[own]])
    # Up from the worst at the cheapest, and on to the dearest at the best.
    begin, end = upward.low if up else upward.high, along.low if right else along.high
    corners = np.vstack([[corners[0, 0], begin], corners, [end, corners[-1, 1]]])
    axes.plot(*corners.T, drawstyle="steps-post", color=canvas.COLOURS[0], linewidth=1.2, alpha=0.6, zorder=3)
    dense = best.sum() > 60
    axes.plot(
        x[best], y[best], linestyle="none", marker="o", markersize=4.5 if dense else 7, color=canvas.COLOURS[0],
        markeredgecolor="white", markeredgewidth=0.6 if dense else 1.2, zorder=4,
    )  # fmt: skip


def _label(figure: Any, panels: Sequence[Any], trials: Trials, best: np.ndarray) -> None:
    """Numbers of the trials beside their points, of not too many of them."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    dot = figure.dpi / 72
    for k, axes in enumerate(panels):
        members = np.flatnonzero(best)
        members = members[np.argsort(trials.scores[members, k + 1], kind="stable")]
        points = axes.transData.transform(np.column_stack([trials.scores[members, k + 1], trials.scores[members, 0]]))
        named = np.unique(np.linspace(0, len(members) - 1, min(_NAMED, len(members))).round().astype(int))
        taken = [Bbox.from_extents(x - 4 * dot, y - 4 * dot, x + 4 * dot, y + 4 * dot) for x, y in points]
        taken += [Bbox.from_extents(*ends.min(axis=0) - dot, *ends.max(axis=0) + dot) for ends in _segments(axes)]
        others = axes.transData.transform(np.column_stack([trials.scores[~best, k + 1], trials.scores[~best, 0]])[:_SEEN])
        taken += [Bbox.from_extents(x - 2 * dot, y - 2 * dot, x + 2 * dot, y + 2 * dot) for x, y in others]
        texts = [f"{trials.numbers[members[j]]}" for j in named]
        canvas.place(axes, texts, [points[j] for j in named], taken, [canvas.COLOURS[0]] * len(named))


def _segments(axes: Any) -> list[np.ndarray]:
    """The horizontal and vertical pieces of the steps, in pixels: arrays [2, 2]."""
    corners = axes.transData.transform(axes.lines[0].get_xydata())
    turns = np.column_stack([corners[1:, 0], corners[:-1, 1]])
    return [np.stack(pair) for a, turn, b in zip(corners[:-1], turns, corners[1:], strict=True) for pair in ((a, turn), (turn, b))]
