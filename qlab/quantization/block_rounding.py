"""Learned rounding of all weights of a block together, on its quantized activations.

The block is already on its grids (activations calibrated, weights to nearest). Any RoundingRule then learns the
weights' integers, against the float block's output on float inputs (AdaRound and BRECQ, arXiv 2004.10568 and
2102.05426).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlab.nn.sites import Block, Run
from qlab.quantization.activations import fake
from qlab.quantization.blocks import QuantizedBlock
from qlab.quantization.grid import calibrate
from qlab.quantization.methods import squared_error
from qlab.quantization.reconstruct import reconstruct_steps
from qlab.quantization.rounding import RoundingRule


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
    grid_options = {"calibration": "shares", **grid_options}
    w = {site: q.params[site]["kernel"].T for site in q.weights}
    grids = {
        site: calibrate(a, w_bits, granularity == "tensor", max_bits=max_bits, **grid_options)
        for site, a in w.items()
    }

    def run(v: Mapping[str, Any]) -> Run:
        def operand(site, x):
            return fake(q.acts[site], x) if site in q.acts else x

        def linear(site, layer, x):
            if site not in v:
                return layer(operand(site, x))
            bias = 0.0 if layer.bias is None else layer.bias[...]
            return operand(site, x) @ rule.soft(v[site], w[site], grids[site]).T + bias

        return Run(linear, operand)

    def loss(v, batch, k, t):
        del k
        x, want = batch
        error = squared_error(block(q.params, x, run(v)), want)
        return error + sum(rule.reg(a, t) for a in v.values())

    v = {site: rule.init(w[site], grids[site], key) for site in w}
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_iters))
    v, _, _ = reconstruct_steps(
        loss, v, optimizer.init(v), (x_q, y), optimizer, key, 0,
        num_steps=num_iters, total=num_iters, batch_size=min(batch_size, len(jax.tree.leaves(y)[0])),
    )  # fmt: skip
    made = {site: rule.hard(v[site], w[site], grids[site]) for site in w}
    return q._replace(weights=jax.tree.map(jnp.asarray, made))
