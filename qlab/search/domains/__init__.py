"""Domains by name, each with what training and measuring need beside the problem itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.data.puzzles import puzzles
from qlab.lab.errors import UserError
from qlab.search.domains import cube, lights_out, sliding
from qlab.search.problem import Problem, expand


class Domain(NamedTuple):
    """
    Attributes:
      problem: with macro-actions of up to the asked depth, each at cost 1.
      scramble: (key, k: i32[], k_max) -> the goal after k random base moves.
      scrambles: (key, n, k_max) -> n such states, each after U{0..k_max} moves.
      distance: states [N, ...] -> f32[N], exact cost-to-go; None where no table fits.
      states: all of them, [num_states, ...], and number: states [N, ...] -> i32[N], their rows; both
        None where no table fits.
      instances: (seed, n) -> n fixed start states, not the goal.
      admissible: f32[m] -> h weights: h = admissible . enc + offset never overestimates.
      offset: the constant of that heuristic.
      num_states: how many can be reached, None if too many to list.
      optima: n -> f32[n], optimal costs of the first n instances where they are known without a table.
    """

    name: str
    problem: Problem
    scramble: Callable[[jax.Array, jax.Array, int], jax.Array]
    scrambles: Callable[[jax.Array, int, int], jax.Array]
    distance: Callable[[jax.Array], jax.Array] | None
    instances: Callable[[int, int], np.ndarray]
    admissible: np.ndarray
    offset: float
    num_states: int | None
    states: np.ndarray | None = None
    number: Callable[[jax.Array], jax.Array] | None = None
    optima: Callable[[int], np.ndarray] | None = None


class Listed(NamedTuple):
    """All states of a small domain and their exact costs at a macro depth."""

    states: np.ndarray
    number: Callable[[jax.Array], jax.Array]
    distance: Callable[[jax.Array], jax.Array]


_UNLISTED: Any = Listed(*[None] * 3)  # type: ignore[arg-type]


def _listed(by_rank: np.ndarray, states: np.ndarray, rank, ranks: np.ndarray, depth: int) -> Listed:
    """by_rank: base distances by rank, -1 where nothing is; ranks: those of `states`."""
    rows = np.zeros(len(by_rank), np.int32)
    rows[ranks] = np.arange(len(states))
    costs = np.maximum(-(-by_rank.astype(np.int32) // depth), 0).astype(np.float32)
    return Listed(
        states,
        number=lambda s: jnp.asarray(rows)[jax.vmap(rank)(s)],
        distance=lambda s: jnp.asarray(costs)[jax.vmap(rank)(s)],
    )


@functools.cache
def domain(name: str, macro_depth: int = 1, dedup: bool = True) -> Domain:
    """A domain by name, with macro-actions of up to `macro_depth` base moves.

    "puzzle8", "puzzle15", "puzzle24", "lightsout<n>", "cube2" (seven movable corners) or "cube3", whose
    instances are DeepCubeA's test states (see qlab.data).

    A macro covers at most `macro_depth` base moves and every way of that many is one (up to moves that
    cancel), so exact macro distances are those of the base domain divided, rounded up.

    >>> d = domain("lightsout4", 2)
    >>> d.problem.num_actions, d.distance(jnp.zeros((1, 16), jnp.uint8)).tolist()
    (136, [0.0])
    """
    sides = {"puzzle8": 3, "puzzle15": 4, "puzzle24": 5}
    if name in sides:
        return _sliding(name, sides[name], macro_depth, dedup)
    if name in ("cube2", "cube3"):
        return _cube(name, int(name[4]), macro_depth, dedup)
    if name.startswith("lightsout") and name[9:].isdigit():
        return _lights_out(name, int(name[9:]), macro_depth, dedup)
    known = ", ".join((*sides, "cube2", "cube3"))
    raise ValueError(f"domain {name!r}: use {known} or lightsout<n>, e.g. lightsout4")


def _walked(scramble: Callable[[jax.Array, jax.Array, int], jax.Array]):
    """`scrambles` by walking from the goal."""

    def scrambles(key: jax.Array, n: int, k_max: int) -> jax.Array:
        k_len, k_walk = jax.random.split(key)
        lengths = jax.random.randint(k_len, (n,), 0, k_max + 1)
        return jax.vmap(lambda key, k: scramble(key, k, k_max))(
            jax.random.split(k_walk, n), lengths
        )

    return scrambles


def _sliding(name: str, n: int, depth: int, dedup: bool) -> Domain:
    listed: Any = _UNLISTED
    if n == 3:
        by_rank, states = sliding.distances()
        listed = _listed(by_rank, states, sliding.rank, sliding.ranks(states), depth)

    def instances(seed: int, count: int) -> np.ndarray:
        if n == 3:  # uniform over all states but the goal, which comes first
            states = sliding.distances()[1][1:]
            return states[np.random.default_rng(seed).choice(len(states), count, replace=False)]
        keys = jax.random.split(jax.random.key(seed), count)
        moves = {4: 400, 5: 1000}[n]
        k = moves + jnp.arange(count) % 2  # both parities
        walk = lambda key, k: sliding.scramble(key, n, k, moves + 1)  # noqa: E731
        return np.asarray(jax.vmap(walk)(keys, k))

    def scramble(key: jax.Array, k: jax.Array, k_max: int) -> jax.Array:
        return sliding.scramble(key, n, k, k_max)

    return Domain(
        name=name,
        problem=sliding.sliding(n, depth, dedup),
        scramble=scramble,
        scrambles=sliding.scrambles8 if n == 3 else _walked(scramble),
        distance=listed.distance,
        instances=instances,
        admissible=sliding.manhattan(n) / depth,
        offset=0.0,
        num_states=181440 if n == 3 else None,
        states=listed.states,
        number=listed.number,
    )


def _lights_out(name: str, n: int, depth: int, dedup: bool) -> Domain:
    listed: Any = _UNLISTED
    if n <= 4:
        by_rank, states = lights_out.distances(n)
        listed = _listed(by_rank, states, lights_out.rank, np.flatnonzero(by_rank >= 0), depth)

    def instances(seed: int, count: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        states = rng.integers(0, 2, (4 * count, n * n)) @ lights_out.masks(n) % 2
        return states[states.any(1)][:count].astype(np.uint8)

    def scramble(key: jax.Array, k: jax.Array, k_max: int) -> jax.Array:
        return lights_out.scramble(key, n, k, k_max)

    return Domain(
        name=name,
        problem=lights_out.lights_out(n, depth, dedup),
        scramble=scramble,
        scrambles=_walked(scramble),
        distance=listed.distance,
        instances=instances,
        # Lit cells / 5 / depth: a press flips at most five; the encoding is -1 or 1 a cell.
        admissible=np.full(n * n, 0.5 / (5 * depth), np.float32),
        offset=0.5 * n * n / (5 * depth),
        num_states=2 ** (n * n - len(lights_out.kernel(n))) if n <= 5 else None,
        states=listed.states,
        number=listed.number,
    )


def _cube(name: str, n: int, depth: int, dedup: bool) -> Domain:
    def distance(s: jax.Array) -> jax.Array:
        table = jnp.asarray(cube.distances2())
        return -(-table[jax.vmap(cube.rank2)(s)].astype(jnp.int32) // depth).astype(jnp.float32)

    def optima(count: int) -> np.ndarray:
        lengths = puzzles(name).lengths
        assert lengths is not None  # the cube's states come with solutions
        return lengths[:count]

    def instances(seed: int, count: int) -> np.ndarray:
        if n == 2:  # uniform over all states but the goal
            rng = np.random.default_rng(seed)
            return cube.unrank2(1 + rng.choice(3674159, count, replace=False))
        states = puzzles(name).states
        if count > len(states):
            raise UserError(f"eval_states={count}: {name} has {len(states)} test states")
        return states[:count]

    def scramble(key: jax.Array, k: jax.Array, k_max: int) -> jax.Array:
        return cube.scramble(key, n, k, k_max)

    weights, offset = cube.wrong_stickers(n)
    return Domain(
        name=name,
        problem=cube.cube(n, depth, dedup),
        scramble=scramble,
        scrambles=_walked(scramble),
        distance=distance if n == 2 else None,
        instances=instances,
        admissible=weights / depth,
        offset=offset / depth,
        num_states=3674160 if n == 2 else None,
        optima=optima if (n, depth) == (3, 1) else None,
    )


_EXACT_Q: dict[Problem, np.ndarray] = {}  # seconds to fill, and arms share it


def exact_q(d: Domain) -> np.ndarray:
    """u8[num_states, A]: Q*(s, a) = c(s, a) + h*(T(s, a)) of all states, rows as in `d.states`."""
    if d.states is None or d.distance is None:
        raise ValueError(f"{d.name} has no exact distances")
    p, distance = d.problem, d.distance
    if p in _EXACT_Q:
        return _EXACT_Q[p]

    def row(s):
        after, cost = expand(p, s)
        return (cost + distance(after)).astype(jnp.uint8)

    table = jax.jit(lambda s: jax.lax.map(row, s, batch_size=1024))(d.states)
    return _EXACT_Q.setdefault(p, np.asarray(table))


def exact(d: Domain, kind: str) -> tuple[Problem, jax.tree_util.Partial]:
    """The problem and the exact heuristic "h" or "q" by table, whose encoding is the state itself."""
    p, distance = d.problem, d.distance
    if distance is None:
        raise ValueError(f"{d.name} has no exact distances")
    goal = d.scramble(jax.random.key(0), jnp.int32(0), 1)

    def h(_, enc):
        return distance(enc.astype(goal.dtype))

    def q(_, enc):
        after, cost = jax.vmap(lambda s: expand(p, s))(enc.astype(goal.dtype))
        return cost + distance(after.reshape(-1, *goal.shape)).reshape(cost.shape)

    problem = p._replace(encode=lambda s: s.astype(jnp.float32))
    return problem, jax.tree_util.Partial(h if kind == "h" else q, ())
