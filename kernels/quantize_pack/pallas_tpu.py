"""Quantize and pack on a TPU: one block of whole groups in VMEM, read once, everything made there.

Two forms. `_rows`: a group is the whole row; planes are cut out of it by rotating lanes. `_groups`: a block
holds many groups; their maxima are put into the lanes of one scale block, and where a plane of a
group is narrower than a vector register the merge of planes is a product with a matrix of powers of two
(codes and powers are exact in bf16, a byte is a sum below 256, exact in float32).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qlab.kernels.common import grid, layout, tpu, tuned
from qlab.kernels.common.dispatch import Impl, Spec, needs

LANES = tpu.LANES
MOST_COLUMNS = (
    32768  # of a row that is one group: f32, codes and both buffers of 32 rows fit into VMEM
)
VMEM = 64 * 2**20


def _grid(x, inside, o, given):
    """(scale, zero) f32[R, 1] of the lanes `inside` (None: all) of x; given: what the caller passed."""
    if o["calibration"] == "given":
        return given

    def reduce(value, other, op):
        value = value if inside is None else jnp.where(inside, value, jnp.float32(other))
        return op(value, axis=1, keepdims=True)

    if o["calibration"] == "absmax":
        return grid.absmax_scale(
            reduce(jnp.abs(grid.finite(x, jnp.inf)), 0.0, jnp.max), o["bits"]
        ), None
    lo = reduce(grid.finite(x, -jnp.inf), 0.0, jnp.min)
    hi = reduce(grid.finite(x, jnp.inf), 0.0, jnp.max)
    return grid.minmax_grid(lo, hi, o["bits"])


def _words(key_ref, shape, row, col):
    if key_ref is None:
        return None
    rows = row + lax.broadcasted_iota(jnp.int32, shape, 0)
    cols = col + lax.broadcasted_iota(jnp.int32, shape, 1)
    k0 = jnp.full(shape, key_ref[0], jnp.int32)
    return grid.threefry(k0, jnp.full(shape, key_ref[1], jnp.int32), rows, cols)


def _split_refs(refs, o, num_parts, matrices):
    """refs in the order of `_call`, by name; absent ones are None."""
    refs = list(refs)
    given = o["calibration"] == "given"
    x = refs.pop(0)
    scale = refs.pop(0) if given else None
    zero = refs.pop(0) if given and o["zero"] else None
    key = refs.pop(0) if o["rounding"] == "stochastic" else None
    mats = [refs.pop(0) if m else None for m in matrices]
    outs = [refs.pop(0) for _ in range(num_parts)]
    scale_out = refs.pop(0) if not given else None
    zero_out = refs.pop(0) if not given and o["zero"] else None
    return x, scale, zero, key, mats, outs, scale_out, zero_out


def _rows(*refs, o, k, rows):
    parts = layout.parts(o["bits"])
    x_ref, s_ref, z_ref, key_ref, _, outs, s_out, z_out = _split_refs(
        refs, o, len(parts), [False] * len(parts)
    )
    x = x_ref[...].astype(jnp.float32)
    width = x.shape[1]
    inside = None if width == k else lax.broadcasted_iota(jnp.int32, x.shape, 1) < k
    given = (None if s_ref is None else s_ref[...], None if z_ref is None else z_ref[...])
    scale, zero = _grid(x, inside, o, given)
    if s_out is not None:
        s_out[...] = scale
    if z_out is not None:
        z_out[...] = zero
    code = grid.codes(x, 1.0 / scale, zero, _words(key_ref, x.shape, pl.program_id(0) * rows, 0), o)
    if inside is not None:
        code = jnp.where(inside, code, 0)  # the layout pads with 0
    for (p, first), out in zip(parts, outs, strict=True):
        out[...] = tpu.row_bytes_of(code, p, first, out.shape[1])


def _groups(*refs, o, rows, columns, chunk, matrices):
    parts, g = layout.parts(o["bits"]), o["group"]
    x_ref, s_ref, z_ref, key_ref, mats, outs, s_out, z_out = _split_refs(
        refs, o, len(parts), matrices
    )
    slab = max(g, LANES)
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)

    def at(ref, i):
        return jnp.where(lane == i, ref[...], 0.0).sum(1, keepdims=True)

    def cat(values):
        return jnp.concatenate(values, 1) if len(values) > 1 else values[0]

    row, col = pl.program_id(0) * rows, pl.program_id(1) * columns

    def body(i, carry):
        s_all, z_all = carry
        x = x_ref[:, pl.ds(pl.multiple_of(i * chunk, LANES), chunk)].astype(jnp.float32)
        inverses, zeros = [], []  # of each slab, in its lanes
        for t in range(chunk // slab):
            inverse = zero = None
            for u in range(slab // g):
                index = i * (chunk // g) + t * (slab // g) + u
                inside = None if slab == g else (lane >= u * g) & (lane < (u + 1) * g)
                given = tuple(None if r is None else at(r, index) for r in (s_ref, z_ref))
                s, z = _grid(x[:, t * slab : (t + 1) * slab], inside, o, given)
                if s_out is not None:
                    s_all = jnp.where(lane == index, s, s_all)
                if z_out is not None:
                    z_all = jnp.where(lane == index, z, z_all)
                inverse = jnp.where(inside, 1.0 / s, inverse) if u else 1.0 / s
                zero = jnp.where(inside, z, zero) if u and z is not None else z
            inverses.append(jnp.broadcast_to(inverse, (rows, slab)))
            zeros.append(None if zero is None else jnp.broadcast_to(zero, (rows, slab)))
        zero = None if zeros[0] is None else cat(zeros)
        code = grid.codes(x, cat(inverses), zero, _words(key_ref, x.shape, row, col + i * chunk), o)
        for (p, first), out, mat in zip(parts, outs, mats, strict=True):
            part = (code >> first) & (2**p - 1)
            if mat is None:  # a plane is whole registers
                num = g * p // 8
                planes = (
                    [part[:, a + j * num : a + (j + 1) * num] << (p * j) for j in range(8 // p)]
                    for a in range(0, chunk, g)
                )
                byte = cat([functools.reduce(lax.bitwise_or, group) for group in planes])
            else:
                byte = jnp.dot(
                    part.astype(jnp.float32).astype(jnp.bfloat16),
                    mat[...],
                    preferred_element_type=jnp.float32,
                ).astype(jnp.int32)
            where = pl.ds(pl.multiple_of(i * (chunk * p // 8), LANES), chunk * p // 8)
            out[:, where] = byte.astype(jnp.uint8)
        return s_all, z_all

    zeros = jnp.zeros((rows, LANES), jnp.float32)
    s_all, z_all = lax.fori_loop(0, columns // chunk, body, (zeros, zeros))
    if s_out is not None:
        s_out[...] = s_all
    if z_out is not None:
        z_out[...] = z_all


def merge_matrix(chunk: int, g: int, p: int) -> np.ndarray:
    """[chunk, chunk p / 8]: byte r of a group is sum_j 2^(p j) part[j n + r], n = g p / 8."""
    out = np.zeros((chunk, chunk * p // 8), np.float32)
    n = g * p // 8
    c = np.arange(chunk)
    out[c, c // g * n + c % g % n] = 2.0 ** (p * (c % g // n))
    return out


def _row_block(n: int, columns: int, itemsize: int, spec: Spec) -> int:
    """About 1 MiB of x a block, in whole tiles of bytes (32 rows)."""
    most = 2**20 // (columns * itemsize) // 32 * 32
    rows = tuned.blocks(spec, "pallas_tpu", {"rows": min(256, max(32, most))})["rows"]
    return min(rows, -(-n // 8) * 8)


def run(spec: Spec, x, scale, zero, key):
    o, (n, k) = spec.options, x.shape
    parts, group = layout.parts(o["bits"]), o["group"] if o["group"] != k else 0
    num, given = layout.num_groups(k, group), o["calibration"] == "given"
    if not group:
        width = chunk = -(-k // LANES) * LANES
        matrices = [False] * len(parts)
    else:
        least = min(p for p, _ in parts)
        chunk = math.lcm(group, LANES * 8 // least)
        width = -(-k // chunk) * chunk if num <= LANES else LANES * group
        matrices = [group * p // 8 % LANES != 0 for p, _ in parts]
    rows = _row_block(n, width, x.dtype.itemsize, spec)

    def by_block(columns):
        return pl.BlockSpec((rows, columns), lambda i, j: (i, j))

    side = by_block(LANES) if group else by_block(1)
    args, specs = [x], [by_block(width)]
    for a in (scale, zero):
        if given and a is not None:
            args.append(a)
            specs.append(side)
    if key is not None:
        args.append(key)
        specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    for (p, _), m in zip(parts, matrices, strict=True):
        if m:
            args.append(jnp.asarray(merge_matrix(chunk, group, p), jnp.bfloat16))
            specs.append(pl.BlockSpec(args[-1].shape, lambda i, j: (0, 0)))
    sizes = [layout.part_bytes(k, group, p) for p, _ in parts]
    shapes = [jax.ShapeDtypeStruct((n, size), jnp.uint8) for size in sizes]
    out_specs = [
        by_block(width * p // 8 if group else size)
        for (p, _), size in zip(parts, sizes, strict=True)
    ]
    for _ in range(0 if given else 1 + o["zero"]):
        shapes.append(jax.ShapeDtypeStruct((n, num), jnp.float32))
        out_specs.append(side)
    static = {"o": {**o, "group": group}, "rows": rows}
    if group:
        body = functools.partial(_groups, **static, columns=width, chunk=chunk, matrices=matrices)
    else:
        body = functools.partial(_rows, **static, k=k)
    outs = pl.pallas_call(
        body,
        grid=(pl.cdiv(n, rows), pl.cdiv(k, width)),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM
        ),
        interpret=spec.interpret,
    )(*args)
    packed = jnp.concatenate(outs[: len(parts)], 1) if len(parts) > 1 else outs[0]
    side = list(outs[len(parts) :]) or [scale, zero]
    return packed, side[0], side[1] if o["zero"] else None


def why_not(spec: Spec) -> str:
    o, k = spec.options, spec.dims["k"]
    group = o["group"] if o["group"] != k else 0
    if spec.dtypes["x"] == "float16":
        return "a TPU has no float16; use bfloat16 or float32"
    if group and group % LANES and LANES % group:
        return f"group={group} neither divides {LANES} lanes nor is a multiple of them"
    if not group and k > MOST_COLUMNS:
        return f"a row of K={k} columns is one group; more than {MOST_COLUMNS} do not fit into VMEM"
    return needs(spec, "tpu")


IMPL = Impl("pallas_tpu", why_not, run)
