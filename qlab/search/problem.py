"""What is searched and what comes out: `Problem`, `SearchResult`, and macro-actions over a problem."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# SearchResult.status; only "solved" carries a path.
STATUS = (
    "running",
    "solved",
    "exhausted",  # OPEN ran empty: no goal can be reached
    "table_full",  # more than max_nodes distinct states
    "queue_full",  # more than max_rows entries written to OPEN
    "node_limit",  # node_limit nodes generated
    "bad_heuristic",  # the heuristic returned NaN
    "path_cut",  # a goal was found, but its path is longer than max_length
)
RUNNING, SOLVED, EXHAUSTED, TABLE_FULL, QUEUE_FULL, NODE_LIMIT, BAD_HEURISTIC, PATH_CUT = range(8)


class Problem(NamedTuple):
    """A deterministic search problem; a state is one array of fixed shape and dtype.

    Attributes:
      next_state: (s, a: i32[]) -> s', for every a in [0, num_actions); an illegal move returns s.
      cost: (s, a) -> f32[], >= 0.
      is_goal: s -> bool[].
      encode: s -> f32[m], what the heuristic sees.
      num_actions: A.
    States are equal when their bits are equal (so 0.0 and -0.0 are two states).
    """

    next_state: Callable[[jax.Array, jax.Array], jax.Array]
    cost: Callable[[jax.Array, jax.Array], jax.Array]
    is_goal: Callable[[jax.Array], jax.Array]
    encode: Callable[[jax.Array], jax.Array]
    num_actions: int


class SearchResult(NamedTuple):
    """One search. With `search_many` every field has a leading axis over starts.

    Attributes:
      path: i32[L], actions from the start, padded with -1.
      cost: f32[], sum of the costs along `path`; inf if not solved.
      solved: bool[].
      num_generated: i32[], states made by next_state (duplicates and self-loops count; the root and
        the padding of a batch do not).
      num_net_inputs: i32[], states given to the heuristic (padding of a batch does not count).
      num_iters: i32[], batches popped.
      max_open: i32[], most entries OPEN held.
      status: i32[], index into STATUS.
      num_nodes: i32[], distinct states stored, the root included.
    """

    path: jax.Array
    cost: jax.Array
    solved: jax.Array
    num_generated: jax.Array
    num_net_inputs: jax.Array
    num_iters: jax.Array
    max_open: jax.Array
    status: jax.Array
    num_nodes: jax.Array


def status_name(status: jax.Array | int) -> str:
    """The name of a status code.

    >>> status_name(2)
    'exhausted'
    """
    return STATUS[int(status)]


def expand(problem: Problem, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every action from one state: (children [A, ...], costs f32[A])."""
    actions = jnp.arange(problem.num_actions, dtype=jnp.int32)
    return jax.vmap(lambda a: (problem.next_state(s, a), problem.cost(s, a)))(actions)


def macro_words(
    num_actions: int,
    depth: int,
    *,
    undo: Sequence[int] | None = None,
    commute: bool = False,
) -> np.ndarray:
    """Words of 1..depth base actions, shortest first, padded with -1: i32[A, depth].

    Args:
      undo: undo[a] is the action that reverts a; a word never has a followed by undo[a].
      commute: actions commute and are their own inverse, so a word is a set of actions.
    >>> [len(macro_words(4, d, undo=(1, 0, 3, 2))) for d in (1, 2, 3)]
    [4, 16, 52]
    >>> [len(macro_words(16, d, commute=True)) for d in (1, 2, 3)]
    [16, 136, 696]
    >>> [len(macro_words(12, d)) for d in (1, 2, 3)]
    [12, 156, 1884]
    """
    words: list[tuple[int, ...]] = []
    for length in range(1, depth + 1):
        if commute:
            words += itertools.combinations(range(num_actions), length)
            continue
        for word in itertools.product(range(num_actions), repeat=length):
            if undo is None or all(undo[a] != b for a, b in itertools.pairwise(word)):
                words.append(word)
    table = np.full((len(words), depth), -1, np.int32)
    for row, word in zip(table, words, strict=True):
        row[: len(word)] = word
    return table


def with_macros(
    problem: Problem,
    depth: int,
    dedup: bool = True,
    *,
    undo: Sequence[int] | None = None,
    commute: bool = False,
    sum_costs: bool = False,
) -> Problem:
    """`problem` with every product of 1..depth base actions as one action.

    A base action that is illegal where it stands does nothing and the rest of the word still runs,
    so with symmetric base moves the macro graph stays symmetric.

    Args:
      dedup: leave out words that `undo` or `commute` show to be redundant (see `macro_words`).
      sum_costs: a macro costs the sum of its base costs; else it costs 1.
    """
    words = macro_words(
        problem.num_actions, depth, undo=undo if dedup else None, commute=commute and dedup
    )

    def run(s, a):
        table = jnp.asarray(words)
        total = jnp.float32(0)
        for i in range(depth):
            base = table[a, i]
            total += jnp.where(base >= 0, problem.cost(s, jnp.maximum(base, 0)), 0.0)
            s = jnp.where(base >= 0, problem.next_state(s, jnp.maximum(base, 0)), s)
        return s, total

    return Problem(
        next_state=lambda s, a: run(s, a)[0],
        cost=(lambda s, a: run(s, a)[1]) if sum_costs else (lambda s, a: jnp.float32(1)),
        is_goal=problem.is_goal,
        encode=problem.encode,
        num_actions=len(words),
    )
