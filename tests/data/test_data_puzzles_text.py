"""Puzzle states against replayed solutions and parity; text; the doctests of qlab.data."""

import doctest
import importlib
import io
import itertools
import os
import pickle
import sys
import types

import numpy as np
import pytest

import qlab.data
from qlab.data.files import find
from qlab.data.puzzles import parse_published, parse_puzzles
from qlab.data.registry import DATASETS
from qlab.data.text import parse_text
from qlab.lab.errors import UserError

SLIDES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def need(key):
    d = DATASETS[key]
    if not os.environ.get("QLAB_DATA") or not all(find(d, f) for f in d.files):
        pytest.skip(f"{key} is not under QLAB_DATA")


def one_line(call, *parts):
    with pytest.raises(UserError) as e:
        call()
    line = str(e.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def is_odd(permutation):
    """Whether a permutation is odd: n minus its number of cycles."""
    left, cycles = set(range(len(permutation))), 0
    while left:
        i, cycles = left.pop(), cycles + 1
        while permutation[i] in left:
            i = permutation[i]
            left.remove(i)
    return (len(permutation) - cycles) % 2 == 1


def test_real_puzzle15_solutions_reach_the_goal():
    need("deepcubea")
    p = qlab.data.load("puzzle15")
    assert p.states.shape == (250, 16)
    assert p.states.dtype == np.uint8
    for state, moves, length in zip(p.states, p.solutions, p.lengths, strict=True):
        assert len(moves) == length
        board = state.reshape(4, 4).copy()
        row, col = map(int, np.argwhere(board == 0)[0])
        for m in moves:
            down, right = SLIDES[m]
            # The tile on the other side slides this way into the blank.
            r, c = row - down, col - right
            assert 0 <= r < 4
            assert 0 <= c < 4
            board[row, col], board[r, c] = board[r, c], 0
            row, col = r, c
        assert board.ravel().tolist() == [*range(1, 16), 0]


def test_real_puzzle15_lengths_are_not_below_the_manhattan_bound():
    need("deepcubea")
    p = qlab.data.load("puzzle15")
    for state, length in zip(p.states, p.lengths, strict=True):
        far = sum(
            abs(i // 4 - (t - 1) // 4) + abs(i % 4 - (t - 1) % 4)
            for i, t in enumerate(state.tolist())
            if t
        )
        assert far <= length <= 80
        assert (length - far) % 2 == 0


def test_real_cube3():
    need("deepcubea")
    p = qlab.data.load("cube3")
    assert p.states.shape == (500, 54)
    assert [len(s) for s in p.solutions] == p.lengths.tolist()
    assert (p.lengths.min(), p.lengths.max()) == (17, 22)
    assert p.lengths.max() <= 26  # God's number in quarter turns
    # Centres never move, and a quarter turn is five 4-cycles of stickers: an odd permutation.
    np.testing.assert_array_equal(p.states[:, 4::9], np.tile(np.arange(4, 54, 9), (500, 1)))
    assert [is_odd(s.tolist()) for s in p.states] == [n % 2 == 1 for n in p.lengths]
    # An optimal solution never undoes its own last move.
    for s in p.solutions:
        assert all(a[0] != b[0] or a == b for a, b in itertools.pairwise(s))


def test_real_lightsout7():
    need("deepcubea")
    p = qlab.data.load("lightsout7")
    assert p.states.shape == (250, 49)
    assert set(np.unique(p.states)) == {0, 1}
    assert p.solutions is None
    assert p.lengths is None


def puzzle15(num=250):
    """A made-up test set: the solved board after one slide up and, if even, one more."""
    one = [*range(1, 12), 0, 13, 14, 15, 12]  # tile 12 slides up into the blank
    two = [*range(1, 8), 0, *range(9, 12), 8, 13, 14, 15, 12]
    states = np.array([one, two] * (num // 2))
    return states, np.array([["U", ""], ["U", "U"]] * (num // 2)), np.array([1, 2] * (num // 2))


def npz(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def pack(states, solutions, lengths):
    return npz(states=states, solutions=solutions, solution_length=lengths)


def test_npz_round_trip():
    p = parse_puzzles(pack(*puzzle15()), "p.npz", "puzzle15")
    np.testing.assert_array_equal(p.states, puzzle15()[0])
    assert p.solutions[:2] == (("U",), ("U", "U"))
    assert p.lengths.dtype == np.int32
    lights = np.eye(250, 49, dtype=np.int64)
    p = parse_puzzles(npz(states=lights), "l.npz", "lightsout7")
    np.testing.assert_array_equal(p.states, lights)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s, m, n: (s[:-1], m, n), "expected integers (250, 16)"),
        (lambda s, m, n: (s * 1.0, m, n), "float64"),
        (lambda s, m, n: (np.where(s == 3, 4, s), m, n), "state 0 is no state"),
        (lambda s, m, n: (np.where(s == 15, 16, s), m, n), "each of 0..15 once"),
        (lambda s, m, n: (s, m[:-1], n), "one for each of 250"),
        (lambda s, m, n: (s, m, n[:-1]), "one for each of 250"),
        (lambda s, m, n: (s, np.where(m == "U", "X", m), n), "solution 0 is not 1 moves"),
        (lambda s, m, n: (s, m, n - 1), "solution 0 is not 0 moves"),
        (lambda s, m, n: (s, m, n + 1), "solution 0 is not 2 moves"),
    ],
)
def test_bad_puzzle_npz(change, says):
    data = pack(*change(*puzzle15()))
    one_line(lambda: parse_puzzles(data, "p.npz", "puzzle15"), "p.npz", says)


def test_bad_lightsout_npz():
    bad = np.zeros((250, 49), np.uint8)
    bad[7, 3] = 2
    one_line(lambda: parse_puzzles(npz(states=bad), "l", "lightsout7"), "state 7", "values 0..1")
    one_line(lambda: parse_puzzles(npz(other=bad), "l", "lightsout7"), "states")
    one_line(lambda: parse_puzzles(b"", "l", "lightsout7"), "not a good npz")


def published(states, field, solutions=None):
    """A pickle as the authors wrote it: a class with slots from a module we do not have."""
    module = types.ModuleType("environments_gone")
    cls = type("NPuzzleState", (), {"__slots__": (field, "hash"), "__module__": module.__name__})
    module.NPuzzleState = cls
    sys.modules[module.__name__] = module
    try:
        made = []
        for s in states:
            made.append(cls())
            setattr(made[-1], field, s)
            made[-1].hash = None
        raw = {"states": made, "times": [np.float64(1.5)]}
        if solutions is not None:
            raw["solutions"] = solutions
        return pickle.dumps(raw, 4)
    finally:
        del sys.modules[module.__name__]


def test_published_pickle_gives_every_second_state():
    states, padded, lengths = puzzle15(500)
    solutions = [row[:k] for row, k in zip(padded.tolist(), lengths.tolist(), strict=True)]
    order = np.random.default_rng(0).permutation(500)
    data = published(states[order], "tiles", [solutions[i] for i in order])
    p = parse_published(data, "p.pkl", "puzzle15")
    np.testing.assert_array_equal(p.states, states[order[::2]])
    assert p.solutions == tuple(tuple(solutions[i]) for i in order[::2])
    one_line(lambda: parse_published(data, "p.pkl", "cube3"), "p.pkl", "not DeepCubeA's")
    one_line(lambda: parse_published(data[:-9], "p.pkl", "puzzle15"), "not a good pickle")
    few = published(states[:10], "tiles", solutions[:10])
    one_line(lambda: parse_published(few, "p.pkl", "puzzle15"), "expected integers (250, 16)")


def test_cube_moves_are_joined():
    # The authors' moves are pairs, ("F", -1).
    solved = np.arange(54)
    data = published([solved] * 1000, "colors", [[("F", 1), ("F", -1)]] * 1000)
    p = parse_published(data, "c.pkl", "cube3")
    assert p.solutions[0] == ("F1", "F-1")


def test_real_published_pickles_equal_the_npz():
    need("deepcubea")
    need("deepcubea_original")
    from qlab.data.files import read

    for name in ("cube3", "puzzle15", "lightsout7"):
        a = qlab.data.load(name)
        b = parse_published(*read(DATASETS["deepcubea_original"], f"{name}/test/data_0.pkl"), name)
        np.testing.assert_array_equal(a.states, b.states)
        assert a.solutions == b.solutions


# ---- text


def test_parse_text():
    t = parse_text(b"the cat sat on the mat\n" * 3, "t.txt")
    assert t.vocab == tuple(sorted(set(t.text)))
    assert t.decode(t.ids) == t.text
    assert t.ids.dtype == np.uint8
    assert len(t.train) == len(t.text) * 9 // 10
    np.testing.assert_array_equal(np.concatenate([t.train, t.val]), t.ids)


def test_bad_text():
    one_line(lambda: parse_text(b"0123456789\xe9", "t.txt"), "t.txt", "0xe9 at offset 10")
    one_line(lambda: parse_text(b"short", "t.txt"), "5 characters")
    one_line(lambda: parse_text(b"", "t.txt"), "0 characters")


def test_real_tiny_shakespeare():
    need("tiny_shakespeare")
    t = qlab.data.load("tiny_shakespeare")
    # The counts that the well-known character-level tutorials print.
    assert (len(t.text), len(t.vocab)) == (1_115_394, 65)
    assert (len(t.train), len(t.val)) == (1_003_854, 111_540)
    assert t.text.startswith("First Citizen:\nBefore we proceed any further")
    assert t.decode(t.ids[:14]) == "First Citizen:"
    assert "".join(t.vocab[:3]) == "\n !"


@pytest.mark.parametrize("name", ["", ".files", ".images", ".text", ".molecules"])
def test_doctests(name):
    result = doctest.testmod(importlib.import_module("qlab.data" + name))
    assert result.attempted > 0
    assert result.failed == 0
