"""The history of a search: the score of each trial in its order, and the best so far."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxopt_lab.report import canvas
from jaxopt_lab.report.search.trials import extent, trials_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_history", "history"]


def history(
    study: Any, path: str | Path, *, title: str = "Scores in the order of trials", dpi: int = 160, objective: int = 0
) -> Path:
    """Draws the score of each trial by its number with the best so far, and writes it as a PNG, whole or not at all.

    Trials that failed or diverged are crosses at the foot. Scores so bad that they would press the others together are triangles at
    the edge.

    Args:
      study: of Optuna's, or the `Result` of a population.
      path: the PNG file.
      title: what stands above.
      dpi: dots an inch; the picture is 8 by 5 inches.
      objective: which of several.

    Raises:
      TypeError: it is neither a study nor a `Result`.
      ValueError: no trial has a finite score.

    >>> import tempfile
    >>> from jaxopt_lab.search.trial import Result
    >>> scores = np.array([0.3, 0.1])
    >>> result = Result(scores, (), [{"rate": 0.1}, {"rate": 0.2}], scores[:, None], (10,), {}, 1, ())
    >>> history(result, Path(tempfile.mkdtemp()) / "a.png", dpi=40).read_bytes()[1:4]
    b'PNG'
    """
    return canvas.png(draw_history(study, title=title, dpi=dpi, objective=objective), path)


def draw_history(study: Any, *, title: str = "Scores in the order of trials", dpi: int = 160, objective: int = 0) -> "Figure":
    """The figure that `history` writes.

    >>> from jaxopt_lab.search.trial import Result
    >>> scores = np.array([0.3, 0.1, 0.2])
    >>> result = Result(scores, (), [{}, {}, {}], scores[:, None], (10,), {}, 1, ())
    >>> draw_history(result).axes[0].lines[0].get_ydata().tolist()
    [0.3, 0.1, 0.1]
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    trials = trials_of(study)
    objective = trials.objective(objective)
    scores, maximize = trials.scores[:, objective], trials.maximize[objective]
    # Below the worst or the best, whichever is at the foot, failures have their place.
    reach = extent(scores, maximize, margin=0.1 if trials.failed else 0.05)
    figure = canvas.figure(8, 5, dpi)
    axes = figure.add_subplot()
    canvas.dress(axes)
    so_far = (np.maximum if maximize else np.minimum).accumulate(scores)
    axes.plot(trials.numbers, so_far, drawstyle="steps-post", color=canvas.INK, linewidth=1.4, zorder=3, label="best so far")
    inside = (scores >= reach.low) & (scores <= reach.high)
    size = 26 if len(scores) <= 100 else 12
    axes.scatter(
        trials.numbers[inside], scores[inside], s=size, color=canvas.COLOURS[0], alpha=0.75, edgecolors="white", linewidths=0.5,
        zorder=2, label="a trial",
    )  # fmt: skip
    if not inside.all():
        axes.plot(
            trials.numbers[~inside], reach.clipped(scores[~inside]), linestyle="none", marker="v" if maximize else "^",
            markersize=5, color=canvas.FAINT, markeredgecolor="white", markeredgewidth=0.5, clip_on=False, zorder=2,
            label="beyond the axis",
        )  # fmt: skip
    best = trials.best(objective)
    axes.plot(
        trials.numbers[best], scores[best], linestyle="none", marker="o", markersize=9, color=canvas.COLOURS[1],
        markeredgecolor="white", markeredgewidth=1.4, zorder=4,
        label=f"best: trial {trials.numbers[best]}, {canvas.number(scores[best])}",
    )  # fmt: skip
    if trials.failed:
        axes.plot(
            trials.failed, np.full(len(trials.failed), 0.02), linestyle="none", marker="x", markersize=4, color=canvas.COLOURS[6],
            transform=axes.get_xaxis_transform(), zorder=2, label="failed or diverged",
        )  # fmt: skip
    reach.apply(axes.yaxis)
    last = max([int(trials.numbers[-1]), *trials.failed])
    axes.set_xlim(-0.03 * last - 0.6, 1.03 * last + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 0 and value == int(value) else ""))
    axes.set_xlabel("trial", color=canvas.INK)
    canvas.plain(axes.set_ylabel(canvas.short(trials.names[objective], 40), color=canvas.INK))
    canvas.legend(axes)
    canvas.heading(figure, title, trials.note)
    return figure
