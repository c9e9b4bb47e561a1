"""Rounding rules: how a weight finds its integer. Nearest here, the learned ones in files of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.quantization.grid import Grid, nearest_qtensor
from qlab.quantization.qtensor import QTensor, clip_ste, expand, round_ste


class RoundingRule(NamedTuple):
    """A weight-rounding rule; every function is pure and takes w f32[out, in] and its Grid.

    Attributes:
      init: (w, grid, key=None) -> v, the trainable pytree (empty for rules that learn nothing).
      soft: (v, w, grid) -> w_hat f32[out, in], differentiable in v.
      hard: (v, w, grid) -> QTensor, the integers that are deployed.
      reg: (v, t) -> f32[], added to the loss; t in [0, 1] is the share of the iterations done.
    """

    init: Callable[..., Any]
    soft: Callable[[Any, jax.Array, Grid], jax.Array]
    hard: Callable[[Any, jax.Array, Grid], QTensor]
    reg: Callable[[Any, Any], jax.Array]


def no_reg(v, t) -> jax.Array:
    """No regulariser."""
    del v, t
    return jnp.zeros(())


def fake_grid(u: jax.Array, scale: jax.Array, grid: Grid) -> jax.Array:
    """scale * (clip(round(u) + zero) - zero): STE through the round, true gradient of the clip."""
    zero = 0.0 if grid.zero is None else expand(grid.zero, u.shape)
    r = clip_ste(round_ste(u, grid.ties) + zero, grid.q_min, grid.q_max)
    return scale * (r - zero)


def shared_row(param: jax.Array, grid: Grid) -> jax.Array:
    """A parameter f32[out, 1] of the scale; where one scale serves all rows, row 0 is that scale.

    Row 0 then receives the summed gradient of all rows, as a scalar parameter would.
    """
    return jnp.where(grid.shared, jnp.broadcast_to(param[..., :1, :], param.shape), param)


def rtn() -> RoundingRule:
    """Round to nearest on the given grid.

    >>> from qlab.quantization.grid import make_grid
    >>> w = jnp.array([[0.0, 1.2, 3.0]])
    >>> grid = make_grid(w, 2, calibration="minmax")
    >>> rtn().hard((), w, grid).codes.tolist()
    [[0, 1, 3]]
    """

    def init(w, grid, key=None):
        del w, grid, key
        return ()

    def soft(v, w, grid):
        del v
        scale = expand(grid.scale, w.shape)
        return fake_grid(w / scale, scale, grid)

    def hard(v, w, grid):
        del v
        return nearest_qtensor(w, grid)

    return RoundingRule(init, soft, hard, no_reg)
