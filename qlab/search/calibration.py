"""Learned against exact cost-to-go, depth by depth: what tells a learned heuristic from a lucky one.

Letters: N states, A actions, D depths, that is exact costs 0..D-1 (unit costs, so costs are whole numbers).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.search.domains import Domain
from qlab.search.driver import Heuristic
from qlab.search.problem import Problem

ROUNDING = 1e-4  # of f32 sums; an admissible heuristic that meets the exact cost does not exceed it


class Probe(NamedTuple):
    """
    Attributes:
      states: [N, ...], what a heuristic is asked about.
      depth: i32[N], their exact costs.
      weight: f32[N], how many states of the domain each stands for.
    """

    states: np.ndarray
    depth: np.ndarray
    weight: np.ndarray


def probe(domain: Domain, most: int, seed: int) -> Probe:
    """All states of a domain; where they are more than `most`, up to most / D drawn of each depth.

    Raises:
      ValueError: the domain has no list of states.

    >>> from qlab.search.domains import domain
    >>> p = probe(domain("lightsout2"), 10, 0)  # 1, 4, 6, 4, 1 states at depths 0..4
    >>> p.depth.tolist(), p.weight.tolist()
    ([0, 1, 1, 2, 2, 3, 3, 4], [1.0, 2.0, 2.0, 3.0, 3.0, 2.0, 2.0, 1.0])
    """
    if domain.states is None or domain.distance is None:
        raise ValueError(f"{domain.name} has no list of states with exact distances")
    depth = np.asarray(jax.jit(domain.distance)(domain.states)).astype(np.int32)
    counts = np.bincount(depth)
    each = max(most // len(counts), 1) if len(depth) > most else len(depth)
    rows = np.random.default_rng(seed).permutation(len(depth))
    rows = rows[np.argsort(depth[rows], kind="stable")]
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = rows[place < each]
    weight = (counts / np.minimum(counts, each))[depth[rows]]
    return Probe(domain.states[rows], depth[rows], weight.astype(np.float32))


def calibration(problem: Problem, heuristic: Heuristic, p: Probe) -> dict[str, jax.Array]:
    """A heuristic (h f32[N], or Q f32[N, A]: then its least action) against the exact costs of a probe.

    Returns:
      exact f32[D] = 0..D-1; learned f32[D] and spread f32[D], mean and standard deviation over the
      states of each depth; h_error f32[], mean |learned - exact|, and h_over f32[], overestimates in %,
      over the domain's states. Q is nan at depth 0, and both means leave it out: no search asks for the
      actions of a goal.

    >>> from qlab.search.domains import domain, exact
    >>> d = domain("lightsout2")
    >>> found = calibration(*exact(d, "q"), probe(d, 99, 0))
    >>> found["learned"].tolist(), float(found["h_error"])
    ([nan, 1.0, 2.0, 3.0, 4.0], 0.0)
    """
    return _calibration(problem, int(p.depth.max()) + 1, heuristic, *p)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _calibration(problem: Problem, num_depths: int, heuristic, states, depth, weight):
    value = heuristic(jax.vmap(problem.encode)(states)).astype(jnp.float32)
    if value.ndim == 2:
        value = jnp.where(depth > 0, value.min(1), jnp.nan)

    def mean(x):  # over the states of each depth, which stand for equally many
        total = jax.ops.segment_sum(x, depth, num_depths)
        return total / jax.ops.segment_sum(jnp.ones_like(x), depth, num_depths)

    learned, exact = mean(value), jnp.arange(num_depths, dtype=jnp.float32)
    spread = jnp.sqrt(mean(jnp.square(value - learned[depth])))
    above, counts = value - exact[depth], jnp.where(depth > 0, weight, 0.0)

    def share(x):
        return jnp.where(depth > 0, counts * x, 0.0).sum() / counts.sum()

    return {
        "exact": exact, "learned": learned, "spread": spread,
        "h_error": share(jnp.abs(above)), "h_over": 100 * share(above > ROUNDING),
    }  # fmt: skip
