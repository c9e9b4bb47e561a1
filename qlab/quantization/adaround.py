"""AdaRound: learn whether each weight is rounded down or up (Nagel et al., ICML 2020, arXiv 2004.10568)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qlab.quantization.elementwise import abs_power
from qlab.quantization.qtensor import clip_ste, expand
from qlab.quantization.rounding import RoundingRule

ZETA, GAMMA = 1.1, -0.1  # stretch of the sigmoid (eq. 23): h reaches 0 and 1 exactly


def rectified_sigmoid(v: jax.Array) -> jax.Array:
    """h(v) in [0, 1] (eq. 23). Its gradient is 0 beyond the rails: a decided weight stays decided."""
    return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def relaxed(
    h: Callable[[jax.Array], jax.Array],
    start: Callable[[jax.Array], jax.Array],
    goes_up: Callable[[jax.Array], jax.Array],
    *,
    reg_weight: float = 0.01,
    beta_start: float = 20.0,
    beta_end: float = 2.0,
    warmup: float = 0.2,
) -> RoundingRule:
    """w_hat = s (clip(floor(w / s) + h(V) + z) - z): rounding up or down, relaxed to a share h in [0, 1].

    Args:
      h: V -> share f32[out, in]. start: fraction of w / s -> V with h(V) = fraction. goes_up: V -> bool, h >= 1/2.
      reg_weight: lambda of the regulariser lambda * sum(1 - |2 h - 1|^beta), which pushes h to 0 or 1.
      beta_start, beta_end: beta falls linearly between them after the warm-up.
      warmup: share of the iterations without regulariser.
    """

    def init(w, grid, key=None):
        del key
        u = w / expand(grid.scale, w.shape)
        return start(u - jnp.floor(u))

    def codes(up, w, grid):
        scale = expand(grid.scale, w.shape)
        zero = 0.0 if grid.zero is None else expand(grid.zero, w.shape)
        return clip_ste(jnp.floor(w / scale) + up + zero, grid.q_min, grid.q_max), zero, scale

    def soft(v, w, grid):
        q, zero, scale = codes(h(v), w, grid)
        return scale * (q - zero)

    def hard(v, w, grid):
        q, _, _ = codes(goes_up(v).astype(jnp.float32), w, grid)
        return grid.qtensor(q, w.shape)

    def reg(v, t):
        left = jnp.clip(1.0 - (t - warmup) / (1.0 - warmup), 0.0, 1.0)
        beta = beta_end + (beta_start - beta_end) * left
        undecided = (1.0 - abs_power(2.0 * h(v) - 1.0, beta)).sum()
        return jnp.where(t < warmup, 0.0, reg_weight) * undecided

    return RoundingRule(init, soft, hard, reg)


def adaround(**options: Any) -> RoundingRule:
    """AdaRound: h(V) is the rectified sigmoid. Options: of `relaxed`.

    >>> from qlab.quantization.grid import make_grid
    >>> w = jnp.array([[0.0, 1.2, 3.0]])
    >>> rule, grid = adaround(), make_grid(w, 2, calibration="minmax")
    >>> rule.hard(rule.init(w, grid), w, grid).codes.tolist()
    [[0, 1, 3]]
    """

    def start(fraction):
        return -jnp.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)

    return relaxed(rectified_sigmoid, start, lambda v: v >= 0, **options)
