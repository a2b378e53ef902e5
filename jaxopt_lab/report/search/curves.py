"""Learning curves of a search: of every trial, the best so far, the rungs that were seen, and where the best is going."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxopt_lab.report import canvas
from jaxopt_lab.report.search.trials import Curves, curves_of, extent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curves", "draw_curves"]

_RUNGS = 12  # As many steps, at most, at which it is said how many trials were seen.


def curves(
    study: Any,
    path: str | Path,
    *,
    title: str = "Scores while training",
    dpi: int = 160,
    extrapolations: Mapping[int, Any] | None = None,
) -> Path:
    """Draws the learning curve of every trial that has one, and writes it as a PNG, whole or not at all.

    The best trial stands out; a dark staircase is the best that any trial had reached by a step. Where there are a dozen steps of
    evaluation or fewer, each is a vertical line with the number of trials that were seen there. A curve that ends in a cross
    failed, diverged, was pruned or dropped.

    Args:
      study: of Optuna's, whose trials report intermediate values, or the `Result` of a population.
      path: the PNG file.
      title: what stands above.
      dpi: dots an inch; the picture is 8 by 5 inches.
      extrapolations: by the number of a trial, what `search.extrapolate_curve` says of it: its mean and interval are drawn.

    Raises:
      TypeError: it is neither a study nor a `Result`.
      ValueError: there is no intermediate value, or an extrapolation of a trial that has no curve.

    >>> import tempfile
    >>> from jaxopt_lab.search.trial import Result
    >>> seen = np.array([[3.0, 1.0], [4.0, np.nan]])
    >>> result = Result(np.array([1.0, 4.0]), (), [{}, {}], seen, (10, 30), {}, 0, ())
    >>> curves(result, Path(tempfile.mkdtemp()) / "a.png", dpi=40).read_bytes()[1:4]
    b'PNG'
    """
    return canvas.png(draw_curves(study, title=title, dpi=dpi, extrapolations=extrapolations), path)


def draw_curves(
    study: Any, *, title: str = "Scores while training", dpi: int = 160, extrapolations: Mapping[int, Any] | None = None
) -> "Figure":
    """The figure that `curves` writes.

    >>> from jaxopt_lab.search.trial import Result
    >>> seen = np.array([[3.0, 1.0], [4.0, np.nan]])
    >>> result = Result(np.array([1.0, 4.0]), (), [{}, {}], seen, (10, 30), {}, 0, ())
    >>> draw_curves(result).axes[0].get_legend_handles_labels()[1]
    ['pruned, dropped or diverged', 'best so far', 'best: trial 0']
    """
    from matplotlib.collections import LineCollection

    found, ahead = curves_of(study), dict(extrapolations or {})
    if missing := sorted(set(ahead) - set(found.numbers)):
        raise ValueError(f"extrapolations are of the trials {', '.join(map(str, missing))}, which have no curve")
    figure = canvas.figure(8, 5, dpi)
    axes = figure.add_subplot()
    canvas.dress(axes)
    lines = [np.column_stack([steps, values]) for steps, values in zip(found.steps, found.values, strict=True)]
    dense = len(lines) > 60
    axes.add_collection(
        LineCollection(lines, colors="#8fb0d9", linewidths=0.7 if dense else 1.1, alpha=0.35 if dense else 0.7, zorder=2)
    )
    alone = [line[0] for line in lines if len(line) == 1 and np.isfinite(line).all()]
    if alone:
        axes.plot(*np.array(alone).T, linestyle="none", marker="o", markersize=4, color="#8fb0d9", alpha=0.7, zorder=2)
    _ends(axes, found, dense)
    steps, best = _best_so_far(found)
    axes.plot(
        steps,
        best,
        drawstyle="steps-post",
        color=canvas.INK,
        linewidth=1.4,
        marker="o" if len(steps) == 1 else "",
        markersize=4,
        zorder=4,
        label="best so far",
    )
    if found.best is not None:
        own = lines[found.best]
        axes.plot(
            own[:, 0], own[:, 1], color=canvas.COLOURS[1], linewidth=2.2, marker="o", markersize=5 if len(own) <= 20 else 0,
            markeredgecolor="white", zorder=5, label=f"best: trial {found.numbers[found.best]}",
        )  # fmt: skip
    shown = _extrapolated(axes, found, ahead)
    every = np.concatenate([*found.values, *shown])
    reach = extent(every[np.isfinite(every)], found.maximize)
    reach.apply(axes.yaxis)
    _steps_axis(axes, np.unique(np.concatenate(found.steps)), [float(np.max(each.at)) for each in ahead.values()])
    _rungs(axes, found)
    axes.set_xlabel("step", color=canvas.INK)
    canvas.plain(axes.set_ylabel(canvas.short(found.name, 40), color=canvas.INK))
    canvas.legend(axes)
    canvas.heading(figure, title, found.note)
    return figure


def _best_so_far(found: Curves) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which any trial was seen, and the best value of any up to there."""
    at, values = np.concatenate(found.steps), np.concatenate(found.values)
    at, values = at[np.isfinite(values)], values[np.isfinite(values)]
    steps = np.unique(at)
    each = np.array([(values[at == step].max if found.maximize else values[at == step].min)() for step in steps])
    return steps, (np.maximum if found.maximize else np.minimum).accumulate(each)


