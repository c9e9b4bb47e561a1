"""Rubik's cubes of 3 x 3 x 3 and 2 x 2 x 2 in quarter turns; exact distances of the small one.

A state is u8[6 n n]: which sticker is at each place, in the order of DeepCubeA's test states: faces
U D L R B F, n n stickers each, colour = sticker // (n n); the goal is 0, 1, 2, ... Actions are quarter turns,
a face and -1 (counter-clockwise, seen from outside) or 1. The large cube turns all six faces; the small one
only U, R and F, which leave one corner where it is, so that turning the whole cube makes no new states.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from qlab.search.domains.sliding import rank
from qlab.search.problem import Problem, macro_words

FACES = "UDLRBF"
TURNED = {2: "URF", 3: FACES}
_TO = {
    "U": (0, 1, 0), "D": (0, -1, 0), "L": (-1, 0, 0), "R": (1, 0, 0), "B": (0, 0, -1), "F": (0, 0, 1)
}  # fmt: skip
# Where the rows of a face's stickers run to, and then those in a row.
_RUNS = {"U": "RB", "D": "RF", "L": "FU", "R": "BU", "B": "LU", "F": "RU"}


def move_names(n: int) -> tuple[str, ...]:
    """The actions, in order.

    >>> move_names(2)
    ('U-1', 'U1', 'R-1', 'R1', 'F-1', 'F1')
    """
    return tuple(face + turn for face in TURNED[n] for turn in ("-1", "1"))


def _places(n: int) -> np.ndarray:
    """i32[6 n n, 3]: where each sticker sits; cubies at -(n - 1), ..., n - 1 in steps of 2, faces at n."""
    steps = range(-(n - 1), n, 2)
    rows = []
    for face in FACES:
        normal, first, second = (np.asarray(_TO[f]) for f in (face, *_RUNS[face]))
        rows += [n * normal + i * first + j * second for i, j in itertools.product(steps, steps)]
    return np.asarray(rows, np.int32)


@functools.cache
def turns(n: int) -> np.ndarray:
    """u8[A, 6 n n]: after action a, place i has the sticker that was at turns[a, i]."""
    at = _places(n)
    index = {tuple(p): i for i, p in enumerate(at.tolist())}
    out = []
    for name in move_names(n):
        axis = np.asarray(_TO[name[0]])
        sign = -int(name[1:])  # clockwise is negative about the outward normal
        moves = at @ axis >= n - 1
        turned = sign * np.cross(axis, at) + np.outer(at @ axis, axis)
        source = np.arange(len(at))
        for i in np.flatnonzero(moves):
            source[index[tuple(turned[i].tolist())]] = i
        out.append(source)
    return np.asarray(out, np.uint8)


def macro_turns(n: int, depth: int, dedup: bool) -> np.ndarray:
    """u8[A, 6 n n]: the words of 1..depth quarter turns, shortest first.

    dedup: of the words that do the same only the first, and none that does nothing.

    >>> [len(macro_turns(3, d, False)) for d in (1, 2, 3)], [len(macro_turns(3, d, True)) for d in (1, 2)]
    ([12, 156, 1884], [12, 126])
    """
    base = turns(n)
    words = macro_words(len(base), depth)
    all_turns = np.broadcast_to(
        np.arange(base.shape[1], dtype=np.uint8), (len(words), base.shape[1])
    )
    for step in words.T:
        after = np.take_along_axis(all_turns, base[step].astype(np.int64), axis=1)
        all_turns = np.where(step[:, None] >= 0, after, all_turns)
    if not dedup:
        return all_turns
    _, first = np.unique(all_turns, axis=0, return_index=True)
    kept = all_turns[np.sort(first)]
    return kept[(kept != np.arange(base.shape[1])).any(1)]


@functools.cache
def cube(n: int, macro_depth: int = 1, dedup: bool = True) -> Problem:
    """The n x n x n cube, n = 2 or 3; macro_depth > 1 adds all words of up to so many turns, each at cost 1.

    The heuristic sees the colours, one-hot: f32[36 n n].

    >>> cube(3).num_actions, cube(3, 3, dedup=False).num_actions, cube(2).num_actions
    (12, 1884, 6)
    >>> bool(cube(3).is_goal(cube(3).next_state(goal_state(3), 0)))
    False
    """
    table = macro_turns(n, macro_depth, dedup)
    goal = np.arange(6 * n * n, dtype=np.uint8)
    return Problem(
        next_state=lambda s, a: s[jnp.asarray(table)[a]],
        cost=lambda s, a: jnp.float32(1),
        is_goal=lambda s: (s == goal).all(),
        encode=lambda s: jax.nn.one_hot(s // (n * n), 6).ravel(),
        num_actions=len(table),
    )


def goal_state(n: int) -> jax.Array:
    """u8[6 n n]."""
    return jnp.arange(6 * n * n, dtype=jnp.uint8)


def scramble(key: jax.Array, n: int, k: jax.Array, k_max: int) -> jax.Array:
    """The goal after k <= k_max random quarter turns: u8[6 n n]."""
    table = jnp.asarray(turns(n))
    actions = jax.random.randint(key, (k_max,), 0, len(table))
    move = lambda s, x: (jnp.where(x[0] < k, s[table[x[1]]], s), None)  # noqa: E731
    return jax.lax.scan(move, goal_state(n), (jnp.arange(k_max), actions))[0]


@functools.cache
def wrong_stickers(n: int) -> tuple[np.ndarray, float]:
    """(f32[36 n n], f): dotted with the encoding, plus f, the wrong stickers over those a turn moves to
    another face (4 n of them): never more than the turns that are left."""
    right = np.eye(6, dtype=np.float32)[np.arange(6 * n * n) // (n * n)]
    return -right.ravel() / (4 * n), 6 * n * n / (4 * n)


# --- the small cube, whole ---------------------------------------------------------------------------


@functools.cache
def _corners() -> np.ndarray:
    """i32[8, 3]: the three places of each corner, clockwise from its U or D sticker; the fixed one last."""
    at = _places(2)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(at.tolist()):
        groups.setdefault(tuple(np.sign(p)), []).append(i)
    out = []
    for corner, places in groups.items():
        first = next(i for i in places if FACES[i // 4] in "UD")
        others = [i for i in places if i != first]
        normals = [at[i] // 2 for i in (first, *others)]
        # Seen from outside, a -> b -> c is clockwise when their normals' determinant is negative.
        if np.linalg.det(np.asarray(normals, float)) > 0:
            others.reverse()
        out.append((corner == (-1, -1, -1), [first, *others]))
    return np.asarray([places for _, places in sorted(out)], np.int32)


def corners_of(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(which corner is at each of the 7 free places i32[7], how it is twisted i32[7] in 0..2)."""
    corners = _corners()
    of, twist = np.zeros(24, np.int32), np.zeros(24, np.int32)
    for c, places in enumerate(corners):
        of[places], twist[places] = c, np.arange(3)
    first = s[jnp.asarray(corners[:7, 0])].astype(jnp.int32)
    return jnp.asarray(of)[first], jnp.asarray(twist)[first]


