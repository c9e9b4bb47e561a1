"""The product on TPUs: groups along the lanes, x gathered by the lane gather, rows summed on the MXU.

Groups, not columns, lie along the 128 lanes: the codes enter transposed [bytes, nnz], which costs nothing,
because XLA stores a narrow u8[nnz, 8] that way already. x enters as [M, K / G / 128, G, 128], one lane a
column group, so one lane gather fetches 128 groups' x for 8 columns at once. The partial dot of each
group goes to its row by a product with a 0/1 matrix over windows of 128 rows; which windows a chunk
touches is prefetched as scalars. Chunks have equal numbers of groups whatever the row lengths. The grid
runs in order on a core, so a row split over chunks is completed in place; the `cores` parts (two cores on
v4 and v5p share a chip) are added up afterwards.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qlab.kernels.common import layout, tuned
from qlab.kernels.common.dispatch import Impl, Spec, needs
from qlab.kernels.group_sparse_matmul.bsr import make_plan
from qlab.kernels.group_sparse_matmul.reference import finish

CHUNK = 1024  # groups a grid step
MAX_M = 64
LANES = 128
ROWS = 8
VMEM = 12 * 2**20  # of the 16 MB that a kernel gets by default on v5e; the rest is the compiler's
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")


def vmem_bytes(m: int, k: int, n: int, group: int, chunk: int) -> int:
    """What the kernel keeps: x and y twice (double buffers), the chunk's weights and partial sums."""
    x = m * -(-k // group // LANES) * group * LANES
    y = max(m, 8) * -(-n // LANES) * LANES
    return 4 * (2 * x + 2 * y + 3 * group * chunk + max(m, 8) * chunk + LANES * chunk)


def why_not(spec: Spec) -> str:
    o, d = spec.options, spec.dims
    if why := needs(spec, "tpu"):
        return why
    if 0 in d.values():
        return "an empty operand"
    if d["m"] > MAX_M:
        return f"M={d['m']} > {MAX_M}: making the weight dense once (xla) is the better algorithm"
    chunk = o["chunk"] or CHUNK
    if chunk % LANES:
        return f"plan of chunk={chunk}, not a multiple of {LANES} lanes"
    need = vmem_bytes(d["m"], d["k"], d["n"], o["group"], chunk)
    if need > VMEM:
        return (
            f"x, y and a chunk of {chunk} groups need {need} bytes of VMEM, {VMEM} are planned for"
        )
    return ""


def unpacked(ref, bits: int, group: int) -> jax.Array:
    """f32[G, T], columns of a group in order, from packed bytes [row_bytes, T].

    Bytes are widened before any shift: 8-bit shifts do not exist on the vector unit.
    """
    code, start = 0, 0
    for width, first in layout.parts(bits):
        nb = layout.part_bytes(group, group, width)
        byte = ref[start : start + nb, :].astype(jnp.int32)
        planes = [(byte >> (width * j)) & (2**width - 1) for j in range(8 // width)]
        code += (jnp.concatenate(planes, 0) if len(planes) > 1 else planes[0]) << first
        start += nb
    return code.astype(jnp.float32)


def kernel(low_ref, high_ref, row_ref, x_ref, col_ref, codes_ref, scale_ref, zero_ref, y_ref, part_ref,
           *, bits, group, nnz):  # fmt: skip
    """y: f32[1, M, N'] of one core; part: f32[M, T] scratch."""
    step = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    m, num_tiles, _, _ = x_ref.shape
    chunk = col_ref.shape[1]

    @pl.when(pl.program_id(1) == 0)
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    live = step * chunk + jax.lax.broadcasted_iota(jnp.int32, (1, chunk), 1) < nnz
    col = jnp.where(live, col_ref[...].astype(jnp.int32), 0)
    w = unpacked(codes_ref, bits, group)
    w = w - (2.0 ** (bits - 1) if zero_ref is None else zero_ref[...])
    scale = scale_ref[...]

    def partial_dots(i):
        """f32[1, T]: each group's product with row i of x."""
        out = []
        for at in range(0, chunk, LANES):
            here = slice(at, at + LANES)
            index = jnp.broadcast_to(col[:, here] & (LANES - 1), (group, LANES))
            tile = col[:, here] >> 7

            def gathered(t, total):
                kept = jnp.take_along_axis(x_ref[i, t], index, axis=1, mode="promise_in_bounds")
                return jnp.where(tile == t, kept, total)

            x = jnp.zeros((group, LANES), jnp.float32)
            if num_tiles == 1:
                x = gathered(0, x)
            else:
                x = jax.lax.fori_loop(0, num_tiles, gathered, x)
            dot = (x * w[:, here]).sum(0, keepdims=True) * scale[:, here]
            out.append(jnp.where(live[:, here], dot, 0.0))
        return jnp.concatenate(out, 1)

    if m <= ROWS:
        part_ref[...] = jnp.concatenate([partial_dots(i) for i in range(m)], 0)
    else:  # a store at a dynamic place writes whole tiles of 8 rows

        @pl.loop(0, m // ROWS)
        def _(i):
            at = pl.multiple_of(i * ROWS, ROWS)
            rows = jnp.concatenate([partial_dots(at + r) for r in range(ROWS)], 0)
            part_ref[pl.ds(at, ROWS), :] = rows

    part, row = part_ref[...], row_ref[...]

    @pl.loop(low_ref[step], high_ref[step] + 1)
    def _(window):
        at = pl.multiple_of(window * LANES, LANES)
        ours = at + jax.lax.broadcasted_iota(jnp.int32, (LANES, chunk), 0) == row
        y_ref[0, :, pl.ds(at, LANES)] += jax.lax.dot_general(
            part,
            ours.astype(jnp.float32),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )


def run(
    spec: Spec, x, row_ptr, col_idx, codes, scale, zero, bias, row, slot, chunk_rows
) -> jax.Array:
    o, nnz, n, (m, k) = spec.options, col_idx.shape[0], row_ptr.shape[0] - 1, x.shape
    group = o["group"]
    block = tuned.blocks(
        spec, "pallas_tpu", {"chunk": CHUNK, "cores": 1 + (spec.device in TWO_CORES)}
    )
    if row is None:
        row, _, chunk_rows = make_plan(row_ptr, nnz, block["chunk"])
    p = chunk_rows.shape[0]
    chunk = row.shape[1] // p
    cores = block["cores"] if p >= block["cores"] else 1
    steps = -(-p // cores)
    # The windows of each chunk; one without groups has none.
    low = jnp.pad(chunk_rows[:, 0] // LANES, (0, cores * steps - p))
    high = jnp.where(chunk_rows < n, chunk_rows, 0).max(1) // LANES
    high = jnp.pad(high, (0, cores * steps - p), constant_values=-1)

    m_all = m if m <= ROWS else -(-m // ROWS) * ROWS
    x = jnp.pad(x, ((0, m_all - m), (0, 0)))
    tiles = -(-k // group // LANES)
    xt = jnp.swapaxes(x.astype(jnp.float32).reshape(m_all, k // group, group), 1, 2)
    xt = jnp.pad(xt, ((0, 0), (0, 0), (0, tiles * LANES - k // group)))
    xt = jnp.swapaxes(xt.reshape(m_all, group, tiles, LANES), 1, 2)
    width = -(-n // LANES) * LANES

    last = p - 1  # blocks past the end are not read: they have no groups
    lanes = lambda rows: pl.BlockSpec(  # noqa: E731
        (rows, chunk), lambda c, s, *_: (0, jnp.minimum(c * steps + s, last))
    )
    flat = lambda a: a.astype(jnp.float32)[None]  # noqa: E731
    operands = [row, xt, col_idx[None], codes.T, flat(scale)]
    specs = [
        lanes(1),
        pl.BlockSpec(xt.shape, lambda c, s, *_: (0, 0, 0, 0)),
        lanes(1),
        lanes(codes.shape[1]),
        lanes(1),
    ]
    if zero is not None:
        operands.append(flat(zero))
        specs.append(lanes(1))

    def body(*refs):
        refs = refs if zero is not None else (*refs[:7], None, *refs[7:])
        kernel(*refs, bits=o["bits"], group=group, nnz=nnz)

    y = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, steps),
            in_specs=specs,
            out_specs=pl.BlockSpec((1, m_all, width), lambda c, s, *_: (c, 0, 0)),
            scratch_shapes=[pltpu.VMEM((m_all, chunk), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((cores, m_all, width), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=spec.interpret,
    )(low, high, *operands)
    return finish(y.sum(0)[:m, :n], bias, x.dtype)


IMPL = Impl("pallas_tpu", why_not, run)
