"""RepQuant: post-training quantization of transformers by scale reparameterisation (Li et al., arXiv 2402.05628).

Calibrate with a grid the data like, run with a grid the hardware likes, and make the two the same by moving the
difference into the weights before it:
- after a LayerNorm, one grid per channel becomes one per tensor (`reparam_ln`; RepQ-ViT, arXiv 2212.08254, section 3);
- after a softmax, codes in half octaves become shifts and a factor of 1 or sqrt 2 (`log_sqrt2_*`, same section);
- the ranges per channel are learned, both ends each (`dual_clip_fit`);
- the weights, re-calibrated on the rewritten net, are reconstructed on its quantized inputs (GPTQ, or AdaRound over
  a block: `qlab.quantization.block_rounding`).

`repquant(...)` is a block method for `site_study`, its parts the paper's steps; `quantize_vit` does a whole net. The
form of the two last points is our choice, the paper's abstract names them only: Adam on sigmoid-bounded ends, error
at the output of the following products; GPTQ with the float net as its target. RepQ-ViT's repository keeps the mean
zero point unrounded, which puts codes up to one level beside those per channel (`round_zero=False`).

Letters: D = channels (inputs of the next product), out = its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.nn.outliers import Link
from qlab.nn.sites import BlockNet, Params
from qlab.nn.vit import LINKS
from qlab.quantization.activations import (
    Affine,
    Log,
    PerToken,
    Record,
    Zero,
    affine,
    decode,
    encode,
)
from qlab.quantization.adaround import adaround
from qlab.quantization.block_rounding import learn_block
from qlab.quantization.blocks import (
    ActMethod,
    SiteInput,
    Target,
    gptq_weight,
    nearest_weight,
)
from qlab.quantization.grid import calibrate, nearest_qtensor
from qlab.quantization.norm_links import Fit, LinkInput, Rewrite, linked
from qlab.quantization.qtensor import Ties, clip_ste, dequantize, round_ste
from qlab.quantization.quantile_ranges import (
    SHARES,
    calib_affine_quantile,
    calib_log,
    range_grid,
)
from qlab.quantization.quantize_net import QuantizedNet, quantize_net
from qlab.quantization.reconstruct import reconstruct_steps
from qlab.quantization.site_study import BlockMethod

Clip = Literal["none", "quantile", "single", "dual"]
Reconstruction = Literal["none", "gptq", "adaround"]
Softmax = Literal["log_sqrt2", "log2", "uniform"]
START = 4.0  # of the clipping parameters: sigmoid(4) = 0.98 of the range


def log_sqrt2_encode(a: jax.Array, bits, d, zero_code: Zero = "repo") -> jax.Array:
    """q = clip(round(-2 log2(a / d)), 0, 2^b - 1); what is smaller, and 0, gets the code of zero.

    Args:
      a: f32[...], softmax outputs. bits: int or f32[]. d: f32[], the scale; a > d gets code 0.
      zero_code: "repo": zero is 2^b (2^b + 1 values, no b-bit code); "reserve": it is 2^b - 1.
    Returns:
      f32[...], integer-valued.
    """
    return encode(_log_sqrt2(bits, d, zero_code), a)


def log_sqrt2_decode(q: jax.Array, bits, d, zero_code: Zero = "repo") -> jax.Array:
    """d 2^(-q / 2) f32[...], and 0 for the code of zero; arguments as in `log_sqrt2_encode`."""
    return decode(_log_sqrt2(bits, d, zero_code), q)


def _log_sqrt2(bits, d, zero_code) -> Log:
    return Log(jnp.asarray(d, jnp.float32), 2.0 ** jnp.asarray(bits, jnp.float32), 2, zero_code)


def log_sqrt2_shift(q: jax.Array, d) -> tuple[jax.Array, jax.Array]:
    """(shift, scale) f32[...] with d 2^(-q / 2) = scale 2^-shift: ceil(q / 2), and d or d sqrt 2.

    >>> shift, scale = log_sqrt2_shift(jnp.array([0.0, 1.0, 2.0]), 1.0)
    >>> shift.tolist(), [round(float(s), 3) for s in scale]
    ([0.0, 1.0, 1.0], [1.0, 1.414, 1.0])
    """
    return jnp.ceil(q / 2), d * (1.0 + (q % 2) * (2.0**0.5 - 1.0))


def reparam_factors(s: jax.Array, z: jax.Array, round_zero: bool = True):
    """(r, c, s~, z~) with x / s + z = x' / s~ + z~ for x' = x / r - c: one grid for all channels.

    Args:
      s, z: f32[D], the grids per channel. round_zero: z~ = round(mean z), else the mean itself.
    Returns:
      r, c: f32[D]; s~, z~: f32[].
    """
    s_all, z_all = s.mean(), z.mean()
    z_all = jnp.round(z_all) if round_zero else z_all
    return s / s_all, s_all * (z_all - z), s_all, z_all


def reparam_ln(gamma, beta, w, b, s, z, round_zero: bool = True):
    """(gamma', beta', w', b', s~, z~): the same function, and one grid (s~, z~) where (s, z) was per channel.

    As RepQ-ViT's repository does it. Whole blocks are rewritten by `transforms.affine_norm`, with the same r and c.

    Args:
      gamma, beta: f32[D], of the norm. w: f32[out, D], b: f32[out], the product that reads it. s, z: f32[D].
    """
    r, c, s_all, z_all = reparam_factors(s, z, round_zero)
    w = w * r
    return gamma / r, beta / r - c, w, b + w @ c, s_all, z_all


class ClipRange(NamedTuple):
    """Parameters of the upper and the lower end of each channel, f32[D]; `lower` None: one for both."""

    upper: jax.Array
    lower: jax.Array | None


def clip_range(v: ClipRange, lo: jax.Array, hi: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(lo, hi) f32[D] drawn in: by sigmoid(lower), sigmoid(upper) towards 0.

    A range that does not hold 0 is drawn in towards its middle: towards 0 one of its ends would move out.
    """
    share_hi = jax.nn.sigmoid(v.upper)
    share_lo = share_hi if v.lower is None else jax.nn.sigmoid(v.lower)
    to = jnp.where((lo <= 0) & (hi >= 0), 0.0, (lo + hi) / 2)
    return to + share_lo * (lo - to), to + share_hi * (hi - to)


