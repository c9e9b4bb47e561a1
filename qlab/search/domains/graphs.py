"""Graphs given as tables: small problems with known answers. A state is i32[1], the vertex."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from qlab.search.problem import Problem


def table_problem(next_vertex: np.ndarray, costs: np.ndarray, goals: np.ndarray) -> Problem:
    """next_vertex i32[V, A], costs f32[V, A] (> 0), goals bool[V]; the encoding is the vertex number."""
    to, cost = np.asarray(next_vertex, np.int32), np.asarray(costs, np.float32)
    return Problem(
        next_state=lambda s, a: jnp.asarray(to)[s[0], a][None],
        cost=lambda s, a: jnp.asarray(cost)[s[0], a],
        is_goal=lambda s: jnp.asarray(goals)[s[0]],
        encode=lambda s: s.astype(jnp.float32),
        num_actions=next_vertex.shape[1],
    )


def lookup(table, enc):
    """Heuristic by table: f32[V] or f32[V, A] and encodings f32[E, 1]; use with Partial."""
    return table[enc[:, 0].astype(jnp.int32)]


def path_graph(length: int, num_actions: int) -> tuple[Problem, np.ndarray]:
    """Vertices 0..length, goal the last; action 0 goes on, action 1 back, others stay. Also h*."""
    v = np.arange(length + 1)
    to = np.repeat(v[:, None], num_actions, 1)
    to[:, 0] = np.minimum(v + 1, length)
    if num_actions > 1:
        to[:, 1] = np.maximum(v - 1, 0)
    p = table_problem(to, np.ones_like(to, np.float32), v == length)
    return p, (length - v).astype(np.float32)


def random_graph(seed: int, num_vertices: int, num_actions: int, max_cost: int = 9):
    """A random directed graph with integer costs 1..max_cost, goal the last vertex.

    Returns:
      (problem, next_vertex, costs, h* f64[V] by Bellman-Ford, inf where no goal can be reached).
    """
    rng = np.random.default_rng(seed)
    to = rng.integers(0, num_vertices, (num_vertices, num_actions))
    costs = rng.integers(1, max_cost + 1, to.shape).astype(np.float32)
    goals = np.arange(num_vertices) == num_vertices - 1
    h = np.where(goals, 0.0, np.inf)
    for _ in range(num_vertices):
        h = np.where(goals, 0.0, (costs + h[to]).min(1))
    return table_problem(to, costs, goals), to, costs, h
