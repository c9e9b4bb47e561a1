"""Learning one unit's rounding: a product or a whole block, under a Lane and a Job (see rounding_lanes).

Losses are divided by that of rounding to nearest and the regulariser by the number of weights, so that one regulariser
weight fits all losses; the logarithmic loss is free of scale as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from qlab.quantization.grid import nearest_qtensor
from qlab.quantization.ptq_stages import SiteInfo
from qlab.quantization.qtensor import dequantize
from qlab.quantization.recon_losses import EXACT, Aux, recon_loss
from qlab.quantization.rounding_lanes import (
    Job,
    Lane,
    Space,
    Variable,
    levels,
    numbers,
    selection,
    variable,
)
from qlab.quantization.rounding_optimizers import choosable, rate


class Unit(NamedTuple):
    """A unit to learn. forward: ({site: w}, {site: b}, x) -> y. Arrays x (behind the quantized prefix), x_fp and
    fisher (like y) have rows first, of which lane.count * positions count. logits: y -> the net's logits, or None.
    number: of its first site."""

    sites: tuple[SiteInfo, ...]
    forward: Callable[..., jax.Array]
    w: Mapping[str, jax.Array]
    b: Mapping[str, jax.Array]
    bits: Mapping[str, jax.Array]
    saliency: Mapping[str, jax.Array]
    x: Any
    x_fp: Any
    fisher: jax.Array
    positions: int
    logits: Callable[[jax.Array], jax.Array] | None = None
    number: Any = 0


class Learned(NamedTuple):
    """{site: w_hat}, {site: b_hat} as deployed; soft: {site: w} as last trained; norm: f32[2, in] or None."""

    w: dict[str, jax.Array]
    b: dict[str, jax.Array]
    soft: dict[str, jax.Array]
    norm: jax.Array | None


def _choose(index, branches, *args):
    return branches[0](*args) if len(branches) == 1 else jax.lax.switch(index, branches, *args)


def learn(unit: Unit, lane: Lane, job: Job, space: Space) -> Learned:
    """Learns a unit's rounding; see the module for what is data and what is not."""
    names = tuple(s.name for s in unit.sites)
    only = unit.sites[0].name  # of units of one site
    single = len(unit.sites) == 1
    normed = single and unit.sites[0].normed
    if lane.table is None:
        lane = numbers(lane, space, max(unit.w[s].size for s in names))
    assert lane.table is not None
    # every site starts at another place of the table
    table = jnp.roll(lane.table, 7919 * unit.number)
    draws = table[: space.num_iters * space.batch_size].reshape(space.num_iters, -1)
    k_features = jax.random.fold_in(lane.key, unit.number)
    variables = [variable(name) for name in space.rules]
    optimizer = choosable(space.optimizers)
    on = {
        s: _choose(
            job.grid,
            [lambda w, b, k=k: levels(w, b, k) for k in space.grids],
            unit.w[s],
            unit.bits[s],
        )
        for s in names
    }
    t_rtn, mask = {}, {}
    for j, s in enumerate(names):
        grid = on[s].grid
        u = on[s].t / grid.scale
        t_rtn[s] = dequantize(nearest_qtensor(on[s].t, grid))
        gain = unit.saliency[s] * (on[s].values(t_rtn[s], unit.w[s]) - unit.w[s]) ** 2
        drawn = jnp.roll(table, 104729 * (j + 1))[: u.size].reshape(u.shape)
        mask[s] = selection(lane, unit.w[s], u - jnp.floor(u), gain, drawn)

    x_all = jax.tree.map(lambda a, b: jnp.where(lane.fp_input, b, a), unit.x, unit.x_fp)
    num_rows = lane.count * unit.positions
    std_x = {s: jnp.ones(()) for s in names}
    if normed:
        std_x = {only: x_all.std()}
    spread = jnp.std(x_all)

    def rows_of(u):
        at = jnp.minimum(jnp.floor(u * num_rows).astype(jnp.int32), num_rows - 1)
        x, x_fp, fisher = (a[at] for a in (x_all, unit.x_fp, unit.fisher))
        return x, x_fp, fisher

    def target(x, x_fp):
        return unit.forward(unit.w, unit.b, jnp.where(lane.own_target, x, x_fp))

    losses = [recon_loss(name) for name in space.losses]
    activation = unit.sites[0].activation if single else None

    def loss_of(i, y, y_q, fisher):
        return losses[i](y, y_q, Aux(activation, unit.logits, fisher))

    # the loss of rounding to nearest, the unit of all losses but the logarithmic one
    x, x_fp, fisher = rows_of(draws[:16].ravel())
    w_rtn = {s: on[s].values(t_rtn[s], unit.w[s]) for s in names}
    y, y_rtn = target(x, x_fp), unit.forward(w_rtn, unit.b, x)
    std_y = {only: y.std()} if single else {s: jnp.ones(()) for s in names}
    base = _choose(
        job.loss,
        [lambda y, y_q, f, i=i: loss_of(i, y, y_q, f) for i in range(len(losses))],
        y, y_rtn, fisher,
    )  # fmt: skip
    error = ((y - y_rtn) ** 2).sum(-1).mean()
    is_log = jnp.array([name == "log_l2" for name in space.losses])[job.loss]
    unit_of_loss = jnp.where(is_log, 1.0, jnp.maximum(base, EXACT))

    start = {}
    for s in names:
        a, r = _choose(
            job.rule,
            [lambda t, g, v=v: v.pack(v.rule.init(t, g), g) for v in variables],
            on[s].t, on[s].grid,
        )  # fmt: skip
        rows, columns = unit.w[s].shape
        start[s] = {
            "a": a, "r": r, "bias": jnp.zeros(rows), "gain": jnp.zeros((rows, 1)),
            "norm": jnp.zeros((2, columns if normed else 0)),
        }  # fmt: skip
    vector, unravel = ravel_pytree(start)
    bound = jnp.array([v.bound for v in variables])[job.rule]

    def rounded(v: Variable, s: str, hard: bool, a, r):
        """Weights of a site under a rule, those not selected at their nearest code on the rule's own scale."""
        params, grid = v.unpack(a, r), on[s].grid
        t_hat = (
            dequantize(v.rule.hard(params, on[s].t, grid))
            if hard
            else v.rule.soft(params, on[s].t, grid)
        )
        rest = t_rtn[s] * (jnp.exp(r[0]) / grid.scale) if v.learns_scale else t_rtn[s]
        return on[s].values(jnp.where(mask[s], t_hat, rest), unit.w[s])

    def regulariser(v: Variable, s: str, a, r, t):
        return space.reg_weight * lane.reg * v.rule.reg(v.unpack(a, r), t) / unit.w[s].size

    def deployed(w, p):
        """({site: w}, {site: b}) with the trained floats."""
        w_hat = {s: w[s] * jnp.exp(lane.scale * p[s]["gain"]) for s in names}
        b_hat = {s: unit.b[s] + lane.bias * std_y[s] * p[s]["bias"] for s in names}
        return w_hat, b_hat

    def norm_of(p):
        g = lane.norm * p[only]["norm"]
        return jnp.stack([jnp.exp(g[0]), std_x[only] * g[1]])

    def loss_and_grads(i, w_soft, p, x, y, fisher):
        def loss(w_soft, p):
            at = x
            if normed:
                at = x * norm_of(p)[0] + norm_of(p)[1]
            w_hat, b_hat = deployed(w_soft, p)
            return loss_of(i, y, unit.forward(w_hat, b_hat, at), fisher) / unit_of_loss

        return jax.value_and_grad(loss, (0, 1))(w_soft, p)

    def augmented(k, x, x_fp):
        """QDrop, mixup of neighbours in the batch, noise; one draw serves all three, of which a lane has one."""
        u = jax.random.uniform(k, x.shape, minval=1e-7)
        x = jnp.where(u < lane.drop, x_fp, x)
        part = jnp.where(lane.mix > 0, u.reshape(len(x), -1)[:, 0], 1.0)
        part = part.reshape(len(x), *[1] * (x.ndim - 1))
        x, x_fp = (part * a + (1.0 - part) * jnp.roll(a, 1, 0) for a in (x, x_fp))
        noise = jax.scipy.special.ndtri(u)
        return x + lane.noise * spread * noise, x_fp

    def weights(p, hard: bool):
        """{site: what the rule in use makes of p}."""
        return {
            s: _choose(
                job.rule,
                [lambda a, r, v=v, s=s: rounded(v, s, hard, a, r) for v in variables],
                p[s]["a"], p[s]["r"],
            )
            for s in names
        }  # fmt: skip

    def body(carry, at):
        vector, state = carry
        i, drawn = at
        x, x_fp, fisher = rows_of(drawn)
        if space.augment:
            x, x_fp = jax.lax.cond(
                job.augmented,
                lambda x, x_fp: augmented(jax.random.fold_in(k_features, i), x, x_fp),
                lambda x, x_fp: (x, x_fp),
                x, x_fp,
            )  # fmt: skip
        y = target(x, x_fp)
        p = unravel(vector)
        t = i / space.num_iters
        w_soft = weights(p, hard=False)
        value, (g_w, g) = _choose(
            job.loss,
            [lambda *args, i=i: loss_and_grads(i, *args) for i in range(len(losses))],
            w_soft, p, x, y, fisher,
        )  # fmt: skip
        for s in names:

            def back(v, s, a, r, g_w):
                """The gradient through the rule, computed again: a switch that is differentiated keeps all branches."""
                out = jax.vjp(
                    lambda a, r: (rounded(v, s, False, a, r), regulariser(v, s, a, r, t)), a, r
                )
                return out[1]((g_w, jnp.ones(())))

            g_a, g_r = _choose(
                job.rule,
                [lambda *args, v=v, s=s: back(v, s, *args) for v in variables],
                p[s]["a"], p[s]["r"], g_w[s],
            )  # fmt: skip
            g[s] = g[s] | {"a": g_a, "r": g_r}
        flat = ravel_pytree(g)[0]
        update, state = optimizer.update(job.optimizer, flat, state, vector)
        new = vector + lane.lr * rate(i, space.num_iters, lane.constant) * update
        p = unravel(new)
        p = {s: p[s] | {"a": jnp.clip(p[s]["a"], -bound, bound)} for s in names}
        return (ravel_pytree(p)[0], state), value

    steps = jnp.arange(space.num_iters)
    (vector, _), _ = jax.lax.scan(body, (vector, optimizer.init(vector)), (steps, draws))
    p = unravel(vector)

    hard, b_hat = deployed(weights(p, hard=True), p)
    soft, _ = deployed(weights(p, hard=False), p)
    # nothing to gain: nearest stays (the logarithm would chase an error of 0)
    done = error <= EXACT
    hard = {s: jnp.where(done, w_rtn[s], hard[s]) for s in names}
    soft = {s: jnp.where(done, w_rtn[s], soft[s]) for s in names}
    b_hat = {s: jnp.where(done, unit.b[s], b_hat[s]) for s in names}
    norm = None
    if normed:
        same = jnp.stack([jnp.ones_like(p[only]["norm"][0]), jnp.zeros_like(p[only]["norm"][1])])
        norm = jnp.where(done, same, norm_of(p))
    return Learned(hard, b_hat, soft, norm)
