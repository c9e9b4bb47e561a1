"""The product for TPUs (Mosaic TPU): packed bytes are unpacked in registers, the matrix unit multiplies.

The layout is planar inside a group, so plane j of a block of bytes is one shift and one mask, and
y += x_j @ plane_j.T with x_j the columns of x in the same order (`layout.planes_of`, done once by XLA).
Nothing is interleaved; a width of several parts (3 = 2 + 1) is several such products.

Where the scale goes depends on the group:
- group 0 (one scale a row): codes stay integers, exact in bf16, and the scale, the zero point (times the
  sum of x) and the offset are applied once to the finished float32 sum.
- smaller groups: the weights are scaled in registers and rounded once to the dtype of x. The matrix unit
  is 128 or 256 deep and a group is 8 to 64 bytes of a plane, so a product a group would leave it mostly
  empty, while scaled weights of several groups share one product.

Bytes are widened to int32 before any shift: shifts of 8-bit lanes do not exist on TPUs.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qlab.kernels.common import dispatch, layout, tuned
from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.weight_only_matmul import arrange
from qlab.kernels.weight_only_matmul.reference import epilogue

LANES = 128
STRIP = 128  # rows of weights that are in registers at once
# Bytes of VMEM a kernel may plan with: three quarters of what a core has (the compiler needs the rest).
VMEM = {
    "TPU v4": 12 << 20,
    "TPU v5 lite": 96 << 20,
    "TPU v5": 48 << 20,
    "TPU v6 lite": 96 << 20,
    "TPU7x": 48 << 20,
}
NAMES = {
    "TPU v5e": "TPU v5 lite",
    "TPU v5p": "TPU v5",
    "TPU v6e": "TPU v6 lite",
    "TPU v7x": "TPU7x",
}


class Plan(NamedTuple):
    """Sizes after padding.

    Attributes:
      bm, bn: rows of x and of weights a block. span: bytes of a part of p bits a block, p / 8 of `columns`.
      columns: columns of x a block. unit: columns of a (padded) group, 0 with one scale a row.
      m, n, steps: padded rows of x, padded rows of weights, blocks along K.
    """

    bm: int
    bn: int
    columns: int
    unit: int
    m: int
    n: int
    steps: int

    def span(self, p: int) -> int:
        return self.columns * p // 8


def round_up(a: int, b: int) -> int:
    return -(-a // b) * b


def heuristic(spec: Spec) -> dict[str, int]:
    """Blocks without a tuned record.

    Few rows of x: blocks of about 0.5 MB of codes, because a step costs some 0.3 us whatever it moves.
    Many rows: 512 rows of x share an unpacked weight, which balances vector against matrix unit; fewer
    where a long group, several parts or float32 would let x take more than 6 MB.
    """
    m, bits, group = spec.dims["m"], spec.options["bits"], spec.options["group"]
    if m <= 64:
        return {"bm": round_up(max(m, 1), 16), "bn": 512, "bk": 2048 if bits >= 4 else 4096}
    wide = 2 if spec.dtypes["x"] == "bfloat16" else 4
    row = 2 * len(layout.parts(bits)) * max(1024, 2 * group) * wide  # of x, in two buffers
    bm = min(512, round_up(m, LANES))
    while bm > 16 and bm * row > 6 << 20:
        bm = bm - LANES if bm > LANES else bm // 2
    return {"bm": bm, "bn": 256, "bk": 1024}


def plan(spec: Spec) -> Plan:
    m, k, n = (spec.dims[c] for c in "mkn")
    bits, group = spec.options["bits"], spec.options["group"]
    want = tuned.blocks(spec, "pallas_tpu", heuristic(spec))
    least = min(p for p, _ in layout.parts(bits))  # the part with the fewest bytes a column
    quantum = LANES * 8 // least  # columns whose bytes fill the lanes in every part
    unit = 0
    if group:  # a power of two that fills or divides the lanes, at least 8 bytes in every part
        unit = max(1 << math.ceil(math.log2(group)), 64 // least)
        k = layout.num_groups(k, group) * unit
        want["bk"] = min(want["bk"], LANES * unit)  # the scales of a block are in one register row
        quantum = max(quantum, unit)
    columns = min(round_up(want["bk"], quantum), round_up(k, quantum))
    if unit:  # a power of two, so that a block's groups do not straddle 128 scales
        columns = quantum << int(math.log2(columns // quantum))
    bn = min(want["bn"], round_up(n, STRIP))
    return Plan(
        want["bm"],
        bn,
        columns,
        unit,
        round_up(max(m, 1), want["bm"]),
        round_up(n, bn),
        -(-k // columns),
    )


def vmem_bytes(spec: Spec) -> int:
    """What the blocks take: two buffers of every operand, the sum, and one strip of float32 weights."""
    p, wide = plan(spec), 2 if spec.dtypes["x"] == "bfloat16" else 4
    parts = layout.parts(spec.options["bits"])
    operands = sum(p.bn * p.span(w) + p.bm * p.columns * wide for w, _ in parts)
    small = (3 * p.bn * LANES + 2 * 8 * p.bn + p.bm * LANES) * 4
    strip = STRIP * max(p.span(w) for w, _ in parts) * 4 * 4
    return 2 * (operands + small + p.bm * p.bn * wide) + p.bm * p.bn * 4 + strip


def vmem_room(spec: Spec) -> int:
    return VMEM.get(NAMES.get(spec.device, spec.device), max(VMEM.values()))


def why_not(spec: Spec) -> str:
    if why := dispatch.needs(spec, "tpu"):
        return why
    kind = NAMES.get(spec.device, spec.device)
    if not spec.interpret and kind not in VMEM:
        return f"was compiled for {', '.join(VMEM)} only, not for {spec.device}"
    p, room = plan(spec), vmem_room(spec)
    if p.bn % STRIP or p.bm % 8:
        return f"bn={p.bn}, bm={p.bm}; use multiples of {STRIP} and 8"
    if (need := vmem_bytes(spec)) > room:
        return f"its blocks take {need >> 20} MiB of VMEM, {kind} has {room >> 20} MiB for them; tune smaller ones"
    return ""


def plane(byte: jax.Array, j: int, p: int, signed: bool) -> jax.Array:
    """i32: field j of p bits of each byte (given as int32); signed: minus 2^(p-1)."""
    q = byte >> (p * j) if j else byte
    if p * (j + 1) < 8:  # the topmost field has nothing above it
        q = q & (2**p - 1)
    return q - 2 ** (p - 1) if signed else q


def spread(values: jax.Array, first: int, count: int, width: int) -> jax.Array:
    """f32[R, 128 or width]: columns first ... of f32[R, G], each repeated `width` times along the lanes."""
    if count == 1:
        return values[:, first : first + 1]
    lane = jax.lax.broadcasted_iota(jnp.int32, (values.shape[0], count * width), 1)
    out = values[:, first : first + 1]
    for c in range(1, count):
        out = jnp.where(lane < c * width, out, values[:, first + c : first + c + 1])
    return out


def scaled(q: jax.Array, s: jax.Array, z: jax.Array | None, o: jax.Array | None) -> jax.Array:
    """f32: s (q - z) + o of one plane of codes."""
    w = q.astype(jnp.float32)
    w = (w if z is None else w - z) * s
    return w if o is None else w + o


def kernel(*refs, p: Plan, bits: int, kind: str, activation, has_bias: bool, wide):
    """One block: y[bm, bn] += x[bm, columns] @ weights[bn, columns].T; refs in the order of `run`."""
    refs, parts = list(refs), layout.parts(bits)
    xs = [refs.pop(0) for _ in parts]
    codes = [refs.pop(0) for _ in parts]
    scale = refs.pop(0)
    zero = refs.pop(0) if "zero" in kind else None
    offset = refs.pop(0) if "offset" in kind else None
    total = refs.pop(0) if not p.unit and kind != "symmetric" else None
    bias = refs.pop(0) if has_bias else None
    out, acc = refs
    step = pl.program_id(2)
    precision = jax.lax.Precision.HIGHEST if wide == jnp.float32 else None

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def groups(ref, rows):
        """The block's columns of scale, zero or offset, brought to lane 0."""
        if ref is None or not p.unit:
            return None
        per_block = p.columns // p.unit
        if per_block == LANES:
            return ref[rows, :]
        return pltpu.roll(ref[rows, :], (LANES - step * per_block % LANES) % LANES, 1)

    def strip(i, carry):
        rows = pl.ds(pl.multiple_of(i * STRIP, STRIP), STRIP)
        s, z, o = groups(scale, rows), groups(zero, rows), groups(offset, rows)
        y = jnp.zeros((p.bm, STRIP), jnp.float32)
        for (width, first), x, code in zip(parts, xs, codes, strict=True):
            top = first + width == bits
            signed = top and kind == "symmetric"
            byte = code[rows, :].astype(jnp.int32)
            if p.unit:
                n = p.unit * width // 8  # bytes of a group
                piece = max(n, LANES)
                many = piece // n
                # z and o belong to the code as a whole: they go with its topmost part.
                s_all, z_all, o_all = (
                    None if a is None else jnp.concatenate(
                        [jnp.broadcast_to(spread(a, c * many, many, n), (STRIP, piece))
                         for c in range(p.span(width) // piece)], 1)
                    for a in (s * 2.0**first, z * 2.0**-first if top and z is not None else None,
                              o if top else None)
                )  # fmt: skip
            for j in range(8 // width):
                q = plane(byte, j, width, signed)
                if p.unit:
                    w = scaled(q, s_all, z_all, o_all)
                else:
                    w = (q * 2**first).astype(jnp.float32)
                y += jax.lax.dot_general(
                    x[j], w.astype(wide), (((1,), (1,)), ((), ())),
                    precision=precision, preferred_element_type=jnp.float32,
                )  # fmt: skip
        acc[:, rows] += y
        return carry

    jax.lax.fori_loop(0, p.bn // STRIP, strip, 0)

    @pl.when(step == p.steps - 1)
    def _():
        y = acc[...]
        if not p.unit:
            if zero is not None:
                y = y - total[...] * zero[...]
            y = y * scale[...]
            if offset is not None:
                y = y + total[...] * offset[...]
        out[...] = epilogue(y, None if bias is None else bias[...], activation, wide)


def run(spec: Spec, x, codes, scale, zero, offset, bias) -> jax.Array:
    o, p = spec.options, plan(spec)
    bits, group, kind = o["bits"], o["group"], o["kind"]
    (m, k), n, dtype = x.shape, codes.shape[0], x.dtype
    if 0 in (m, n):
        return jnp.zeros((m, n), dtype)
    wide = dtype if dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)  # TPUs have no float16
    unit = p.unit or p.steps * p.columns
    num = p.steps * p.columns // unit
    rows = jnp.pad(x.astype(wide), [(0, p.m - m), (0, 0)])

    operands, specs = [], []
    for w, _ in layout.parts(bits):
        planes = jnp.moveaxis(arrange.planes(rows, w, group, unit, num), 2, 0)
        operands.append(planes.reshape(8 // w, p.m, -1))
        specs.append(pl.BlockSpec((8 // w, p.bm, p.span(w)), lambda i, j, s: (0, i, s)))
    parts = arrange.codes_by_part(codes, k, bits, group, unit, num, p.n)
    for (w, _), (array, at) in zip(layout.parts(bits), parts, strict=True):
        first = at // p.span(w)
        operands.append(array)
        specs.append(pl.BlockSpec((p.bn, p.span(w)), lambda i, j, s, first=first: (j, s + first)))
    row = pl.BlockSpec((1, p.bn), lambda i, j, s: (0, j))
    for a in (scale, zero, offset):
        if a is None:
            continue
        a = jnp.pad(a.astype(jnp.float32), [(0, p.n - n), (0, num - a.shape[1])])
        if p.unit:
            per_block = p.columns // p.unit
            operands.append(a)
            specs.append(pl.BlockSpec((p.bn, LANES), lambda i, j, s: (j, s * per_block // LANES)))
        else:
            operands.append(a.reshape(1, -1))
            specs.append(row)
    if not p.unit and kind != "symmetric":
        total = x.astype(jnp.float32).sum(-1, keepdims=True)
        operands.append(jnp.pad(total, [(0, p.m - m), (0, 0)]))
        specs.append(pl.BlockSpec((p.bm, 1), lambda i, j, s: (i, 0)))
    if bias is not None:
        operands.append(jnp.pad(bias.astype(jnp.float32), (0, p.n - n)).reshape(1, -1))
        specs.append(row)

    body = functools.partial(
        kernel, p=p, bits=bits, kind=kind, activation=o["activation"],
        has_bias=bias is not None, wide=wide,
    )  # fmt: skip
    y = pl.pallas_call(
        body,
        grid=(p.m // p.bm, p.n // p.bn, p.steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((p.bm, p.bn), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((p.m, p.n), wide),
        scratch_shapes=[pltpu.VMEM((p.bm, p.bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_room(spec),
        ),
        interpret=spec.interpret,
    )(*operands)
    return y[:m, :n].astype(dtype)


IMPL = Impl("pallas_tpu", why_not, run)
