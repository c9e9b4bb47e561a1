"""decoupleQ on the layers of a net: layer after layer, then the block step on all floats of a unit.

The block step (codes frozen) trains scales and offsets, and what else a block holds in floats (norms, biases),
so that the block's output on the inputs behind the quantized layers before it meets its target: masked mean
square, Adam with betas (0.9, 0.99), eps 2e-5 and weight decay in the gradient (Guo et al., arXiv 2404.12759).
Ours: minibatches drawn with replacement as in every learned arm of the lab, and the trained floats are kept
only if the loss over all calibration samples fell.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.quantization.affine_fit import best_range, minmax, nearest, rails
from qlab.quantization.blocks import SiteInput, WeightMethod
from qlab.quantization.decoupleq import DEFAULT, DecoupleQ, Solution, alternate, check, record
from qlab.quantization.gptq import (
    LADDER,
    damping,
    gptq_solve,
    layer_problem,
)
from qlab.quantization.grid import Grid
from qlab.quantization.methods import Method, Unit, squared_error
from qlab.quantization.qtensor import QTensor, dequantize
from qlab.quantization.reconstruct import reconstruct_steps

Floats = Literal["scale", "offset", "extra"]


def adam(learning_rate, weight_decay: float = 1e-6) -> optax.GradientTransformation:
    """The block step's optimizer; the paper's rates are 1e-5 (LLaMA) and 1e-6 (ResNet, decay 1e-4)."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.adam(learning_rate, b1=0.9, b2=0.99, eps=2e-5),
    )


def block_step(
    forward,
    q: tuple[QTensor, ...],
    extra: Any,
    x: jax.Array,
    y: jax.Array,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    num_steps: int,
    batch_size: int = 32,
    train: tuple[Floats, ...] = ("scale", "offset"),
    mask: jax.Array | None = None,
):
    """Trains the floats of a block with its integers frozen.

    Args:
      forward: (w_hats, extra, x) -> output. q: the QTensors of the block, unpacked.
      extra: pytree of other floats of the block (norm weights, biases). x, y: inputs and target, samples
        first. train: which of "scale", "offset", "extra" move. mask: bool[N, ...] like y without its last
        axis, positions that count; None: all.
    Returns:
      (q, extra, losses f32[2]): the loss over all samples before and after.
    """
    if unknown := set(train) - {"scale", "offset", "extra"}:
        raise ValueError(f'train={tuple(unknown)}; use some of "scale", "offset", "extra"')
    params = {
        "scale": tuple(a.scale for a in q),
        "offset": tuple(a.offset for a in q),
        "extra": extra,
    }
    mask = jnp.ones(y.shape[:-1], bool) if mask is None else mask

    def put(p):
        pairs = zip(q, p["scale"], p["offset"], strict=True)
        return tuple(dataclasses.replace(a, scale=s, offset=z) for a, s, z in pairs)

    def loss_fn(trained, batch, key=None, t=None):
        del key, t
        x, y, mask = batch
        p = params | trained
        error = (forward(tuple(map(dequantize, put(p))), p["extra"], x) - y) ** 2
        error = error * mask[..., None]
        return error.sum() / jnp.maximum(mask.sum() * y.shape[-1], 1)

    data = (x, y, mask)
    start = {name: params[name] for name in train}
    if not jax.tree.leaves(start) or not num_steps:
        before = loss_fn(start, data)
        return q, extra, jnp.stack([before, before])
    trained, _, _ = reconstruct_steps(
        loss_fn, start, optimizer.init(start), data, optimizer, key, 0,
        num_steps=num_steps, total=num_steps, batch_size=batch_size,
    )  # fmt: skip
    before, after = loss_fn(start, data), loss_fn(trained, data)
    trained = jax.tree.map(lambda a, b: jnp.where(after < before, a, b), trained, start)
    p = params | trained
    return put(p), p["extra"], jnp.stack([before, jnp.minimum(before, after)])


class Found(NamedTuple):
    """What a unit has become. history: f32[layers, half steps], tr(E H E^T) of each; block: f32[2]."""

    q: tuple[QTensor, ...]
    b: tuple[jax.Array, ...]
    history: jax.Array
    block: jax.Array
    fallbacks: jax.Array


