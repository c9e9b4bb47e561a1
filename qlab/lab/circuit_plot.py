"""Quantum circuits of a run as drawings: wires, boxes and controls. Imports no JAX.

A circuit comes as a named array f[G, 6], a row a gate: its place in GATES, first and second qubit (the same
for gates of one), up to three angles in radians. Rows of gate 0 are empty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qlab.lab import svg
from qlab.lab.plots import WIDTH, Plot
from qlab.lab.svg import FG, MUTED, SERIES

# The codes of qlab.quantum.circuit_spec.
GATES = ("", "X", "Y", "Z", "H", "RX", "RY", "RZ", "CNOT", "CZ", "U3", "SWAP")
ANGLES = {"RX": 1, "RY": 1, "RZ": 1, "U3": 3}
MAX_CIRCUITS, MIN_COLUMNS, MAX_COLUMNS = 4, 8, 24
BOX, ROW = 30, 34  # user units of a column and of a wire


def columns(rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(column, row) of every gate, each as far left as the wires it crosses are free.

    >>> rows = np.array([[4, 0, 0, 0, 0, 0], [8, 0, 2, 0, 0, 0], [4, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    >>> [column for column, _ in columns(rows)]  # the CNOT's line crosses qubit 1
    [0, 1, 2]
    """
    free: dict[int, int] = {}
    placed = []
    for row in rows[rows[:, 0] > 0]:
        low, high = sorted((int(row[1]), int(row[2])))
        at = max(free.get(q, 0) for q in range(low, high + 1))
        placed.append((at, row))
        free |= dict.fromkeys(range(low, high + 1), at + 1)
    return placed


def circuit_plot(title: str, circuits: Mapping[str, np.ndarray]) -> Plot:
    """The circuits below one another, each with its name. circuits: name -> f[G, 6]."""
    shown = dict(list(circuits.items())[:MAX_CIRCUITS])
    placed = {name: columns(np.asarray(rows, float)) for name, rows in shown.items()}
    wires = {
        name: 1 + max((int(max(row[1:3])) for _, row in gates), default=0)
        for name, gates in placed.items()
    }
    used = max((at + 1 for gates in placed.values() for at, _ in gates), default=1)
    depth = min(max(used, MIN_COLUMNS), MAX_COLUMNS)
    heights = [ROW * (n + 1) for n in wires.values()]

    def draw_all(fig: Any) -> None:
        axes = fig.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (name, gates) in zip(axes, placed.items(), strict=True):
            ax.set_xlim(-0.8, depth - 0.2)
            ax.set_ylim(wires[name] - 0.4, -0.6)
            ax.set_axis_off()
            ax.set_title(f"{name} ({len(gates)} gates)", fontsize=10, color=FG, loc="left")
            for q in range(wires[name]):
                # Cut out at boxes: text on a line is hard to read.
                boxes = [at for at, row in gates if row[1] == row[2] == q and at < depth]
                cuts = [-0.5, *(x for at in boxes for x in (at - 0.4, at + 0.4)), depth - 0.3]
                for pair in zip(cuts[::2], cuts[1::2], strict=True):
                    ax.plot(pair, (q, q), color=MUTED, linewidth=0.9, zorder=0)
                ax.text(-0.6, q, str(q), color=MUTED, ha="right", va="center", fontsize=9)
            for at, row in gates:
                if at < depth:
                    _gate(ax, at, row)

    width = max(WIDTH, min(BOX * (depth + 1), 960))
    drawing = svg.figure(draw_all, title, width, sum(heights) + 10 * len(heights))
    cut = sum(at >= depth for gates in placed.values() for at, _ in gates)
    notes = []
    if cut:
        notes.append(f"{cut} gates beyond column {depth} are left out.")
    if len(circuits) > len(shown):
        notes.append(f"{len(circuits) - len(shown)} further circuits are left out.")
    alt = f"{title}: " + "; ".join(f"{n}: {_words(gates)}" for n, gates in placed.items()) + "."
    return Plot(title, drawing, (), alt, " ".join(notes), wide=width > WIDTH)


def _words(gates: list[tuple[int, np.ndarray]]) -> str:
    """The gates in order, for those who do not see the drawing.

    >>> _words([(0, np.array([5, 1, 1, 0.5, 0, 0])), (1, np.array([8, 1, 0, 0, 0, 0]))])
    'RX(0.5) on 1, CNOT on 1 and 0'
    """
    texts = []
    for _, row in gates:
        name, angles = _parts(row)
        where = f"{row[1]:.0f}" + (f" and {row[2]:.0f}" if row[1] != row[2] else "")
        texts.append(f"{name}{f'({angles})' if angles else ''} on {where}")
    return ", ".join(texts) or "no gates"


def _parts(row: np.ndarray) -> tuple[str, str]:
    name = GATES[int(row[0])]
    turns = [math.remainder(a, 2 * math.pi) for a in row[3 : 3 + ANGLES.get(name, 0)]]
    return name, ", ".join(f"{a:.2g}" for a in turns)


def _gate(ax: Any, at: int, row: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    name, angles = _parts(row)
    a, b = int(row[1]), int(row[2])
    if a == b:
        box = Rectangle(
            (at - 0.4, a - 0.36), 0.8, 0.72, facecolor=SERIES[0], alpha=0.25, linewidth=0
        )
        ax.add_patch(box)
        ax.text(at, a - 0.12 * bool(angles), name, ha="center", va="center", fontsize=9, color=FG)
        if angles:
            ax.text(at, a + 0.2, angles, ha="center", va="center", fontsize=6.5, color=FG)
        return
    ax.plot((at, at), (a, b), color=FG, linewidth=1.2)
    if name == "SWAP":
        ax.plot((at, at), (a, b), "x", color=FG, markersize=7)
        return
    ax.plot(at, a, "o", color=FG, markersize=5)
    if name == "CZ":
        ax.plot(at, b, "o", color=FG, markersize=5)
        return
    ax.plot(at, b, "o", color=FG, markersize=12, fillstyle="none")
    ax.plot(at, b, "+", color=FG, markersize=12)
