"""GPTQ: round column by column and let the columns to come absorb the error (Frantar et al., arXiv 2210.17323).

The layer objective is tr(E H E^T), E = w_hat - w, with H the mean of x x^T over calibration inputs.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from qlab.quantization.qtensor import Ties, expand, round_ties

LADDER = 4  # dampings tried: damp times 1, 10, 100, 1000
COLUMNS = 32  # in a block of columns


class HessianState(NamedTuple):
    mean: jax.Array  # f[in, in], running mean of left^T x
    count: jax.Array  # f[], rows seen


def hessian_init(width: int) -> HessianState:
    """Nothing seen yet; float64 where x64 is on."""
    dtype = jnp.zeros(()).dtype  # f64 where x64 is on
    return HessianState(jnp.zeros((width, width), dtype), jnp.zeros((), dtype))


def hessian_update(state: HessianState, x, mask=None, *, left=None) -> HessianState:
    """Adds rows x f32[N, in] to the running mean of x^T x (of left^T x, if given: C = E[x_fp x_q^T]).

    Args:
      mask: bool[N], rows that count (padding does not).

    >>> state = hessian_update(hessian_init(2), jnp.array([[1.0, 2.0], [3.0, 0.0]]))
    >>> state.mean.tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    """
    x = x.astype(state.mean.dtype)
    left = x if left is None else left.astype(x.dtype)
    weight = jnp.ones(x.shape[0], x.dtype) if mask is None else mask.astype(x.dtype)
    count = state.count + weight.sum()
    total = state.mean * state.count + (left * weight[:, None]).T @ x
    return HessianState(total / jnp.maximum(count, 1.0), count)


def damping(h: jax.Array, damp) -> jax.Array:
    """damp * mean of the live diagonal (an input that is always 0 says nothing about the scale)."""
    diagonal = jnp.diagonal(h)
    live = diagonal > 0
    return damp * (diagonal * live).sum() / jnp.maximum(live.sum(), 1)


@jax.custom_batching.sequential_vmap
def _inverse_cholesky(h: jax.Array) -> jax.Array:
    """Upper triangular U with U^T U = h^-1; NaN where h is not positive definite.

    With h = R R^T, R upper triangular (a Cholesky of the reversed matrix), U = R^-1: one
    factorisation instead of two. Under vmap one matrix after another: a batched LAPACK call inside a
    larger program was seen to deadlock on a CPU with two cores (jaxlib 0.10).
    """
    r = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(r, jnp.eye(h.shape[0], dtype=h.dtype), lower=False)


def inverse_factor(h: jax.Array, damp) -> tuple[jax.Array, jax.Array]:
    """Upper triangular U with U^T U = (h + damping I)^-1, and the rung of the ladder that was needed.

    A factorisation that fails is tried again with ten times the damping; rung LADDER means that
    none was finite.
    """
    eye = jnp.eye(h.shape[0], dtype=h.dtype)

    def factor(rung):
        return _inverse_cholesky(h + damping(h, damp) * 10.0**rung * eye)

    def failed(carry):
        u, rung = carry
        return ~jnp.isfinite(u).all() & (rung < LADDER - 1)

    u, rung = jax.lax.while_loop(failed, lambda c: (factor(c[1] + 1), c[1] + 1), (factor(0), 0))
    return u, jnp.where(jnp.isfinite(u).all(), rung, LADDER)


def gptq_columns(w, u, scale, offset, q_min, q_max, *, ties: Ties = "half_even") -> jax.Array:
    """i32[out, in] codes, column after column, with the factor u of `inverse_factor` (in the order of w).

    Columns are worked off in blocks: within one the errors spread at once, to the columns behind it as
    one matrix product (Frantar et al., section 3.3, "lazy batch-updates"). The same codes, less memory moved.

    Args:
      scale, offset: of the shape of w; a scale may be negative.
    """
    rows, width = w.shape
    block = min(COLUMNS, width)
    pad = -width % block
    # A column is a contiguous row of the transposes; the padding rounds 0 to a grid of step 1.
    wt = jnp.pad(w.T, ((0, pad), (0, 0)))
    s = jnp.pad(scale.T, ((0, pad), (0, 0)), constant_values=1)
    z = jnp.pad(offset.T, ((0, pad), (0, 0)))
    places = jnp.arange(width + pad)
    u = jnp.pad(u, ((0, pad), (0, pad))) + jnp.diag((places >= width).astype(u.dtype))

    def one_block(b, carry):
        wt, codes = carry
        first = b * block
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=block)
        s_b, z_b, u_b = cut(s), cut(z), cut(cut(u), axis=1)

        def column(i, carry):
            w_b, q_b, errors = carry
            q = jnp.clip(round_ties((w_b[i] - z_b[i]) / s_b[i], ties), q_min, q_max)
            error = (w_b[i] - (q * s_b[i] + z_b[i])) / u_b[i, i]
            # Columns up to i are final: u is upper triangular, and column i itself is not read again.
            w_b = w_b - jnp.where(jnp.arange(block) > i, u_b[i], 0.0)[:, None] * error
            return w_b, q_b.at[i].set(q.astype(jnp.int32)), errors.at[i].set(error)

        start = (cut(wt), jnp.zeros((block, rows), jnp.int32), jnp.zeros((block, rows), wt.dtype))
        _, q_b, errors = jax.lax.fori_loop(0, block, column, start)
        behind = jnp.where(places >= first + block, cut(u), 0.0)
        wt = wt - jnp.matmul(behind.T, errors, precision="highest")
        return wt, jax.lax.dynamic_update_slice_in_dim(codes, q_b, first, 0)

    codes = jnp.zeros(wt.shape, jnp.int32)
    if pad + width == block:
        _, codes = one_block(0, (wt, codes))
    else:
        _, codes = jax.lax.fori_loop(0, (width + pad) // block, one_block, (wt, codes))
    return codes[:width].T


def gptq_solve(
    w, h, scale, offset, q_min, q_max, *, perm=None, damp=0.01, ties: Ties = "half_even"
):
    """(codes, rung): `gptq_round` with the rung of the damping ladder, 0 if the first one held."""
    w = w.astype(h.dtype)
    scale, offset = (jnp.broadcast_to(expand(a, w.shape), w.shape) for a in (scale, offset))
    if perm is not None:
        w, scale, offset, h = w[:, perm], scale[:, perm], offset[:, perm], h[perm][:, perm]
    u, rung = inverse_factor(h, damp)
    codes = gptq_columns(w, u, scale, offset, q_min, q_max, ties=ties)
    return (codes if perm is None else codes[:, jnp.argsort(perm)]), rung


def gptq_round(
    w, h, scale, offset, q_min, q_max, *, perm=None, damp=0.01, ties: Ties = "half_even"
):
    """i32[out, in] codes q with scale * q + offset near w in the norm of h, one column after another.

    Args:
      w: f32[out, in]. h: f[in, in], the mean of x x^T.
      scale, offset: f32[out, 1] (or [out, G], [out, in]), any affine grid; an integer zero point z
        is offset = -scale * z.
      perm: i32[in], order of the columns (act-order: descending diagonal of h); None: as they are.
      damp: added to h, relative to its mean diagonal; ten-fold more is tried where that fails.
        0: nothing is added, and a singular h is an error.

    >>> codes = gptq_round(jnp.array([[0.6, 0.6]]), jnp.array([[1.0, 0.9], [0.9, 1.0]]),
    ...                    jnp.ones((1, 1)), jnp.zeros((1, 1)), 0, 3)
    >>> codes.tolist()  # the second weight pays back what the first was rounded up by
    [[1, 0]]
    """
    codes, rung = gptq_solve(w, h, scale, offset, q_min, q_max, perm=perm, damp=damp, ties=ties)
    if not isinstance(rung, Tracer) and int(rung) >= (1 if damp == 0 else LADDER):
        raise ValueError(
            f"the Hessian ({h.shape[0]} inputs) is singular with damp={damp}; use a larger damp or more samples"
        )
    return codes


def fp_target(w, c, h, damp=0.01) -> jax.Array:
    """W* = W C H^-1: the weights that on quantized-prefix inputs best give W's output on float inputs.

    min over W* of E |W* x_q - W x_fp|^2, with C = E[x_fp x_q^T] and H = E[x_q x_q^T], both damped by
    the same multiple of the identity: W + W (C - H) (H + damping)^-1, so W* = W where the prefix is exact, and where
    its outputs are all 0.
    """
    dead = ~(h != 0).any()  # then the damping, a share of H, is 0 too
    u, _ = inverse_factor(jnp.where(dead, jnp.eye(len(h), dtype=h.dtype), h), damp)
    return w + jnp.where(dead, 0.0, (w.astype(h.dtype) @ (c - h)) @ (u.T @ u))


def layer_problem(w, x_q, x_fp=None, damp: float = 0.01) -> tuple[jax.Array, jax.Array]:
    """(weights to round, H): what a layer's rounding minimises on its inputs behind the quantized net.

    Args:
      w: f32[out, in]. x_q: f32[..., in]. x_fp: f32[..., in], the same samples behind the float net, for W* (see
        `fp_target`); None: w itself.
    Returns:
      f32[out, in]; f[in, in], the undamped mean of x_q x_q^T.
    """
    x_q = x_q.reshape(-1, x_q.shape[-1])
    empty = hessian_init(w.shape[1])
    h = hessian_update(empty, x_q).mean
    if x_fp is None:
        return w, h
    c = hessian_update(empty, x_q, left=x_fp.reshape(x_q.shape)).mean
    return fp_target(w, c, h, damp), h
