"""Other variables for the choice between rounding down and up: tanh, softmax over {floor, ceil}, straight-through offsets.

The first two are AdaRound with another relaxation (same regulariser). For one binary choice they are one method:
tanh has h = sigmoid(2 v) and softmax h = sigmoid(v1 - v0), and under an optimizer whose steps do not depend on
the scale of the gradient and are odd in it (Adam, Lion, sign) v1 - v0 and 2 v take the same path.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qlab.quantization.adaround import relaxed
from qlab.quantization.qtensor import clip_ste, expand, round_ties
from qlab.quantization.rounding import RoundingRule, fake_grid, no_reg

NARROW = 1e-4  # fractions 0 and 1 would start at infinity


def _odds(fraction: jax.Array) -> jax.Array:
    f = jnp.clip(fraction, NARROW, 1.0 - NARROW)
    return jnp.log(f) - jnp.log1p(-f)


def tanh_rounding(**options: Any) -> RoundingRule:
    """h(V) = (1 + tanh V) / 2: no rails, so V never stops at a decision. Options: of `relaxed`.

    >>> from qlab.quantization.grid import make_grid
    >>> w = jnp.array([[0.0, 1.2, 3.0]])
    >>> rule, grid = tanh_rounding(), make_grid(w, 2, calibration="minmax")
    >>> rule.hard(rule.init(w, grid), w, grid).codes.tolist()
    [[0, 1, 3]]
    """
    return relaxed(
        lambda v: 0.5 * (1.0 + jnp.tanh(v)), lambda f: _odds(f) / 2.0, lambda v: v >= 0, **options
    )


def softmax_rounding(**options: Any) -> RoundingRule:
    """V f32[2, out, in] are the logits of floor and ceil, h their softmax's second entry. Options: of `relaxed`.

    >>> from qlab.quantization.grid import make_grid
    >>> w = jnp.array([[0.0, 1.2, 3.0]])
    >>> rule, grid = softmax_rounding(), make_grid(w, 2, calibration="minmax")
    >>> rule.hard(rule.init(w, grid), w, grid).codes.tolist()
    [[0, 1, 3]]
    """
    return relaxed(
        lambda v: jax.nn.softmax(v, axis=0)[1],
        lambda f: jnp.stack([-_odds(f) / 2.0, _odds(f) / 2.0]),
        lambda v: v[1] >= v[0],
        **options,
    )


def ste_offset(*, bound: float | None = 0.5) -> RoundingRule:
    """w_hat = s (clip(round(w / s + delta) + z) - z), delta from 0 by straight-through gradients.

    Args:
      bound: |delta| stays within it, 0.5: floor and ceil only. A projection belongs behind each step
        (`rounding_optimizers.keep_within`); here larger ones are cut, with gradient 0. None: free, which is AdaQuant
        without a learned step.

    >>> from qlab.quantization.grid import make_grid
    >>> w = jnp.array([[0.0, 1.2, 3.0]])
    >>> rule, grid = ste_offset(), make_grid(w, 2, calibration="minmax")
    >>> rule.hard(jnp.array([[0.0, 0.4, 0.0]]), w, grid).codes.tolist()
    [[0, 2, 3]]
    """
    if bound is not None and bound <= 0:
        raise ValueError(f"bound={bound}; use a positive number, or None")

    def init(w, grid, key=None):
        del grid, key
        return jnp.zeros_like(w)

    def moved(v, w, grid):
        delta = v if bound is None else clip_ste(v, -bound, bound)
        return w / expand(grid.scale, w.shape) + delta

    def soft(v, w, grid):
        return fake_grid(moved(v, w, grid), expand(grid.scale, w.shape), grid)

    def hard(v, w, grid):
        q = round_ties(moved(v, w, grid), grid.ties)
        if grid.zero is not None:
            q = q + expand(grid.zero, w.shape)
        return grid.qtensor(jnp.clip(q, grid.q_min, grid.q_max), w.shape)

    return RoundingRule(init, soft, hard, no_reg)