def rank2(s: jax.Array) -> jax.Array:
    """i32[]: the number of a state of the small cube, in 0..3674159; the goal is 0."""
    corner, twist = corners_of(s)
    powers = (3 ** np.arange(6)).astype(np.int32)
    return rank(corner) * 729 + jnp.sum(twist[:6] * powers)


def unrank2(number: np.ndarray) -> np.ndarray:
    """u8[N, 24]: the states of these numbers, the inverse of `rank2`."""
    permutation, orientation = np.divmod(np.asarray(number, np.int64), 729)
    left = np.tile(np.arange(7), (len(number), 1))
    twist = (orientation[:, None] // 3 ** np.arange(6)) % 3
    twist = np.concatenate([twist, (-twist.sum(1, keepdims=True)) % 3], 1)
    corners, lines = _corners(), np.arange(len(number))
    out = np.tile(np.arange(24, dtype=np.uint8), (len(number), 1))
    for place in range(7):
        digit, permutation = np.divmod(permutation, np.prod(range(1, 7 - place), dtype=np.int64))
        corner = left[lines, digit]
        keep = np.arange(left.shape[1]) != digit[:, None]
        left = left[keep].reshape(len(number), -1)
        for j in range(3):
            out[:, corners[place, j]] = corners[corner, (j + twist[:, place]) % 3]
    return out


@functools.cache
def distances2() -> np.ndarray:
    """i8[3674160]: quarter turns to the goal by `rank2`; at most 14."""
    number = jax.jit(jax.vmap(rank2))
    table = turns(2).astype(np.int64)
    # A turn acts on where the corners are and on how they are twisted apart from each other.
    permutations = unrank2(np.arange(5040) * 729)
    orientations = unrank2(np.arange(729))
    move_p = np.stack([np.asarray(number(permutations[:, t])) // 729 for t in table])
    move_o = np.stack([np.asarray(number(orientations[:, t])) % 729 for t in table])
    out = np.full(5040 * 729, -1, np.int8)
    layer = np.zeros(1, np.int64)
    out[layer] = 0
    depth = 0
    while len(layer):
        depth += 1
        p, o = np.divmod(layer, 729)
        reached = np.zeros(out.shape, bool)
        for a, b in zip(move_p, move_o, strict=True):
            reached[a[p] * 729 + b[o]] = True
        layer = np.flatnonzero(reached & (out < 0))
        out[layer] = depth
    return out
