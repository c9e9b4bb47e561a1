"""Entropy of codes: how evenly a tensor fills its grid, and how much one tensor's codes tell about another's (nats).

Proxies for sensitivity and for dependency between layers. Entropy is large for well-filled grids and for badly
clipped ones alike, so it ranks layers and is no objective for their ranges.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qlab.quantization.qtensor import clip_ste


def code_histogram(q: jax.Array, n_levels: int) -> jax.Array:
    """p f32[n_levels], shares of the codes 0 .. n_levels - 1 (integer-valued, others are left out) in q.

    >>> code_histogram(jnp.array([0, 1, 1, 3]), 4).tolist()
    [0.25, 0.5, 0.0, 0.25]
    """
    counts = jnp.zeros(n_levels).at[q.astype(jnp.int32).ravel()].add(1.0, mode="drop")
    return counts / jnp.maximum(counts.sum(), 1.0)


def entropy(p: jax.Array) -> jax.Array:
    """f32[]: -sum p log p in nats, 0 log 0 = 0; p sums to 1."""
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum()


def conditional_entropy(q1: jax.Array, q2: jax.Array, n_levels: int) -> jax.Array:
    """H(q2 | q1) f32[] in nats of the pairs at equal places: 0 where code 1 determines code 2, else up to H(q2).

    Q-VLM's D(k, k+1). It is large where codes depend LITTLE on one another.

    Args:
      q1, q2: integer-valued codes 0 .. n_levels - 1 of one shape.

    >>> q = jnp.array([0, 1, 0, 1])
    >>> float(conditional_entropy(q, 1 - q, 2)), round(float(conditional_entropy(0 * q, q, 2)), 4)
    (0.0, 0.6931)
    """
    if q1.shape != q2.shape:
        raise ValueError(f"codes of shapes {q1.shape} and {q2.shape} do not pair up")
    pair = q1.astype(jnp.int32) * n_levels + q2.astype(jnp.int32)
    joint = code_histogram(pair, n_levels**2).reshape(n_levels, n_levels)
    row = joint.sum(1, keepdims=True)
    # the difference of logarithms is exactly 0 where a row has one entry
    terms = joint * (
        jnp.log(jnp.where(joint > 0, joint, 1.0)) - jnp.log(jnp.where(row > 0, row, 1.0))
    )
    return jnp.maximum(-terms.sum(), 0.0)


def soft_entropy(x: jax.Array, lo: jax.Array, hi: jax.Array, n_levels, room: int = 0) -> jax.Array:
    """Entropy f32[] of a soft histogram of x over n_levels codes of [lo, hi], differentiable in all three.

    A value counts for the two codes next to it, by a triangular kernel of one bin width; on codes exactly it
    is the entropy of their histogram. Values beyond the ends count for the last code and pass no gradient.

    Args:
      x: f32[...]. lo, hi: broadcastable to x; a width below 1e-5 is taken as 1e-5.
      n_levels: an int, or f32[] with room (static) at least as large.
    """
    step = jnp.maximum(hi - lo, 1e-5) / (n_levels - 1)
    u = clip_ste((x - lo) / step, 0.0, jnp.float32(n_levels) - 1.0)
    low = jax.lax.stop_gradient(jnp.minimum(jnp.floor(u), n_levels - 2))
    share = (u - low).ravel()
    at = low.astype(jnp.int32).ravel()
    p = jnp.zeros(room or n_levels).at[at].add(1.0 - share).at[at + 1].add(share)
    return entropy(p / u.size)
