"""Codes and their product on a Hopper GPU (Mosaic GPU).

Quantizer: memory to registers to memory, a row of logits to a warp. Rows of up to 2048 columns stay in
registers; longer ones are read twice, first for a running maximum and sum (online softmax), then, out of
the cache, for the codes.
Product: a warpgroup turns a tile of codes into signed-byte digits of powers of two (int8 values) or powers
of two (bf16 values) in shared memory and multiplies them there by wgmma. Values enter transposed for int8,
whose wgmma needs the columns of both operands contiguous.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlab.kernels.common import gpu, tuned
from qlab.kernels.common.dispatch import Impl, Spec, needs
from qlab.kernels.log2_softmax_quantize import levels

WARPS, LANES = 4, 32
WIDTH = 2048  # columns a warp holds: 64 a lane
UNIT = 128  # columns are padded to a multiple
ROWS = 64  # of a wgmma
ACCUMULATORS = 192  # registers of a thread for sums, of 255


def row_layout(vector: int):
    """A row a warp, `vector` neighbours a lane."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa

    across = LANES * vector
    tiling = fa.Tiling(((WARPS, across), (1, across), (vector,)))
    made = fa.TiledLayout(tiling, (-5,), (-3, -2), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(made.tiling, made.warp_dims, made.lane_dims, made.vector_dim)


def quantize_kernel(shift_ref, z_ref, *rest, o, r, c, width, how, interpreted):
    """z: [N, C'], N rows of all batches, C' a multiple of width; q: u8 like z. Past column c nothing counts."""
    mask_ref, q_ref = rest if len(rest) == 2 else (None, rest[0])
    n, columns = z_ref.shape
    # The last block is moved back to end with the matrix: rows it shares are written twice, alike.
    start = jnp.minimum(lax.axis_index("block") * WARPS, n - WARPS)
    here, shape = pl.ds(start, WARPS), (WARPS, width)

    def load(ref, at):
        index = (here, pl.ds(at, width))
        return ref[index] if interpreted else plgpu.load(ref, index, layout=how, optimized=False)

    def iota(axis):
        if interpreted:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=how)

    def wide(a):
        a = lax.broadcast_in_dim(a, shape, (0,))
        return a if interpreted else plgpu.layout_cast(a, how)

    def per_row(value):
        a = jnp.full((WARPS,), value, jnp.float32)
        return a if interpreted else plgpu.layout_cast(a, how.reduce(1))

    def logits(at):  # unseen ones are -inf
        z = load(z_ref, at).astype(jnp.float32)
        if o["causal"]:
            row = lax.rem(start + iota(0), jnp.full(shape, r, jnp.int32))
            z = jnp.where(at + iota(1) <= row + (c - r), z, -jnp.inf)
        elif columns != c:
            z = jnp.where(at + iota(1) < c, z, -jnp.inf)
        if mask_ref is not None:
            z = jnp.where(load(mask_ref, at).astype(jnp.int32) != 0, z, -jnp.inf)
        return z

    def encode(at, z, top, total):
        t = wide(jnp.log2(total) + shift_ref[0]) - (z - wide(top)) * levels.LOG2E
        q = levels.code(levels.STEPS[o["base"]] * t, o["bits"], o["zero_code"])
        q_ref[here, pl.ds(at, width)] = q.astype(jnp.uint8)

    def add(z, top):
        return jnp.exp2((z - wide(top)) * levels.LOG2E).sum(1)

    if columns == width:
        z = logits(0)
        top = z.max(1)
        encode(0, z, top, add(z, top))
        return

    def first(k, carry):
        before, total = carry
        z = logits(k * width)
        top = jnp.maximum(before, z.max(1))
        # Nothing seen so far: -inf - -inf is no number, but the sum is still 0.
        kept = jnp.where(before == -jnp.inf, 0.0, jnp.exp2((before - top) * levels.LOG2E))
        more = jnp.where(top == -jnp.inf, 0.0, add(z, top))
        return top, total * kept + more

    num = columns // width
    top, total = lax.fori_loop(0, num, first, (per_row(-jnp.inf), per_row(0.0)))

    @pl.loop(0, num)
    def _(k):
        encode(k * width, logits(k * width), top, total)


def _pad(a: jax.Array, *sizes: int) -> jax.Array:
    more = [(0, size - n) for size, n in zip(sizes, a.shape, strict=True)]
    return jnp.pad(a, more) if any(high for _, high in more) else a


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def run(spec: Spec, z, mask, d) -> jax.Array:
    b, r, c = z.shape
    most = tuned.blocks(spec, "pallas_gpu", {"width": WIDTH})["width"]
    columns, n = _up(c, UNIT), max(b * r, WARPS)
    width = next(w for w in range(min(most, columns), 0, -UNIT) if columns % w == 0)
    z = _pad(z.reshape(b * r, c), n, columns)
    masks = [] if mask is None else [_pad(mask.astype(jnp.int8).reshape(b * r, c), n, columns)]
    q = plgpu.kernel(
        functools.partial(
            quantize_kernel, o=spec.options, r=r, c=c, width=width, how=row_layout(4),
            interpreted=spec.interpret,
        ),
        out_type=jax.ShapeDtypeStruct((n, columns), jnp.uint8),
        grid=(pl.cdiv(n, WARPS),),
        grid_names=("block",),
        interpret=gpu.interpreter() if spec.interpret else None,
    )(jnp.log2(d).reshape(1), z, *masks)  # fmt: skip
    return q[: b * r, :c].reshape(b, r, c)


def why_not(spec: Spec) -> str:
    return needs(spec, "gpu") or ("an empty operand" if 0 in spec.dims.values() else "")


