"""Best-first search over implicit graphs with learned heuristics, whole loops under jit.

A user's own domain takes a few lines. Here: turn one number into another with the moves
+3, *2 and -5 (modulo 64) at costs 1, 2, 1, without a heuristic, so A* is Dijkstra:

    >>> import jax, jax.numpy as jnp
    >>> from qlab.search import Problem, search, status_name
    >>> def next_state(s, a):  # s: i32[1]
    ...     return jnp.stack([s + 3, s * 2, s - 5])[a] % 64
    >>> numbers = Problem(
    ...     next_state=next_state,
    ...     cost=lambda s, a: jnp.array([1.0, 2.0, 1.0])[a],
    ...     is_goal=lambda s: s[0] == 33,
    ...     encode=lambda s: s.astype(jnp.float32),
    ...     num_actions=3,
    ... )
    >>> zero = jax.tree_util.Partial(lambda params, enc: jnp.zeros(enc.shape[0]), ())
    >>> start = jnp.array([10], jnp.int32)
    >>> r = search(numbers, zero, start, jax.random.key(0), mode="astar", max_nodes=64)
    >>> status_name(r.status), float(r.cost), r.path[r.path >= 0].tolist()
    ('solved', 6.0, [0, 0, 0, 1, 2])

For Q* the heuristic returns one value per action (transition cost included); see `search`.
"""

from qlab.search.driver import search, search_many
from qlab.search.problem import STATUS, Problem, SearchResult, macro_words, status_name, with_macros

__all__ = [
    "STATUS",
    "Problem",
    "SearchResult",
    "macro_words",
    "search",
    "search_many",
    "status_name",
    "with_macros",
]
