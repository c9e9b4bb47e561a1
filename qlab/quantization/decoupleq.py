"""decoupleQ: integers and floats of a uniform grid as two decoupled unknowns (Guo et al., arXiv 2404.12759).

    w_hat = q s + z,  q integer in [-2^(b-1), 2^(b-1) - 1];  s, z real, one pair for each row or group
    min over q, s, z of tr(E H E^T),  E = w_hat - w,  H = E[x x^T] + damp mean(diag) I

Nothing ties (s, z) to the range of w. From the min/max grid, the integers (given s and z: GPTQ, or projected
Adam with column-wise rounding, or all of them tried) and the floats (given q: least squares in closed form,
`fit_affine`) are improved in turn, and of each half step a row keeps only what lowers its error. The first
alternation starts on the min/max range shrunk by a search, refitted.

Halves are rounded up everywhere. s may turn out negative: q s + z is then the same set of levels, mirrored.
Where it differs from the authors' program: the ladder of extra damping is 1, 10, 100, 1000 times its start
(theirs also 10,000), dependent unknowns of the float step are left out instead of damped, and with the solver
"gptq" the projected steps before it are skipped, as their program does in spite of its flag.

Letters: out = rows, in = columns; G = groups of a row.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from qlab.quantization.affine_fit import (
    best_range,
    fit_affine,
    minmax,
    nearest,
    pad_groups,
    rails,
    row_error,
    width_of,
)
from qlab.quantization.gptq import damping, gptq_columns, inverse_factor
from qlab.quantization.grid import check_bits
from qlab.quantization.qtensor import QTensor, expand

Solver = Literal["gptq", "train", "exhaustive"]
MOST_CODES = 2**20  # rows of codes that "exhaustive" tries


class DecoupleQ(NamedTuple):
    """How a layer is quantized.

    bits: 1 to 8. group: columns that share (s, z); 0 or -1: the whole row. symmetric: z = 0.
    num_outer: K. 0: nearest on the min/max grid; 1: GPTQ on it; more: K - 1 alternations.
    solver: of the integers. float_step: False keeps the searched (s, z) (an ablation).
    damp: share of H's mean diagonal added in the loss and in both steps; extra_damp: added once more
      where GPTQ inverts H. act_order: columns by descending diagonal of H.
    iters, inner, learning_rate: of "train": steps of projected Adam first, and after each rounded column.
    tolerance: stop where less than this share of the rows improves.
    """

    bits: int = 2
    group: int = 0
    symmetric: bool = False
    num_outer: int = 4
    solver: Solver = "gptq"
    float_step: bool = True
    damp: float = 0.01
    extra_damp: float = 0.01
    act_order: bool = True
    iters: int = 50
    inner: int = 50
    learning_rate: float = 1e-3
    tolerance: float = 1e-4


DEFAULT = DecoupleQ()


class Solution(NamedTuple):
    q: jax.Array  # f[out, in padded], integers
    s: jax.Array  # f[out, G]
    z: jax.Array  # f[out, G]
    err: jax.Array  # f[out]


def check(cfg: DecoupleQ, num_in: int, bits: int) -> None:
    """Raises ValueError, one line, for what cannot be run on `num_in` columns of codes of `bits`."""
    check_bits(bits)
    if cfg.solver not in ("gptq", "train", "exhaustive"):
        raise ValueError(f'solver={cfg.solver!r}; use "gptq", "train" or "exhaustive"')
    if cfg.num_outer < 0:
        raise ValueError(f"num_outer={cfg.num_outer}; use 0 (nearest), 1 (GPTQ) or more")
    if cfg.solver == "exhaustive" and bits * num_in > MOST_CODES.bit_length() - 1:
        raise ValueError(
            f'solver="exhaustive" would try 2^{bits * num_in} rows of codes ({num_in} inputs, {bits} bits); '
            f'at most {MOST_CODES} (10 inputs at 2 bits) are tried: use "gptq" or "train"'
        )


def decoupleq_layer(w, h, cfg: DecoupleQ = DEFAULT) -> tuple[QTensor, jax.Array]:
    """Quantizes w f32[out, in] in the norm of h f[in, in], the undamped mean of x x^T.

    Returns:
      (QTensor with real offset, or symmetric without; history f[2 K], or f[1 + K] without float steps: the loss
      tr(E H E^T) with the damped H of nearest, of GPTQ, then after each half step; it never rises).

    >>> w = jax.random.normal(jax.random.key(0), (4, 8))
    >>> qt, history = decoupleq_layer(w, jnp.eye(8) + 0.5, DecoupleQ(bits=2))
    >>> qt
    QTensor(4 x 8, 2 bits real offset, per channel, 64 bytes unpacked)
    >>> bool((history[1:] <= history[:-1]).all()), bool(history[-1] < 0.8 * history[0])
    (True, True)
    """
    if w.ndim != 2 or h.shape != (w.shape[-1], w.shape[-1]):
        raise ValueError(f"w has shape {w.shape}, h {h.shape}; (out, in) and (in, in) are expected")
    check(cfg, w.shape[1], cfg.bits)
    best, history, _ = alternate(w, h, *rails(cfg.bits), cfg)
    return record(best, rails(cfg.bits)[0], cfg.bits, w.shape, cfg.symmetric), history


def record(best: Solution, q_min, bits: int, shape: tuple[int, ...], symmetric: bool) -> QTensor:
    """The QTensor of a solution: signed codes where symmetric, else unsigned ones and an offset."""
    if symmetric:
        return QTensor(best.q.astype(jnp.int8), best.s, None, None, bits, (1,), shape)
    codes, offset = (best.q - q_min).astype(jnp.uint8), best.z + best.s * q_min
    return QTensor(codes, best.s, None, offset, bits, (1,), shape)


def alternate(w, h, q_min, q_max, cfg: DecoupleQ):
    """(Solution, history, rung): the whole outer loop; rails may be traced, so that vmap runs several widths.

    rung: of GPTQ's damping ladder, 0 if the first damping held.
    """
    with jax.default_matmul_precision("highest"):
        width = width_of(cfg.group, w.shape[1])
        num_in = w.shape[1]
        h = h + damping(h, cfg.damp) * jnp.eye(num_in, dtype=h.dtype)
        h, w = pad_groups(width, h, w.astype(h.dtype))
        perm = jnp.argsort(-jnp.diagonal(h)) if cfg.act_order else jnp.arange(w.shape[1])
        u, rung = inverse_factor(h[perm][:, perm], cfg.extra_damp)
        is_real = jnp.arange(w.shape[1]) < num_in

        def solved(q, s, z) -> Solution:
            q = jnp.where(is_real, q, q_min)
            return Solution(q, s, z, row_error(q * expand(s, q.shape) + expand(z, q.shape), w, h))

        def gptq(s, z) -> Solution:
            s_col, z_col = (by_column_of(a, w)[:, perm] for a in (s, z))
            s_col = jnp.where(s_col == 0, 1.0, s_col)
            q = gptq_columns(w[:, perm], u, s_col, z_col, q_min, q_max, ties="half_up")
            return solved(q.astype(h.dtype)[:, jnp.argsort(perm)], s, z)

        def integers(s, z) -> Solution:
            if cfg.solver == "gptq":
                return gptq(s, z)
            if cfg.solver == "train":
                return solved(projected(w, h, s, z, q_min, q_max, cfg, perm), s, z)
            s_col, z_col = by_column_of(s, w)[:, :num_in], by_column_of(z, w)[:, :num_in]
            real_h = h[:num_in, :num_in]
            q = all_codes(w[:, :num_in], real_h, s_col, z_col, q_min, q_max, cfg.bits)
            return solved(jnp.pad(q, [(0, 0), (0, w.shape[1] - num_in)]), s, z)

        def half_step(best: Solution, new: Solution):
            better = new.err < best.err  # a NaN is not better
            return _choose(better, new, best), better.mean() >= cfg.tolerance

        def turn(carry):
            """Floats for the integers, then integers for the floats. In turn 0 the floats are only where the
            first integer step begins: the searched range, refitted to its own nearest codes."""
            k, _, best, losses = carry
            q, s, z = _choose(k == 0, (near, *searched), (best.q, best.s, best.z))
            moved = k == 0
            if cfg.float_step:
                fit = Solution(q, *fit_affine(q, w, h, width, cfg.symmetric, scale=s))
                improved, refit = half_step(best, fit)
                best = _choose(k == 0, best, improved)
                s, z = _choose(k == 0, (fit.s, fit.z), (best.s, best.z))
                moved |= refit
            after_floats = best.err.sum()
            new = jax.lax.cond(k < turns - cfg.float_step, integers, lambda s, z: best, s, z)
            best, changed = half_step(best, new)
            # an early stop leaves the last loss standing
            now = (k == jnp.arange(turns))[:, None] & jnp.array([True, False])
            losses = jnp.where(jnp.arange(turns)[:, None] >= k, best.err.sum(), losses)
            return k + 1, moved | changed, best, jnp.where(now, after_floats, losses)

        s, z = (a.astype(h.dtype) for a in minmax(w, q_min, q_max, width, cfg.symmetric))
        best = solved(nearest(w, s, z, q_min, q_max), s, z)
        history = [best.err.sum()]
        if cfg.num_outer >= 1:
            best, _ = half_step(best, gptq(s, z))
            history.append(best.err.sum())
        history = jnp.stack(history)
        if cfg.num_outer >= 2:
            searched = best_range(w, h, q_min, q_max, width, cfg.symmetric)
            near = nearest(w, searched[0], searched[1], q_min, q_max)
            # the last turn has no integer step, where there are float steps
            turns = cfg.num_outer - 1 + cfg.float_step
            start = (jnp.int32(0), jnp.bool_(True), best, jnp.zeros((turns, 2), h.dtype))
            go_on = lambda c: c[1] & (c[0] < turns)  # noqa: E731
            *_, best, losses = jax.lax.while_loop(go_on, turn, start)
            losses = losses.ravel()[1:-1] if cfg.float_step else losses[:, 1]
            history = jnp.concatenate([history, losses])
        return best, history, rung


def _choose(condition, new, old):
    """Rows of the arrays of a tuple (whole arrays, where the condition is one) from `new` where it holds."""

    def one(a, b):
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(one, new, old)


def by_column_of(a, w) -> jax.Array:
    """f[out, in] from f[out, G]."""
    return jnp.broadcast_to(expand(a, w.shape), w.shape)


class _Adam(NamedTuple):
    w: jax.Array
    mean: jax.Array
    square: jax.Array
    t: jax.Array


def projected(w, h, s, z, q_min, q_max, cfg: DecoupleQ, perm) -> jax.Array:
    """f[out, in] integers by projected Adam on (w' - w) H (w' - w)^T / 2 and rounding one column after another.

    cfg.iters steps inside the box of the rails, then each column in the order `perm` is rounded, and the
    columns after it take cfg.inner steps more, with moments and step count carried over. The gradient is
    (w' - w) H; betas 0.9 and 0.999, eps 1e-5 before and 1e-4 between the columns.
    """
    h = h[perm][:, perm]
    w, s, z = (by_column_of(a, w)[:, perm] for a in (w, s, z))
    low, high = jnp.minimum(q_min * s, q_max * s) + z, jnp.maximum(q_min * s, q_max * s) + z
    columns = jnp.arange(w.shape[1])

    def steps(a: _Adam, num: int, eps: float, free) -> _Adam:
        def body(_, a: _Adam) -> _Adam:
            grad = (a.w - w) @ h
            t = a.t + 1
            mean = jnp.where(free, 0.9 * a.mean + 0.1 * grad, a.mean)
            square = jnp.where(free, 0.999 * a.square + 0.001 * grad**2, a.square)
            size = jnp.sqrt(square / (1 - 0.999**t)) + eps
            new = jnp.clip(a.w - cfg.learning_rate * mean / (1 - 0.9**t) / size, low, high)
            return _Adam(jnp.where(free, new, a.w), mean, square, t)

        return jax.lax.fori_loop(0, num, body, a)

    def rounded(a):
        return nearest(a, s, z, q_min, q_max) * s + z

    def column(i, a: _Adam) -> _Adam:
        a = a._replace(w=jnp.where(columns == i, rounded(a.w), a.w))
        return steps(a, cfg.inner, 1e-4, columns > i)

    zero = jnp.zeros_like(w)
    a = steps(_Adam(w, zero, zero, jnp.zeros((), w.dtype)), cfg.iters, 1e-5, columns >= 0)
    a = jax.lax.fori_loop(0, w.shape[1] - 1, column, a)
    return nearest(a.w, s, z, q_min, q_max)[:, jnp.argsort(perm)]


def all_codes(w, h, s, z, q_min, q_max, bits: int) -> jax.Array:
    """f[out, in] integers of least error, all 2^(bits in) tried for each row; codes beyond the rails lose.

    s, z: f[out, in].
    """
    num_in = w.shape[1]
    levels = 2**bits
    place = levels ** jnp.arange(num_in)
    q = (jnp.arange(levels**num_in)[:, None] // place % levels).astype(h.dtype) + q_min

    def row(args):
        w, s, z = args
        err = row_error(q * s + z, w, h)
        return q[jnp.where((q <= q_max).all(-1), err, jnp.inf).argmin()]

    return jax.lax.map(row, (w, s, z))
