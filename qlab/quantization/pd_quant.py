"""PD-Quant: post-training quantization by the prediction difference metric (Liu et al., CVPR 2023, arXiv 2212.07048).

Block by block, learned rounding of the weights and learned activation steps, with three branches:
- the corrected input x' of the float block, moved towards what the batch norms remember (`bn_statistics`), gives the
  target y' = block(x');
- the dropped mixture of x' and the quantized net's input x_q (QDrop) is reconstructed to y' (eq. 10, L_rec);
- the input x_q alone goes through the quantized block and then through the float rest of the net, and its logits are
  compared with the float net's on the original images (eq. 5, the prediction difference, L_PD).
AdaRound's regulariser is added, and the whole minimised by Adam. BRECQ is L_rec without mixture or drop, QDrop L_rec with.

As in the authors' code lamb_r and lamb_c are divisors, the temperature is not squared, activation drop is on in both
branches. Unlike there, the rate of the activation steps is relative to the searched steps (`step_rate`): the paper's
absolute one fits its 20,000 iterations only.

Letters: N = samples, H, W, C = height, width, channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.nn.sites import Params, Run
from qlab.quantization.activations import Affine, affine, fake, minmax, qdrop, search_range
from qlab.quantization.adaround import adaround
from qlab.quantization.block_rounding import soft_run
from qlab.quantization.blocks import (
    ActMethod,
    QuantizedBlock,
    SiteInput,
    WeightMethod,
    nearest_weight,
    quantize_block,
)
from qlab.quantization.grid import calibrate, grid_of, nearest_codes, search_affine
from qlab.quantization.methods import squared_error
from qlab.quantization.qtensor import dequantize
from qlab.quantization.reconstruct import reconstruct_steps
from qlab.quantization.site_study import Around, BlockMethod, divergence

Difference = Literal["kl", "mse", "cosine"]
P = 2.4  # power of the error that searches minimise
WIDE = {"stem": 8, "head": 8, "features": 8}  # first and last weights, and the last layer's input


def pd_loss(
    logits_fp: jax.Array, logits_q: jax.Array, temperature: float = 4.0, kind: Difference = "kl"
) -> jax.Array:
    """f32[], the prediction difference: KL(softmax(fp / T) || softmax(q / T)) in nats, mean over samples (eq. 5).

    Args:
      logits_fp, logits_q: f32[N, classes]. kind: "mse" and "cosine" (one minus it) are for comparison.

    >>> float(pd_loss(jnp.zeros((1, 2)), jnp.array([[0.0, 9.0]]), temperature=1.0)).__round__(2)
    3.81
    """
    if kind == "kl":
        return divergence(logits_fp, logits_q, temperature)
    if kind == "mse":
        return ((logits_fp - logits_q) ** 2).mean()
    return (1.0 - optax.cosine_similarity(logits_fp, logits_q, epsilon=1e-12)).mean()


def searched_act(
    wide: Mapping[str, int] = WIDE,
    *,
    num: int = 256,
    n_grid: int = 100,
    signed: Sequence[str] = (),
) -> ActMethod:
    """Operands on a grid per tensor of least mean |error|^2.4 over the first `num` samples; inputs of products float.

    Args:
      wide: {site: its width}. n_grid: shares of the range that are tried. signed: sites that take both signs, whose
        zero point is searched too; widths there are those of `wide`.
    """

    def act(i: SiteInput) -> Affine | None:
        if i.w is not None:  # its input is quantized where it arises, before it is cut into patches
            return None
        x, bits = i.x[:num], jnp.float32(wide.get(i.site, i.bits))
        if i.site in signed:
            scale, zero = search_affine(x, wide[i.site], None, p=P, n_grid=n_grid)
            q_max = 2.0**bits - 1
            return Affine(scale.reshape(()), zero.reshape(()), jnp.zeros_like(q_max), q_max)
        shares = jnp.arange(1, n_grid + 1) / n_grid
        return affine(*search_range(x, bits, *minmax(x), shares, p=P), bits)

    return act


def by_width(narrow: WeightMethod, broad: WeightMethod, wide: Mapping[str, int] = WIDE):
    """`broad` at the sites of `wide`, in their widths; `narrow` elsewhere."""

    def weight(i: SiteInput):
        if i.site in wide:
            return broad(i._replace(bits=jnp.float32(wide[i.site])))
        return narrow(i)

    return weight


class Parts(NamedTuple):
    """Which of the paper's parts are on; the defaults are PD-Quant's.

    Attributes:
      lamb_r: divisor of L_PD; None: no prediction difference.
      corrected: x' is the corrected input (`Around.beside`), else the float one.
      mix: share of elements of the input that come from x_q, the rest from x'. quantized: share of an activation's
        elements that are quantized in training. 1 and 1: BRECQ.
      kind, temperature: of `pd_loss`. suffix: the rest of the net is "fp", or rounded to "nearest".
    """

    lamb_r: float | None = 0.1
    corrected: bool = True
    mix: float = 0.5
    quantized: float = 0.5
    kind: Difference = "kl"
    temperature: float = 4.0
    suffix: Literal["fp", "nearest"] = "fp"


class Fit(NamedTuple):
    """How the parts are minimised. reg_weight, warmup: of AdaRound's regulariser.

    rate: of AdaRound's V, constant. step_rate: of the activation steps, cosine to 0; relative to the searched steps,
    or the paper's `absolute` one.
    """

    num_iters: int = 20_000
    batch_size: int = 32
    rate: float = 3e-3
    step_rate: float = 4e-5
    absolute: bool = False
    reg_weight: float = 0.01
    warmup: float = 0.2


def pd_quant(
    parts: Parts = Parts(),  # noqa: B008 (constant tuples)
    fit: Fit = Fit(),  # noqa: B008
    *,
    wide: Mapping[str, int] = WIDE,
    max_bits: int = 4,
    num_search: int = 256,
    **grid_options: Any,
) -> BlockMethod:
    """A block method for `site_study(..., around=True)`, on nets of `qlab.nn.resnet` and others with such sites.

    Args:
      wide: {site: width} of weights and activations that do not take the cell's. max_bits: of the others.
      num_search: samples on which activation steps are searched. grid_options: of the weights' grids.
    """
    rule = adaround(reg_weight=fit.reg_weight, warmup=fit.warmup)
    act = searched_act(wide, num=num_search)
    weight = by_width(
        nearest_weight(max_bits=max_bits, **grid_options),
        nearest_weight(max_bits=max(wide.values(), default=8), **grid_options),
        wide,
    )

    def method(block, params, x_q, x_fp, w_bits, a_bits, key, around: Around):
        q, failed = quantize_block(
            block, params, x_q, x_fp, w_bits, a_bits, key, act=act, weight=weight
        )
        x = around.beside if parts.corrected else x_fp
        y, logits = block(params, x), around.suffix(around.params, block(params, x_fp))
        rest = _rest(around, parts.suffix, w_bits, a_bits, wide, max_bits, grid_options)
        theta = init_theta(q, w_bits, wide, fit, rule)
        loss = block_loss(block, q, w_bits, wide, parts, fit, rule, rest)
        optimizer = optax.multi_transform(
            {
                "v": optax.adam(fit.rate),
                "steps": optax.adam(optax.cosine_decay_schedule(fit.step_rate, fit.num_iters)),
            },
            {"v": "v", "steps": "steps"},
        )
        theta, _, _ = reconstruct_steps(
            loss, theta, optimizer.init(theta), (x_q, x, y, logits), optimizer,
            jax.random.fold_in(key, 10**6),  # beyond the keys of the sites
            0, num_steps=fit.num_iters, total=fit.num_iters, batch_size=min(fit.batch_size, len(y)),
        )  # fmt: skip
        return hardened(q, theta, w_bits, wide, fit, rule), failed

    return method


def init_theta(q: QuantizedBlock, w_bits, wide, fit: Fit, rule) -> dict[str, dict[str, jax.Array]]:
    """What is trained: {"v": AdaRound's V per weight, "steps": activation steps (1 where they are relative)}."""
    w, grids = _weights(q, w_bits, wide)
    steps = {s: a.scale if fit.absolute else jnp.ones_like(a.scale) for s, a in q.acts.items()}
    return {"v": {s: rule.init(w[s], grids[s]) for s in w}, "steps": steps}


def block_loss(block, q: QuantizedBlock, w_bits, wide, parts: Parts, fit: Fit, rule, rest):
    """(theta, batch, key, t) -> f32[], L_rec + L_PD / lamb_r + L_round of a block.

    Args:
      q: the block on its grids; its params hold the float weights. rest: output of the block -> logits.
      batch: (x_q, x', y', logits of the float net), samples first.
    """
    w, grids = _weights(q, w_bits, wide)
    order = list(q.acts)

    def loss(theta, batch, key, t):
        x_q, x, y, logits = batch
        k_mix, k_act = jax.random.split(key)
        acts = _stepped(q, theta["steps"], fit)

        def operand(site, a):
            if site not in acts:
                return a
            k = jax.random.fold_in(k_act, order.index(site))
            return qdrop(k, fake(acts[site], a), a, parts.quantized)

        mixed = qdrop(k_mix, x_q, x, parts.mix)
        inputs = mixed if parts.lamb_r is None else jnp.concatenate([mixed, x_q])
        out = block(q.params, inputs, soft_run(rule, theta["v"], w, grids, operand))
        total = squared_error(out[: len(y)], y) + sum(rule.reg(v, t) for v in theta["v"].values())
        if parts.lamb_r is None:
            return total
        difference = pd_loss(logits, rest(out[len(y) :]), parts.temperature, parts.kind)
        return total + difference / parts.lamb_r

    return loss


def hardened(q: QuantizedBlock, theta, w_bits, wide, fit: Fit, rule) -> QuantizedBlock:
    """q with the integers and the activation steps that theta stands for."""
    w, grids = _weights(q, w_bits, wide)
    made = {s: rule.hard(theta["v"][s], w[s], grids[s]) for s in w}
    return q._replace(weights=made, acts=_stepped(q, theta["steps"], fit))


def _weights(q: QuantizedBlock, w_bits, wide):
    """({site: float weight f32[out, in]}, {site: its grid})."""
    w = {site: q.params[site]["kernel"].T for site in q.weights}
    return w, {s: grid_of(qt, wide.get(s, w_bits)) for s, qt in q.weights.items()}


def _stepped(q: QuantizedBlock, steps: Mapping[str, jax.Array], fit: Fit) -> dict[str, Affine]:
    """The activation grids with trained steps; zero points stay."""
    out = {}
    for site, record in q.acts.items():
        scale = steps[site] if fit.absolute else record.scale * steps[site]
        out[site] = dataclasses.replace(record, scale=scale)
    return out


def _rest(around: Around, kind: str, w_bits, a_bits, wide, max_bits: int, grid_options):
    """An output of the block -> logits: through the rest of the float net, or of the one rounded to nearest.

    The latter has the grids of nearest rounding for weights and the batch's own range for activations.
    """
    if kind == "fp":
        return lambda y: around.suffix(around.params, y)
    params = tuple(_nearest(p, w_bits, wide, max_bits, grid_options) for p in around.params)

    def operand(site, x):
        return fake(jax.lax.stop_gradient(affine(*minmax(x), wide.get(site, a_bits))), x)

    run = Run(lambda site, layer, x: layer(x), operand)
    return lambda y: around.suffix(params, y, run)


def _nearest(stacked: Params, w_bits, wide, max_bits: int, grid_options) -> Params:
    """A group's params with all kernels rounded to nearest."""

    def rounded(site, kernel):
        most = wide.get(site, max_bits)
        grid = calibrate(kernel.T, wide.get(site, w_bits), False, max_bits=most, **grid_options)
        return dequantize(grid.qtensor(nearest_codes(kernel.T, grid), kernel.T.shape)).T

    return {
        site: v | {"kernel": jax.vmap(lambda k, s=site: rounded(s, k))(v["kernel"])}
        if "kernel" in v
        else v
        for site, v in stacked.items()
    }
