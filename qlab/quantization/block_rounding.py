"""Learned rounding of weights, of a block together or of one product, on quantized activations.

The block is already on its grids (activations calibrated, weights to nearest). Any RoundingRule then learns the
weights' integers, against the float block's output on float inputs (AdaRound and BRECQ, arXiv 2004.10568 and
2102.05426).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlab.nn.sites import Block, Run
from qlab.quantization.activations import fake
from qlab.quantization.blocks import QuantizedBlock, SiteInput, WeightMethod, weight_grid
from qlab.quantization.grid import Grid, nearest_qtensor
from qlab.quantization.methods import squared_error
from qlab.quantization.qtensor import dequantize
from qlab.quantization.recon_losses import EXACT, Aux, Loss, recon_loss
from qlab.quantization.reconstruct import reconstruct_steps
from qlab.quantization.rounding import RoundingRule


def soft_run(
    rule: RoundingRule,
    v: Mapping[str, Any],
    w: Mapping[str, jax.Array],
    grids: Mapping[str, Grid],
    operand: Callable[[str, jax.Array], jax.Array],
) -> Run:
    """A run with the soft weights of a rule, differentiable in v. operand: what sites do to activations."""

    def linear(site, layer, x):
        x = operand(site, x)
        if site not in v:
            return layer(x)
        bias = 0.0 if layer.bias is None else layer.bias[...]
        return x @ rule.soft(v[site], w[site], grids[site]).T + bias

    return Run(linear, operand)


def learned_weight(
    rule: RoundingRule,
    optimizer: optax.GradientTransformation,
    *,
    num_iters: int,
    batch_size: int = 32,
    granularity: str = "channel",
    max_bits: int = 8,
    loss: Loss = recon_loss("l2"),  # noqa: B008 (a function)
    relative: float | None = None,
    **grid_options: Any,
) -> WeightMethod:
    """A rule learned product by product: the product on quantized inputs towards that on float ones.

    Args:
      loss: of `recon_losses`. relative: None, or the weight of the rule's regulariser where losses are divided by that
        of rounding to nearest and the regulariser by the number of weights, as in `learn_unit`.
    """

    def weight(i: SiteInput):
        if i.x is None or i.w is None:
            raise ValueError(f"{i.site!r} is no plain product; round it to nearest")
        w = i.w
        grid = weight_grid(w, i.bits, granularity, max_bits, grid_options)
        y = i.x_fp @ w.T
        unit, reg = 1.0, 1.0
        if relative is not None:
            nearest = i.x @ dequantize(nearest_qtensor(w, grid)).T
            unit, reg = jnp.maximum(loss(y, nearest, Aux()), EXACT), relative / w.size

        def objective(v, batch, k, t):
            del k
            x, want = batch
            return loss(want, x @ rule.soft(v, w, grid).T, Aux()) / unit + reg * rule.reg(v, t)

        k_init, k_steps = jax.random.split(i.key)
        v = rule.init(w, grid, k_init)
        v, _, _ = reconstruct_steps(
            objective, v, optimizer.init(v), (i.x, y), optimizer, k_steps, 0,
            num_steps=num_iters, total=num_iters, batch_size=min(batch_size, len(i.x)),
        )  # fmt: skip
        return rule.hard(v, w, grid), jnp.zeros(())

    return weight


def learn_block(
    block: Block,
    q: QuantizedBlock,
    x_q: Any,
    y: Any,
    w_bits,
    key: jax.Array,
    rule: RoundingRule,
    *,
    num_iters: int = 500,
    learning_rate: float = 3e-2,
    batch_size: int = 32,
    max_bits: int = 8,
    granularity: str = "channel",
    **grid_options: Any,
) -> QuantizedBlock:
    """q with its weights re-rounded by `rule`: Adam on the block's squared error, cosine to 0.

    Args:
      q: its params hold the float weights. x_q: the block's input behind the quantized blocks before it;
        y: what it should put out (the float block on float inputs). grid_options: of `grid.calibrate`,
        as they were for the weights of q.
    """
    w = {site: q.params[site]["kernel"].T for site in q.weights}
    grids = {
        site: weight_grid(a, w_bits, granularity, max_bits, grid_options) for site, a in w.items()
    }

    def operand(site, x):
        return fake(q.acts[site], x) if site in q.acts else x

    def loss(v, batch, k, t):
        del k
        x, want = batch
        run = soft_run(rule, v, w, grids, operand)
        error = squared_error(block(q.params, x, run), want)
        return error + sum(rule.reg(a, t) for a in v.values())

    v = {site: rule.init(w[site], grids[site], key) for site in w}
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_iters))
    v, _, _ = reconstruct_steps(
        loss, v, optimizer.init(v), (x_q, y), optimizer, key, 0,
        num_steps=num_iters, total=num_iters, batch_size=min(batch_size, len(jax.tree.leaves(y)[0])),
    )  # fmt: skip
    made = {site: rule.hard(v[site], w[site], grids[site]) for site in w}
    return q._replace(weights=jax.tree.map(jnp.asarray, made))
