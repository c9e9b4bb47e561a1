"""The kinds of plot a report draws: lines with bands, bars, heat maps, effects.

Imports no JAX; matplotlib only when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlab.lab import stats, svg
from qlab.lab.svg import FG, MUTED, SERIES

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vPX*"
WIDTH, HEIGHT = 480, 290  # user units of the drawing
MAX_BANDS, MAX_LABELS, MAX_PANELS = 8, 6, 12


class Plot(NamedTuple):
    """One drawing: its title, SVG, and the legend as (arm, colour index, dash index).

    `labelled` says that the names stand beside the lines: the legend is for narrow screens then.
    """

    title: str
    svg: str
    legend: tuple[tuple[str, int, int], ...] = ()
    alt: str = ""
    note: str = ""
    wide: bool = False
    labelled: bool = False


class Line(NamedTuple):
    """One arm's line: x f[N], mean f[N], low and high f[N] (nan where unknown)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def styles(arms: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Colour and dash of each arm, the same in every figure of a page.

    >>> styles(["a", "b"])
    {'a': (0, 0), 'b': (1, 0)}
    """
    return {arm: (i % len(SERIES), i // len(SERIES) % len(DASHES)) for i, arm in enumerate(arms)}


def lines_plot(
    title: str,
    lines: Mapping[str, Line],
    style: Mapping[str, tuple[int, int]],
    *,
    xlabel: str = "",
    ylabel: str = "",
    logx: bool = False,
    logy: bool = False,
    markers: bool = False,
    xticks: Sequence[str] = (),
    diagonal: bool = False,
) -> Plot:
    """A line an arm with its band; names beside the lines while they fit, else in the legend."""
    direct = 1 < len(lines) <= MAX_LABELS and max(map(len, lines)) <= 18
    right = 9 + 7.0 * max(map(len, lines)) if direct else 10
    bands = len(lines) <= MAX_BANDS

    def draw(ax: Any) -> None:
        ends = []
        if diagonal:
            ax.axline((0, 0), slope=1, color=MUTED, linewidth=0.8, zorder=0, gid="diagonal")
        for i, (arm, line) in enumerate(lines.items()):
            colour, dash = style[arm]
            few = markers or line.x.size <= 2
            ax.plot(
                line.x, line.mean, color=SERIES[colour], linestyle=DASHES[dash], linewidth=1.7,
                marker=MARKERS[i % len(MARKERS)] if few else "", markersize=4.5, gid=f"arm-{colour}-{dash}",
            )  # fmt: skip
            known = np.isfinite(line.low) & (line.high > line.low)
            if bands and known.any():
                if markers:
                    err = (line.mean - line.low, line.high - line.mean)
                    ax.errorbar(
                        line.x,
                        line.mean,
                        err,
                        fmt="none",
                        ecolor=SERIES[colour],
                        elinewidth=1,
                        capsize=2,
                    )
                else:
                    ax.fill_between(
                        line.x,
                        line.low,
                        line.high,
                        where=known,
                        color=SERIES[colour],
                        alpha=0.16,
                        linewidth=0,
                    )
            ends.append((arm, line))
        _scales(ax, logx, logy, list(lines.values()), framed=not markers)
        if xticks:
            ax.set_xticks(range(len(xticks)), xticks)
            ax.set_xlim(-0.3, len(xticks) - 0.7)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        if direct:
            _label_ends(ax, ends, style)

    note = "The thin grey line is y = x. " * diagonal
    note += "" if bands else "Bands are left out with this many lines."
    ends = {arm: line.mean[-1] if line.mean.size else math.nan for arm, line in lines.items()}
    drawing, alt = _draw(draw, title, WIDTH, HEIGHT, right), _alt(title, ends, "ends at")
    return Plot(title, drawing, _legend(lines, style), alt, note, labelled=direct)


def bars_plot(
    title: str,
    cells: stats.Cells,
    keys: Mapping[str, str],
    arms: Sequence[str],
    style: Mapping[str, tuple[int, int]],
    *,
    ylabel: str = "",
    logy: bool = False,
) -> Plot:
    """A result metric over tasks, whiskers for the 95 % interval.

    Bars start at zero; where that would hide the differences (or on a log axis) points are drawn.

    Args:
      keys: group label -> result key. With one group, the arms themselves are the axis.
    """
    ci = {
        (a, g): stats.t_interval(cells[a, k].values.values())
        for g, k in keys.items()
        for a in arms
        if (a, k) in cells
    }
    ci = {where: c for where, c in ci.items() if c.n}
    means = np.array([c.mean for c in ci.values()])
    low = min(means.min(), 0.0) if means.size else 0.0
    points = logy or (means.size > 1 and low == 0 and means.min() > 0.6 * means.max())
    shown = [a for a in arms if any((a, g) in ci for g in keys)]
    single = len(keys) == 1
    across = len(shown) if single else len(keys) * (len(shown) + 1)
    width = int(min(max(WIDTH, 14 * across + 80), 1000))

    def draw(ax: Any) -> None:
        slot = 0.8 if single else 0.84 / max(len(shown), 1)
        for g, group in enumerate(keys):
            for i, arm in enumerate(shown):
                c = ci.get((arm, group))
                if c is None:
                    continue
                x = i if single else g + (i - (len(shown) - 1) / 2) * slot
                colour, dash = SERIES[style[arm][0]], style[arm][1]
                if points:
                    fill = "none" if dash else "full"
                    mark = dict(marker=MARKERS[i % len(MARKERS)], markersize=5, fillstyle=fill)
                    ax.plot(x, c.mean, color=colour, linestyle="none", **mark)
                else:  # the second arm of a colour: pale, with its dashes around
                    look = dict(facecolor=(colour, 0.3 if dash else 0.85), edgecolor=colour)
                    look |= dict(linestyle=DASHES[dash], linewidth=1.2 if dash else 0)
                    ax.bar(x, c.mean, 0.9 * slot, **look)
                if c.n > 1 and c.half > 0:
                    ax.errorbar(
                        x,
                        c.mean,
                        [[c.mean - c.low], [c.high - c.mean]],
                        fmt="none",
                        ecolor=colour if points else FG,
                        elinewidth=1.1,
                        capsize=2.5,
                    )
        labels = shown if single else list(keys)
        crowded = sum(map(len, labels)) * 6.5 > width - 90
        ax.set_xticks(
            range(len(labels)),
            labels,
            rotation=35 if crowded else 0,
            ha="right" if crowded else "center",
        )
        ax.set_xlim(-0.6, len(labels) - 0.4)
        ax.set_ylabel(ylabel)
        if logy:
            ax.set_yscale("log")
            svg.log_ticks(ax.yaxis)
        elif not points:
            ax.axhline(0, color=MUTED, linewidth=0.8)
        if not logy:
            svg.ticks(ax.yaxis)

    note = "Points, not bars: the axis does not start at zero." if points and not logy else ""
    alt = _alt(
        title,
        {a: float(np.mean([ci[a, g].mean for g in keys if (a, g) in ci])) for a in shown},
        "mean",
    )
    legend = () if single else _legend(shown, style)
    return Plot(title, _draw(draw, title, width, HEIGHT, 10), legend, alt, note, wide=width > WIDTH)


def heatmap_plot(
    title: str,
    panels: Mapping[str, np.ndarray],
    *,
    xlabel: str = "",
    ylabel: str = "",
    logz: bool = False,
) -> Plot:
    """A 2-D array an arm on one shared colour scale. Panels: arm -> f[H, W]."""
    shown = dict(list(panels.items())[:MAX_PANELS])
    columns = min(len(shown), 3)
    height_rows = math.ceil(len(shown) / columns)
    finite = np.concatenate([p[np.isfinite(p)].ravel() for p in shown.values()] or [np.zeros(1)])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)

    def draw_all(fig: Any) -> None:
        from matplotlib.colors import LogNorm, Normalize

        log = logz and low > 0
        norm = LogNorm(low, high) if log else Normalize(low, high if high > low else low + 1)
        axes = fig.subplots(height_rows, columns, squeeze=False)
        image = None
        for ax, arm in zip(axes.flat, shown, strict=False):
            image = ax.imshow(
                shown[arm],
                norm=norm,
                cmap="viridis",
                aspect="auto",
                interpolation="none",
                origin="lower",
            )
            ax.grid(False)
            ax.set_title(arm, fontsize=10, color=FG)
            svg.ticks(ax.xaxis, 4, whole=True)
            svg.ticks(ax.yaxis, 4, whole=True)
        for ax in axes.flat[len(shown) :]:
            ax.set_axis_off()
        for ax in axes[-1]:
            ax.set_xlabel(xlabel)
        for ax in axes[:, 0]:
            ax.set_ylabel(ylabel)
        if image is not None:
            fig.colorbar(image, ax=axes.ravel().tolist(), shrink=0.9, pad=0.02).outline.set_visible(
                False
            )

    left_out = len(panels) - len(shown)
    width = WIDTH if columns < 3 else 960
    drawing = svg.figure(draw_all, title, width, max(220 * height_rows, HEIGHT))
    note = f"{left_out} further arms are left out." if left_out else ""
    alt = f"{title}: heat maps of {', '.join(shown)}, from {low:.3g} to {high:.3g}."
    return Plot(title, drawing, (), alt, note, wide=width > WIDTH)


def effects_plot(
    title: str,
    effects: Mapping[str, Mapping[str, stats.Interval]],
    style: Mapping[str, tuple[int, int]],
    *,
    xlabel: str = "",
) -> Plot:
    """Paired changes as points with intervals around zero: one line a switch, a point an arm.

    Args:
      effects: label of the switch -> arm -> change.
    """
    arms = list(dict.fromkeys(a for by_arm in effects.values() for a in by_arm))
    height = 60 + len(effects) * (14 + 9 * len(arms))

    def draw(ax: Any) -> None:
        ax.axvline(0, color=MUTED, linewidth=1)
        for y, by_arm in enumerate(effects.values()):
            for i, arm in enumerate(arms):
                if arm not in by_arm or not by_arm[arm].n:
                    continue
                c, colour = by_arm[arm], SERIES[style[arm][0]]
                at = y + (i - (len(arms) - 1) / 2) * 0.7 / len(arms)
                ax.plot(
                    [c.mean],
                    [at],
                    marker=MARKERS[i % len(MARKERS)],
                    color=colour,
                    markersize=5,
                    linestyle="none",
                )
                if c.n > 1 and c.half > 0:
                    ax.plot([c.low, c.high], [at, at], color=colour, linewidth=1.4)
        ax.set_yticks(range(len(effects)), list(effects))
        ax.set_ylim(len(effects) - 0.45, -0.55)
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
        ax.set_xlabel(xlabel)
        svg.ticks(ax.xaxis)

    biggest = {
        label: max((abs(c.mean) for c in by_arm.values() if c.n), default=0.0)
        for label, by_arm in effects.items()
    }
    return Plot(
        title,
        _draw(draw, title, WIDTH, min(height, 900), 12),
        _legend(arms, style),
        _alt(title, biggest, "largest change"),
    )


def _legend(arms: Any, style: Mapping[str, tuple[int, int]]) -> tuple[tuple[str, int, int], ...]:
    return tuple((arm, *style[arm]) for arm in arms)


def _alt(title: str, values: Mapping[str, float], what: str) -> str:
    some = [f"{arm} {stats.format_number(v)}" for arm, v in list(values.items())[:8]]
    return f"{title}: {what} {', '.join(some)}{' ...' if len(values) > 8 else ''}."


def _scales(ax: Any, logx: bool, logy: bool, lines: Sequence[Line], *, framed: bool) -> None:
    """Log axes where asked and possible, the frame, and a sensible number of ticks."""
    if logx and all((n.x > 0).all() for n in lines):
        ax.set_xscale("log")
        svg.log_ticks(ax.xaxis)
    else:
        svg.ticks(ax.xaxis, whole=all((n.x == np.round(n.x)).all() for n in lines))
    log = logy and all((n.mean[np.isfinite(n.mean)] > 0).any() for n in lines)
    if log:
        ax.set_yscale("log", nonpositive="mask")
    if framed:
        _frame(ax, lines, log)
    (svg.log_ticks if log else svg.ticks)(ax.yaxis)


def _frame(ax: Any, lines: Sequence[Line], log: bool) -> None:
    """Keeps wide bands (few seeds) from flattening the lines: they may leave the frame."""

    def finite(values: Sequence[np.ndarray]) -> np.ndarray:
        x = np.concatenate(values)
        x = x[np.isfinite(x) & ((x > 0) if log else True)]
        return np.log10(x) if log else x

    mean, bands = finite([n.mean for n in lines]), finite([y for n in lines for y in n[1:]])
    if not mean.size or mean.max() == mean.min():
        return
    room = mean.max() - mean.min()
    low = max(bands.min(), mean.min() - 0.5 * room) - 0.05 * room
    high = min(bands.max(), mean.max() + 0.5 * room) + 0.05 * room
    ax.set_ylim(*((10**low, 10**high) if log else (low, high)))


def _label_ends(
    ax: Any, ends: Sequence[tuple[str, Line]], style: Mapping[str, tuple[int, int]]
) -> None:
    """Names at the right edge, at the height of each line's end, moved apart where they meet."""
    ax.figure.canvas.draw()  # fixes the limits
    to_axes = ax.transAxes.inverted()
    heights = []
    for arm, line in ends:
        last = line.mean[np.isfinite(line.mean)]
        y = to_axes.transform(ax.transData.transform((1.0, last[-1])))[1] if last.size else 0.5
        heights.append((float(np.clip(y, 0, 1)) if np.isfinite(y) else 0.5, arm))
    heights.sort()
    gap = 0.068
    placed: list[float] = []
    for y, _ in heights:
        placed.append(max(y, placed[-1] + gap) if placed else y)
    over = placed[-1] - 1.02
    for i in range(len(placed) - 1, -1, -1):  # push back down from the top
        limit = 1.02 if i == len(placed) - 1 else placed[i + 1] - gap
        placed[i] = min(placed[i], limit) if over > 0 else placed[i]
    for y, (_, arm) in zip(placed, heights, strict=True):
        ax.text(
            1.015,
            y,
            arm,
            transform=ax.transAxes,
            va="center",
            ha="left",
            fontsize=10.5,
            color=SERIES[style[arm][0]],
        ).set_in_layout(False)  # its room is set aside already


def _draw(draw: Callable[[Any], None], title: str, width: int, height: int, right: float) -> str:
    def draw_all(fig: Any) -> None:
        fig.get_layout_engine().set(rect=(0, 0, 1 - max(right - 10, 0) / width, 1))
        draw(fig.add_subplot())

    return svg.figure(draw_all, title, width, height)
