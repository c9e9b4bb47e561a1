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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.nn.resnet import ResNet
from qlab.nn.sites import Block, Params, Run
from qlab.quantization.activations import Affine, Record, affine, fake, minmax, qdrop, search_range
from qlab.quantization.adaround import adaround
from qlab.quantization.block_rounding import soft_run
from qlab.quantization.blocks import (
    ActMethod,
    Around,
    QuantizedBlock,
    SiteInput,
    WeightMethod,
    nearest_weight,
    quantize_block,
)
from qlab.quantization.bn_statistics import correct_inputs
from qlab.quantization.grid import Grid, calibrate, grid_of, nearest_qtensor
from qlab.quantization.methods import squared_error
from qlab.quantization.qtensor import dequantize
from qlab.quantization.quantize_net import QuantizedNet, quantize_net
from qlab.quantization.reconstruct import reconstruct_steps
from qlab.quantization.rounding import RoundingRule
from qlab.quantization.site_study import BlockMethod, divergence

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
    max_bits: int = 8,
) -> ActMethod:
    """Operands on a grid per tensor of least mean |error|^2.4 over the first `num` samples; inputs of products float.

    Args:
      wide: {site: its width}. n_grid: shares of the range that are tried.
      signed: sites that take both signs, where all zero points of up to max_bits bits are tried too; elsewhere, behind
        a ReLU, zero lies at the end of the range.
    """

    def act(i: SiteInput) -> Affine | None:
        if i.w is not None:  # its input is quantized where it arises, before it is cut into patches
            return None
        x, bits = i.x[:num], jnp.float32(wide.get(i.site, i.bits))
        if i.site not in signed:
            shares = jnp.arange(1, n_grid + 1) / n_grid
            return affine(*search_range(x, bits, *minmax(x), shares, p=P), bits)
        grid = calibrate(x.reshape(1, -1), bits, True, max_bits=max_bits, p=P, n_grid=n_grid)
        assert grid.zero is not None  # asymmetric
        return Affine(grid.scale[0, 0], grid.zero[0, 0], grid.q_min, grid.q_max)

    return act


def by_width(narrow: WeightMethod, broad: WeightMethod, wide: Mapping[str, int] = WIDE):
    """`broad` at the sites of `wide`, in their widths; `narrow` elsewhere."""

    def weight(i: SiteInput):
        if i.site in wide:
            return broad(i._replace(bits=jnp.float32(wide[i.site])))
        return narrow(i)

    return weight


class Parts(NamedTuple):
    """The prediction difference; the defaults are the paper's.

    Attributes:
      lamb_r: divisor of L_PD; None: no prediction difference. kind, temperature: of `pd_loss`.
      suffix: the rest of the net is "fp", or rounded to "nearest".
    """

    lamb_r: float | None = 0.1
    kind: Difference = "kl"
    temperature: float = 4.0
    suffix: Literal["fp", "nearest"] = "fp"


class Beside(NamedTuple):
    """What the method needs of each block (`Around.beside`), as data, so that arms share their compiled programs.

    Attributes:
      x: x', the float block's input, corrected or not.
      mix: f32[], share of the elements of the mixture that come from x_q, the rest from x'. quantized: f32[], share of
        an activation's elements that are quantized in training. 1 and 1: BRECQ; 0.5 and 0.5: QDrop.
    """

    x: jax.Array
    mix: jax.Array
    quantized: jax.Array


def beside(inputs: Sequence[jax.Array], mix: float = 0.5, quantized: float = 0.5):
    """Per group the Beside of its n blocks; inputs: of `correct_inputs`, f32[n, N, ...] each."""
    return tuple(
        Beside(x, *(jnp.full(len(x), share, jnp.float32) for share in (mix, quantized)))
        for x in inputs
    )


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
        unit = unit_of(block, q, w_bits, fit, rule, wide)
        if not isinstance(around.beside, Beside):
            raise ValueError("no float inputs: pass beside=beside(correct_inputs(...))")
        x, *shares = around.beside
        y, logits = block(params, x), around.suffix(around.params, block(params, x_fp))
        rest = _rest(around, parts.suffix, w_bits, a_bits, wide, max_bits, grid_options)
        optimizer = optax.multi_transform(
            {
                "v": optax.adam(fit.rate),
                "steps": optax.adam(optax.cosine_decay_schedule(fit.step_rate, fit.num_iters)),
            },
            {"v": "v", "steps": "steps"},
        )
        theta = init_theta(unit)
        theta, _, _ = reconstruct_steps(
            block_loss(unit, parts, rest, *shares), theta, optimizer.init(theta), (x_q, x, y, logits), optimizer,
            jax.random.fold_in(key, 10**6),  # beyond the keys of the sites
            0, num_steps=fit.num_iters, total=fit.num_iters, batch_size=min(fit.batch_size, len(y)),
        )  # fmt: skip
        return hardened(unit, theta), failed

    return method


