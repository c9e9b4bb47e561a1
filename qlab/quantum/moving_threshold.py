"""When an episode of CRLQAS ends: a threshold that is learnt, and a random length.

The ground energy is unknown; known is a lower bound e_ref (all Pauli strings at their minimum). An episode succeeds
when |E - e_ref| < xi. At first xi is large. `every` episodes it is set just above the best error so far, and in between
each `wins_needed` successes lower it by a tenth of delta, at most `max_shifts` times: after ten of them xi is the best
error itself, so that only a strictly better circuit succeeds until the next reset.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError


class ThresholdRule(NamedTuple):
    """Numbers of the curriculum (they may be arrays, so that arms share a program).

    Attributes:
      e_ref: the energy that errors are measured from. delta: margin of a reset.
      every: episodes between resets (G). wins_needed: successes for a shift. max_shifts: between two resets.
      switch: shifts happen only while |e_ref - e_best| is below it. moving: False keeps xi as it is.
    """

    e_ref: Any
    delta: Any = 5e-4
    every: Any = 500
    wins_needed: Any = 25
    max_shifts: Any = 10
    switch: Any = np.inf
    moving: Any = True


class Threshold(NamedTuple):
    """xi: f[], success below it. wins, shifts: i32[], since the last shift and the last reset. episodes: i32[]."""

    xi: Any
    wins: Any
    shifts: Any
    episodes: Any
    rule: ThresholdRule


FIRST_RESET_AFTER = 10  # episodes


def moving_threshold(accept_error: float, rule: ThresholdRule) -> Threshold:
    """The threshold before the first episode."""
    zero = jnp.int32(0)
    return Threshold(
        jnp.asarray(accept_error, jnp.result_type(float)),
        zero,
        zero,
        zero,
        jax.tree.map(jnp.asarray, rule),
    )


def moving_threshold_update(cur: Threshold, success: jax.Array, e_best: jax.Array) -> Threshold:
    """The threshold after an episode.

    Args:
      success: bool[], the episode ended below xi. e_best: f[], lowest energy of the whole training so far.

    >>> rule = ThresholdRule(e_ref=-1.0, delta=0.1, wins_needed=2, every=20)
    >>> cur = moving_threshold(0.5, rule)
    >>> for _ in range(2):
    ...     cur = moving_threshold_update(cur, True, -0.6)
    >>> round(float(cur.xi), 6), int(cur.wins), int(cur.shifts)
    (0.49, 0, 1)
    """
    rule = cur.rule
    gap = jnp.abs(rule.e_ref - e_best)
    wins, episodes = cur.wins + success, cur.episodes + 1
    shift = (
        success & (wins >= rule.wins_needed) & (cur.shifts < rule.max_shifts) & (gap < rule.switch)
    )
    reset = (episodes % rule.every == 0) & (episodes > FIRST_RESET_AFTER)
    xi = jnp.where(reset, gap + rule.delta, cur.xi - jnp.where(shift, rule.delta / 10, 0.0))
    wins = jnp.where(shift | reset, 0, wins)
    shifts = jnp.where(reset, 0, cur.shifts + shift)
    new = Threshold(xi, wins, shifts, episodes, rule)
    fixed = cur._replace(episodes=episodes)
    return jax.tree.map(lambda a, b: jnp.where(rule.moving, a, b), new, fixed)


def halting_table(max_gates: int, failures: float, p: float, least: int = 0) -> np.ndarray:
    """f64[D+1], distribution function of clip(NegBin(n, p), least, D): failures before the n-th success.

    Args:
      failures: n of NumPy's negative_binomial (40 or 70 in the paper's code). p: chance of a success.
    """
    if not (failures > 0 and 0 < p <= 1 and 0 <= least <= max_gates):
        raise UserError(
            f"halting with n={failures}, p={p}, least={least}: expected n > 0, 0 < p <= 1 and "
            f"0 <= least <= max_gates={max_gates}"
        )
    from scipy.stats import nbinom

    table = nbinom.cdf(np.arange(max_gates + 1), failures, p)
    table[:least] = 0.0
    table[-1] = 1.0
    return table


def halting_cap(key: jax.Array, table: jax.Array, draws: int, count: int) -> jax.Array:
    """i32[count]: each the most frequent of `draws` numbers from the table; of several, the smallest.

    An episode halts at the step whose index, counted from 0, is this number; it then has one gate more.
    """
    table = jnp.asarray(table)
    u = jax.random.uniform(key, (draws, count), jnp.float32)
    found = (u[..., None] >= table).sum(-1)  # the smallest k with a distribution function above u
    counts = (found[..., None] == jnp.arange(len(table))).sum(0)
    return counts.argmax(-1).astype(jnp.int32)
