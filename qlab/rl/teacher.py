"""A self-paced teacher: a Gamma distribution of temperatures that moves to its target as the student allows.

p_k = Gamma(concentration k, rate), the rate fixed. From pairs (temperature, discounted return) drawn at k
the return at any other k' is estimated by importance weights. While the student does well enough at k,
    k_new = argmin KL(p_k' || p_target)  s.t.  KL(p_k' || p_k) <= epsilon  and  return(k') >= J_lb,
else k stays (QARL, arXiv 2311.01642, "fixed_beta"; Klink et al. 2020). One number is sought and the objective
falls all the way from k to the target, so the answer is the feasible point nearest to the target: the trust
region's edge by bisection, a grid up to it (the estimated return need not be monotone), and a second
bisection inside the last feasible cell. The repository's general solver finds the same up to tolerance.

Ratios of densities are taken in log space: far from k they leave float32.
Letters: N = pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln

from qlab.lab.errors import UserError

WAITED, MOVED, FROZEN, EXPLORED, ARRIVED = range(5)  # the branch an update took
GRID = 129
BISECTIONS = 40
LEAST = 1e-8
MAX_PAIRS = 100


class TeacherConfig(NamedTuple):
    """conc_target, rate > 0: of the Gamma. kl_eps: the trust region. j_lb: least discounted return.

    min_pairs: pairs an update needs. explore: before the student was ever good enough, move to where it
    is estimated to do best instead of waiting.
    """

    conc_target: float = 1.0
    rate: float = 1000.0
    kl_eps: float = 0.5
    j_lb: float = 0.0
    min_pairs: int = 30
    explore: bool = False


class TeacherState(NamedTuple):
    """conc: f32[]. above: bool[], the student was good enough once. temps, returns: f32[100], the newest
    pairs first. count: i32[], how many of them are filled. branch: i32[], what the last update did.
    performance: f32[], mean return over the pairs of the last update that had enough of them.
    """

    conc: jax.Array
    above: jax.Array
    temps: jax.Array
    returns: jax.Array
    count: jax.Array
    branch: jax.Array
    performance: jax.Array


def gamma_kl(a: Any, b: Any) -> jax.Array:
    """KL(Gamma(a) || Gamma(b)) at equal rates: (a - b) digamma(a) - lnGamma(a) + lnGamma(b).

    >>> round(float(gamma_kl(50.0, 1.0)), 3)
    46.632
    """
    return (a - b) * digamma(a) - gammaln(a) + gammaln(b)


def gamma_logpdf(x: Any, conc: Any, rate: Any) -> jax.Array:
    """Log density of Gamma(conc, rate) at x > 0; mean conc / rate.

    >>> round(float(gamma_logpdf(1.0, 1.0, 2.0)), 4)
    -1.3069
    """
    return conc * jnp.log(rate) - gammaln(conc) + (conc - 1) * jnp.log(x) - rate * x


def sample_gamma(key: jax.Array, conc: Any, rate: Any, n: int) -> jax.Array:
    """f32[n] from Gamma(conc, rate), at least the smallest normal number."""
    return jnp.maximum(jax.random.gamma(key, conc, (n,)) / rate, jnp.finfo(jnp.float32).tiny)


def iw_performance(
    conc_new: Any, conc_old: Any, temps: jax.Array, returns: jax.Array, rate: Any, mask: Any = True
) -> jax.Array:
    """Mean over pairs of p_new(temperature) / p_old(temperature) times the return, f32[].

    Args:
      temps, returns: f32[N]. mask: bool[N], which pairs count.

    >>> float(iw_performance(2.0, 2.0, jnp.array([0.1, 0.2]), jnp.array([1.0, 3.0]), 10.0))
    2.0
    """
    log_ratio = (
        (conc_new - conc_old) * jnp.log(rate * temps) + gammaln(conc_old) - gammaln(conc_new)
    )
    mask = jnp.broadcast_to(mask, temps.shape)
    weighted = jnp.where(mask, jnp.exp(log_ratio) * returns, 0.0)
    return weighted.sum() / jnp.maximum(mask.sum(), 1)


def _bisect(good: Any, bad: Any, is_good) -> jax.Array:
    """The last good point between `good` and `bad`, where is_good turns once."""

    def halve(_, ends):
        lo, hi = ends
        middle = 0.5 * (lo + hi)
        ok = is_good(middle)
        return jnp.where(ok, middle, lo), jnp.where(ok, hi, middle)

    return jax.lax.fori_loop(0, BISECTIONS, halve, (good, bad))[0]


def _edge(conc: Any, towards: Any, eps: float) -> jax.Array:
    """The point nearest to `towards` with KL(. || conc) <= eps."""
    towards = jnp.asarray(towards, jnp.float32)
    inside = gamma_kl(towards, conc) <= eps
    found = _bisect(conc, towards, lambda k: gamma_kl(k, conc) <= eps)
    return jnp.where(inside, towards, found)


def teacher_init(conc: float, config: TeacherConfig) -> TeacherState:
    """A teacher at `conc`, without pairs; its settings are checked here.

    Raises:
      UserError: a setting out of range.
    """
    for name, value in (("conc0", conc), ("conc_target", config.conc_target), ("rate", config.rate),
                        ("kl_eps", config.kl_eps)):  # fmt: skip
        if not 0 < value < float("inf"):
            raise UserError(f"{name}={value}: expected a finite number above 0")
    if not 1 <= config.min_pairs <= MAX_PAIRS:
        raise UserError(f"min_pairs={config.min_pairs}: expected 1 to {MAX_PAIRS}")
    # One array for each field: the runner donates buffers, and none can be given away twice.
    return TeacherState(
        jnp.float32(conc), jnp.bool_(False), jnp.ones(MAX_PAIRS), jnp.zeros(MAX_PAIRS),
        jnp.int32(0), jnp.int32(WAITED), jnp.float32(0),
    )  # fmt: skip


def teacher_update(
    state: TeacherState, temps: jax.Array, returns: jax.Array, config: TeacherConfig
) -> TeacherState:
    """Adds pairs and, where there are enough, moves the concentration; the pairs are then dropped.

    Args:
      temps, returns: f32[N], temperatures drawn at state.conc and the discounted returns met there.
    """
    c, eps, old = config, config.kl_eps, state.conc
    count = jnp.minimum(state.count + len(temps), MAX_PAIRS)
    temps = jnp.concatenate([temps, state.temps])[:MAX_PAIRS]
    returns = jnp.concatenate([returns, state.returns])[:MAX_PAIRS]
    mask = jnp.arange(MAX_PAIRS) < count

    def estimate(k):
        return iw_performance(k, old, temps, returns, c.rate, mask)

    now = estimate(old)
    enough, above = count >= c.min_pairs, now >= c.j_lb
    target = jnp.float32(c.conc_target)

    edge = _edge(old, target, eps)
    points = old + (edge - old) * jnp.linspace(0, 1, GRID)
    points = points.at[-1].set(edge)
    feasible = jax.vmap(estimate)(points) >= c.j_lb
    last = jnp.where(feasible, jnp.arange(GRID), 0).max()
    beyond = points[jnp.minimum(last + 1, GRID - 1)]
    towards = _bisect(points[last], beyond, lambda k: estimate(k) >= c.j_lb)
    towards = jnp.where(last == GRID - 1, edge, towards)

    arrived = gamma_kl(towards, target) <= 1e-6
    moved = jnp.where(arrived, target, jnp.maximum(towards, LEAST))
    branch = jnp.where(above, jnp.where(arrived, ARRIVED, MOVED), FROZEN)
    conc = jnp.where(above, moved, old)
    if c.explore:
        low, high = _edge(old, LEAST, eps), _edge(old, 1e3 * old + 1e3, eps)
        points = jnp.concatenate([old[None], jnp.linspace(low, high, GRID)])
        best = points[jax.vmap(estimate)(points).argmax()]
        searching = ~above & ~state.above
        conc, branch = jnp.where(searching, best, conc), jnp.where(searching, EXPLORED, branch)
    return TeacherState(
        conc=jnp.where(enough, conc, old),
        above=state.above | (enough & above),
        temps=temps,
        returns=returns,
        count=jnp.where(enough, 0, count),
        branch=jnp.where(enough, branch, WAITED),
        performance=jnp.where(enough, now, state.performance),
    )
