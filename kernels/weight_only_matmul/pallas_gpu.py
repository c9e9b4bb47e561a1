"""The product for Hopper GPUs (Mosaic GPU): y^T = W x^T on the tensor cores, W unpacked in registers.

Packed bytes and x come into shared memory by TMA through a warp-specialised pipeline (one warpgroup only
copies). A compute warpgroup loads 64 rows of bytes into registers, unpacks one plane at a time and
multiplies it, as the left operand of wgmma, with the columns of x that the plane holds.

- `plane` masks a field of the bytes in place, without a shift, and reads the result as int8, whose
  conversion to bf16 is two values an instruction; the field's position goes into a power of two. Codes of
  up to 8 bits, and differences of them, are exact in bf16.
- The scale is applied to the float32 sum of a group, not to the weights: a warpgroup has 64 rows, so that
  costs tile_m / 2 multiply-adds a thread and group against about 2.75 group / 2 instructions to scale and
  round the weights, and nothing but the sum is rounded. Zero point and offset become, exactly, a term
  (offset - scale zero) times the group's sum of x.
- Because the codes are exact, float16 and float32 x are split into two and three bf16 pieces, which are more
  rows of x: the products stay exact there too.
- Up to 16 rows (GEMV) memory is the limit: narrow tiles, several steps in flight, and K split over blocks
  until all multiprocessors have two; the partial sums are added by XLA.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlab.kernels.common import dispatch, gpu, layout, tuned
from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.weight_only_matmul import arrange
from qlab.kernels.weight_only_matmul.reference import epilogue

ROWS = 64  # rows of weights of a warpgroup: what wgmma takes
CHUNK = 256  # columns at once of a group too long for shared memory
BLOCKS = 2 * 132  # two blocks for each multiprocessor of an H100 or H200
PIECES = {"bfloat16": 1, "float16": 2, "float32": 3}


class Plan(NamedTuple):
    """Sizes after padding.

    Attributes:
      tile_m: rows of x a block. wgs: compute warpgroups of ROWS rows. m, n: padded rows of x and weights.
      unit: columns of a (padded) group. chunk: columns between two applications of the scale.
      num: chunks of a row. per_step: chunks a pipeline step. splits: blocks that share a row.
      stages: steps in flight.
    """

    tile_m: int
    wgs: int
    m: int
    n: int
    unit: int
    chunk: int
    num: int
    per_step: int
    splits: int
    stages: int

    @property
    def rows(self) -> int:
        return self.wgs * ROWS

    def span(self, p: int) -> int:
        return self.chunk * p // 8


def round_up(a: int, b: int) -> int:
    return -(-a // b) * b


def columns(spec: Spec) -> tuple[int, int, int]:
    """(unit, chunk, num) of a Plan: a plane of a group is a multiple of wgmma's depth, 16 columns."""
    k, bits, group = spec.dims["k"], spec.options["bits"], spec.options["group"]
    unit = round_up(group or k, 128 // min(p for p, _ in layout.parts(bits)))
    chunk = unit
    if unit > 2 * CHUNK:
        unit, chunk = round_up(unit, CHUNK), CHUNK
    return unit, chunk, layout.num_groups(k, group) * (unit // chunk)


def heuristic(spec: Spec) -> dict[str, int]:
    """Blocks without a tuned record: narrow tiles for few rows, else 128 x 128 or a half or quarter of it.

    Narrow tiles split K while the blocks are too few, as long as each keeps four steps in flight.
    """
    m, n = spec.dims["m"] * PIECES[spec.dtypes["x"]], spec.dims["n"]
    wgs, splits = 2 if n > ROWS else 1, 1
    _, chunk, num = columns(spec)
    if m > 48:
        tile_m, parts = 128, layout.parts(spec.options["bits"])
        step = max(chunk, 128)
        codes = wgs * ROWS * step * spec.options["bits"] // 8
        while 2 * (codes + 2 * tile_m * step * len(parts)) + wgs * ROWS * tile_m * 4 > gpu.SHARED:
            tile_m //= 2  # two steps must fit beside the result
        return {"tile_m": tile_m, "wgs": wgs, "step": 128, "stages": 4, "splits": 1}
    step = 256 if m <= 16 else 128
    steps = num // math.gcd(max(step // chunk, 1), num)
    while -(-n // (wgs * ROWS)) * splits < BLOCKS and steps % (8 * splits) == 0:
        splits *= 2
    tile_m = round_up(max(m, 1), 8)
    return {"tile_m": tile_m, "wgs": wgs, "step": step, "stages": 4, "splits": splits}


def plan(spec: Spec) -> Plan:
    bits, want = spec.options["bits"], tuned.blocks(spec, "pallas_gpu", heuristic(spec))
    tile_m, wgs = want["tile_m"], want["wgs"]
    unit, chunk, num = columns(spec)
    per_step = math.gcd(max(want["step"] // chunk, 1), num)
    steps = num // per_step
    splits = math.gcd(want["splits"], steps)
    m = round_up(max(spec.dims["m"], 1) * PIECES[spec.dtypes["x"]], tile_m)
    n = round_up(spec.dims["n"], wgs * ROWS)
    p = Plan(tile_m, wgs, m, n, unit, chunk, num, per_step, splits, 1)
    half, whole = (
        (r - out_bytes(p, 4)) // stage_bytes(p, bits) for r in (gpu.SHARED // 2, gpu.SHARED)
    )
    fit = half if tile_m < 64 and half >= 2 else whole  # two narrow blocks share a multiprocessor
    return p._replace(stages=max(min(want["stages"], fit, steps // splits), 1))


def stage_bytes(p: Plan, bits: int) -> int:
    """Shared memory of one pipeline step: packed bytes and, for each part, x."""
    parts = layout.parts(bits)
    return p.per_step * sum(p.rows * p.span(w) + 2 * p.tile_m * p.chunk for w, _ in parts)


def out_bytes(p: Plan, itemsize: int) -> int:
    return p.rows * p.tile_m * itemsize


def why_not(spec: Spec) -> str:
    if why := dispatch.needs(spec, "gpu"):
        return why
    if not spec.interpret and not any(name in spec.device for name in gpu.HOPPER):
        return f"needs Hopper (sm_90: wgmma with the left operand in registers), the device is {spec.device}"
    p, bits = plan(spec), spec.options["bits"]
    if p.tile_m % 8 or p.tile_m > 256:
        return f"tile_m={p.tile_m}; wgmma takes a multiple of 8 up to 256"
    if (need := stage_bytes(p, bits) * p.stages + out_bytes(p, 4)) > gpu.SHARED:
        return f"its blocks take {need} bytes of shared memory, sm_90 has {gpu.SHARED}; tune smaller ones"
    return ""


def plane(byte: jax.Array, j: int, p: int, scale: float, minus: float) -> jax.Array:
    """bf16: scale * field - minus, exactly, for field j of p bits of each byte (u8).

    The field is left where it is: masked and read as int8 it is field 2^(p j), and the topmost, whose high
    bit would be a sign, is first brought to field 2^(p j) - 128 by flipping that bit.
    """
    first, top = p * j, p * (j + 1) == 8
    q = byte & jnp.uint8((2**p - 1) << first) if p < 8 else byte
    if top:
        q = q ^ jnp.uint8(0x80)
    w = lax.bitcast_convert_type(q, jnp.int8).astype(jnp.bfloat16)
    by, add = scale * 2.0**-first, (128 * scale * 2.0**-first if top else 0.0) - minus
    w = w * jnp.bfloat16(by) if by != 1 else w
    return w + jnp.bfloat16(add) if add else w


def group_sum(total, dot, s, z, o, x_sum, spread):
    """total + s (dot - z x_sum) + o x_sum; s, z, o belong to rows of weights, x_sum to rows of x.

    spread: (vector, axis) -> the tile that repeats it along the other axis.
    """
    total = total + spread(s, 0) * dot
    if z is None and o is None:
        return total
    t = -s * z if z is not None else o
    t = t + o if z is not None and o is not None else t
    return total + spread(t, 0) * spread(x_sum, 1)


def kernel(
    *refs,
    p: Plan,
    firsts,
    bits: int,
    kind: str,
    activation,
    bias: bool,
    direct: bool,
    interpret: bool,
):
    """One tile of y^T; refs in the order of `run`.

    firsts: block of codes at which each part begins. direct: write finished y, else partial sums of y^T.
    interpret: the interpreter has neither register operands of wgmma nor layouts, so there the product is
    written as a dot; everything else is the same code.
    """
    refs, parts = list(refs), layout.parts(bits)
    xs = [refs.pop(0) for _ in parts]
    codes = [refs.pop(0) for _ in parts]
    scale = refs.pop(0)
    zero = refs.pop(0) if "zero" in kind else None
    offset = refs.pop(0) if "offset" in kind else None
    sums = refs.pop(0) if kind != "symmetric" else None
    bias_ref = refs.pop(0) if bias else None
    out, out_smem = refs
    wg, at_n, at_m, split = (lax.axis_index(a) for a in ("wg", "n", "m", "split"))
    tile = (ROWS, p.tile_m)
    mine = pl.ds(wg * ROWS, ROWS)  # rows of the block's codes
    rows = pl.ds(at_n * p.rows + wg * ROWS, ROWS)
    cols = pl.ds(at_m * p.tile_m, p.tile_m)
    steps = p.num // p.per_step // p.splits

    def read(ref, index, how):
        if interpret:
            return ref[index]
        return plgpu.load(ref, index, layout=how, optimized=False)

    by_row = functools.partial(read, how=plgpu.Layout.WGMMA.reduce(1))
    by_col = functools.partial(read, how=plgpu.Layout.WGMMA.reduce(0))

    def spread(vector, axis):
        return lax.broadcast_in_dim(vector, tile, (axis,))

    def zeros():
        a = jnp.zeros(tile, jnp.float32)
        return a if interpret else plgpu.layout_cast(a, plgpu.Layout.WGMMA)

    def product(c, x_tiles, code_tiles, acc):
        """acc + the chunk's integer product."""
        for (w, first), x, code in zip(parts, x_tiles, code_tiles, strict=True):
            n = p.span(w)
            byte = read(code, (mine, pl.ds(c * n, n)), plgpu.Layout.WGMMA_UPCAST_2X)
            for j in range(8 // w):
                top = first + w == bits and kind == "symmetric"
                q = plane(byte, j, w, 2.0**first, 2.0 ** (bits - 1) if top else 0.0)
                x_t = x.at[:, pl.ds(c * p.chunk + j * n, n)]
                if interpret:
                    acc = acc + jnp.dot(q, x_t[...].T, preferred_element_type=jnp.float32)
                else:
                    q = plgpu.layout_cast(q, plgpu.Layout.WGMMA)
                    plgpu.wgmma(acc, q, plgpu.transpose_ref(x_t, (1, 0)))
        if interpret:
            return acc
        plgpu.wgmma_wait(0)
        return acc[...]

    def body(index, *tiles):
        *tiles, total = tiles
        x_tiles, code_tiles = tiles[: len(parts)], tiles[len(parts) :]
        for c in range(p.per_step):
            chunk = (split * steps + index[0]) * p.per_step + c
            group = chunk // (p.unit // p.chunk)
            s = by_row(scale, (rows, group))
            z = None if zero is None else by_row(zero, (rows, group))
            o = None if offset is None else by_row(offset, (rows, group))
            x_sum = None if sums is None else by_col(sums, (chunk, cols))
            dot = functools.partial(product, c, x_tiles, code_tiles)
            d = dot(zeros()) if interpret else pl.run_scoped(dot, plgpu.ACC(tile, jnp.float32))
            total = group_sum(total, d, s, z, o, x_sum, spread)
        return total

    def finish(pipeline):
        y = pipeline(zeros())
        here = out_smem.at[wg]
        if direct:
            added = None if bias_ref is None else spread(by_row(bias_ref, (rows,)), 0)
            y = epilogue(y, added, activation, jnp.bfloat16)
            if interpret:
                here[...] = y.T
            else:
                y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.transpose_ref(here, (1, 0))[...] = y
        else:
            here[...] = y
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(here, out.at[cols, rows] if direct else out.at[split, rows, cols])
        plgpu.wait_smem_to_gmem(0)

    widths = [w for w, _ in parts]
    x_specs = [
        plgpu.BlockSpec(
            (p.tile_m, p.per_step * p.chunk),
            lambda k: (at_m, split * steps + k),
            transforms=tiling(p.span(w), 16),
        )
        for w in widths
    ]
    code_specs = [
        plgpu.BlockSpec(
            (p.rows, p.per_step * p.span(w)),
            lambda k, first=first: (at_n, first + split * steps + k),
            transforms=tiling(p.span(w), 8),
        )
        for w, first in zip(widths, firsts, strict=True)
    ]
    plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=40,
        in_specs=[*x_specs, *code_specs],
        wg_axis="wg",
        num_compute_wgs=p.wgs,
        max_concurrent_steps=p.stages,
        compute_context=finish,
    )(*xs, *codes)


def tiling(columns: int, bits: int) -> tuple[Any, ...]:
    """The widest swizzled tile of 8 rows that divides `columns` values of `bits` bits."""
    swizzle = next(b for b in (128, 64, 32, 16) if columns * bits % (8 * b) == 0)
    tile = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return (tile, plgpu.SwizzleTransform(swizzle)) if swizzle > 16 else (tile,)


def pieces(x: jax.Array) -> jax.Array:
    """bf16[pieces M, K] whose blocks of M rows add up to x: exactly for bf16 and f16, to 2^-24 for f32."""
    out, rest = [], x.astype(jnp.float32)
    for _ in range(PIECES[x.dtype.name]):
        out.append(rest.astype(jnp.bfloat16))
        # The barrier keeps XLA from taking a conversion there and back for the identity.
        rest = rest - lax.optimization_barrier(out[-1]).astype(jnp.float32)
    return jnp.concatenate(out)


def run(spec: Spec, x, codes, scale, zero, offset, bias) -> jax.Array:
    o, p = spec.options, plan(spec)
    bits, group, kind = o["bits"], o["group"], o["kind"]
    (m, k), n, dtype = x.shape, codes.shape[0], x.dtype
    if 0 in (m, n):
        return jnp.zeros((m, n), dtype)
    if spec.interpret:
        p = p._replace(stages=min(p.stages, 2))
    direct = dtype == jnp.bfloat16 and p.splits == 1

    rows = pieces(x)
    rows = jnp.pad(rows, [(0, p.m - rows.shape[0]), (0, 0)])
    num = p.num * p.chunk // p.unit
    xs = []
    for w, _ in layout.parts(bits):
        if p.unit == p.chunk == group:  # a plane is contiguous columns of x: nothing to rearrange
            xs.append(rows)
            continue
        a = arrange.planes(rows, w, group, p.unit, num)
        a = a.reshape(p.m, num, 8 // w, p.unit // p.chunk, p.span(w))
        xs.append(jnp.moveaxis(a, 3, 2).reshape(p.m, -1))
    parts = arrange.codes_by_part(codes, k, bits, group, p.unit, num, p.n)
    firsts = tuple(
        at // (p.per_step * p.span(w))
        for (w, _), (_, at) in zip(layout.parts(bits), parts, strict=True)
    )
    operands = [*xs, *(a for a, _ in parts)]
    for a in (scale, zero, offset):
        if a is not None:
            operands.append(jnp.pad(a.astype(jnp.float32), [(0, p.n - n), (0, 0)]))
    if kind != "symmetric":
        operands.append(xs[0].astype(jnp.float32).reshape(p.m, p.num, p.chunk).sum(-1).T)
    if has_bias := direct and bias is not None:
        operands.append(jnp.pad(bias.astype(jnp.float32), (0, p.n - n)))

    body = functools.partial(
        kernel, p=p, firsts=firsts, bits=bits, kind=kind, activation=o["activation"],
        bias=has_bias, direct=direct, interpret=spec.interpret,
    )  # fmt: skip
    if direct:
        out = jax.ShapeDtypeStruct((p.m, p.n), jnp.bfloat16)
        smem = plgpu.SMEM((p.wgs, p.tile_m, ROWS), jnp.bfloat16, transforms=tiling(ROWS, 16))
    else:
        out = jax.ShapeDtypeStruct((p.splits, p.n, p.m), jnp.float32)
        smem = plgpu.SMEM((p.wgs, ROWS, p.tile_m), jnp.float32, transforms=tiling(p.tile_m, 32))
    y = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[smem],
        grid=(p.n // p.rows, p.m // p.tile_m, p.splits),
        grid_names=("n", "m", "split"),
        num_threads=p.wgs + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=gpu.interpreter() if spec.interpret else None,
    )(*operands)
    if direct:
        return y[:m, :n]
    y = y.sum(0)[:n, : m * PIECES[dtype.name]].reshape(n, -1, m).sum(1).T
    return epilogue(y, bias, o["activation"], dtype)


IMPL = Impl("pallas_gpu", why_not, run)
