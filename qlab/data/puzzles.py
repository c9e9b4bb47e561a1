"""Test states of three puzzles, with optimal solutions where their authors published them.

Letters: N states, n cells of one state.
"""

from typing import NamedTuple

import numpy as np

from qlab.data.cifar import parse_npz
from qlab.data.files import first_here, read
from qlab.data.pickles import open_pickle
from qlab.lab.errors import UserError


class _Rules(NamedTuple):
    num: int  # states in the test set
    cells: int
    top: int  # the largest value of a cell
    moves: tuple[str, ...] | None  # None: no solutions published


PUZZLES = {
    "cube3": _Rules(500, 54, 53, tuple(f + t for f in "UDLRBF" for t in ("-1", "1"))),
    "puzzle15": _Rules(250, 16, 15, ("U", "D", "L", "R")),
    "lightsout7": _Rules(250, 49, 1, None),
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


def check_puzzles(states, solutions, lengths, where: str, name: str) -> Puzzles:
    """Every state and every move checked.

    Args:
      states: i[N, n]; solutions: str[N, L], padded with ""; lengths: i[N]; both None if unknown.
    """
    num, cells, top, moves = PUZZLES[name]
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
    if lengths.shape != (num,) or solutions.shape[:1] != (num,) or solutions.ndim != 2:
        raise UserError(f"{where}: {len(lengths)} solutions, expected one for each of {num} states")
    rows = []
    for i, (row, k) in enumerate(zip(solutions.tolist(), lengths.tolist(), strict=True)):
        if not 0 <= k <= len(row) or any(row[k:]) or set(row[:k]) - set(moves):
            raise UserError(
                f"{where}: solution {i} is not {k} moves of {', '.join(moves)} and then blanks"
            )
        rows.append(tuple(row[:k]))
    return Puzzles(states, tuple(rows), lengths.astype(np.int32))


def parse_puzzles(data: bytes, where: str, name: str) -> Puzzles:
    """One of the npz files."""
    known = PUZZLES[name].moves is not None
    z = parse_npz(data, where, ("states", "solutions", "solution_length") if known else ("states",))
    return check_puzzles(z["states"], z.get("solutions"), z.get("solution_length"), where, name)


def parse_published(data: bytes, where: str, name: str) -> Puzzles:
    """One of the published pickles, every second state of it, the same as in the npz."""
    raw = open_pickle(data, where, states=("Cube3State", "NPuzzleState", "LOState"))
    try:
        cells = "colors" if name == "cube3" else "tiles"
        states = np.stack([s.fields[cells] for s in raw["states"][::2]])
        found = [["".join(map(str, m)) for m in moves] for moves in raw.get("solutions", ())[::2]]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{where}: not DeepCubeA's test states ({reason})") from e
    if PUZZLES[name].moves is None:
        return check_puzzles(states, None, None, where, name)
    lengths = np.array([len(row) for row in found], np.int32)
    width = int(lengths.max(initial=0))
    solutions = np.array([row + [""] * (width - len(row)) for row in found])
    return check_puzzles(states, solutions, lengths, where, name)


def sources(name: str) -> tuple[tuple[str, str], ...]:
    """The files that hold this puzzle's states, the smallest first."""
    return ("deepcubea", f"{name}_test.npz"), ("deepcubea_original", f"{name}/test/data_0.pkl")


def puzzles(name: str) -> Puzzles:
    """The test states of "cube3", "puzzle15" or "lightsout7"."""
    dataset, path = first_here(*sources(name))
    parse = parse_puzzles if path.endswith(".npz") else parse_published
    return parse(*read(dataset, path), name)