class Unit(NamedTuple):
    """A block at work. q: on its grids, its params hold the float weights; w: {site: f32[out, in]}, with grids."""

    block: Block
    q: QuantizedBlock
    w: dict[str, jax.Array]
    grids: dict[str, Grid]
    fit: Fit
    rule: RoundingRule

    @property
    def acts(self) -> dict[str, Affine]:
        """The activation grids whose steps are trained."""
        return {s: a for s, a in self.q.acts.items() if isinstance(a, Affine)}


def unit_of(block: Block, q: QuantizedBlock, w_bits, fit: Fit, rule: RoundingRule, wide) -> Unit:
    """The unit of a block whose weights lie on asymmetric grids."""
    w = {site: q.params[site]["kernel"].T for site in q.weights}
    grids = {site: grid_of(qt, wide.get(site, w_bits)) for site, qt in q.weights.items()}
    return Unit(block, q, w, grids, fit, rule)


def init_theta(u: Unit) -> dict[str, dict[str, jax.Array]]:
    """What is trained: {"v": AdaRound's V per weight, "steps": activation steps (1 where they are relative)}."""
    steps = {s: a.scale if u.fit.absolute else jnp.ones_like(a.scale) for s, a in u.acts.items()}
    return {"v": {s: u.rule.init(u.w[s], u.grids[s]) for s in u.w}, "steps": steps}


def stepped(u: Unit, steps: Mapping[str, jax.Array]) -> dict[str, Record]:
    """The activation grids with trained steps; zero points stay."""
    out = dict(u.q.acts)
    for site, record in u.acts.items():
        scale = steps[site] if u.fit.absolute else record.scale * steps[site]
        out[site] = dataclasses.replace(record, scale=scale)
    return out


def hardened(u: Unit, theta) -> QuantizedBlock:
    """The block with the integers and the activation steps that theta stands for."""
    made = {s: u.rule.hard(theta["v"][s], u.w[s], u.grids[s]) for s in u.w}
    return u.q._replace(weights=made, acts=stepped(u, theta["steps"]))


def block_loss(u: Unit, parts: Parts, rest: Callable[[jax.Array], jax.Array], mix, quantized):
    """(theta, batch, key, t) -> f32[], L_rec + L_PD / lamb_r + L_round of a block; t: share of the steps done.

    Args:
      rest: output of the block -> logits. mix, quantized: of `Beside`. batch: (x_q, x', y', logits of the float net), samples first.
    """
    order = list(u.q.acts)

    def loss(theta, batch, key, t):
        x_q, x, y, logits = batch
        k_mix, k_act = jax.random.split(key)
        acts = stepped(u, theta["steps"])

        def operand(site, a):
            if site not in acts:
                return a
            k = jax.random.fold_in(k_act, order.index(site))
            return qdrop(k, fake(acts[site], a), a, quantized)

        mixed = qdrop(k_mix, x_q, x, mix)
        inputs = mixed if parts.lamb_r is None else jnp.concatenate([mixed, x_q])
        out = u.block(u.q.params, inputs, soft_run(u.rule, theta["v"], u.w, u.grids, operand))
        total = squared_error(out[: len(y)], y)
        total = total + sum(u.rule.reg(v, t) for v in theta["v"].values())
        if parts.lamb_r is None:
            return total
        difference = pd_loss(logits, rest(out[len(y) :]), parts.temperature, parts.kind)
        return total + difference / parts.lamb_r

    return loss


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
        return dequantize(nearest_qtensor(kernel.T, grid)).T

    return {
        site: v | {"kernel": jax.vmap(lambda k, s=site: rounded(s, k))(v["kernel"])}
        if "kernel" in v
        else v
        for site, v in stacked.items()
    }


def quantize_resnet(
    family: ResNet,
    params: Sequence[Params],
    x: jax.Array,
    *,
    w_bits: int = 4,
    a_bits: int = 4,
    parts: Parts = Parts(),  # noqa: B008
    fit: Fit = Fit(),  # noqa: B008
    lamb_c: float = 0.02,
    num_correct: int = 500,
    key: jax.Array | None = None,
    **options: Any,
) -> QuantizedNet:
    """A trained net of yours quantized on calibration images, for `run_blocks(family.folded, result.blocks, x)`.

    Args:
      family, params: of `qlab.nn.resnet`, with norms. x: f32[N, H, W, C]. w_bits, a_bits: 2 to 8.
      lamb_c, num_correct: of the distribution correction (0 steps: none). options: of `pd_quant`.
    """
    inputs = correct_inputs(family.net, params, x, lamb_c=lamb_c, n=num_correct)
    return quantize_net(
        family.folded, family.fold(params), x, pd_quant(parts, fit, max_bits=w_bits, **options),
        w_bits=w_bits, a_bits=a_bits, key=key, around=True, beside=beside(inputs),
    )  # fmt: skip
