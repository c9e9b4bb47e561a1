"""Rewriting a norm and its consumers for quantization: one walk for smoothing, scale reparameterisation and alike.

A link is (norm, consumers), every weight product that reads the norm. A Fit looks at what the norm puts out and
answers how to change it: x becomes x / r - c, and the consumers undo that (`affine_norm`), so the float function
stays. SmoothQuant is r alone; RepQuant brings r, c and the grid on which the new x falls.

`linked_block` fits inside the walk over a block, on inputs behind the quantized sites before the norm;
`norm_transform` fits the whole float net at once, a Transform that chains with others.

Letters: D = channels, out = rows of all consumers together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.nn.outliers import Link
from qlab.nn.sites import Block, BlockNet, Params, capture, pick, sites
from qlab.quantization.activations import Record
from qlab.quantization.blocks import (
    ActMethod,
    QuantizedBlock,
    SiteInput,
    WeightMethod,
    quantize_block,
)
from qlab.quantization.grid import calibrate, nearest_qtensor
from qlab.quantization.qtensor import dequantize
from qlab.quantization.transforms import Transform, affine_norm, smooth_scale


class LinkInput(NamedTuple):
    """x: f32[..., D], output of the norm. w: f32[out, D], its consumers. bits: of the activation."""

    x: jax.Array
    w: jax.Array
    bits: jax.Array
    key: jax.Array


class Rewrite(NamedTuple):
    """x -> x / r - c. r: f32[D] > 0; c: f32[D] or None. record: the grid of the new x, None: left open."""

    r: jax.Array
    c: jax.Array | None = None
    record: Record | None = None


Fit = Callable[[LinkInput], Rewrite]


def smooth(alpha: float = 0.5) -> Fit:
    """SmoothQuant (Xiao et al., arXiv 2211.10438, eq. 4): r = max|x|^alpha / max|w|^(1 - alpha)."""

    def fit(i: LinkInput) -> Rewrite:
        peak = jnp.abs(i.x).max(tuple(range(i.x.ndim - 1)))
        return Rewrite(smooth_scale(peak, jnp.abs(i.w).max(0), alpha))

    return fit


def awq(w_bits, *, group: int = 0, candidates: int = 20, calibration: str = "shares") -> Fit:
    """AWQ (Lin et al., arXiv 2306.00978): r = mean|x|^alpha, scaled to sqrt(max r min r) = 1, alpha searched.

    Of alpha = 0, 1/c, ... (c candidates) the one whose rounded weights W r give (x / r) the outputs nearest to x W.

    Args:
      w_bits: width of the weights. group: inputs that share a scale, where they divide. calibration: of `grid.calibrate`.
    """

    def fit(i: LinkInput) -> Rewrite:
        rows = i.x.reshape(-1, i.x.shape[-1])
        size = group if group and rows.shape[1] % group == 0 else 0
        mean = jnp.maximum(jnp.abs(rows).mean(0), 1e-5)
        gram = rows.T @ rows / len(rows)

        def scale(alpha):
            r = mean**alpha
            return r / jnp.sqrt(r.max() * r.min())

        def error(alpha):
            w = i.w * scale(alpha)
            grid = calibrate(w, w_bits, False, max_bits=8, calibration=calibration, group=size)  # type: ignore[arg-type]
            off = (dequantize(nearest_qtensor(w, grid)) - w) / scale(alpha)
            return ((off @ gram) * off).sum()

        alphas = jnp.arange(candidates) / candidates
        return Rewrite(scale(alphas[jax.lax.map(error, alphas).argmin()]))

    return fit


def linked_block(
    block: Block,
    params: Params,
    x_q: Any,
    x_fp: Any,
    w_bits,
    a_bits,
    key: jax.Array,
    *,
    links: Sequence[Link],
    fit: Fit,
    act: ActMethod,
    weight: WeightMethod,
) -> tuple[QuantizedBlock, jax.Array]:
    """`quantize_block` with the norms of a block rewritten on the way; links of absent norms are skipped.

    Sites before a norm are quantized first (their results are kept, nothing is done twice), then the
    norm's output is seen, the link rewritten, and the walk goes on from there. Weights are thus
    calibrated on the rewritten matrix and its quantized inputs.

    Raises:
      ValueError: a consumer that the block does not have, or a shift without a bias to hold it.
    """
    order = [s.name for s in sites(block, params, x_q)]
    here = [link for link in links if link[0] in params]
    if unknown := [site for _, consumers in here for site in consumers if site not in order]:
        raise ValueError(f"no site is called {unknown[0]!r}; the block has {', '.join(order)}")
    acts: dict[str, Record | None] = {}
    weights: dict[str, Any] = {}

    def walk(stop: Sequence[str] = ()):
        """Quantizes what is not yet; up to the first site of `stop`, whose SiteInput comes back."""
        reached: list[SiteInput] = []

        def act_or_kept(i: SiteInput):
            if i.site in stop:
                reached.append(i)
            if reached:
                return None  # beyond: a later walk's business
            if i.site not in acts:
                acts[i.site] = act(i)
            return acts[i.site]

        def weight_or_kept(i: SiteInput):
            if reached:
                return None
            if i.site not in weights:
                weights[i.site] = weight(i)
            return weights[i.site]

        made = quantize_block(
            block, params, x_q, x_fp, w_bits, a_bits, key, act=act_or_kept, weight=weight_or_kept
        )
        return made, reached[0] if reached else None

    for norm, consumers in sorted(here, key=lambda link: min(map(order.index, link[1]))):
        _, seen = walk(consumers)
        assert seen is not None
        rewrite = fit(
            LinkInput(seen.x, _stacked(params, consumers), a_bits, jax.random.fold_in(seen.key, 1))
        )
        params = affine_norm(params, norm, consumers, rewrite.r, rewrite.c)
        if rewrite.record is not None:
            acts |= dict.fromkeys(consumers, rewrite.record)
    return walk()[0]


def _stacked(params: Params, consumers: Sequence[str]) -> jax.Array:
    return jnp.concatenate([params[site]["kernel"].T for site in consumers])


def norm_transform(net: BlockNet, links: Sequence[Link], fit: Fit, a_bits: float = 8) -> Transform:
    """The links of all blocks rewritten by what they put out in the float net. t: per group {norm: (r, c)}."""

    def init(params, x, key):
        t = []
        for g, (group, stacked) in enumerate(zip(net.groups, params, strict=True)):
            here = [link for link in links if link[0] in stacked]

            def body(x, p_and_key, block=group.block, here=here):
                p, k = p_and_key
                y, seen = capture(block, p, x)
                return y, {
                    norm: fit(
                        LinkInput(
                            seen[consumers[0]],
                            _stacked(p, consumers),
                            jnp.float32(a_bits),
                            jax.random.fold_in(k, i),
                        )
                    )[:2]
                    for i, (norm, consumers) in enumerate(here)
                }

            keys = jax.random.split(jax.random.fold_in(key, g), group.n)
            if group.n == 1:  # its output may have another shape than its input
                x, found = body(x, pick((stacked, keys), 0))
                found = jax.tree.map(lambda a: a[None], found)
            else:
                x, found = jax.lax.scan(body, x, (stacked, keys))
            t.append(found)
        return tuple(t)

    def apply(params, t):
        out = []
        for stacked, found in zip(params, t, strict=True):
            for norm, consumers in links:
                if norm in found:
                    stacked = affine_norm(stacked, norm, consumers, *found[norm])
            out.append(stacked)
        return tuple(out)

    return Transform(jax.jit(init), jax.jit(apply))


def linked(
    links: Sequence[Link], fit: Fit | None, act: ActMethod, weight: WeightMethod
) -> Callable[..., tuple[QuantizedBlock, jax.Array]]:
    """A block method for `site_study`: `linked_block`, or without a fit the plain walk site by site."""
    if fit is None:
        return partial(quantize_block, act=act, weight=weight)
    return partial(linked_block, links=tuple(links), fit=fit, act=act, weight=weight)