def _tiled(minor: int, bits: int) -> tuple:
    """The shared-memory layout that wgmma reads, of rows of `minor` numbers of `bits` bits."""
    swizzle = plgpu.find_swizzle(minor * bits)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def attend_kernel(q_ref, v_ref, y_ref, p_ref, *, o, c, steps, values, interpreted):
    """q: [B R', C'], v: int8 [B D', C'] or bf16 [B C', D'], y: f32[B R', D']; p: [products, 64, columns] scratch."""
    num, _, columns = p_ref.shape
    integer = v_ref.dtype == jnp.int8
    batch, i, n = (lax.axis_index(name) for name in ("batch", "rows", "values"))
    row = batch * lax.axis_size("rows") + i
    num_parities = levels.STEPS[o["base"]]

    def step(q_tile, v_tile, accs):
        q = q_tile[...].astype(jnp.int32)
        slot = 0
        for e, counts in levels.parities(q, o["bits"], o["base"], o["zero_code"]):
            if integer:
                for digit in levels.digits(e, counts, o["fraction"]):
                    p_ref[slot] = digit.astype(jnp.int8)
                    slot += 1
            else:
                p_ref[slot] = jnp.where(counts, levels.power(e), 0.0).astype(v_tile.dtype)
                slot += 1
        plgpu.commit_smem()
        right = plgpu.transpose_ref(v_tile, (1, 0)) if integer and not interpreted else v_tile
        for slot, acc in enumerate(accs):
            plgpu.wgmma(acc, p_ref.at[slot], right)
        plgpu.wgmma_wait(0)

    def scope(*accs):
        q_spec = plgpu.BlockSpec((ROWS, columns), lambda s: (row, s), transforms=_tiled(columns, 8))
        if not integer:
            v_spec = plgpu.BlockSpec(
                (columns, values), lambda s: (batch * steps + s, n), transforms=_tiled(values, 16)
            )
        elif interpreted:  # which cannot transpose a Ref
            v_spec = plgpu.BlockSpec((columns, values), lambda s: (batch * steps + s, n))
        else:
            v_spec = plgpu.BlockSpec(
                (values, columns), lambda s: (batch * lax.axis_size("values") + n, s),
                transforms=_tiled(columns, 8),
            )  # fmt: skip
        plgpu.emit_pipeline(
            lambda index, q_tile, v_tile: step(q_tile, v_tile, accs),
            grid=(steps,),
            in_specs=[q_spec, v_spec],
            max_concurrent_steps=min(4, steps),
        )(q_ref, v_ref)
        return [acc[...] for acc in accs]

    kind = jnp.int32 if integer else jnp.float32
    sums = pl.run_scoped(scope, *[plgpu.ACC((ROWS, values), kind)] * num)
    total, each = None, num // num_parities
    for odd in range(num_parities):
        part = sums[odd * each]
        for j in range(1, each):
            part = part + (sums[odd * each + j] << (levels.DIGIT * j))
        part = part.astype(jnp.float32) * (levels.SQRT2 if odd else 1.0)
        total = part if total is None else total + part
    if integer:
        total = total * 2.0 ** -o["fraction"]
    y_ref[pl.ds(row * ROWS, ROWS), pl.ds(n * values, values)] = total


def products(spec: Spec) -> int:
    o = spec.options
    digits = levels.num_digits(o["fraction"]) if spec.dtypes["v"] == "int8" else 1
    return levels.STEPS[o["base"]] * digits


def value_columns(spec: Spec) -> int:
    """Columns of v a block: as many as the sums of all products leave registers for."""
    most = next(w for w in (128, 64, 32, 16) if products(spec) * w // 2 <= ACCUMULATORS)
    return min(most, max(16, pl.next_power_of_2(spec.dims["d"])))


def attend(spec: Spec, codes, v) -> jax.Array:
    o, (b, r, c), d = spec.options, codes.shape, v.shape[2]
    integer = v.dtype == jnp.int8
    columns, values = 128 if integer else 64, value_columns(spec)
    rows_all, c_all, d_all = _up(r, ROWS), _up(c, columns), _up(d, values)
    # Columns past the end multiply rows of v that are 0.
    q = _pad(codes, b, rows_all, c_all).reshape(b * rows_all, c_all)
    v = _pad(v, b, c_all, d_all)
    if integer and not spec.interpret:
        v = jnp.swapaxes(v, 1, 2)
    v = v.reshape(-1, v.shape[2])
    p = plgpu.SMEM(
        (products(spec), ROWS, columns), v.dtype, transforms=_tiled(columns, 8 if integer else 16)
    )
    y = plgpu.kernel(
        functools.partial(
            attend_kernel,
            o=o,
            c=c,
            steps=c_all // columns,
            values=values,
            interpreted=spec.interpret,
        ),
        out_type=jax.ShapeDtypeStruct((b * rows_all, d_all), jnp.float32),
        scratch_types=[p],
        grid=(b, rows_all // ROWS, d_all // values),
        grid_names=("batch", "rows", "values"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=gpu.interpreter() if spec.interpret else None,
    )(q, v)
    return y.reshape(b, rows_all, d_all)[:, :r, :d].astype(jnp.float32 if integer else v.dtype)


def attend_why_not(spec: Spec) -> str:
    if why := why_not(spec):
        return why
    if spec.dtypes["v"] not in ("int8", "bfloat16"):
        return f"v is {spec.dtypes['v']}: the matrix unit would round it; use int8 or bfloat16"
    return ""


IMPL = Impl("pallas_gpu", why_not, run)
ATTEND = Impl("pallas_gpu", attend_why_not, attend)
