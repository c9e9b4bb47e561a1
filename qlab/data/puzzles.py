"""Test states of three puzzles, with optimal solutions where their authors published them.

Letters: N states, n cells of one state.
"""

from typing import NamedTuple

import numpy as np

from qlab.data.cifar import parse_npz
from qlab.data.files import read
from qlab.data.registry import DATASETS
from qlab.lab.errors import UserError

PUZZLES = {
    # name: (states, cells, largest value, moves)
    "cube3": (500, 54, 53, tuple(f + t for f in "UDLRBF" for t in ("-1", "1"))),
    "puzzle15": (250, 16, 15, ("U", "D", "L", "R")),
    "lightsout7": (250, 49, 1, None),
}


class Puzzles(NamedTuple):
    """Scrambled states of one puzzle.

    states: u8[N, n].
      cube3: which sticker 0..53 is at each place; colour = sticker // 9, solved = 0..53.
      puzzle15: which tile is in each cell, row by row, 0 = blank; solved = 1..15, 0.
      lightsout7: 1 = lit; solved = all 0.
    solutions: for each state its moves from there to the solved state, or None (lightsout7).
      cube3: a face U D L R B F and 1 (clockwise) or -1: quarter turns.
      puzzle15: the way the TILE slides into the blank (the blank moves the opposite way).
    lengths: i32[N], moves in each solution, or None.
    """

    states: np.ndarray
    solutions: tuple[tuple[str, ...], ...] | None
    lengths: np.ndarray | None


def parse_puzzles(data: bytes, where: str, name: str) -> Puzzles:
    """One of the npz files, every state and move checked."""
    num, cells, top, moves = PUZZLES[name]
    fields = ("states", "solutions", "solution_length") if moves else ("states",)
    z = parse_npz(data, where, fields)
    states = z["states"]
    if states.shape != (num, cells) or states.dtype.kind not in "iu":
        raise UserError(
            f"{where}: states are {states.dtype}{states.shape}, expected integers ({num}, {cells})"
        )
    good = (states >= 0) & (states <= top)
    if moves:  # each value once
        good = np.sort(states, axis=1) == np.arange(cells)
    if not good.all():
        bad = int(np.argmin(good.all(axis=1)))
        rule = f"each of 0..{top} once" if moves else f"values 0..{top}"
        raise UserError(f"{where}: state {bad} is no state of {name} (expected {rule})")
    states = states.astype(np.uint8)
    if not moves:
        return Puzzles(states, None, None)
    padded, lengths = z["solutions"], z["solution_length"]
    solutions = tuple(tuple(row[:k].tolist()) for row, k in zip(padded, lengths, strict=True))
    for i, (row, k) in enumerate(zip(padded, lengths, strict=True)):
        if not (0 <= k <= len(row)) or (row[k:] != "").any() or set(solutions[i]) - set(moves):
            raise UserError(
                f"{where}: solution {i} is not {int(k)} moves of {', '.join(moves)} and then blanks"
            )
    return Puzzles(states, solutions, lengths.astype(np.int32))


def puzzles(name: str) -> Puzzles:
    """The test states of "cube3", "puzzle15" or "lightsout7"."""
    data, where = read(DATASETS["deepcubea"], f"{name}_test.npz")
    return parse_puzzles(data, where, name)
