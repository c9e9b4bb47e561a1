"""Learned rounding of a unit with every choice as data, so that one compiled program serves a whole study.

A Job holds what its lanes share (rule, loss, optimizer, grid: branches of a switch, of which one runs), a Lane what
differs from run to run within it (learning rate, bits, selected weights, calibration set, trained floats, noise on
features). Lanes are vmapped.

Letters: S = weight sites of the net, R = most rows of a site, N = samples, P = positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.quantization.adaquant import adaquant
from qlab.quantization.adaround import adaround
from qlab.quantization.flexround import flexround
from qlab.quantization.grid import Grid, calibrate
from qlab.quantization.power import (
    EXPONENTS,
    fit_power,
    from_power,
    log2_map,
    log2_scale,
    log2_unmap,
    rails,
    to_power,
)
from qlab.quantization.rounding import RoundingRule
from qlab.quantization.rounding_variables import ste_offset, tanh_rounding

MAX_BITS = 8
GRIDS = ("uniform", "symmetric", "power", "log2")
SELECTIONS = ("all", "random", "magnitude", "importance", "middle")
RULES = ("sigmoid", "tanh", "ste", "ste_free", "adaquant", "flexround")


class Lane(NamedTuple):
    """One run. bits: f32[S, R], of each row of each site. select: of SELECTIONS; share: of the weights it takes.

    reg: the regulariser's weight, relative to that of Space. bias, scale, norm: 1 where biases, a factor per row, the affine map of the norm before the site are trained.
    drop: probability of a float input element (QDrop). mix: 1 for mixup of features. noise: of the inputs' std.
    fp_input, own_target (bool): learn on float inputs; the float unit on the quantized prefix's inputs as target.
    calib: number of the calibration set; count: its samples.
    """

    lr: jax.Array
    constant: jax.Array
    bits: jax.Array
    select: jax.Array
    share: jax.Array
    reg: jax.Array
    bias: jax.Array
    scale: jax.Array
    norm: jax.Array
    drop: jax.Array
    mix: jax.Array
    noise: jax.Array
    fp_input: jax.Array
    own_target: jax.Array
    calib: jax.Array
    count: jax.Array
    key: jax.Array
    table: jax.Array | None = None  # uniform numbers, see `numbers`


class Job(NamedTuple):
    """What lanes share: indices into Space, and whether any of them changes features."""

    rule: jax.Array
    loss: jax.Array
    optimizer: jax.Array
    grid: jax.Array
    augmented: jax.Array


class Space(NamedTuple):
    """The static side: what can be chosen, and the budget, equal for all."""

    rules: tuple[str, ...] = RULES
    losses: tuple[str, ...] = ("l2",)
    optimizers: tuple[str, ...] = ("adam",)
    grids: tuple[str, ...] = GRIDS
    num_iters: int = 500
    batch_size: int = 32
    reg_weight: float = 1.0
    augment: bool = True  # whether any job changes features


def numbers(lane: Lane, space: Space, most: int) -> Lane:
    """The lane with a table of uniform numbers for all its sites: random bits are slow to compile, site by site."""
    size = max(space.num_iters * space.batch_size, most)
    return lane._replace(table=jax.random.uniform(lane.key, (size,)))


class Variable(NamedTuple):
    """A rule on parameters of one form: a f32[out, in] and r f32[2, out, 1]. bound: |a| is projected into it."""

    rule: RoundingRule
    pack: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
    unpack: Callable[[jax.Array, jax.Array], Any]
    learns_scale: bool = False
    bound: float = 1e9


def variable(name: str) -> Variable:
    """The rule `name` of RULES, its regulariser of weight 1."""

    def plain(rule, bound=1e9):
        def pack(v, grid):
            return v, jnp.zeros((2, v.shape[0], 1))

        return Variable(rule, pack, lambda a, r: a, bound=bound)

    if name == "sigmoid":
        return plain(adaround(reg_weight=1.0))
    if name == "tanh":
        return plain(tanh_rounding(reg_weight=1.0))
    if name == "ste":
        return plain(ste_offset(), 0.5)
    if name == "ste_free":
        return plain(ste_offset(bound=None))
    if name == "adaquant":
        return Variable(
            adaquant(),
            lambda v, grid: (v["add"], jnp.stack([v["log_s1"], jnp.zeros_like(v["log_s1"])])),
            lambda a, r: {"add": a, "log_s1": r[0]},
            True,
        )
    if name == "flexround":
        return Variable(
            flexround(),
            lambda v, grid: (v["S2"], jnp.stack([v["s1"], v["s3"]])),
            lambda a, r: {"S2": a, "s1": r[0], "s3": r[1]},
            True,
        )
    raise ValueError(f"rule={name!r}; use one of {', '.join(RULES)}")


class Levels(NamedTuple):
    """A site on its grid: t f32[out, in], what is rounded; grid, of t; a, largest: of the map back to weights."""

    t: jax.Array
    grid: Grid
    a: jax.Array
    largest: jax.Array
    is_log: jax.Array

    def values(self, t_hat: jax.Array, w: jax.Array) -> jax.Array:
        """The weights that rounded t stand for."""
        return jnp.where(
            self.is_log,
            log2_unmap(jnp.where(self.is_log, t_hat, 0.0), w, self.largest),
            from_power(t_hat, self.a),
        )


def levels(w: jax.Array, bits: jax.Array, kind: str, shares: int = 50) -> Levels:
    """The grid `kind` of GRIDS for w f32[out, in], bits f32[out, 1], by least |error|^2.4 over shares of the range."""
    rows = w.shape[0]
    one = jnp.ones((rows, 1))
    n = rails(bits)

    def made(t, scale, zero, q_max, a: Any = 1.0, largest=None, is_log=False):
        grid = Grid(scale, zero * one, 0.0 * one, q_max * one, jnp.asarray(False), MAX_BITS)
        largest = one if largest is None else largest
        return Levels(t, grid, jnp.float32(a), largest, jnp.asarray(is_log))

    if kind == "uniform":
        g = calibrate(w, bits, False, max_bits=MAX_BITS, calibration="shares")
        return made(w, g.scale, g.zero, g.q_max)
    if kind in ("symmetric", "power"):
        grid = EXPONENTS if kind == "power" else (1.0,)
        fit = fit_power(w, bits, grid, axis=0, shares=shares, p=2.4)
        return made(to_power(w, fit.a), fit.scale, n, 2.0 * n, fit.a)
    if kind == "log2":
        largest = log2_scale(w, bits, axis=0, shares=shares, p=2.4)
        return made(log2_map(w, largest), one, 0.0, n, 1.0, largest, True)
    raise ValueError(f"grid={kind!r}; use one of {', '.join(GRIDS)}")


def selection(lane: Lane, w, fraction, saliency, drawn) -> jax.Array:
    """bool[out, in]: the weights that are learned; the others stay at the nearest code. drawn: uniform numbers like w."""

    scores = jnp.stack([jnp.abs(w).ravel(), saliency.ravel()])
    num = jnp.floor(lane.share * w.size + 0.5).astype(jnp.int32)
    least = jnp.sort(scores, 1)[:, jnp.clip(w.size - num, 0, w.size - 1)]
    top = (scores >= jnp.where(num > 0, least, jnp.inf)[:, None]).reshape(2, *w.shape)
    choices = [
        jnp.ones(w.shape, bool),
        drawn < lane.share,
        top[0],
        top[1],
        (fraction >= 0.25) & (fraction <= 0.75),
    ]
    return jnp.select([lane.select == i for i in range(len(choices))], choices)
