"""How one unit of a net is quantized: learned rounding by gradient steps, or a closed form.

A unit is one or more consecutive layers of a chain. Both kinds share one interface, so that the walk over
the units (qlab.quantization.post_training) is the same program for every arm of a comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.quantization.gptq import LADDER, gptq_solve, layer_problem
from qlab.quantization.grid import Grid, nearest_codes, nearest_qtensor
from qlab.quantization.qtensor import QTensor, dequantize
from qlab.quantization.reconstruct import reconstruct_steps
from qlab.quantization.rounding import RoundingRule


class Unit(NamedTuple):
    """A unit and what it has to reproduce.

    w: its matrices, tuple of f32[out, in]. grid: one Grid each. forward: (w_hats, x) -> output.
    x_q: inputs behind the quantized layers before it; x_fp: behind the float ones; y: the target.
    b: its biases, which forward takes others for as a third argument. inputs: (w_hats, x) -> the
    input of each of its layers.
    """

    w: tuple[jax.Array, ...]
    grid: tuple[Grid, ...]
    forward: Callable[..., jax.Array]
    x_q: jax.Array
    x_fp: jax.Array
    y: jax.Array
    b: tuple[jax.Array, ...] = ()
    inputs: Callable[..., tuple[jax.Array, ...]] = lambda w_hat, x: (x,)


class Method(NamedTuple):
    """A way to quantize a unit, in `rounds` pieces that a checkpoint may fall between.

    Attributes:
      rounds: calls of `round` per unit.
      init: (w, grid, key) -> carry. round: (carry, unit, key, i) -> (carry, loss).
      hard: (carry, unit) -> (tuple of QTensor, fallbacks f32[]), the integers at this moment.
      layerwise: the method knows single layers only.
      blank: (w, grid) -> the QTensor that holds a layer's place before its turn, of the structure of
        those of `hard`; None: nearest on the grid.
      biases: carry -> biases that replace the unit's; None: they stay.
    """

    rounds: int
    init: Callable[..., Any]
    round: Callable[..., tuple[Any, jax.Array]]
    hard: Callable[[Any, Unit], tuple[tuple[QTensor, ...], jax.Array]]
    layerwise: bool = False
    blank: Callable[[jax.Array, Grid], QTensor] | None = None
    biases: Callable[[Any], tuple[jax.Array, ...]] | None = None


def squared_error(y_hat: jax.Array, y: jax.Array, reduction: str = "sum_outputs") -> jax.Array:
    """f32[]: mean over samples (and positions) of the squared error, summed or averaged over outputs."""
    error = (y_hat - y) ** 2
    return error.mean() if reduction == "mean" else error.sum(-1).mean()


def learned(
    rule: RoundingRule,
    optimizer: optax.GradientTransformation,
    *,
    num_iters: int,
    rounds: int,
    batch_size: int = 32,
    reduction: str = "sum_outputs",
    input_mix: float = 0.0,
) -> Method:
    """Gradient steps on the parameters of a rounding rule.

    Args:
      num_iters: steps per unit, a multiple of rounds.
      reduction: of the squared error over a unit's outputs, "sum_outputs" or "mean".
      input_mix: probability with which an input element is the float one (QDrop, arXiv 2203.05740).
    """
    if num_iters % rounds:
        raise ValueError(f"num_iters={num_iters} is no multiple of rounds={rounds}; change either")
    if reduction not in ("sum_outputs", "mean"):
        raise ValueError(f'reduction={reduction!r}; use "sum_outputs" or "mean"')

    def init(w, grid, key):
        keys = [jax.random.fold_in(key, j) for j in range(len(w))]
        v = tuple(map(rule.init, w, grid, keys))
        return v, optimizer.init(v)

    def round_(carry, unit, key, i):
        def loss_fn(v, batch, k_mix, t):
            x_q, x_fp, y = batch
            if input_mix:
                x_q = jnp.where(jax.random.bernoulli(k_mix, input_mix, x_q.shape), x_fp, x_q)
            y_hat = unit.forward(tuple(map(rule.soft, v, unit.w, unit.grid)), x_q)
            return squared_error(y_hat, y, reduction) + sum(rule.reg(a, t) for a in v)

        num = num_iters // rounds
        v, opt_state = carry
        v, opt_state, losses = reconstruct_steps(
            loss_fn,
            v,
            opt_state,
            (unit.x_q, unit.x_fp, unit.y),
            optimizer,
            key,
            i * num,
            num_steps=num,
            total=num_iters,
            batch_size=batch_size,
        )
        return (v, opt_state), losses.mean()

    def hard(carry, unit):
        return tuple(map(rule.hard, carry[0], unit.w, unit.grid)), jnp.zeros(())

    return Method(rounds, init, round_, hard)


def nearest() -> Method:
    """Round to nearest: no carry, nothing to do."""

    def hard(carry, unit):
        del carry
        return tuple(map(nearest_qtensor, unit.w, unit.grid)), jnp.zeros(())

    def round_(carry, unit, key, i):
        del key, i
        w_hat = tuple(dequantize(q) for q in hard(carry, unit)[0])
        return carry, squared_error(unit.forward(w_hat, unit.x_q), unit.y)

    return Method(1, lambda w, grid, key: (), round_, hard)


def gptq_layer(
    w, grid: Grid, x_q, x_fp, *, damp: float = 0.01, act_order: bool = True
) -> tuple[QTensor, jax.Array]:
    """One matrix by GPTQ on its quantized inputs, of W* (see `fp_target`); and f32[], 1 if it fell back.

    Args:
      w: f32[out, in]. x_q, x_fp: f32[..., in], its inputs behind the quantized and the float net.
    """
    w_star, h = layer_problem(w, x_q, x_fp, damp)
    return gptq_codes(w, w_star, h, grid, damp=damp, act_order=act_order)


def gptq_codes(
    w, w_star, h, grid: Grid, *, damp: float = 0.01, act_order: bool = True
) -> tuple[QTensor, jax.Array]:
    """w_star f32[out, in] rounded by GPTQ under h f[in, in]; w rounded to nearest where no damping helps. As `gptq_layer`."""
    offset = jnp.zeros_like(grid.scale) if grid.zero is None else -grid.scale * grid.zero
    perm = jnp.argsort(-jnp.diagonal(h)) if act_order else None
    codes, rung = gptq_solve(
        w_star, h, grid.scale, offset, grid.q_min, grid.q_max, perm=perm, damp=damp, ties=grid.ties
    )
    # Codes that no damping could give fall back to the nearest, and are counted.
    codes = jnp.where(rung < LADDER, codes, nearest_codes(w, grid).astype(jnp.int32))
    return grid.qtensor(codes, w.shape), (rung > 0).astype(jnp.float32)


def gptq(*, damp: float = 0.01, act_order: bool = True) -> Method:
    """GPTQ on the layer's inputs behind the quantized prefix, of W* (see `fp_target`) instead of W.

    With target "same" the float inputs of the unit are those inputs, and W* is W: plain GPTQ.

    Args:
      damp: share of the mean diagonal that is added to the Hessian. act_order: columns by
        descending diagonal.
    """

    def hard(carry, unit):
        del carry
        (w,), (grid,) = unit.w, unit.grid
        q, failed = gptq_layer(w, grid, unit.x_q, unit.x_fp, damp=damp, act_order=act_order)
        return (q,), failed

    def round_(carry, unit, key, i):
        del key, i
        w_hat = tuple(dequantize(q) for q in hard(carry, unit)[0])
        return carry, squared_error(unit.forward(w_hat, unit.x_q), unit.y)

    return Method(1, lambda w, grid, key: (), round_, hard, layerwise=True)
