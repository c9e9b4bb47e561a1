"""Performance profiles of a run: the share of runs above a score, with bootstrap bands. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from qlab.lab import aggregates, plots, stats
from qlab.lab.plots import Line, Plot

POINTS = 201
MAX_NAMED = 6  # arms whose numbers stand in the note


def profile_plot(
    title: str,
    cells: stats.Cells,
    keys: Sequence[str],
    arms: Sequence[str],
    style: Mapping[str, tuple[int, int]],
    *,
    better: str = "higher",
    xlabel: str = "",
) -> Plot:
    """A line an arm over all scores; the note gives interquartile means and probabilities of improvement.

    Args:
      keys: the result, one key a task; an arm takes part if it has runs on all of them.
      better: "lower" draws the share of runs below.
    """
    scores = {
        a: [np.array(list(cells[a, k].values.values())) for k in keys]
        for a in arms
        if keys and all((a, k) in cells and cells[a, k].values for k in keys)
    }
    if not scores:
        return Plot(title, "")
    sign = -1.0 if better == "lower" else 1.0
    every = np.concatenate([x for s in scores.values() for x in s])
    room = 0.05 * (np.ptp(every) or 1.0)
    at = np.linspace(every.min() - room, every.max() + room, POINTS)
    lines, middle = {}, {}
    for arm, runs in scores.items():
        signed = [sign * x for x in runs]
        profile = partial(aggregates.performance_profile, thresholds=sign * at)
        lines[arm] = Line(at, *aggregates.bootstrap(profile, signed))
        middle[arm] = aggregates.interval(aggregates.iqm, runs)
    ylabel = f"share of runs {'below' if sign < 0 else 'above'}"
    plot = plots.lines_plot(title, lines, style, xlabel=xlabel, ylabel=ylabel)
    said = [f"{a} {stats.format_span(*c[1:])}" for a, c in list(middle.items())[:MAX_NAMED]]
    best = max(middle, key=lambda a: sign * middle[a].mean)
    runs = sum(map(len, scores[best]))
    note = f"Interquartile mean [95 % bootstrap] of {runs} runs: {', '.join(said)}."
    others = [a for a in scores if a != best][:MAX_NAMED]
    if others and min(len(x) for s in scores.values() for x in s) > 1:
        first = [sign * x for x in scores[best]]
        wins = []
        for a in others:
            second = [sign * x for x in scores[a]]
            c = aggregates.interval(aggregates.probability_of_improvement, first, second)
            wins.append(f"{a} {stats.format_span(*c[1:])}")
        note += f" Probability that a run of {best} beats one of {', '.join(wins)}."
    alt = f"{title}: {ylabel} a score; interquartile means {', '.join(said)}."
    return plot._replace(alt=alt, note=f"{note} {plot.note}".strip())