def dual_clip_fit(
    x: jax.Array,
    w: jax.Array,
    bits,
    key: jax.Array,
    steps: int = 500,
    *,
    learning_rate: float = 1e-2,
    batch_size: int = 0,
    single: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(lo, hi) f32[D]: the ends of each channel's range for which x_hat w^T is nearest to x w^T.

    Adam on the squared error, straight through the rounding, with the true gradient of the ends. Of the learned
    range and min/max, the one with the smaller error over all of x is returned.

    Args:
      x: f32[..., D], outputs of a norm. w: f32[out, D], what reads them. bits: int or f32[].
      batch_size: rows a step; 0: all of them. single: one share for both ends of a channel.
    """
    rows = x.reshape(-1, x.shape[-1])
    lo, hi = rows.min(0), rows.max(0)
    gram = w.T @ w  # |e w^T|^2 = e gram e^T, whatever the number of outputs
    gram = gram / jnp.maximum(jnp.trace(gram), 1e-30)

    def loss(v, batch, *_):
        low, high = clip_range(v, lo, hi)
        error = _learnable(batch, low, high, bits) - batch
        return ((error @ gram) * error).sum(-1).mean()

    start = jnp.full_like(lo, START)
    v = ClipRange(start, None if single else start)
    optimizer = optax.adam(learning_rate)
    scale = jnp.maximum(loss(v, rows), 1e-30)  # Adam's epsilon then means the same on any net
    v, _, _ = reconstruct_steps(
        lambda v, batch, *_: loss(v, batch) / scale, v, optimizer.init(v), rows, optimizer, key, 0,
        num_steps=steps, total=steps, batch_size=batch_size or len(rows),
    )  # fmt: skip
    whole = jax.tree.map(lambda a: jnp.full_like(a, jnp.inf), v)
    better = loss(v, rows) <= loss(whole, rows)
    low, high = clip_range(v, lo, hi)
    return jnp.where(better, low, lo), jnp.where(better, high, hi)


def _learnable(x, lo, hi, bits) -> jax.Array:
    """x on `range_grid(lo, hi)`, differentiable in the ends: the zero point passes gradients too."""
    q_max = 2.0 ** jnp.asarray(bits, jnp.float32) - 1
    scale = jax.lax.stop_gradient(range_grid(lo, hi, bits).scale)
    floor = scale > (hi - lo) / q_max * (1 + 1e-6)
    scale = jnp.where(floor, scale, (hi - lo) / q_max)
    zero = round_ste(-lo / scale)
    return scale * (clip_ste(round_ste(x / scale) + zero, 0.0, q_max) - zero)


def reparam(
    clip: Clip = "dual",
    *,
    ps: Sequence[float] = SHARES,
    round_zero: bool = True,
    symmetric: bool = False,
    steps: int = 500,
    learning_rate: float = 1e-2,
    batch_size: int = 0,
    ties: Ties = "half_even",
) -> Fit:
    """A Fit for `norm_links`: calibrate per channel, then one grid for all.

    Args:
      clip: the ends of the ranges: "none" (min/max), "quantile" (RepQ-ViT), learned "single" or "dual".
      ps: the quantiles among which "quantile" chooses. round_zero: see `reparam_factors`.
      symmetric: no zero points and no shift, for norms without a bias (RMSNorm); not with learned ends.
      steps, learning_rate, batch_size: of `dual_clip_fit`.
    Raises:
      ValueError: an unknown clip, or learned ends with symmetric=True.
    """
    if clip not in ("none", "quantile", "single", "dual"):
        raise ValueError(f'clip={clip!r}; use "none", "quantile", "single" or "dual"')
    if symmetric and clip in ("single", "dual"):
        raise ValueError(f'clip={clip!r} learns both ends; with symmetric=True use "none"')

    def channel_grids(i: LinkInput) -> tuple[jax.Array, jax.Array]:
        if clip in ("single", "dual"):
            lo, hi = dual_clip_fit(
                i.x, i.w, i.bits, i.key, steps, learning_rate=learning_rate,
                batch_size=batch_size, single=clip == "single",
            )  # fmt: skip
            grid = range_grid(lo, hi, i.bits)
            return grid.scale, grid.zero
        return calib_affine_quantile(i.x, i.bits, -1, (1.0,) if clip == "none" else ps)

    def fit(i: LinkInput) -> Rewrite:
        if symmetric:
            peak = jnp.abs(i.x).max(tuple(range(i.x.ndim - 1)))
            s = affine(-peak, peak, i.bits, symmetric=True).scale
            r, _, s_all, z_all = reparam_factors(s, jnp.zeros_like(s))
            top = 2.0 ** (i.bits - 1) - 1
            return Rewrite(r, None, Affine(s_all, z_all, -top - 1, top, ties))
        s, z = channel_grids(i)
        r, c, s_all, z_all = reparam_factors(s, z, round_zero)
        q_max = 2.0**i.bits - 1
        return Rewrite(r, c, Affine(s_all, z_all, jnp.zeros_like(q_max), q_max, ties))

    return fit


def site_acts(
    softmax: Softmax = "log_sqrt2",
    *,
    ps: Sequence[float] = SHARES,
    zero_code: Zero = "reserve",
    per_token: bool = False,
    input_bits: float = 8,
) -> ActMethod:
    """One grid per tensor at every site, its range from quantiles of what the quantized net puts there.

    Args:
      softmax: the grid of site "probs". zero_code: how it writes zero, see `log_sqrt2_encode`.
      per_token: all other sites take each row's own range at run time.
      input_bits: of the site "patch" (the image itself), as RepQ-ViT has it.
    Raises:
      ValueError: an unknown softmax grid.
    """
    if softmax not in ("log_sqrt2", "log2", "uniform"):
        raise ValueError(f'softmax={softmax!r}; use "log_sqrt2", "log2" or "uniform"')

    def act(i: SiteInput) -> Record:
        if i.site == "probs" and softmax != "uniform":
            return calib_log(i.x, i.bits, 1 if softmax == "log2" else 2, zero_code, ps)
        bits = jnp.float32(input_bits) if i.site == "patch" else i.bits
        if per_token and i.site not in ("probs", "patch"):
            return PerToken(bits)
        s, z = calib_affine_quantile(i.x, bits, None, ps)
        q_max = 2.0**bits - 1
        return Affine(s, z, jnp.zeros_like(q_max), q_max)

    return act


def repquant(
    rewrite: Fit | None,
    act: ActMethod,
    *,
    reconstruction: Reconstruction = "gptq",
    links: Sequence[Link] = LINKS,
    target: Target = "fp",
    damp: float = 0.01,
    num_iters: int = 500,
    learning_rate: float = 3e-2,
    max_bits: int = 8,
    **grid_options: Any,
) -> BlockMethod:
    """A block method: norms rewritten, activations on their grids, weights reconstructed.

    RepQuant is rewrite=reparam("dual"), RepQ-ViT reparam("quantile") with reconstruction="none"; baselines are
    the same walk with `smooth()` or no rewrite.

    Args:
      rewrite: what to do with the norms of `links` (`reparam`, `norm_links.smooth`); None: nothing.
      act: the grids of the activations (`site_acts`); a rewrite's own grid goes before it.
      reconstruction: "none" (nearest), "gptq" (site by site), "adaround" (the block's weights together:
        num_iters steps of Adam with learning_rate). target: whose inputs the float weights see ("fp": the
        float net's). damp: GPTQ's. grid_options: of the weights' grids (`grid.calibrate`).
    Raises:
      ValueError: an unknown reconstruction.
    """
    if reconstruction not in ("none", "gptq", "adaround"):
        raise ValueError(f'reconstruction={reconstruction!r}; use "none", "gptq" or "adaround"')
    options = {"max_bits": max_bits, **grid_options}
    if reconstruction == "gptq":
        weight = gptq_weight(target=target, damp=damp, **options)
    else:
        weight = nearest_weight(**options)
    walk = linked(links, rewrite, act, weight)
    if reconstruction != "adaround":
        return walk
    rule = adaround()

    def method(block, params, x_q, x_fp, w_bits, a_bits, key):
        q, failed = walk(block, params, x_q, x_fp, w_bits, a_bits, key)
        y = block(params, x_fp if target == "fp" else x_q)
        k = jax.random.fold_in(key, 10**6)  # beyond the keys of the sites
        learn = partial(learn_block, num_iters=num_iters, learning_rate=learning_rate, **options)
        return learn(block, q, x_q, y, w_bits, k, rule), failed

    return method


def quantize_vit(
    net: BlockNet,
    params: Sequence[Params],
    x: Any,
    *,
    w_bits: int = 4,
    a_bits: int = 4,
    method: BlockMethod | None = None,
    key: jax.Array | None = None,
) -> QuantizedNet:
    """A net of `qlab.nn.vit` (or any with such norms) quantized on calibration images x, for `run_blocks`.

    Args:
      net, params: the BlockNet and its float params. x: f32[N, H, W, C], a few (32 in the paper).
      w_bits, a_bits: 2 to 8. method: of `repquant(...)`; None: RepQuant as the paper has it.

    >>> from qlab.nn.vit import ViTSize, vit
    >>> from qlab.quantization.blocks import run_blocks
    >>> net = vit(ViTSize(dim=8, depth=1, heads=2, hidden=16))
    >>> params, x = net.init(jax.random.key(0)), jax.random.uniform(jax.random.key(1), (4, 8, 8, 1))
    >>> quantized = quantize_vit(net, params, x)  # doctest: +SKIP
    >>> run_blocks(net, quantized.blocks, x).shape  # doctest: +SKIP
    (4, 10)
    """
    method = method or repquant(reparam(), site_acts(), max_bits=w_bits, calibration="shares")
    return quantize_net(net, params, x, method, w_bits=w_bits, a_bits=a_bits, key=key)


def weight_error(params: Params, links: Sequence[Link], bits, **grid_options: Any) -> jax.Array:
    """f32[]: mean over the consumers of links of |w_hat - w|^2 / |w|^2, rounded to nearest per row.

    What a rewrite does to the weights: compare a block's params before and after.
    """
    errors = []
    for site in (site for norm, consumers in links if norm in params for site in consumers):
        w = params[site]["kernel"].T
        grid = calibrate(w, bits, False, max_bits=8, **grid_options)
        w_hat = dequantize(nearest_qtensor(w, grid))
        errors.append(((w_hat - w) ** 2).sum() / jnp.maximum((w**2).sum(), 1e-30))
    return jnp.stack(errors).mean()
