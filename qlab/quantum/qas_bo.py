"""Bayesian optimisation over a finite pool with DNGO (Snoek et al. 2015): a small net's last layer is made Bayesian.

Each round: a net D -> 128 tanh -> 1 is trained anew on all (embedding, score) pairs so far; a Bayesian linear
regression on its 128 features gives mean and deviation for the whole pool; the five unvisited circuits with the largest
expected improvement over a fixed y* = 0.9 (not over the incumbent) are evaluated. Inputs and scores are not normalised,
the regression has no bias, as in arch2vec's source. The QAS source puts the predictive variance where the deviation
belongs; `use_variance` does that. Letters: P = pool, D = embedding, Q = queries, M = features, N = pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import ndtr

Score = Callable[[jax.Array], jax.Array]  # i32[...] -> f[...]; a jax.tree_util.Partial


class SearchResult(NamedTuple):
    """order i32[Q], all different: what was evaluated, in order. score f32[Q]: what it was worth."""

    order: jax.Array
    score: jax.Array


class Posterior(NamedTuple):
    """w ~ N(mean, V diag(1 / precision) V^T), y = phi w + noise of variance 1 / beta.

    mean f[M]; basis V f[M, M]; precision f[M]; alpha, beta f[]: precisions of prior and noise.
    """

    mean: jax.Array
    basis: jax.Array
    precision: jax.Array
    alpha: jax.Array
    beta: jax.Array


LIMITS = (1e-6, 1e6)  # of alpha and beta
_STAGE = 16  # rounds that share one padded number of pairs


def log_evidence(
    log_ab: jax.Array, eigen: jax.Array, proj: jax.Array, yy: jax.Array, num: jax.Array
) -> jax.Array:
    """log p(y | alpha, beta) of Bayesian linear regression, from eigenvalues f[M] of Phi^T Phi.

    Args:
      log_ab: f[2]. proj: f[M], Phi^T y in the eigenbasis. yy: |y|^2. num: number of pairs.
    """
    alpha, beta = jnp.exp(log_ab)
    precision = alpha + beta * eigen
    quad = beta * yy - beta**2 * (proj**2 / precision).sum()
    log_det = jnp.log(precision).sum() - eigen.size * log_ab[0] - num * log_ab[1]
    return -0.5 * (quad + log_det + num * jnp.log(2 * jnp.pi))


def blr_posterior(
    phi: jax.Array, y: jax.Array, weight: jax.Array, num_iters: int = 60
) -> Posterior:
    """Bayesian linear regression with alpha and beta of maximal evidence.

    MacKay's fixed point: gamma = sum beta l / (alpha + beta l), alpha = gamma / |m|^2, beta = (N - gamma) / |y - Phi m|^2,
    kept within LIMITS.

    Args:
      phi: f[N, M]. y: f[N]. weight: f[N], 1 for pairs that count and 0 for padding.
    """
    phi, y = phi * weight[:, None], y * weight
    num = weight.sum()
    eigen, basis = jnp.linalg.eigh(phi.T @ phi)
    eigen = jnp.maximum(eigen, 0.0)
    proj = basis.T @ (phi.T @ y)

    def fix(_, ab):
        alpha, beta = ab
        precision = alpha + beta * eigen
        m = beta * proj / precision
        gamma = (beta * eigen / precision).sum()
        rest = jnp.sum((y - phi @ (basis @ m)) ** 2)
        alpha = gamma / jnp.maximum((m**2).sum(), 1e-12)
        beta = jnp.maximum(num - gamma, 1e-3) / jnp.maximum(rest, 1e-12)
        return jnp.clip(alpha, *LIMITS), jnp.clip(beta, *LIMITS)

    one = jnp.ones((), phi.dtype)
    alpha, beta = jax.lax.fori_loop(0, num_iters, fix, (one, 100 * one))
    precision = alpha + beta * eigen
    return Posterior(basis @ (beta * proj / precision), basis, precision, alpha, beta)


def blr_predict(post: Posterior, phi: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation f[P] of y at phi f[P, M], noise included."""
    var = ((phi @ post.basis) ** 2 / post.precision).sum(-1) + 1 / post.beta
    return phi @ post.mean, jnp.sqrt(var)


def expected_improvement(mean: jax.Array, sd: jax.Array, target: jax.Array | float) -> jax.Array:
    """E max(y - target, 0) of y ~ N(mean, sd^2): sd (phi(u) + u Phi(u)), u = (mean - target) / sd.

    Never negative; the far tail is its asymptotic series, since the two terms cancel there in float32.

    >>> round(float(expected_improvement(jnp.array(1.0), jnp.array(1e-6), 0.4)), 4)
    0.6
    """
    sd = jnp.maximum(sd, 1e-12)
    u = (mean - target) / sd
    pdf = jnp.exp(-(u**2) / 2) / jnp.sqrt(2 * jnp.pi)
    far = jnp.maximum(u**2, 49.0)
    tail = pdf / far * (1 - 3 / far + 15 / far**2 - 105 / far**3 + 945 / far**4)
    return sd * jnp.where(u < -7.0, tail, jnp.maximum(pdf + u * ndtr(u), 0.0))


