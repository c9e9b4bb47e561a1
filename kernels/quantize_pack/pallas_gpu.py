"""Quantize and pack on a Hopper GPU (Mosaic GPU): memory to registers to memory, no shared memory.

A group of a row-major matrix is a row of the matrix [N G, g], so both forms see one group a row. `_short`
holds a tile of whole groups in registers: a row is spread over a few lanes of a warp, every plane in the
same lanes, so the maximum is a few shuffles and merging planes stays inside a thread. `_long` gives a
row to a whole warpgroup and reads it twice, the second time out of the cache.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlab.kernels.common import gpu, grid, layout, tuned
from qlab.kernels.common.dispatch import Impl, Spec, needs

THREADS = 128  # a warpgroup
SHORT = 1024  # columns of a group that a tile of whole groups may have
REGISTERS = 64  # values of x that a thread holds at a time


def tile_layout(lanes: int, vector: int):
    """A row over `lanes` lanes with `vector` neighbours each; 32 / lanes rows a warp, four warps down."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa

    across = lanes * vector
    tiling = fa.Tiling(((THREADS // lanes, across), (32 // lanes, across), (vector,)))
    made = fa.TiledLayout(tiling, (-5,), (-3, -2), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(made.tiling, made.warp_dims, made.lane_dims, made.vector_dim)


def _calibrate(o, chunks, reduce):
    """(scale, zero) from all chunks of a group; reduce: (array, "max" or "min") -> one value a group."""
    if o["calibration"] == "absmax":
        amax = functools.reduce(jnp.maximum, [jnp.abs(grid.finite(c, jnp.inf)) for c in chunks])
        return grid.absmax_scale(reduce(amax, "max"), o["bits"]), None
    lo = functools.reduce(jnp.minimum, [grid.finite(c, -jnp.inf) for c in chunks])
    hi = functools.reduce(jnp.maximum, [grid.finite(c, jnp.inf) for c in chunks])
    return grid.minmax_grid(reduce(lo, "min"), reduce(hi, "max"), o["bits"])


def _split_refs(refs, o):
    """refs by name; absent ones are None."""
    refs = list(refs)
    given = o["calibration"] == "given"
    x = refs.pop(0)
    scale = refs.pop(0) if given else None
    zero = refs.pop(0) if given and o["zero"] else None
    key = refs.pop(0) if o["rounding"] == "stochastic" else None
    outs = [refs.pop(0) for _ in layout.parts(o["bits"])]
    scale_out = refs.pop(0) if not given else None
    zero_out = refs.pop(0) if not given and o["zero"] else None
    return x, scale, zero, key, outs, scale_out, zero_out


def _words(key_ref, row, col):
    if key_ref is None:
        return None
    k0, k1 = key_ref[0], key_ref[1]
    return grid.threefry(jnp.full(row.shape, k0), jnp.full(row.shape, k1), row, col)


def _short(*refs, o, m, g, num, rows, width, how, interpret):
    x_ref, s_ref, z_ref, key_ref, outs, s_out, z_out = _split_refs(refs, o)
    # the last tile is moved back to end with the matrix: rows it shares are written twice, alike
    start = jnp.minimum(lax.axis_index("tile") * rows, m - rows)
    here = pl.ds(start, rows)
    one = None if interpret else how.reduce(1)
    shape = (rows, width)

    def wide(v):
        v = lax.broadcast_in_dim(v, shape, (0,))
        return v if interpret else plgpu.layout_cast(v, how)

    chunks = [
        gpu.load(x_ref, (here, pl.ds(c * width, width)), how, interpret).astype(jnp.float32)
        for c in range(g // width)
    ]
    if s_ref is None:
        scale, zero = _calibrate(o, chunks, lambda v, op: v.max(1) if op == "max" else v.min(1))
        s_out[here] = scale
        if z_out is not None:
            z_out[here] = zero
    else:
        scale = gpu.load(s_ref, (here,), one, interpret)
        zero = None if z_ref is None else gpu.load(z_ref, (here,), one, interpret)
    inverse, zero = wide(1.0 / scale), None if zero is None else wide(zero)
    codes = []
    for c, x in enumerate(chunks):
        word = None
        if key_ref is not None:
            index = start + gpu.iota(shape, 0, how, interpret)
            count = jnp.full_like(index, num)
            col = lax.rem(index, count) * g + (c * width + gpu.iota(shape, 1, how, interpret))
            word = _words(key_ref, lax.div(index, count), col)
        codes.append(grid.codes(x, inverse, zero, word, o))
    for out, merged in zip(outs, gpu.merge(codes, o["bits"]), strict=True):
        for c, byte in enumerate(merged):
            out[here, pl.ds(c * width, width)] = byte


def _long(*refs, o, g, num, width, how, interpret):
    x_ref, s_ref, z_ref, key_ref, outs, s_out, z_out = _split_refs(refs, o)
    m = lax.axis_index("tile")
    parts = layout.parts(o["bits"])
    least = min(p for p, _ in parts)
    plane = g * least // 8

    def load(at):
        return gpu.load(x_ref, (m, pl.ds(at, width)), how, interpret).astype(jnp.float32)

    if s_ref is None:
        chunks = [load(at) for at in range(0, g, width)]
        scale, zero = _calibrate(o, chunks, lambda v, op: v.max() if op == "max" else v.min())
        s_out[m] = scale
        if z_out is not None:
            z_out[m] = zero
    else:
        scale, zero = s_ref[m], None if z_ref is None else z_ref[m]
    inverse = 1.0 / scale
    for at in range(0, plane, width):  # the same stretch of every plane: threads merge their own
        codes = []
        for j in range(8 // least):
            word = None
            if key_ref is not None:
                col = lax.rem(m, num) * g + j * plane + at + gpu.iota((width,), 0, how, interpret)
                word = _words(key_ref, jnp.full_like(col, lax.div(m, num)), col)
            codes.append(grid.codes(load(j * plane + at), inverse, zero, word, o))
        for out, merged in zip(outs, gpu.merge(codes, o["bits"]), strict=True):
            for c, byte in enumerate(merged):
                out[m, pl.ds(c * plane + at, width)] = byte


def _plan(spec: Spec) -> tuple[dict, str]:
    """(static arguments of the kernel, "" or why there are none)."""
    o, k = spec.options, spec.dims["k"]
    g = o["group"] or k
    if g % 8:
        return {}, f"K={k} is no multiple of 8, so a plane of codes has no whole bytes"
    plane = g * min(p for p, _ in layout.parts(o["bits"])) // 8
    item = {"float32": 4}.get(spec.dtypes["x"], 2)
    if g <= SHORT:
        vector = math.gcd(plane, 16 // item)
        lanes = math.gcd(plane // vector, 32)
        base = THREADS // lanes
        rows = base * max(1, REGISTERS * lanes // g)
        return {"lanes": lanes, "vector": vector, "width": plane, "base": base, "rows": rows}, ""
    if plane % THREADS:
        return {}, (
            f"a row of K={k} columns is one group and its planes of {plane} columns do not fill "
            f"{THREADS} threads"
        )
    width = next(w for w in range(min(plane, 2048), 0, -THREADS) if plane % w == 0)
    return {"width": width, "vector": math.gcd(width // THREADS, 16 // item)}, ""


def run(spec: Spec, x, scale, zero, key):
    o, (n, k) = spec.options, x.shape
    g = o["group"] or k
    num, given, plan = k // g, o["calibration"] == "given", _plan(spec)[0]
    m, short = n * num, g <= SHORT
    x = x.reshape(m, g)
    sides = [a.reshape(-1) for a in (scale, zero) if given and a is not None]
    if short:
        rows = tuned.blocks(spec, "pallas_gpu", {"rows": plan["rows"]})["rows"]
        rows = min(rows, -(-m // plan["base"]) * plan["base"])
        pad = max(rows - m, 0)  # a matrix smaller than a tile
        x = jnp.pad(x, ((0, pad), (0, 0)))
        sides = [jnp.pad(a, (0, pad), constant_values=1.0) for a in sides]
        static = {"m": m + pad, "rows": rows, "how": tile_layout(plan["lanes"], plan["vector"])}
        body, tiles = _short, pl.cdiv(m + pad, rows)
    else:
        pad, body, tiles = 0, _long, m
        static = {"how": plgpu.Layout.WG_STRIDED((plan["width"],), plan["vector"])}
    parts = layout.parts(o["bits"])
    shapes = [jax.ShapeDtypeStruct((m + pad, g * p // 8), jnp.uint8) for p, _ in parts]
    shapes += [jax.ShapeDtypeStruct((m + pad,), jnp.float32)] * (0 if given else 1 + o["zero"])
    outs = plgpu.kernel(
        functools.partial(
            body, o=o, g=g, num=num, width=plan["width"], interpret=spec.interpret, **static
        ),
        out_type=shapes,
        grid=(tiles,),
        grid_names=("tile",),
        interpret=gpu.interpreter() if spec.interpret else None,
    )(x, *sides, *([] if key is None else [key]))
    packed = [a[:m].reshape(n, -1) for a in outs[: len(parts)]]
    side = [a[:m].reshape(n, num) for a in outs[len(parts) :]] or [scale, zero]
    packed = jnp.concatenate(packed, 1) if len(parts) > 1 else packed[0]
    return packed, side[0], side[1] if o["zero"] else None


def why_not(spec: Spec) -> str:
    return _plan(spec)[1] or needs(spec, "gpu")


IMPL = Impl("pallas_gpu", why_not, run)
