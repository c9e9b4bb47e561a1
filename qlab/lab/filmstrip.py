"""Filmstrips: what a policy did, a frame every so many steps. Imports no JAX.

A film comes as a named array f[F, L, 5], a row a line of a frame: from (x0, y0) to (x1, y1), y upwards, and its place
in LOOKS. A frame whose lines all have look 0 is not drawn: the episode was over.
Letters: F = frames, L = lines of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qlab.lab import svg
from qlab.lab.plots import Plot
from qlab.lab.svg import FG, MUTED, SERIES

# The codes of qlab.rl.envs.drawings.
LOOKS = ("none", "ground", "body", "limb")
MAX_STRIPS, MAX_FRAMES = 8, 12
FRAME, LABEL = 108, 26  # user units: width of a frame, height of a strip's name


def frames_of(film: np.ndarray) -> int:
    """How many frames come before the end of the episode.

    >>> frames_of(np.array([[[0, 0, 1, 1, 2.0]], [[0, 0, 1, 1, 0]], [[0, 0, 1, 1, 0]]]))
    1
    """
    over = np.flatnonzero(~(film[..., 4] > 0).any(1))
    return int(over[0]) if over.size else len(film)


def filmstrip_plot(
    title: str,
    films: Mapping[str, np.ndarray],
    steps: Mapping[str, np.ndarray] | None = None,
) -> Plot:
    """A strip an arm, below one another, all at one scale. films: arm -> f[F, L, 5]; steps: arm -> f[F]."""
    shown = {a: np.asarray(f, float)[:MAX_FRAMES] for a, f in list(films.items())[:MAX_STRIPS]}
    frames = max(map(len, shown.values()))
    boxes = {a: _box(f) for a, f in shown.items()}
    heights = {
        a: LABEL + FRAME * min((y1 - y0) / (x1 - x0), 1.5) for a, (x0, x1, y0, y1) in boxes.items()
    }

    def draw_all(fig: Any) -> None:
        fig.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
        axes = fig.subplots(len(shown), frames, squeeze=False, height_ratios=list(heights.values()))
        for row, (arm, film) in zip(axes, shown.items(), strict=True):
            x0, x1, y0, y1 = boxes[arm]
            for i, ax in enumerate(row):
                ax.set_axis_off()
                ax.set_xlim(x0, x1)
                ax.set_ylim(y0, y1)
                ax.set_aspect("equal")
                if i < frames_of(film):
                    _frame(ax, film[i])
                    at = _step(steps, arm, i)
                    ax.text(x1, y1, f"{at:g}", color=MUTED, fontsize=8, ha="right", va="top")  # fmt: skip
                elif i == frames_of(film) < len(film):
                    ax.text((x0 + x1) / 2, (y0 + y1) / 2, "ended", color=MUTED, fontsize=9, ha="center")  # fmt: skip
            row[0].set_title(arm, fontsize=10, color=FG, loc="left")

    drawing = svg.figure(draw_all, title, FRAME * frames, math.ceil(sum(heights.values())))
    alt = f"{title}: " + "; ".join(f"{a}: {_words(f, steps, a)}" for a, f in shown.items()) + "."
    left_out = len(films) - len(shown)
    note = "The first seed of each arm; numbers are steps of the episode."
    note += f" {left_out} further arms are left out." if left_out else ""
    return Plot(title, drawing, (), alt, note, wide=True)


def _words(film: np.ndarray, steps: Mapping[str, np.ndarray] | None, arm: str) -> str:
    n = frames_of(film)
    if n == len(film):
        return f"still going in all {n} frames"
    return f"ended after frame {n}" + (f" (step {_step(steps, arm, n - 1):g})" if n else "")


def _step(steps: Mapping[str, np.ndarray] | None, arm: str, frame: int) -> float:
    """Of the episode, else the number of the frame."""
    known = (steps or {}).get(arm, ())
    return float(known[frame]) if frame < len(known) else float(frame)


def _box(film: np.ndarray) -> tuple[float, float, float, float]:
    """What all frames together cover, with a margin: x from, to, y from, to."""
    x, y = film[..., (0, 2)], film[..., (1, 3)]
    room = 0.04 * max(np.ptp(x), np.ptp(y), 1e-6)
    return x.min() - room, x.max() + room, y.min() - room, y.max() + room


def _frame(ax: Any, lines: np.ndarray) -> None:
    width = {"ground": 1.0, "body": 5.0, "limb": 3.0}
    colour = {"ground": MUTED, "body": FG, "limb": SERIES[0]}
    for x0, y0, x1, y1, code in lines:
        look = LOOKS[int(code)]
        if look != "none":
            ax.plot((x0, x1), (y0, y1), color=colour[look], linewidth=width[look])
