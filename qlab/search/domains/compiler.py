"""Compiling a unitary into a word over a gate set (AQ*, arXiv 2204.06904), as a search problem.

The remaining unitary is R = g_L^dagger ... g_1^dagger U = W^dagger U, W = g_1 ... g_L the word so far; a goal
is d(R, I) < eps. The state holds W exactly (integers, in a canonical form up to the global phase) and, constant
along a search, the bits of U and eps. So two words of one unitary are one state and never two, whatever U is,
with no rounding boundary to fall on; R itself is computed afresh from W and does not drift.
Gates, elements and features come as arguments: this file knows no quantum mechanics beyond matrices.
Letters: N dimension, A gates, P = 2 N^2 + 1 words of target and eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.search.beam import from_words
from qlab.search.domains import Domain
from qlab.search.problem import Problem, SearchResult


class Elements(NamedTuple):
    """What the problem needs to know of a gate set.

    Attributes:
      identity: i32[...], the element of the empty word.
      compose: (x, a: i32[]) -> the canonical element of x times gate a.
      matrix: x -> c64[N, N].
      gates: c[A, N, N].
      inverse: the index of each gate's inverse, -1 where there is none.
      limit: elements with a larger integer are not entered (they would overflow); the move then does nothing.
    """

    identity: np.ndarray
    compose: Callable[[jax.Array, jax.Array], jax.Array]
    matrix: Callable[[jax.Array], jax.Array]
    gates: np.ndarray
    inverse: Sequence[int]
    limit: int


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def _floats(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def start_state(e: Elements, target: jax.Array, eps: jax.Array) -> jax.Array:
    """i32[S]: nothing chosen yet. target c64[N, N], unitary; eps f32[]."""
    u = jnp.asarray(target)
    parts = [u.real.ravel(), u.imag.ravel(), jnp.asarray(eps, jnp.float32)[None]]
    return jnp.concatenate([jnp.asarray(e.identity).ravel(), _bits(jnp.concatenate(parts))])


def split(e: Elements, s: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(W element, U c64[N, N], eps f32[]) of a state."""
    m, n = e.identity.size, e.gates.shape[-1]
    f = _floats(s[m:])
    u = jax.lax.complex(f[: n * n], f[n * n : 2 * n * n]).reshape(n, n)
    return s[:m].reshape(e.identity.shape), u, f[-1]


