"""Codes and their product on TPUs (Mosaic).

Quantizer: rows that fit are read once. Longer rows are read twice by one grid, first for a running maximum
and sum (online softmax), then for the codes; the output block does not move in the first pass, so nothing
is written before it is computed.
Product: a block of codes becomes signed-byte digits of powers of two (int8 values) or powers of two (float
values) in VMEM and goes to the matrix unit; the sums stay in VMEM over the columns of the row block.
Codes are widened to int32 before any shift: 8-bit shifts do not exist on the vector unit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qlab.kernels.common import tuned
from qlab.kernels.common.dispatch import Impl, Spec, needs
from qlab.kernels.log2_softmax_quantize import levels

ROWS = 32  # a tile of bytes has 32 rows
ELEMENTS = 2**17  # of a block: 0.5 MB in f32, and some ten such temporaries
LANES = 128


def _blocks(spec: Spec) -> tuple[int, int]:
    """(rows, columns) of the quantizer's block: whole rows while ROWS of them fit, else 1 / ROWS of a block."""
    r, c = spec.dims["r"], spec.dims["c"]
    columns = c if c * ROWS <= ELEMENTS else ELEMENTS // ROWS
    rows = max(ROWS, min(256, ELEMENTS // columns // ROWS * ROWS))
    found = tuned.blocks(spec, "pallas_tpu", {"rows": rows, "columns": columns})
    return min(found["rows"], r), min(found["columns"], c)


def why_not(spec: Spec) -> str:
    if why := needs(spec, "tpu"):
        return why
    return "an empty operand" if 0 in spec.dims.values() else ""


def quantize_kernel(d_ref, z_ref, mask_ref, q_ref, max_ref, sum_ref, *, o, r, c):
    """d: f32[1] in SMEM, log2 of the scale. max, sum: f32[rows, 128] scratch, every lane the same."""
    _, rows, columns = z_ref.shape
    row = pl.program_id(1) * rows + lax.broadcasted_iota(jnp.int32, (rows, columns), 0)
    col = pl.program_id(3) * columns + lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
    seen = col < c
    if o["causal"]:
        seen = seen & (col <= row + (c - r))
    if mask_ref is not None:
        seen = seen & (mask_ref[0].astype(jnp.int32) != 0)
    z = jnp.where(seen, z_ref[0].astype(jnp.float32), -jnp.inf)

    def encode(top, total):
        t = levels.STEPS[o["base"]] * (jnp.log2(total) + d_ref[0] - (z - top) * levels.LOG2E)
        t = jnp.where(seen, t, jnp.inf)
        q_ref[0] = levels.code(t, o["bits"], o["zero_code"]).astype(jnp.uint8)

    def add(top):
        return jnp.exp2((z - top) * levels.LOG2E).sum(1, keepdims=True)

    if q_ref.shape[2] == c:  # the whole row
        top = z.max(1, keepdims=True)
        encode(top, add(top))
        return

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(pl.program_id(2) == 0)
    def _():
        before = max_ref[:, :1]
        top = jnp.maximum(before, z.max(1, keepdims=True))
        # Nothing seen so far: -inf - -inf is no number, but the sum is still 0.
        kept = jnp.where(before == -jnp.inf, 0.0, jnp.exp2((before - top) * levels.LOG2E))
        more = jnp.where(top == -jnp.inf, 0.0, add(top))
        max_ref[...] = jnp.broadcast_to(top, max_ref.shape)
        sum_ref[...] = jnp.broadcast_to(sum_ref[:, :1] * kept + more, sum_ref.shape)

    @pl.when(pl.program_id(2) == 1)
    def _():
        encode(max_ref[:, :1], sum_ref[:, :1])


def run(spec: Spec, z, mask, d) -> jax.Array:
    b, r, c = z.shape
    rows, columns = _blocks(spec)
    num = pl.cdiv(c, columns)
    z = z.astype(jnp.float32) if z.dtype == jnp.float16 else z  # Mosaic has no f16
    block = (1, rows, columns)
    read = pl.BlockSpec(block, lambda i, j, phase, k: (i, j, k))

    def body(*refs):
        refs = refs if mask is not None else (*refs[:2], None, *refs[2:])
        quantize_kernel(*refs, o=spec.options, r=r, c=c)

    return pl.pallas_call(
        body,
        grid=(b, pl.cdiv(r, rows), 1 + (num > 1), num),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), read, *([] if mask is None else [read])],
        out_specs=pl.BlockSpec(block, lambda i, j, phase, k: (i, j, k * (phase if num > 1 else 1))),
        out_shape=jax.ShapeDtypeStruct(z.shape, jnp.uint8),
        scratch_shapes=[pltpu.VMEM((rows, LANES), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=spec.interpret,
    )(jnp.log2(d).reshape(1), z, *([] if mask is None else [mask.astype(jnp.int8)]))


def attend_kernel(q_ref, v_ref, y_ref, acc_ref, *, o, c):
    """acc: [products, rows, D] scratch, i32 or f32; one product a parity and digit."""
    columns, step = q_ref.shape[2], pl.program_id(3)

    @pl.when(step == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    q = q_ref[0].astype(jnp.int32)
    inside = step * columns + lax.broadcasted_iota(jnp.int32, q.shape, 1) < c
    v = v_ref[0]
    integer = v.dtype == jnp.int8
    if c % columns and not integer:  # what lies past the end may be NaN
        past = step * columns + lax.broadcasted_iota(jnp.int32, v.shape, 0) >= c
        v = jnp.where(past, 0.0, v.astype(jnp.float32)).astype(v.dtype)
    parities = levels.parities(q, o["bits"], o["base"], o["zero_code"])
    products = []
    for e, counts in parities:
        counts = counts & inside
        if integer:
            products += [a.astype(jnp.int8) for a in levels.digits(e, counts, o["fraction"])]
        else:
            products.append(jnp.where(counts, levels.power(e), 0.0).astype(v.dtype))
    exact = lax.Precision.HIGHEST if v.dtype == jnp.float32 else None
    for i, p in enumerate(products):
        acc_ref[i] += jnp.dot(p, v, precision=exact, preferred_element_type=acc_ref.dtype)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        total, each = 0.0, len(products) // len(parities)
        for odd in range(len(parities)):
            part = acc_ref[odd * each]
            for j in range(1, each):
                part += acc_ref[odd * each + j] << (levels.DIGIT * j)
            total += part.astype(jnp.float32) * (levels.SQRT2 if odd else 1.0)
        y_ref[0] = (total * (2.0 ** -o["fraction"] if integer else 1.0)).astype(y_ref.dtype)


def attend(spec: Spec, codes, v) -> jax.Array:
    o, (b, r, c), d = spec.options, codes.shape, v.shape[2]
    integer = v.dtype == jnp.int8
    out = jnp.float32 if integer else v.dtype
    v = v.astype(jnp.float32) if v.dtype == jnp.float16 else v
    found = tuned.blocks(spec, "pallas_tpu", {"rows": 128, "columns": 512, "values": 256})
    rows, columns, values = min(found["rows"], r), min(found["columns"], c), min(found["values"], d)
    num = levels.STEPS[o["base"]] * (levels.num_digits(o["fraction"]) if integer else 1)

    def body(*refs):
        attend_kernel(*refs, o=o, c=c)

    y = pl.pallas_call(
        body,
        grid=(b, pl.cdiv(r, rows), pl.cdiv(d, values), pl.cdiv(c, columns)),
        in_specs=[
            pl.BlockSpec((1, rows, columns), lambda i, j, n, k: (i, j, k)),
            pl.BlockSpec((1, columns, values), lambda i, j, n, k: (i, k, n)),
        ],
        out_specs=pl.BlockSpec((1, rows, values), lambda i, j, n, k: (i, j, n)),
        out_shape=jax.ShapeDtypeStruct((b, r, d), jnp.float32 if integer else v.dtype),
        scratch_shapes=[pltpu.VMEM((num, rows, values), jnp.int32 if integer else jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=spec.interpret,
    )(codes, v)
    return y.astype(out)


IMPL = Impl("pallas_tpu", why_not, run)
ATTEND = Impl("pallas_tpu", why_not, attend)