def of_grid(grid: Grid, num_in: int, cfg: DecoupleQ = DEFAULT):
    """(cfg for this grid, q_min, q_max), the rails for signed codes."""
    num = grid.scale.shape[-1]
    group, symmetric = (0 if num == 1 else num_in // num), grid.zero is None
    low = grid.q_min if symmetric else -(grid.q_max + 1) / 2
    high = grid.q_max if symmetric else (grid.q_max - 1) / 2
    check(cfg, num_in, grid.bits)
    return cfg._replace(bits=grid.bits, group=group, symmetric=symmetric), low, high


def blank(w: jax.Array, grid: Grid) -> QTensor:
    """Nearest on the min/max grid: what stands for a layer before its turn."""
    c, low, high = of_grid(grid, w.shape[1])
    s, z = minmax(w, low, high, c.group, c.symmetric)
    best = Solution(nearest(w, s, z, low, high), s, z, jnp.zeros(len(w)))
    return record(best, low, grid.bits, w.shape, c.symmetric)


def hard(carry: Found, unit: Unit):
    del unit
    return carry.q, carry.fallbacks


def decoupleq(
    cfg: DecoupleQ = DEFAULT,
    *,
    target: Literal["same", "fp"] = "same",
    num_steps: int = 0,
    optimizer: optax.GradientTransformation | None = None,
    batch_size: int = 32,
    train: tuple[Floats, ...] = ("scale", "offset"),
) -> Method:
    """decoupleQ as a method of the walk over units; bits, groups and symmetry are those of the unit's grid.

    Args:
      cfg: of the layers. target: as in the walk: what a layer's weights are fitted to, themselves ("same")
        or W* (`fp_target`).
      num_steps: of the block step after the layers of a unit; 0: none. optimizer, batch_size, train: its.
    """
    check(cfg, 1, cfg.bits)  # what no layer could be quantized with
    optimizer = adam(1e-5) if optimizer is None else optimizer

    def init(w, grid, key):
        del key
        steps = min(cfg.num_outer, 1) + 1 + max(cfg.num_outer - 1, 0) * (1 + cfg.float_step)
        return Found(
            tuple(map(blank, w, grid)),
            tuple(jnp.zeros(len(a)) for a in w),
            jnp.zeros((len(w), steps)),
            jnp.zeros(2),
            jnp.zeros(()),
        )

    def round_(carry, unit: Unit, key, i):
        del carry, i
        w_hat, q, history, fallbacks = list(unit.w), [], [], jnp.zeros(())
        for j, (w, grid) in enumerate(zip(unit.w, unit.grid, strict=True)):
            w, h = problem(unit, j, tuple(w_hat), target, cfg.damp)
            c, low, high = of_grid(grid, w.shape[1], cfg)
            best, losses, rung = alternate(w, h, low, high, c)
            best = jax.tree.map(lambda a: a.astype(jnp.float32), best)
            q.append(record(best, low, grid.bits, w.shape, c.symmetric))
            w_hat[j] = dequantize(q[-1])
            history.append(losses.astype(jnp.float32))
            fallbacks = fallbacks + (rung > 0)

        def forward(w_hat, b, x):
            return unit.forward(w_hat, x, b)

        found, b, block = block_step(
            forward, tuple(q), unit.b, unit.x_q, unit.y, optimizer, key,
            num_steps=num_steps, batch_size=batch_size, train=train,
        )  # fmt: skip
        return Found(found, b, jnp.stack(history), block, fallbacks), block[1] * unit.y.shape[-1]

    return Method(1, init, round_, hard, blank=blank, biases=lambda carry: carry.b)


def problem(unit: Unit, j: int, w_hat: tuple[jax.Array, ...], target: str, damp: float):
    """(w, H) of layer j of a unit whose earlier layers are w_hat: W and E[x x^T], or W* for target "fp"."""
    x = unit.inputs(w_hat, unit.x_q)[j]
    x_fp = None if target == "same" else unit.inputs(unit.w, unit.x_fp)[j]
    return layer_problem(unit.w[j], x, x_fp, damp)


def decoupleq_weight(
    cfg: DecoupleQ = DEFAULT, *, target: Literal["same", "fp"] = "fp", max_bits: int = 8
) -> WeightMethod:
    """decoupleQ of a product in the walk over blocks, per row, at the site's width (at most max_bits)."""
    cfg = cfg._replace(bits=max_bits)
    check(cfg, 1, max_bits)

    def weight(i: SiteInput):
        if i.x is None or i.w is None:
            raise ValueError(f"{i.site!r} is no plain product; round it to nearest")
        w, h = layer_problem(i.w, i.x, i.x_fp if target == "fp" else None, cfg.damp)
        low, high = rails(i.bits)
        best, _, rung = alternate(w, h, low, high, cfg)
        best = jax.tree.map(lambda a: a.astype(jnp.float32), best)
        return record(best, low, max_bits, w.shape, cfg.symmetric), (rung > 0).astype(jnp.float32)

    return weight


def shrink_gptq(*, target: Literal["same", "fp"] = "same", damp: float = 0.01) -> Method:
    """A baseline: GPTQ, once, on the range that decoupleQ's search finds (real offset), without a refit."""

    def round_(carry, unit: Unit, key, i):
        del carry, key, i
        w, h = problem(unit, 0, unit.w, target, damp)
        grid = unit.grid[0]
        c, low, high = of_grid(grid, w.shape[1])
        damped = h + damping(h, damp) * jnp.eye(len(h))
        s, z = best_range(w, damped, low, high, c.group, c.symmetric)
        perm = jnp.argsort(-jnp.diagonal(h))
        q, rung = gptq_solve(w, h, s, z, low, high, perm=perm, damp=damp, ties="half_up")
        q = jnp.where(rung < LADDER, q, nearest(w, s, z, low, high).astype(jnp.int32))
        best = Solution(q.astype(jnp.float32), s, z, jnp.zeros(len(w)))
        q = (record(best, low, grid.bits, w.shape, c.symmetric),)
        found = Found(q, unit.b, jnp.zeros((1, 0)), jnp.zeros(2), (rung > 0).astype(jnp.float32))
        return found, squared_error(unit.forward((dequantize(q[0]),), unit.x_q), unit.y)

    def init(w, grid, key):
        del key
        q, b = tuple(map(blank, w, grid)), tuple(jnp.zeros(len(a)) for a in w)
        return Found(q, b, jnp.zeros((1, 0)), jnp.zeros(2), jnp.zeros(()))

    return Method(1, init, round_, hard, layerwise=True, blank=blank)
