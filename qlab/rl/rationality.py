"""Games solved as one player's temperature falls, and the teacher alone: the exact side of a rationality curriculum.

Nothing is learned here. Drawn matrix and Markov games go from an adversary near uniform to one near Nash, next to
linear programming; the teacher's steps stand next to a root finder's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from qlab.rl import games
from qlab.rl import teacher as tt

GIVEN = np.array([[2.0, -1.0], [-1.0, 1.0]])  # value 1/5, equilibrium (2/5, 3/5) for both


def predicted_updates(conc: float, target: float, kl_eps: float) -> int:
    """Teacher updates from conc to target when the student is always good enough, by SciPy in float64.

    >>> predicted_updates(50.0, 1.0, 0.5)
    13
    """

    def kl(a: float, b: float) -> float:
        return float((a - b) * special.digamma(a) - special.gammaln(a) + special.gammaln(b))

    count = 0
    while conc != target:
        near = kl(target, conc) <= kl_eps
        edge: Any = lambda k: kl(k, conc) - kl_eps  # noqa: E731
        conc = target if near else float(optimize.brentq(edge, target, conc))  # pyright: ignore
        count += 1
    return count


def matrix_study(rng: np.random.Generator, temperatures: np.ndarray, num_games: int) -> dict:
    """Along falling temperatures f64[T] of the adversary, the protagonist's being the last of them.

    Returns residual, uniform_gap, value_gap, exploitability, the largest over 4 x 3 games with normal
    payoffs; least_rise of GIVEN's worst case; and its path and the games' mean exploitability f64[T].
    """
    drawn = rng.normal(size=(num_games, 4, 3))
    cold = temperatures[-1]
    given, *paths = ([games.qre_matrix(a, cold, t) for t in temperatures] for a in (GIVEN, *drawn))
    worst = np.array([games.worst_case(e.x, GIVEN) for e in given])
    value = [games.nash_matrix(a).value for a in drawn]
    short = np.array(
        [
            [v - games.worst_case(e.x, a) for e in p]
            for p, a, v in zip(paths, drawn, value, strict=True)
        ]
    )
    return {
        "matrix/residual": max(e.residual for p in (given, *paths) for e in p),
        "matrix/uniform_gap": max(np.abs(p[0].y - 1 / 3).max() for p in paths),
        "matrix/value_gap": max(abs(p[-1].value - v) for p, v in zip(paths, value, strict=True)),
        "matrix/exploitability": short[:, -1].max(),
        "matrix/least_rise": np.diff(worst).min(),
        "matrix/rise": worst[-1] - worst[0],
        "rationality": temperatures,
        "worst_case": worst,
        "exploitability_path": short.mean(0),
    }


def markov_study(
    rng: np.random.Generator, temperatures: Any, num_states: int, gamma: float
) -> dict:
    """A drawn 2 x 2 Markov game at a few falling temperatures of the adversary, against Shapley's solution."""
    p = rng.dirichlet(np.ones(num_states), (num_states, 2, 2))
    r = rng.normal(size=(num_states, 2, 2))
    path = [games.soft_minimax_vi(p, r, gamma, temperatures[-1], t) for t in temperatures]
    nash = games.soft_minimax_vi(p, r, gamma, 0.0, 0.0)
    worst = [games.markov_worst_case(p, r, gamma, e.x).mean() for e in path]
    return {
        "markov/residual": max(e.residual for e in path),
        "markov/value_gap": np.abs(path[-1].value - nash.value).max(),
        "markov/rise": worst[-1] - worst[0],
        "markov/exploitability": nash.value.mean() - worst[-1],
    }


def teacher_study(conc: float, config: tt.TeacherConfig) -> dict:
    """Updates until the target when the student is always good enough, and how many more than predicted."""
    config = config._replace(j_lb=0.0)
    step = jax.jit(lambda t: tt.teacher_update(t, jnp.full(100, 0.01), jnp.ones(100), config))
    state, count = tt.teacher_init(conc, config), 0
    predicted = predicted_updates(conc, config.conc_target, config.kl_eps)
    while float(state.conc) != config.conc_target and count <= 2 * predicted:
        state, count = step(state), count + 1
    return {"teacher/updates": count, "teacher/surprise": abs(count - predicted)}
