"""FlexRound: learn a divisor for every weight (Lee et al., ICML 2023, arXiv 2306.00317), and its low-rank LRQ.

    w_hat = s1 (clip(round(w / (s1 S2 s3 s4)) + z, q_min, q_max) - z)

The dequantisation multiplies by s1 alone: S2, s3, s4 only move integers and vanish at deployment.
In log space d w_hat / d log S2 = -w / (S2 s3) inside the clip range: large weights move further.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from qlab.quantization.qtensor import expand, round_ties
from qlab.quantization.rounding import RoundingRule, fake_grid, no_reg, shared_row

LEAST = 1e-3  # lower clamp of a factor in the parametrisation "clamp"


def flexround(
    *,
    learn_s1: bool = True,
    use_s3: bool = True,
    in_channels: int | None = None,
    parametrisation: Literal["log", "clamp"] = "log",
) -> RoundingRule:
    """FlexRound's rule. At initialisation it equals rounding to nearest.

    Args:
      learn_s1: train the common grid size s1 (one per row, or one in all where the grid is shared).
      use_s3: train s3 f32[out, 1], a divisor per row beside S2 f32[out, in].
      in_channels: for a convolution seen as (out, kh * kw * C) with C = in_channels fastest: train
        s4, a divisor per input channel, too. None for linear layers.
      parametrisation: "log" trains logarithms (always positive); "clamp" trains the factors
        themselves, relative to their start, kept above 1e-3.

    >>> from qlab.quantization.grid import make_grid
    >>> w = jnp.array([[0.0, 1.2, 3.0]])
    >>> rule, grid = flexround(), make_grid(w, 2, calibration="minmax")
    >>> v = rule.init(w, grid)
    >>> rule.hard(v, w, grid).codes.tolist()
    [[0, 1, 3]]
    >>> v["S2"] = v["S2"].at[0, 1].set(jnp.log(0.4))  # a divisor of 0.4 moves that integer by two steps
    >>> rule.hard(v, w, grid).codes.tolist()
    [[0, 3, 3]]
    """
    if parametrisation not in ("log", "clamp"):
        raise ValueError(f'parametrisation={parametrisation!r}; use "log" or "clamp"')
    is_log = parametrisation == "log"

    def init(w, grid, key=None):
        del key
        start = jnp.zeros if is_log else jnp.ones
        v = {"S2": start(w.shape)}
        if learn_s1:
            v["s1"] = jnp.log(grid.scale) if is_log else jnp.ones_like(grid.scale)
        if use_s3:
            v["s3"] = start((w.shape[0], 1))
        if in_channels is not None:
            if w.shape[1] % in_channels:
                raise ValueError(
                    f"in_channels={in_channels} does not divide the {w.shape[1]} columns of w"
                )
            v["s4"] = start((1, in_channels))
        return v

    def factors(v, w, grid):
        """(s1 f32[out, 1 or G], divisor f32[out, in])."""
        s4 = [jnp.tile(v["s4"], (1, w.shape[1] // in_channels))] if in_channels else []
        rest = [v["S2"], *([v["s3"]] if use_s3 else []), *s4]
        if is_log:
            log_s1 = shared_row(v["s1"], grid) if learn_s1 else jnp.log(grid.scale)
            return jnp.exp(log_s1), jnp.exp(expand(log_s1, w.shape) + sum(rest))
        s1 = grid.scale * jnp.maximum(shared_row(v["s1"], grid), LEAST) if learn_s1 else grid.scale
        divisor = expand(s1, w.shape)
        for factor in rest:
            divisor = divisor * jnp.maximum(factor, LEAST)
        return s1, divisor

    def soft(v, w, grid):
        s1, divisor = factors(v, w, grid)
        return fake_grid(w / divisor, expand(s1, w.shape), grid)

    def hard(v, w, grid):
        s1, divisor = factors(v, w, grid)
        q = round_ties(w / divisor, grid.ties)
        if grid.zero is not None:
            q = q + expand(grid.zero, w.shape)
        return grid.qtensor(jnp.clip(q, grid.q_min, grid.q_max), w.shape, s1)

    return RoundingRule(init, soft, hard, no_reg)


def lrq(rank: int = 4, *, learn_s1: bool = True) -> RoundingRule:
    """LRQ: FlexRound with log S2 = L U + r + c of low rank (Lee et al., NAACL 2025, arXiv 2407.11534).

    L f32[out, rank] starts at 0 and U f32[rank, in] from a Kaiming draw, so the start is FlexRound's;
    the row vector r plays the part of s3, c f32[1, in] is a divisor per column.

    >>> from qlab.quantization.grid import make_grid
    >>> w = jnp.array([[0.0, 1.2, 3.0]])
    >>> rule, grid = lrq(1), make_grid(w, 2, calibration="minmax")
    >>> rule.hard(rule.init(w, grid, jax.random.key(0)), w, grid).codes.tolist()
    [[0, 1, 3]]
    """
    if rank < 1:
        raise ValueError(f"rank={rank}; use 1 or more")
    full = flexround(learn_s1=learn_s1)

    def init(w, grid, key=None):
        key = jax.random.key(0) if key is None else key
        num_out, num_in = w.shape
        v = full.init(w, grid)
        bound = (6.0 / num_in) ** 0.5  # Kaiming uniform over the fan-in of U's rows
        return {
            **{name: v[name] for name in v if name != "S2"},
            "L": jnp.zeros((num_out, rank)),
            "U": jax.random.uniform(key, (rank, num_in), minval=-bound, maxval=bound),
            "c": jnp.zeros((1, num_in)),
        }

    def widen(v):
        return {**{k: v[k] for k in ("s1", "s3") if k in v}, "S2": v["L"] @ v["U"] + v["c"]}

    return RoundingRule(
        init,
        lambda v, w, grid: full.soft(widen(v), w, grid),
        lambda v, w, grid: full.hard(widen(v), w, grid),
        no_reg,
    )
