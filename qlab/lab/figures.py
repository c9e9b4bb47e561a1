"""From a run's files to its plots: declared figures and learning curves. Imports no JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlab.lab import plots, stats
from qlab.lab.circuit_plot import circuit_plot
from qlab.lab.experiment import Figure
from qlab.lab.filmstrip import filmstrip_plot
from qlab.lab.plots import Line, Plot
from qlab.lab.profile_plot import profile_plot

MAX_POINTS = 200  # of a learning curve
MAX_TASKS = 6  # plots of one declared figure


def figure_plots(
    figure: Figure,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    cells: stats.Cells,
    arms: Sequence[str],
    metrics: Mapping[str, Any] | None = None,
) -> tuple[list[Plot], str]:
    """The drawings of one declared figure, and "" or why there is nothing (more) to draw."""
    style = plots.styles(arms)
    names = [a for a in arms if not figure.arms or a in figure.arms]
    labels: dict[str, Any] = {"xlabel": figure.xlabel, "ylabel": figure.ylabel or figure.y}
    if figure.kind == "curve":
        lines = {a: line for a in names if (line := curve_line(curves.get(a, ()), figure.y))}
        if not lines:
            return [], f"{figure.title}: no arm logged the step metric {figure.y}"
        labels["xlabel"] = labels["xlabel"] or "step"
        return [
            plots.lines_plot(
                figure.title, lines, style, logx=figure.logx, logy=figure.logy, **labels
            )
        ], ""
    if figure.kind == "bars":
        keys = _tasks([k for a, k in cells if a in names], figure)
        if not keys:
            return [], f"{figure.title}: no arm has the result {figure.y}"
        return [
            plots.bars_plot(
                figure.title, cells, keys, names, style, ylabel=labels["ylabel"], logy=figure.logy
            )
        ], ""
    if figure.kind == "profile":
        keys = list(_tasks([k for a, k in cells if a in names], figure).values())
        better = stats.better_of(figure.y, metrics or {})
        plot = profile_plot(
            figure.title, cells, keys, names, style, xlabel=figure.xlabel or figure.y, better=better
        )
        return ([plot], "") if plot.svg else ([], f"{figure.title}: no arm has {figure.y} on all tasks")  # fmt: skip
    found = _tasks([n for a in names for n in arrays.get(a, {})], figure)
    drawn: list[Plot] = []
    for task, name in list(found.items())[:MAX_TASKS]:
        title = figure.title + (f", {task}" if len(found) > 1 else "")
        if figure.kind == "circuit":
            circuits = {a: arrays[a][name][0] for a in names if name in arrays.get(a, {})}
            if circuits := {a: c for a, c in circuits.items() if c.ndim == 2 and c.shape[1] == 6}:
                drawn.append(circuit_plot(title, circuits))
            continue
        if figure.kind == "filmstrip":
            films = {a: arrays[a][name][0] for a in names if name in arrays.get(a, {})}
            if films := {a: f for a, f in films.items() if f.ndim == 3 and f.shape[2] == 5}:
                at = {a: _beside(arrays[a], task, figure.x) for a in films}
                drawn.append(filmstrip_plot(title, films, {a: x for a, x in at.items() if x is not None}))  # fmt: skip
            continue
        if figure.kind == "heatmap":
            panels = {a: _mean2d(arrays[a][name]) for a in names if name in arrays.get(a, {})}
            panels = {a: p for a, p in panels.items() if p is not None}
            if panels:
                drawn.append(
                    plots.heatmap_plot(
                        title, panels, logz=figure.logy, **{**labels, "ylabel": figure.ylabel}
                    )
                )
            continue
        x = (
            f"{task}/{figure.x}"
            if task
            and f"{task}/{figure.x}" in arrays[next(a for a in names if name in arrays.get(a, {}))]
            else figure.x
        )
        lines = {a: line for a in names if (line := array_line(arrays.get(a, {}), name, x))}
        if lines:
            labels["xlabel"] = figure.xlabel or figure.x
            scales = {"logx": figure.logx, "logy": figure.logy, "diagonal": figure.diagonal}
            drawn.append(plots.lines_plot(title, lines, style, **scales, **labels))
    if not drawn:
        return [], f"{figure.title}: no arm wrote an array {figure.y} that fits a {figure.kind}"
    more = len(found) - MAX_TASKS
    return drawn, f"{figure.title}: {more} further tasks are left out" if more > 0 else ""


def _tasks(names: Sequence[str], figure: Figure) -> dict[str, str]:
    """Task -> key among names for figure.y, which may itself be a full key."""
    if figure.y in names:
        return {stats.task_of(figure.y): figure.y}
    keys = [n for n in dict.fromkeys(names) if stats.metric_of(n) == figure.y]
    return {
        stats.task_of(k): k for k in keys if not figure.tasks or stats.task_of(k) in figure.tasks
    }


def _beside(arrays: Mapping[str, np.ndarray], task: str, name: str) -> np.ndarray | None:
    """The first seed of an array of the same task, else of no task."""
    found = arrays.get(f"{task}/{name}", arrays.get(name)) if name else None
    return None if found is None or found.ndim != 2 else found[0]


def _mean2d(values: np.ndarray) -> np.ndarray | None:
    """f[S, H, W] -> f[H, W] over the seeds with finite entries."""
    x = np.asarray(values, np.float64)
    if x.ndim != 3 or not x.size:
        return None
    ok = np.isfinite(x)
    count = ok.sum(0)
    return np.where(count > 0, np.where(ok, x, 0).sum(0) / np.maximum(count, 1), np.nan)


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and 95 % t interval over the first axis, without non-finite entries.

    Args:
      values: f[S, N]. Returns: three of f[N].
    """
    out = np.full((3, values.shape[1]), np.nan)
    for j, column in enumerate(values.T):
        out[:, j] = stats.t_interval(column[np.isfinite(column)])[1:]
    return out[0], out[1], out[2]


def curve_line(rows: Sequence[Mapping[str, Any]], name: str) -> Line | None:
    """A step metric over the global step, from the rows of one metrics.jsonl."""
    points: dict[int, list[float]] = {}
    for row in rows:
        value = row["metrics"].get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            points.setdefault(int(row["step"]), []).append(float(value))
    if not points:
        return None
    steps = sorted(points)
    keep = [
        steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int))
    ]
    ci = [stats.t_interval(points[s]) for s in keep]
    return Line(np.array(keep, float), *(np.array([c[k] for c in ci]) for k in (1, 2, 3)))


def array_line(arrays: Mapping[str, np.ndarray], y: str, x: str) -> Line | None:
    """A named array over another (over its index if x is "" or absent)."""
    if y not in arrays:
        return None
    ys = np.atleast_1d(np.asarray(arrays[y], np.float64))
    if ys.ndim > 2:
        return None
    xs = np.asarray(arrays[x], np.float64) if x in arrays else None
    if ys.ndim == 1:  # one number a seed: a point each
        at = np.arange(ys.size, dtype=float) if xs is None or xs.shape != ys.shape else xs
        order = np.argsort(at)
        none = np.full(ys.size, np.nan)
        return Line(at[order], ys[order], none, none)
    grid = np.arange(ys.shape[1], dtype=float)
    if xs is not None and xs.shape[-1:] == ys.shape[-1:]:
        with np.errstate(invalid="ignore"):
            grid = xs.mean(0) if xs.ndim == 2 else xs
    return Line(grid, *band(ys))
