"""Nets that are trained while quantized: min/max grids for weights and activations, on nets with named sites.

Every product's weight lies on a grid of its own range per output channel, found anew at each forward pass; every
operand that no batch norm reads (in `qlab.nn.resnet` the output of each ReLU) on one grid per tensor, whose range is a
running mean of the batches' min and max. The grids are constants to the gradient.

Letters: N = samples, D = channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.lab.errors import UserError
from qlab.nn.resnet import norms
from qlab.nn.sites import BlockNet, Params, Run, blocks_of, sites
from qlab.quantization.activations import Affine, affine, encode, fake
from qlab.quantization.blocks import QuantizedBlock
from qlab.quantization.observers import Observer, ema
from qlab.quantization.qtensor import QTensor

STE = Literal["repo", "clipped"]
Ranges = Mapping[str, Any]  # {"block1/mid": an observer's state}
RANGE = ema()
NARROW: Mapping[str, int] = {}  # no site of a width of its own


def fake_quant_minmax(x: jax.Array, bits, lo, hi, *, ste: STE = "repo") -> jax.Array:
    """x on the asymmetric grid of the range [lo, hi] (AdaDFQ's quantizer; the range need not hold 0).

    With S = (2^b - 1) / (hi - lo) and Z = round(S lo) + 2^(b-1): x_hat = (clip(round(S x - Z), -2^(b-1), 2^(b-1) - 1) + Z) / S.
    The house's asymmetric record has these values, its codes counted from 0.

    Args:
      lo, hi: f32[] or f32[D], of the last axis. bits: int or f32[].
      ste: gradient 1 everywhere ("repo", as the published code has it) or only where the code lies on the grid
        ("clipped", this library's default elsewhere).

    >>> x = jnp.array([-1.0, 0.4, 1.2, 9.0])
    >>> fake_quant_minmax(x, 2, 0.0, 3.0).tolist()
    [0.0, 0.0, 1.0, 3.0]
    >>> [jax.grad(lambda x: fake_quant_minmax(x, 2, 0.0, 3.0, ste=s).sum())(x).tolist() for s in ("repo", "clipped")]
    [[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]]
    """
    record = jax.lax.stop_gradient(affine(lo, hi, bits, widen=False))
    if ste == "clipped":
        return fake(record, x)
    if ste != "repo":
        raise UserError(f'ste={ste!r}: "repo" or "clipped"')
    return jax.lax.stop_gradient(fake(record, x)) + (x - jax.lax.stop_gradient(x))


def init_ranges(
    net: BlockNet, params: Sequence[Params], x: Any, observer: Observer = RANGE
) -> dict[str, Any]:
    """{"block/site": state before any batch} of all operands that no norm reads; x: inputs, or their shape."""
    out = {}
    for name, block, p in blocks_of(net, params):
        for site in sites(block, p, x):
            if site.kind == "operand" and site.name not in norms(p):
                out[f"{name}/{site.name}"] = observer.init(site.shape[-1])
        x = jax.eval_shape(lambda p, x, block=block: block(p, x), p, x)
    return out


def apply_minmax(
    net: BlockNet,
    params: Sequence[Params],
    ranges: Ranges,
    x: jax.Array,
    w_bits,
    a_bits,
    *,
    learn: bool | jax.Array = False,
    ste: STE = "repo",
    observer: Observer = RANGE,
    wide: Mapping[str, int] = NARROW,
) -> tuple[jax.Array, dict[str, Any]]:
    """(logits f32[N, classes], ranges): the net on its grids; norms in evaluation mode.

    Args:
      ranges: of `init_ranges`. learn: bool[], whether x first moves the ranges on.
      wide: {site: its bits} of weights and operands whose width is fixed.
    """
    new = dict(ranges)

    def operand_of(name: str):
        def operand(site: str, u: jax.Array) -> jax.Array:
            at = f"{name}/{site}"
            if at not in ranges:
                return u
            moved = observer.update(ranges[at], jax.lax.stop_gradient(u))
            new[at] = jax.tree.map(lambda a, b: jnp.where(learn, a, b), moved, ranges[at])
            bits = wide.get(site, a_bits)
            return fake_quant_minmax(u, bits, *observer.finalize(new[at]), ste=ste)

        return operand

    def linear(site: str, layer: nnx.Linear, u: jax.Array) -> jax.Array:
        kernel, bits = layer.kernel[...], wide.get(site, w_bits)
        y = u @ fake_quant_minmax(kernel, bits, kernel.min(0), kernel.max(0), ste=ste)
        return y if layer.bias is None else y + layer.bias[...]

    for name, block, p in blocks_of(net, params):
        x = block(p, x, Run(linear, operand_of(name)))
    return x, new


def calibrate_ranges(
    net: BlockNet,
    params: Sequence[Params],
    ranges: Ranges,
    x: jax.Array,
    w_bits,
    a_bits,
    *,
    batch_size: int,
    observer: Observer = RANGE,
    wide: Mapping[str, int] = NARROW,
) -> dict[str, Any]:
    """The ranges after all whole batches of x, in order, each passed through the quantized net."""
    batches = x[: len(x) // batch_size * batch_size].reshape(-1, batch_size, *x.shape[1:])

    def body(ranges, images):
        return apply_minmax(
            net, params, ranges, images, w_bits, a_bits, learn=True, observer=observer, wide=wide
        )[1], None

    return jax.lax.scan(body, dict(ranges), batches)[0]


def minmax_blocks(
    net: BlockNet,
    params: Sequence[Params],
    ranges: Ranges,
    w_bits,
    a_bits,
    *,
    observer: Observer = RANGE,
    wide: Mapping[str, int] = NARROW,
    max_bits: int = 8,
) -> tuple[QuantizedBlock, ...]:
    """The net of `apply_minmax` as it is deployed: a QuantizedBlock per group, for `run_blocks`.

    max_bits: width of the codes' storage; w_bits may be traced.
    """

    def weight(site: str, kernel: jax.Array) -> QTensor:
        record = affine(kernel.min(0), kernel.max(0), wide.get(site, w_bits), widen=False)
        codes = encode(record, kernel).astype(jnp.uint8).T
        scale, zero = record.scale[:, None], record.zero[:, None]
        return QTensor(codes, scale, zero, bits=max_bits, axes=(1,), shape=codes.shape)

    def act(at: str) -> Affine:
        lo, hi = observer.finalize(ranges[at])
        return affine(lo, hi, wide.get(at.rpartition("/")[2], a_bits), widen=False)

    made = []
    for name, _, p in blocks_of(net, params):
        weights = {site: weight(site, v["kernel"]) for site, v in p.items() if "kernel" in v}
        here = [at for at in ranges if at.rpartition("/")[0] == name]
        made.append(QuantizedBlock(p, weights, {at.rpartition("/")[2]: act(at) for at in here}))
    stacked, end = [], 0
    for g in net.groups:
        end += g.n
        own, *rest = made[end - g.n : end]
        stacked.append(jax.tree.map(lambda *a: jnp.stack(a), own, *rest))
    return tuple(stacked)
