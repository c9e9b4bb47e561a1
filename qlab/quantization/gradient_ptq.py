"""The walk of Gradient-Based Post-Training Quantization (Yvinec et al., arXiv 2308.07662): a whole net in one program.

Only the paper's abstract is public, so the axes of the study (which weights, features, calibration set, loss, degrees
of freedom, grid, variable and optimizer, unit) are the options of the literature that it builds on (AdaRound, BRECQ,
AdaQuant, FlexRound, QDrop, PowerQuant).

The walk takes a Lane and a Job (see rounding_lanes): site after site (or block after block) is learned on the inputs
that the quantized sites before it give, against the float product on float inputs. Inputs to test on run along.

Letters: N = calibration samples, E = samples to evaluate, L = lanes, n = blocks of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.quantization.grid import calibrate, nearest_qtensor
from qlab.quantization.importance import ig_importance
from qlab.quantization.learn_unit import Learned, Unit, learn
from qlab.quantization.methods import Method
from qlab.quantization.methods import Unit as MethodUnit
from qlab.quantization.ptq_stages import (
    Stage,
    Stages,
    fisher_diagonal,
    forward,
    offsets,
    product,
    scan_stage,
    stacked_weights,
    suffix,
)
from qlab.quantization.qtensor import dequantize
from qlab.quantization.rounding_lanes import MAX_BITS, Job, Lane, Space, numbers
from qlab.quantization.site_study import divergence

METRICS = ("heldout_kl", "accuracy", "kl", "soft_accuracy")


class Data(NamedTuple):
    """bank: f32[sets, N, ...] calibration sets. heldout, x_test: f32[..]; fp: the float net's logits on both, in
    this order. saliency: of the weights, per stage {site: f32[n, out, in]}."""

    bank: jax.Array
    heldout: jax.Array
    x_test: jax.Array
    y_test: jax.Array
    fp: jax.Array
    saliency: Any


def walk(
    stages: Stages,
    params: Sequence[Any],
    data: Data,
    lane: Lane,
    job: Job,
    space: Space,
    *,
    joint: bool = False,
    plain: bool = False,
    method: Method | None = None,
) -> dict[str, jax.Array]:
    """METRICS of one lane.

    Args:
      joint: the sites of a block are learned together (unit "block" or "net").
      plain: outputs of stages are outputs of products on whole samples, so that the loss "kl" can run the rest of the net.
      method: a closed form for every site (a house Method) instead of learning; it takes bits and calibration set.
    """
    if method is None:
        lane = numbers(
            lane, space, max(s.rows * s.columns for stage in stages for s in stage.sites)
        )
    x_cal = data.bank[lane.calib]
    num = len(x_cal)
    x = jnp.concatenate([x_cal, data.heldout, data.x_test])
    soft = data.x_test
    fishers: Sequence[Any] = [None] * len(stages)
    if "fisher" in space.losses and method is None and not joint:
        shapes = jax.eval_shape(lambda: fisher_diagonal(stages, params, x_cal))
        fishers = jax.lax.cond(
            job.loss == space.losses.index("fisher"),
            lambda: fisher_diagonal(stages, params, x_cal),
            lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes),
        )
    x_fp = x_cal
    for g, (stage, first) in enumerate(zip(stages, offsets(stages), strict=True)):

        def body(carry, at, stage=stage, first=first, g=g):
            x, x_fp, soft = carry
            i, p, saliency, fisher = at
            logits = (lambda y: suffix(stages, params, g, i, y)) if plain else None
            number = first + i * len(stage.sites)
            args = (stage, p, saliency, fisher, number, lane, job, space, logits)
            if joint:
                found = {None: joint_unit(x[:num], x_fp, *args)}
                y_fp = stage.apply(p, x_fp, product)
                y = stage.apply(p, x, _deployed(found[None]))
            else:
                found = {}
                seen: dict[str, jax.Array] = {}
                y_fp = stage.apply(p, x_fp, _noting(seen))

                def linear(site, w, b, x):
                    rows, rows_fp = x[:num], seen[site]
                    if method is not None:
                        found[site] = closed_form(method, site, w, b, rows, rows_fp, number, args)
                    else:
                        found[site] = single_unit(site, w, b, rows, rows_fp, *args)
                    return _deployed(found[site])(site, w, b, x)

                y = stage.apply(p, x, linear)

            def soft_linear(site, w, b, x):
                own = found[None] if joint else found[site]
                return _deployed(own._replace(w=own.soft))(site, w, b, x)

            return (y, y_fp, stage.apply(p, soft, soft_linear)), None

        xs = (jnp.arange(stage.n), params[g], data.saliency[g], fishers[g])
        (x, x_fp, soft), _ = scan_stage(stage, body, (x, x_fp, soft), xs)
    held, test = x[num : num + len(data.heldout)], x[num + len(data.heldout) :]
    fp_held, fp_test = data.fp[: len(data.heldout)], data.fp[len(data.heldout) :]
    return {
        "heldout_kl": divergence(fp_held, held),
        "accuracy": 100.0 * (test.argmax(-1) == data.y_test).mean(),
        "kl": divergence(fp_test, test),
        "soft_accuracy": 100.0 * (soft.argmax(-1) == data.y_test).mean(),
    }


def _noting(seen: dict[str, jax.Array]):
    def linear(site, w, b, x):
        seen[site] = x
        return product(site, w, b, x)

    return linear


def _deployed(found: Learned):
    def linear(site, w, b, x):
        del w, b
        if found.norm is not None:
            x = x * found.norm[0] + found.norm[1]
        return x @ found.w[site].T + found.b[site]

    return linear


def _bits(lane: Lane, number, rows: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(lane.bits, number, 0, False)[:rows, None]


def single_unit(
    site, w, b, x, x_fp, stage: Stage, p, saliency, fisher, number, lane: Lane, job, space, logits
) -> Learned:
    """One product; positions of a sample are rows of their own."""
    del p
    at = [s.name for s in stage.sites].index(site)
    number = number + at
    rows, rows_fp = (a.reshape(-1, a.shape[-1]) for a in (x, x_fp))
    weight = jnp.zeros((len(rows), 1))
    if fisher is not None:
        weight = fisher[site].reshape(len(rows), -1)
    unit = Unit(
        (stage.sites[at],),
        lambda w, b, x: x @ w[site].T + b[site],
        {site: w},
        {site: b},
        {site: _bits(lane, number, len(w))},
        {site: saliency[site]},
        rows,
        rows_fp,
        weight,
        math.prod(x.shape[1:-1]),
        logits,
        number,
    )
    return learn(unit, lane, job, space)


def joint_unit(
    x, x_fp, stage: Stage, p, saliency, fisher, number, lane: Lane, job, space, logits
) -> Learned:
    """All products of a block together, on whole samples."""
    del fisher
    own = stage.weights(p)

    def run(w, b, x):
        return stage.apply(p, x, lambda site, _w, _b, x: x @ w[site].T + b[site])

    unit = Unit(
        stage.sites,
        run,
        {s: w for s, (w, _) in own.items()},
        {s: b for s, (_, b) in own.items()},
        {s.name: _bits(lane, number + j, s.rows) for j, s in enumerate(stage.sites)},
        saliency,
        x,
        x_fp,
        jnp.zeros((len(x), 1)),
        1,
        logits,
        number,
    )
    return learn(unit, lane, job, space)


def closed_form(method: Method, site, w, b, x, x_fp, number, args) -> Learned:
    """A house Method on one product; its grid is uniform, of the bits of the site's first row."""
    stage, lane = args[0], args[5]
    number = number + [s.name for s in stage.sites].index(site)
    bits = _bits(lane, number, len(w))[0, 0]
    grid = calibrate(w, bits, False, max_bits=MAX_BITS, calibration="shares")
    x, x_fp = (a.reshape(-1, a.shape[-1]) for a in (x, x_fp))

    def run(w_hat, x, b_hat=(b,)):
        return x @ w_hat[0].T + b_hat[0]

    unit = MethodUnit((w,), (grid,), run, x, x_fp, run((w,), x_fp), (b,))
    key = jax.random.fold_in(lane.key, number)
    carry = method.init(unit.w, unit.grid, key)
    for i in range(method.rounds):
        carry, _ = method.round(carry, unit, key, i)
    (q,), _ = method.hard(carry, unit)
    w_hat = {site: dequantize(q)}
    biases = method.biases(carry) if method.biases else (b,)
    return Learned(w_hat, {site: biases[0]}, w_hat, None)