def remaining(e: Elements, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(R = W^dagger U c64[N, N], eps)."""
    x, u, eps = split(e, s)
    return e.matrix(x).conj().T @ u, eps


def off_identity(r: jax.Array) -> jax.Array:
    """d(R, I)^2 = min_phi |R e^(-i phi) - I|^2 / 2 N = 1 - |Tr R| / N, without cancellation."""
    n = r.shape[-1]
    trace = jnp.trace(r)
    size = jnp.abs(trace)
    gap = r * jnp.where(size > 1e-6, trace.conj() / jnp.maximum(size, 1e-6), 1.0) - jnp.eye(n)
    return jnp.sum(gap.real**2 + gap.imag**2) / (2 * n)


def compiler_problem(
    e: Elements,
    features: Callable[[jax.Array], jax.Array],
    costs: Sequence[float] | None = None,
) -> Problem:
    """Fewest gates (or least total cost) from U to within eps; U and eps are in the start state.

    Args:
      features: c64[N, N] -> f32[m]; the encoding is features(R) and log10(eps) / 2.
      costs: one for each gate, e.g. 1 for T and 0.1 for the others; default 1.
    Raises:
      UserError: costs of another number or not positive, or a gate that is not unitary.
    """
    _check_unitary(e.gates, "gate")
    a = len(e.gates)
    price = np.ones(a, np.float32) if costs is None else np.asarray(costs, np.float32)
    if price.shape != (a,) or not (price > 0).all():
        raise UserError(f"costs={costs}: expected {a} positive numbers, one for each gate")
    m = e.identity.size

    def next_state(s, action):
        x = e.compose(s[:m].reshape(e.identity.shape), action)
        fits = jnp.abs(x).max() <= e.limit
        return jnp.where(fits, jnp.concatenate([x.ravel().astype(s.dtype), s[m:]]), s)

    def is_goal(s):
        r, eps = remaining(e, s)
        return off_identity(r) < eps * eps

    def encode(s):
        r, eps = remaining(e, s)
        return jnp.concatenate([features(r), jnp.log10(eps)[None] / 2])

    return Problem(
        next_state=next_state,
        cost=lambda s, action: jnp.asarray(price)[action],
        is_goal=is_goal,
        encode=encode,
        num_actions=a,
    )


def sample_words(e: Elements, key: jax.Array, n: int, k_max: int, k_min: int = 0):
    """n random words, lengths uniform in k_min..k_max, no gate right behind its inverse.

    Returns:
      (R c64[n, N, N], their products; words i32[n, k_max], padded with -1; lens i32[n]).
    """
    k_len, k_word = jax.random.split(key)
    a, inverse = len(e.gates), jnp.asarray(e.inverse, jnp.int32)
    gates = jnp.asarray(e.gates, jnp.complex64)
    lens = jax.random.randint(k_len, (n,), k_min, k_max + 1)

    def step(carry, x):
        u, last = carry
        t, key = x
        banned = jnp.where(last >= 0, inverse[last], -1)
        draw = jax.random.randint(key, (n,), 0, jnp.where(banned >= 0, a - 1, a))
        action = draw + ((banned >= 0) & (draw >= banned))
        on = t < lens
        u = jnp.where(on[:, None, None], u @ gates[action], u)
        return (u, jnp.where(on, action, last)), jnp.where(on, action, -1)

    eye = jnp.broadcast_to(jnp.eye(gates.shape[-1], dtype=gates.dtype), (n, *gates.shape[1:]))
    carry = eye, jnp.full(n, -1, jnp.int32)
    (u, _), words = jax.lax.scan(step, carry, (jnp.arange(k_max), jax.random.split(k_word, k_max)))
    return u, words.T, lens


def compiler_domain(
    name: str,
    e: Elements,
    problem: Problem,
    eps: Sequence[float],
    noise: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Domain:
    """The domain that `learner` and `search_benchmark` take.

    Training states: products of random words, eps one of `eps`; every one has a solution of at most so many
    gates. noise: (key, eps) -> c64[N, N], a unitary within eps of the identity that multiplies the product.

    Raises:
      UserError: an eps outside 0 < eps < 1.
    """
    for t in eps:
        _check_eps(t)
    choices = jnp.asarray(eps, jnp.float32)

    def scrambles(key, n, k_max):
        k_word, k_eps, k_noise = jax.random.split(key, 3)
        u, _, _ = sample_words(e, k_word, n, k_max)
        tolerance = choices[jax.random.randint(k_eps, (n,), 0, len(choices))]
        if noise is not None:
            u = u @ jax.vmap(noise)(jax.random.split(k_noise, n), tolerance)
        return jax.vmap(lambda u, t: start_state(e, u, t))(u, tolerance)

    def scramble(key, k, k_max):
        u, _, _ = sample_words(e, key, 1, k_max)
        u = jnp.where(k > 0, u[0], jnp.eye(u.shape[-1]))
        return start_state(e, u, choices[0])

    eye = jnp.eye(e.gates.shape[-1])
    width = jax.eval_shape(lambda: problem.encode(start_state(e, eye, choices[0]))).shape[0]
    return Domain(
        name=name,
        problem=problem,
        scramble=scramble,
        scrambles=scrambles,
        distance=None,
        instances=lambda seed, n: np.asarray(scrambles(jax.random.key(seed), n, 10)),
        admissible=np.zeros(width, np.float32),
        offset=0.0,
        num_states=None,
    )


def _check_eps(eps: float) -> None:
    if not 0 < eps < 1:
        raise UserError(f"eps={eps}: expected 0 < eps < 1, the distance to compile to, e.g. 0.05")


def _check_unitary(mats: np.ndarray, what: str) -> None:
    mats = np.asarray(mats)
    gap = mats @ mats.conj().swapaxes(-1, -2) - np.eye(mats.shape[-1])
    off = np.abs(gap).max((-2, -1))
    if not (off < 1e-4).all():  # nan is not
        i = int(np.argmax(~(off < 1e-4)))
        raise UserError(
            f"{what} {i} of {len(mats)} is not unitary: |{what} {what}^dagger - I| is {off[i]:.2g}; "
            "take the nearest unitary, or divide it by its norm"
        )


def start_states(e: Elements, targets: np.ndarray, eps: float) -> np.ndarray:
    """i32[T, S]: `start_state` of targets c[T, N, N], on the host.

    Raises:
      UserError: eps outside 0 < eps < 1, a target that is not unitary or not of the gates' size.
    """
    _check_eps(eps)
    if np.shape(targets)[1:] != e.gates.shape[1:]:
        raise UserError(
            f"targets of shape {list(np.shape(targets))}: expected [T, {e.gates.shape[1]}, "
            f"{e.gates.shape[1]}], the size of the gates"
        )
    _check_unitary(targets, "target")
    u = np.asarray(targets, np.complex64).reshape(len(targets), -1)
    parts = [u.real, u.imag, np.full((len(u), 1), eps, np.float32)]
    words = np.concatenate(parts, 1, dtype=np.float32).view(np.int32)
    nothing = np.broadcast_to(np.asarray(e.identity, np.int32).ravel(), (len(u), e.identity.size))
    return np.concatenate([nothing, words], 1)


def ones_q(problem: Problem) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Q = 1 for every action, the least any word costs at unit costs: search without a net."""
    return lambda _, enc: jnp.ones((enc.shape[0], problem.num_actions))


Solve = Callable[..., SearchResult]


def _targets_of(e: Elements, starts) -> tuple[np.ndarray, float]:
    """(c128[T, N, N], eps): what start states i32[T, S] of one eps hold, on the host."""
    m, n = e.identity.size, e.gates.shape[-1]
    f = np.ascontiguousarray(np.asarray(starts)[:, m:]).view(np.float32).astype(np.float64)
    u = f[:, : n * n] + 1j * f[:, n * n : -1]
    return u.reshape(-1, n, n), float(f[0, -1])


def host_solver(
    e: Elements, find: Callable[[np.ndarray, float], tuple[list[tuple[int, ...] | None], int]]
) -> Solve:
    """A solver in the place of `search_many` from one on the host.

    find: (targets c128[T, N, N], eps) -> (a word each, or None; how many elements it looked at).
    """

    def solve(problem, heuristic, starts, key=None, **options):
        price = jax.vmap(lambda a: problem.cost(starts[0], a))(jnp.arange(problem.num_actions))
        return from_words(*find(*_targets_of(e, starts)), np.asarray(price))

    return solve


def bounded(run: Solve, width: int, max_length: int) -> Solve:
    """`beam` or `random_walks` in the place of `search_many`, whose other options they do not have."""
    size = {"width": width, "max_length": max_length}

    def solve(problem, heuristic, starts, key=None, *, node_limit, **_):
        return run(problem, heuristic, starts, key, **size, node_limit=node_limit)

    return solve


def verified(
    solve: Solve, e: Elements, distance: Callable[[np.ndarray, np.ndarray], float]
) -> Solve:
    """`solve`, whose words are multiplied out again: distance(word, U) must be below eps.

    Raises:
      RuntimeError: a word is not within eps (up to float32 of U): the search or the solver is wrong.
    """

    def run(problem, heuristic, starts, key=None, **options):
        r = solve(problem, heuristic, starts, key, **options)
        paths, (targets, eps) = np.asarray(r.path), _targets_of(e, starts)
        for i in np.flatnonzero(np.asarray(r.solved)):
            word = paths[i][paths[i] >= 0]
            if not (d := distance(word, targets[i])) < eps * 1.001 + 1e-6:
                raise RuntimeError(f"word {word.tolist()} is at distance {d:.2g}, not within {eps}")
        return r

    return run
