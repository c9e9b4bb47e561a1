"""A block quantized at its sites: one program for float, captured, fake-quantized and packed execution.

A QuantizedBlock holds the block's float parameters (norms, biases, weights nobody quantized), a QTensor per
quantized weight site and an activation record per quantized input or operand. `fake_run` executes it in
floats on the grids, `packed_run` through the low-bit operations: the same block function, the same numbers.

`quantize_block` rounds the sites in the order in which they run, in one pass: each weight is quantized on
the inputs that the quantized sites before it give (true-sequential).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from qlab import ops
from qlab.nn.sites import FLOAT, Block, BlockNet, Group, Params, Run, capture, pick
from qlab.quantization.activations import Affine, Record, fake
from qlab.quantization.grid import Grid, calibrate, nearest_qtensor
from qlab.quantization.methods import gptq_layer
from qlab.quantization.qtensor import QTensor, dequantize

Target = Literal["same", "fp"]


class QuantizedBlock(NamedTuple):
    """params: float parameters. weights: {site: QTensor (out, in)}. acts: {site: activation record}."""

    params: Params
    weights: dict[str, QTensor]
    acts: dict[str, Record]


def _bias(layer: nnx.Linear) -> jax.Array | float:
    return 0.0 if layer.bias is None else layer.bias[...]


def fake_run(q: QuantizedBlock) -> Run:
    """Floats on the grids: every quantized tensor is decoded, products are float."""

    def operand(site: str, x: jax.Array) -> jax.Array:
        return fake(q.acts[site], x) if site in q.acts else x

    def linear(site: str, layer: nnx.Linear, x: jax.Array) -> jax.Array:
        x = operand(site, x)
        if site not in q.weights:
            return layer(x)
        return x @ dequantize(q.weights[site]).T + _bias(layer)

    return Run(linear, operand, _decoded(q))


def _decoded(q: QuantizedBlock) -> Callable[[str, jax.Array], jax.Array]:
    return lambda site, w: dequantize(q.weights[site]) if site in q.weights else w


def packed_run(q: QuantizedBlock, *, impl: str | None = None) -> Run:
    """The low-bit operations on packed weights.

    A weight of up to 8 bits whose input has a static grid per tensor of up to 8 bits runs as an int8
    product, other quantized weights as weight-only products of the fake-quantized input. Weights used
    otherwise (`Run.weight`) are decoded: there is no low-bit operation for them.
    impl: of the operations, see qlab.ops.
    """

    def operand(site: str, x: jax.Array) -> jax.Array:
        return fake(q.acts[site], x) if site in q.acts else x

    def linear(site: str, layer: nnx.Linear, x: jax.Array) -> jax.Array:
        if site not in q.weights:
            return layer(operand(site, x))
        qt, act = q.weights[site], q.acts.get(site)
        bias = None if layer.bias is None else layer.bias[...]
        if isinstance(act, Affine) and _int8_fits(act, qt):
            # Codes on the signed rail: an unsigned grid moves down by 128 as its zero point does.
            shift = jnp.where(act.q_min < 0, 0.0, 128.0)
            codes = jnp.clip(jnp.round(x / act.scale) + act.zero, act.q_min, act.q_max) - shift
            zero = jnp.int8(act.zero - shift)
            return ops.int8_matmul(
                codes.astype(jnp.int8), qt, bias, x_scale=act.scale, x_zero=zero, impl=impl
            )
        packed = qt if qt.packed else ops.pack(qt)
        return ops.matmul(operand(site, x), packed, bias, impl=impl)

    return Run(linear, operand, _decoded(q))


def _int8_fits(act: Affine, qt: QTensor) -> bool:
    """One scale for all inputs, zero point and rails in 8 bits, no groups: known where they are constants."""
    ends = (act.q_min, act.zero, act.q_max)
    if act.scale.ndim or qt.group or qt.offset is not None or any(map(_is_traced, ends)):
        return False
    q_min, zero, q_max = map(
        float, map(np.asarray, ends)
    )  # NumPy: jit would trace jnp on constants
    return q_max - q_min <= 255 and q_min <= zero <= q_max


def _is_traced(a) -> bool:
    return isinstance(a, Tracer)


def run_blocks(
    net: BlockNet, quantized: tuple[QuantizedBlock, ...], x: Any, how: Callable[..., Run] = fake_run
) -> Any:
    """The quantized net's output. quantized: a QuantizedBlock per group, leaves stacked on axis 0.

    To compile it with `packed_run`, close over the blocks: jax.jit(lambda x: run_blocks(net, blocks, x,
    packed_run)). As arguments of jit their grids are not known, and all products would be weight-only.
    """
    for group, stacked in zip(net.groups, quantized, strict=True):
        for i in range(group.n):
            q = jax.tree.map(lambda a, i=i: a[i] if _is_traced(a) else np.asarray(a)[i], stacked)
            x = group.block(q.params, x, how(q))
    return x


def scan_quantized(
    group: Group, stacked: QuantizedBlock, x: Any, how: Callable[..., Run] = fake_run
) -> Any:
    """x through the n quantized blocks of a group, as one program: a scan where there are several."""
    if group.n == 1:
        q = pick(stacked, 0)
        return group.block(q.params, x, how(q))
    return jax.lax.scan(lambda x, q: (group.block(q.params, x, how(q)), None), x, stacked)[0]


class Around(NamedTuple):
    """What a method may know of the net around its block.

    Attributes:
      params: the float net's, per group. beside: what `beside` gave for this block, or None.
      suffix: (params, y, run=FLOAT) -> the net's output from y, an output of this block.
    """

    params: tuple[Params, ...]
    beside: Any
    suffix: Callable[..., Any]


def around_block(net: BlockNet, params: tuple[Params, ...], g: int, i, beside: Any) -> Around:
    """What is around block i (may be traced) of group g."""

    def suffix(params, y, run: Run = FLOAT):
        return net.suffix(params, g, i, y, run)

    return Around(params, beside, suffix)


class SiteInput(NamedTuple):
    """What a site method sees. x: its input behind the quantized sites before it; x_fp: in the float net.

    w: f32[out, in], None at operands. bits: f32[], of the weight or of the activation. x and x_fp are
    None at weights used otherwise than in a plain product: only rounding that looks at w alone fits there.
    """

    site: str
    x: Any
    x_fp: Any
    w: jax.Array | None
    bits: jax.Array
    key: jax.Array


ActMethod = Callable[[SiteInput], Record | None]
WeightMethod = Callable[[SiteInput], tuple[QTensor, jax.Array] | None]


def quantize_block(
    block: Block,
    params: Params,
    x_q: Any,
    x_fp: Any,
    w_bits,
    a_bits,
    key: jax.Array,
    *,
    act: ActMethod,
    weight: WeightMethod,
) -> tuple[QuantizedBlock, jax.Array]:
    """The block quantized site by site in one pass, and its fallbacks f32[].

    Args:
      x_q: the block's input behind the quantized blocks before it. x_fp: behind the float ones.
      act: SiteInput -> record, or None: this site stays float. weight: SiteInput -> (QTensor,
        fallbacks), its x already on the activation grid; or None.
    """
    _, seen = capture(block, params, x_fp)
    weights: dict[str, QTensor] = {}
    acts: dict[str, Record] = {}
    fallbacks = [jnp.zeros(())]

    def operand(site: str, x: jax.Array, w=None) -> jax.Array:
        # A site's key is its place in the block's order, whatever other sites do.
        k = jax.random.fold_in(key, 2 * list(seen).index(site))
        record = act(SiteInput(site, x, seen[site], w, a_bits, k))
        if record is None:
            return x
        acts[site] = record
        return fake(record, x)

    def linear(site: str, layer: nnx.Linear, x: jax.Array) -> jax.Array:
        w = jnp.asarray(layer.kernel[...]).T
        x = operand(site, x, w)
        k = jax.random.fold_in(key, 2 * list(seen).index(site) + 1)
        made = weight(SiteInput(site, x, seen[site], w, w_bits, k))
        if made is None:
            return layer(x)
        weights[site], failed = made
        fallbacks.append(failed)
        return x @ dequantize(weights[site]).T + _bias(layer)

    def other(site: str, w: jax.Array) -> jax.Array:
        k = jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), len(weights))
        made = weight(SiteInput(site, None, None, w, w_bits, k))
        if made is None:
            return w
        weights[site], failed = made
        fallbacks.append(failed)
        return dequantize(weights[site])

    block(params, x_q, Run(linear, operand, other))
    return QuantizedBlock(params, weights, acts), sum(fallbacks[1:], fallbacks[0])


def weight_grid(w: jax.Array, bits, granularity: str, max_bits: int, options) -> Grid:
    """The grid of a weight f32[out, in]; options: of grid.calibrate, with "shares" as the default calibration."""
    # "searched" over zero points too would cost 2^max_bits times as much: minutes at 8 bits.
    options = {"calibration": "shares", **options}
    return calibrate(w, bits, granularity == "tensor", max_bits=max_bits, **options)


def nearest_weight(*, granularity: str = "channel", max_bits: int = 8, **options) -> WeightMethod:
    """Rounding to nearest. granularity: "channel" or "tensor"; options: of grid.calibrate ("shares")."""

    def weight(i: SiteInput):
        assert i.w is not None  # weight methods are asked at products only
        grid = weight_grid(i.w, i.bits, granularity, max_bits, options)
        return nearest_qtensor(i.w, grid), jnp.zeros(())

    return weight


def gptq_weight(
    *,
    granularity: str = "channel",
    target: Target = "fp",
    damp: float = 0.01,
    act_order: bool = True,
    max_bits: int = 8,
    **options,
) -> WeightMethod:
    """GPTQ on the site's quantized inputs; target "fp" moves the weights to W* first (`fp_target`)."""

    def weight(i: SiteInput):
        if i.x is None or i.w is None:
            raise ValueError(
                f"{i.site!r} is no plain product, which GPTQ needs; round it to nearest"
            )
        grid = weight_grid(i.w, i.bits, granularity, max_bits, options)
        x_fp = i.x_fp if target == "fp" else i.x
        return gptq_layer(i.w, grid, i.x, x_fp, damp=damp, act_order=act_order)

    return weight


def float_act(i: SiteInput) -> None:
    """Activations stay float (weight-only quantization)."""
    del i


site_by_site = partial(partial, quantize_block)
"""site_by_site(act=..., weight=...) -> a block method for `qlab.quantization.site_study`."""