class DngoSpec(NamedTuple):
    """batch = 0 trains on all pairs at once; target: y*, or 0 for the best score so far."""

    queries: int = 300
    start: int = 16
    top: int = 5
    hidden: int = 128
    epochs: int = 100
    batch: int = 10
    learning_rate: float = 1e-2
    target: float = 0.9
    use_variance: bool = False


def _net_init(key: jax.Array, dim: int, hidden: int) -> dict[str, jax.Array]:
    """Uniform within 1 / sqrt(fan in), weights and biases: PyTorch's."""
    keys = jax.random.split(key, 4)
    shapes = {
        "w": ((dim, hidden), dim),
        "b": ((hidden,), dim),
        "v": ((hidden,), hidden),
        "c": ((), hidden),
    }
    return {
        n: jax.random.uniform(k, s, minval=-(f**-0.5), maxval=f**-0.5)
        for k, (n, (s, f)) in zip(keys, shapes.items(), strict=True)
    }  # fmt: skip


def _features(net: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ net["w"] + net["b"])


def fit_net(
    key: jax.Array, x: jax.Array, y: jax.Array, num: jax.Array, spec: DngoSpec
) -> dict[str, jax.Array]:
    """A net trained on the first `num` of the pairs x f[Q, D], y f[Q]: Adam, squared error, spec.epochs epochs.

    A last batch that is not full is left out, and below one batch all pairs are one.
    """
    k_init, k_run = jax.random.split(key)
    net = _net_init(k_init, x.shape[-1], spec.hidden)
    tx = optax.adam(spec.learning_rate)
    slots = jnp.arange(y.size)

    def move(carry, x, y, weight):
        net, opt_state = carry

        def loss(net):
            gap = _features(net, x) @ net["v"] + net["c"] - y
            return (weight * gap**2).sum() / weight.sum()

        updates, opt_state = tx.update(jax.grad(loss)(net), opt_state)
        return optax.apply_updates(net, updates), opt_state

    def epoch(i, carry):
        if not spec.batch:
            return move(carry, x, y, (slots < num).astype(y.dtype))
        noise = jax.random.uniform(jax.random.fold_in(k_run, i), y.shape)
        order = jnp.argsort(jnp.where(slots < num, noise, 2.0))

        def batch(j, carry):
            at = jax.lax.dynamic_slice(order, (j * spec.batch,), (spec.batch,))
            weight = (j * spec.batch + jnp.arange(spec.batch) < num).astype(y.dtype)
            return move(carry, x[at], y[at], weight)

        return jax.lax.fori_loop(0, jnp.maximum(num // spec.batch, 1), batch, carry)

    return jax.lax.fori_loop(0, spec.epochs, epoch, (net, tx.init(net)))[0]


@functools.partial(jax.jit, static_argnames="spec")
def dngo_search(key: jax.Array, emb: jax.Array, score_fn: Any, spec: DngoSpec) -> SearchResult:
    """Queries a pool with embeddings f[P, D]; the method of the module. jit; map or vmap over keys.

    Args:
      score_fn: i32[k] -> f[k], a jax.tree_util.Partial.
    """
    size = emb.shape[0]
    start = min(spec.start, spec.queries)
    rounds = -(-(spec.queries - start) // spec.top)
    total = start + rounds * spec.top
    k_start, k_run = jax.random.split(key)
    first = jax.random.choice(k_start, size, (start,), replace=False).astype(jnp.int32)
    order = jnp.zeros(total, jnp.int32).at[:start].set(first)
    score = jnp.zeros(total, jnp.float32).at[:start].set(score_fn(first))
    visited = jnp.zeros(size, bool).at[first].set(True)

    def one_round(width, carry, r):
        order, score, visited = carry
        num = start + r * spec.top
        x, y, known = emb[order[:width]], score[:width], jnp.arange(width) < num
        net = fit_net(jax.random.fold_in(k_run, r), x, y, num, spec)
        post = blr_posterior(_features(net, x), y, known.astype(x.dtype))
        mean, sd = blr_predict(post, _features(net, emb))
        best = jnp.where(known, y, -jnp.inf).max()
        target = spec.target if spec.target else best
        gain = expected_improvement(mean, sd**2 if spec.use_variance else sd, target)
        _, at = jax.lax.top_k(jnp.where(visited, -1.0, gain), spec.top)
        at = at.astype(jnp.int32)
        order = jax.lax.dynamic_update_slice(order, at, (num,))
        score = jax.lax.dynamic_update_slice(score, score_fn(at).astype(jnp.float32), (num,))
        return (order, score, visited.at[at].set(True)), None

    carry = (order, score, visited)
    # early rounds know few pairs: padded to their own most, not to the last round's, all of it costs two thirds
    for stage in np.array_split(np.arange(rounds), max(1, rounds // _STAGE)):
        if stage.size:
            width = start + int(stage[-1]) * spec.top
            carry, _ = jax.lax.scan(functools.partial(one_round, width), carry, jnp.asarray(stage))
    order, score, _ = carry
    return SearchResult(order[: spec.queries], score[: spec.queries])