def nearest_weights(stages: Stages, params: Sequence[Any], bits) -> tuple[Any, ...]:
    """Per stage {site: f32[n, out, in]}, rounded to nearest on the uniform grid at `bits` (may be traced)."""

    def one(w):
        g = calibrate(w, bits, False, max_bits=MAX_BITS, calibration="shares")
        return dequantize(nearest_qtensor(w, g))

    return jax.tree.map(jax.vmap(one), stacked_weights(stages, params))


def flat_sites(stages: Stages, stacked: Sequence[Any]) -> dict[str, jax.Array]:
    """{"stage.block.site": f32[out, in]} in the order of site numbers."""
    return {
        f"{g}.{i}.{s.name}": stacked[g][s.name][i]
        for g, stage in enumerate(stages)
        for i in range(stage.n)
        for s in stage.sites
    }


def site_importance(
    stages: Stages, params: Sequence[Any], x: jax.Array, logits: jax.Array, bits, m: int, num: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(importance f32[S], that of rows f32[S, R], squared error of the weights f32[S]) of rounding to nearest at `bits`.

    The loss is the KL from the float net's logits on calibration inputs x (in `num` batches): no labels, and 0 with
    gradient 0 at the float weights, so all of it is in the path.
    """
    w = flat_sites(stages, stacked_weights(stages, params))
    w_q = flat_sites(stages, nearest_weights(stages, params, bits))

    def loss(flat, batch):
        stacked = tuple(
            {
                s.name: jnp.stack([flat[f"{g}.{i}.{s.name}"] for i in range(stage.n)])
                for s in stage.sites
            }
            for g, stage in enumerate(stages)
        )
        return divergence(batch[1], forward(stages, params, batch[0], stacked))

    size = len(x) // num
    batches = [
        (x[i * size : (i + 1) * size], logits[i * size : (i + 1) * size]) for i in range(num)
    ]
    rows = ig_importance(loss, w, w_q, batches, m, per="row", signed=True)
    most = max(len(a) for a in w.values())
    rows = jnp.stack([jnp.pad(r, (0, most - len(r))) for r in rows.values()])
    error = jnp.stack([((w_q[name] - w[name]) ** 2).sum() for name in w])
    return jnp.abs(rows.sum(1)), jnp.abs(rows), error
