"""AdaQuant: learn a continuous addition to every weight (Hubara et al., ICML 2021, arXiv 2006.10518)."""

from __future__ import annotations

import jax.numpy as jnp

from qlab.quantization.qtensor import expand, round_ties
from qlab.quantization.rounding import RoundingRule, fake_grid, no_reg, shared_row


def adaquant(*, learn_s1: bool = True) -> RoundingRule:
    """w_hat = s1 (clip(round(w / s1 + V) + z) - z): additive twin of FlexRound's division.

    V starts at 0 and is counted in grid steps, so that one learning rate suits layers of any scale;
    the original adds V to w itself. Its bias correction is left out: no other rule here has one.

    Args:
      learn_s1: train the grid size too (as a logarithm), as the paper does.

    >>> from qlab.quantization.grid import make_grid
    >>> w = jnp.array([[0.0, 1.2, 3.0]])
    >>> rule, grid = adaquant(), make_grid(w, 2, calibration="minmax")
    >>> rule.soft(rule.init(w, grid), w, grid).tolist()
    [[0.0, 1.0, 3.0]]
    """

    def init(w, grid, key=None):
        del key
        v = {"add": jnp.zeros_like(w)}
        return v | {"log_s1": jnp.log(grid.scale)} if learn_s1 else v

    def scale_of(v, grid):
        return jnp.exp(shared_row(v["log_s1"], grid)) if learn_s1 else grid.scale

    def soft(v, w, grid):
        scale = expand(scale_of(v, grid), w.shape)
        return fake_grid(w / scale + v["add"], scale, grid)

    def hard(v, w, grid):
        s1 = scale_of(v, grid)
        q = round_ties(w / expand(s1, w.shape) + v["add"], grid.ties)
        if grid.zero is not None:
            q = q + expand(grid.zero, w.shape)
        return grid.qtensor(jnp.clip(q, grid.q_min, grid.q_max), w.shape, s1)

    return RoundingRule(init, soft, hard, no_reg)
