"""Zero-sum games with entropy: quantal response equilibria of matrix and tabular Markov games, exactly.

The row player maximises x^T A y + t_x H(x) - t_y H(y) over x, the column player minimises it over y. The
saddle point is the quantal response equilibrium x = softmax(A y / t_x), y = softmax(-A^T x / t_y): unique for
positive temperatures, Nash as both go to 0, a uniform column player as t_y grows.

Eliminating x leaves f(y) = t_x logsumexp(A y / t_x) + t_y sum y log y, strictly convex on the simplex. It is
minimised by Newton steps on the logits of y with a line search, along a homotopy that halves both
temperatures. A damped fixed point, the textbook way, needs a step of about t_x t_y.
NumPy in float64 on the host, like the other exact solvers.
Letters: S = states, M, K = actions of the row and the column player.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MAX_NEWTON = 200


class Equilibrium(NamedTuple):
    """x: f64[M] or f64[S, M]. y: f64[K] or f64[S, K]. value: x^T A y. soft_value: with the entropies.

    residual: largest |x - softmax| or |y - softmax|; of a Markov game also the Bellman residual.
    """

    x: np.ndarray
    y: np.ndarray
    value: np.ndarray
    soft_value: np.ndarray
    residual: float


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def _objective(a: np.ndarray, log_y: np.ndarray, tx: float, ty: float):
    """f(y), its gradient by y, and x = softmax(A y / t_x)."""
    y = np.exp(log_y)
    u = a @ y / tx
    log_x = _log_softmax(u)
    x = np.exp(log_x)
    f = tx * (u.max() + np.log(np.exp(u - u.max()).sum())) + ty * (y * log_y).sum()
    return f, a.T @ x + ty * (log_y + 1), x


def _descend(a: np.ndarray, log_y: np.ndarray, tx: float, ty: float, iters: int) -> np.ndarray:
    """Newton on log y: solves (C diag(y) + t_y I) s + lambda 1 = -gradient, y^T s = 0, C the curvature in y."""
    k = a.shape[1]
    for _ in range(iters):
        f, grad, x = _objective(a, log_y, tx, ty)
        y = np.exp(log_y)
        spread = grad - y @ grad
        if np.abs(spread).max() < 1e-13 * max(1.0, ty):
            break
        ax = a.T @ x
        curve = (a.T * x) @ a / tx - np.outer(ax, ax) / tx
        system = np.zeros((k + 1, k + 1))
        system[:k, :k] = curve * y + ty * np.eye(k)
        system[:k, k], system[k, :k] = 1.0, y
        s = np.linalg.solve(system, np.append(-grad, 0.0))[:k]
        slope = (y * spread) @ s
        rate = min(1.0, 20 / max(np.abs(s).max(), 1e-300))
        while rate > 1e-12:
            new = _log_softmax(log_y + rate * s)
            if _objective(a, new, tx, ty)[0] <= f + 1e-4 * rate * slope + 1e-15 * abs(f):
                break
            rate /= 2
        log_y = new
    return log_y


def qre_matrix(
    a: np.ndarray,
    tx: float,
    ty: float,
    iters: int = MAX_NEWTON,
    start: np.ndarray | None = None,
) -> Equilibrium:
    """The quantal response equilibrium of a matrix game.

    Args:
      a: f64[M, K], payoff to the row player. tx, ty: temperatures > 0. iters: Newton steps at most, for each
        level of the homotopy. start: f64[K], a guess of y > 0 that replaces the homotopy.
    Raises:
      ValueError: a temperature that is not positive (for temperatures 0 see `nash_matrix`).

    >>> eq = qre_matrix(np.array([[1.0, -1.0], [-1.0, 1.0]]), 0.1, 0.1)
    >>> eq.x.tolist(), eq.y.tolist(), float(eq.value)
    ([0.5, 0.5], [0.5, 0.5], 0.0)
    """
    a = np.asarray(a, np.float64)
    if a.ndim != 2:
        raise ValueError(f"a has shape {a.shape}: expected (rows, columns)")
    if not (tx > 0 and ty > 0 and np.isfinite([tx, ty]).all()):
        raise ValueError(
            f"tx={tx}, ty={ty}: temperatures must be positive and finite; nash_matrix is the limit 0"
        )
    log_y = np.full(a.shape[1], -np.log(a.shape[1]))
    lift = max(1.0, np.ptp(a) / min(tx, ty))
    if start is not None:
        log_y, lift = _log_softmax(np.log(np.maximum(start, 1e-300))), 1.0
    while lift > 1:
        log_y = _descend(a, log_y, lift * tx, lift * ty, iters)
        lift /= 2
    log_y = _descend(a, log_y, tx, ty, iters)
    # One response of each player last: it costs nothing and both forms then agree to rounding.
    y = np.exp(log_y)
    log_x = _log_softmax(a @ y / tx)
    x = np.exp(log_x)
    residual = np.abs(y - np.exp(_log_softmax(-a.T @ x / ty))).max()
    value = x @ a @ y
    soft = value - tx * (x * log_x).sum() + ty * (y * log_y).sum()
    return Equilibrium(x, y, value, soft, float(residual))


def nash_matrix(a: np.ndarray) -> Equilibrium:
    """The Nash equilibrium by linear programming (one of them, where there are several).

    >>> eq = nash_matrix(np.array([[2.0, -1.0], [-1.0, 1.0]]))
    >>> eq.x.round(6).tolist(), round(float(eq.value), 6)
    ([0.4, 0.6], 0.2)
    """
    from scipy.optimize import linprog

    def maximin(b: np.ndarray) -> np.ndarray:  # max over x of the least entry of x^T b
        m, k = b.shape
        out = linprog(
            np.append(np.zeros(m), -1.0),
            A_ub=np.column_stack([-b.T, np.ones(k)]),
            b_ub=np.zeros(k),
            A_eq=np.append(np.ones(m), 0.0)[None],
            b_eq=[1.0],
            bounds=[(0, None)] * m + [(None, None)],
            method="highs",
        )
        if out.status != 0:
            raise ArithmeticError(f"linear program of a {b.shape} game: {out.message}")
        return np.maximum(out.x[:m], 0) / np.maximum(out.x[:m], 0).sum()

    a = np.asarray(a, np.float64)
    x, y = maximin(a), maximin(-a.T)
    gap = (a @ y).max() - (x @ a).min()
    value = x @ a @ y
    return Equilibrium(x, y, value, value, float(gap))


def worst_case(x: np.ndarray, a: np.ndarray) -> float:
    """What the row player gets against a best response, min over columns of x^T A."""
    return float((x @ a).min())


def exploitability(x: np.ndarray, a: np.ndarray) -> float:
    """How much less than the value of the game x is sure of, >= 0; 0 exactly for a maximin strategy.

    >>> exploitability(np.array([0.5, 0.5]), np.array([[2.0, -1.0], [-1.0, 1.0]])).__round__(6)
    0.2
    """
    return float(nash_matrix(a).value - worst_case(x, a))


def _check_game(p: np.ndarray, r: np.ndarray, gamma: float) -> None:
    if p.ndim != 4 or p.shape[:3] != r.shape or p.shape[3] != p.shape[0]:
        raise ValueError(f"P {p.shape}, R {r.shape}: expected (S, M, K, S) and (S, M, K)")
    if (p < 0).any() or (p.sum(-1) > 1 + 1e-9).any():
        raise ValueError(
            "rows of P must be non-negative and sum to 1 (less, where the game may end)"
        )
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma={gamma}: expected 0 <= gamma < 1")


def soft_minimax_vi(
    p: np.ndarray, r: np.ndarray, gamma: float, tx: float, ty: float, tol: float = 1e-10
) -> Equilibrium:
    """Value iteration with a matrix game in every state; tx = ty = 0 is Shapley's (Nash).

    Args:
      p: f64[S, M, K, S], next-state probabilities; rows may sum to less than 1 where the game ends.
      r: f64[S, M, K]. gamma: discount in [0, 1).
    Returns:
      Equilibrium with x f64[S, M], y f64[S, K]; soft_value f64[S] is the fixed point, value the same policies'
      return without entropies.
    """
    p, r = np.asarray(p, np.float64), np.asarray(r, np.float64)
    _check_game(p, r, gamma)

    v, guess = np.zeros(len(r)), [None] * len(r)
    while True:
        games = r + gamma * p @ v
        if tx == ty == 0:
            stage = [nash_matrix(g) for g in games]
        else:
            stage = [qre_matrix(g, tx, ty, start=y) for g, y in zip(games, guess, strict=True)]
        guess = [e.y for e in stage]
        new = np.array([e.soft_value for e in stage])
        change = np.abs(new - v).max()
        v = new
        # A contraction: the distance to the fixed point is at most gamma / (1 - gamma) times this.
        if change * gamma <= tol * (1 - gamma):
            break
    x, y = (np.stack([e[i] for e in stage]) for i in (0, 1))
    flow = np.einsum("sm,sk,smkt->st", x, y, p)
    value = np.linalg.solve(np.eye(len(v)) - gamma * flow, np.einsum("sm,sk,smk->s", x, y, r))
    return Equilibrium(x, y, value, v, max(change, *(e.residual for e in stage)))


def markov_worst_case(p: np.ndarray, r: np.ndarray, gamma: float, x: np.ndarray) -> np.ndarray:
    """Return f64[S] of the row policy x f64[S, M] against a best response, by policy iteration."""
    p, r = np.asarray(p, np.float64), np.asarray(r, np.float64)
    _check_game(p, r, gamma)
    flow, pay = np.einsum("sm,smkt->skt", x, p), np.einsum("sm,smk->sk", x, r)
    states = np.arange(len(r))
    reply = np.zeros(len(r), int)
    while True:
        v = np.linalg.solve(np.eye(len(r)) - gamma * flow[states, reply], pay[states, reply])
        q = pay + gamma * flow @ v
        better = q.argmin(1)
        gain = q[states, reply] - q[states, better]
        if gain.max() < 1e-12 * max(1.0, np.abs(v).max()):
            return v
        reply = np.where(gain > 0, better, reply)