def _ends(axes: Any, found: Curves, dense: bool) -> None:
    """Crosses where curves end before their time."""
    over = [
        (steps[k], values[k])
        for steps, values, ended in zip(found.steps, found.values, found.ended, strict=True)
        if (k := _last(values)) is not None and (ended in ("PRUNED", "FAIL") or k < len(values) - 1)
    ]
    if over:
        x, y = np.array(over).T
        axes.plot(
            x, y, linestyle="none", marker="x", markersize=3 if dense else 5, color=canvas.FAINT, zorder=3,
            label="pruned, dropped or diverged",
        )  # fmt: skip


def _last(values: np.ndarray) -> int | None:
    there = np.flatnonzero(np.isfinite(values))
    return int(there[-1]) if there.size else None


def _extrapolated(axes: Any, found: Curves, ahead: Mapping[int, Any]) -> list[np.ndarray]:
    """Draws bands and means; what they take of the axis."""
    shown = []
    for k, (number, each) in enumerate(sorted(ahead.items())):
        own = found.numbers.index(number)
        colour = canvas.COLOURS[1] if own == found.best else canvas.COLOURS[(k + 2) % len(canvas.COLOURS)]
        at, mean, lower, upper = (np.asarray(part, float) for part in (each.at, each.mean, each.lower, each.upper))
        order = np.argsort(at, kind="stable")
        at, mean, lower, upper = at[order], mean[order], lower[order], upper[order]
        last = _last(found.values[own])
        if last is not None and at[0] > found.steps[own][last]:
            # From where the curve is.
            begin = found.values[own][last]
            at = np.concatenate([[found.steps[own][last]], at])
            mean, lower, upper = (np.concatenate([[begin], part]) for part in (mean, lower, upper))
        axes.fill_between(at, lower, upper, color=colour, alpha=0.18, linewidth=0, zorder=1, label=f"expected: trial {number}")
        axes.plot(at, mean, color=colour, linewidth=1.3, linestyle=(0, (4, 2)), zorder=4)
        shown += [lower, upper]
    return shown


def _steps_axis(axes: Any, steps: np.ndarray, ahead: list[float]) -> None:
    """The range of the steps, those of extrapolations included; the rungs are its ticks where they are few and apart."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = float(steps[0]), max([float(steps[-1]), *ahead])
    # Rungs are spread evenly in the logarithm.
    log = low > 0 and high / low >= 20 and len(steps) <= _RUNGS
    if log:
        axes.set_xscale("log")
        room = (high / low) ** 0.04
        axes.set_xlim(low / room, high * room)
    else:
        room = 0.03 * (high - low) or 1.0
        axes.set_xlim(low - room, high + room)
    apart = float(np.diff(steps).min()) if len(steps) > 1 else math.inf
    if log or (len(steps) <= _RUNGS and apart > 0.05 * (high - low)):
        axes.xaxis.set_major_locator(FixedLocator([*steps.tolist(), *(end for end in ahead if end > 1.5 * steps[-1])]))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value == int(value) else ""))


def _rungs(axes: Any, found: Curves) -> None:
    steps, counts = np.unique(np.concatenate(found.steps), return_counts=True)
    if not 1 < len(steps) <= _RUNGS:
        return
    for step, count in zip(steps.tolist(), counts.tolist(), strict=True):
        axes.axvline(step, color=canvas.PALE, linewidth=1, zorder=0)
        axes.annotate(
            f"{count}", (step, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points", ha="center",
            color=canvas.FAINT, fontsize=8, annotation_clip=False,
        )  # fmt: skip
    axes.annotate(
        "trials seen", (1, 1), xycoords="axes fraction", xytext=(0, 15), textcoords="offset points", ha="right", color=canvas.FAINT,
        fontsize=8, annotation_clip=False,
    )  # fmt: skip
