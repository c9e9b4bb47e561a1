"""The product on GPUs: one program a chunk of groups, x gathered by column, one partial sum a touched row.

Through Triton: Mosaic GPU lowers no gather with an index array, and a group of 16 columns is too small
for a copy of its own.

A program reads its chunk's codes in one coalesced tile, plane by plane of the packed layout, gathers the
matching columns of x (x stays in L1/L2), and sums by row with a compare against the slots of its chunk.
The rows that a chunk touches are few, so the partial sums are small; XLA adds them up (the fix-up).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qlab.kernels.common import layout, tuned
from qlab.kernels.common.dispatch import Impl, Spec, needs
from qlab.kernels.group_sparse_matmul.bsr import fix_up, make_plan
from qlab.kernels.group_sparse_matmul.reference import finish

CHUNK = 128  # groups a program: 2048 weights at G = 16, 16 a thread
MAX_M = 64


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def why_not(spec: Spec) -> str:
    o, d = spec.options, spec.dims
    if why := needs(spec, "gpu"):
        return why
    if not is_power_of_two(o["group"]):
        return f"group={o['group']} is not a power of two (Triton tiles)"
    if o["chunk"] and not is_power_of_two(o["chunk"]):
        return f"plan of chunk={o['chunk']}, not a power of two (Triton tiles); use 128"
    if d["m"] > MAX_M:
        return f"M={d['m']} > {MAX_M}: making the weight dense once (xla) is the better algorithm"
    if 0 in d.values():
        return "an empty operand"
    return ""


def kernel(x_ref, col_ref, codes_ref, scale_ref, zero_ref, slot_ref, out_ref, *, bits, group, nnz):
    """out: f32[P, M, R]; the program's own [M, R] is written."""
    from jax.experimental.pallas import triton as plt

    p, m = pl.program_id(0), x_ref.shape[0]
    chunk, num_slots = slot_ref.shape[1], out_ref.shape[2]
    task = p * chunk + jnp.arange(chunk)
    live = task < nnz
    col = plt.load(col_ref.at[task], mask=live, other=0).astype(jnp.int32) * group
    scale = plt.load(scale_ref.at[task], mask=live, other=0).astype(jnp.float32)
    if zero_ref is None:
        zero = jnp.full((chunk,), 2.0 ** (bits - 1), jnp.float32)
    else:
        zero = plt.load(zero_ref.at[task], mask=live, other=0).astype(jnp.float32)
    slot = plt.load(slot_ref.at[p, pl.ds(0, chunk)])
    own = slot[:, None] == jnp.arange(num_slots)[None, :]

    planes, start = [], 0  # (first column of the plane in its group, weights f32[chunk, bytes])
    for width, first in layout.parts(bits):
        nb = layout.part_bytes(group, group, width)
        at = (task[:, None], start + jnp.arange(nb)[None, :])
        byte = plt.load(
            codes_ref.at[at], mask=jnp.broadcast_to(live[:, None], (chunk, nb)), other=0
        )
        byte = byte.astype(jnp.int32)
        for j in range(8 // width):
            q = ((byte >> (width * j)) & (2**width - 1)).astype(jnp.float32) * 2.0**first
            planes.append((j * nb, q - zero[:, None] if first == 0 else q))
        start += nb

    @pl.loop(0, m)
    def _(i):
        total = jnp.zeros((chunk,), jnp.float32)
        for first, w in planes:
            at = col[:, None] + (first + jnp.arange(w.shape[1]))[None, :]
            total += (plt.load(x_ref.at[i, at]).astype(jnp.float32) * w).sum(1)
        total = jnp.where(own, (total * scale)[:, None], 0.0).sum(0)
        plt.store(out_ref.at[p, i, pl.ds(0, num_slots)], total)


def run(
    spec: Spec, x, row_ptr, col_idx, codes, scale, zero, bias, row, slot, chunk_rows
) -> jax.Array:
    from jax.experimental.pallas import triton as plt

    o, nnz, n = spec.options, col_idx.shape[0], row_ptr.shape[0] - 1
    block = tuned.blocks(spec, "pallas_gpu", {"chunk": CHUNK, "warps": 4, "stages": 2})
    if row is None:
        _, slot, chunk_rows = make_plan(row_ptr, nnz, block["chunk"])
    p, num = chunk_rows.shape
    pad = pl.next_power_of_2(num) - num
    chunk_rows = jnp.pad(chunk_rows, ((0, 0), (0, pad)), constant_values=n)

    def body(*refs):
        refs = refs if zero is not None else (*refs[:4], None, *refs[4:])
        kernel(*refs, bits=o["bits"], group=o["group"], nnz=nnz)

    partial = pl.pallas_call(
        body,
        grid=(p,),
        out_shape=jax.ShapeDtypeStruct((p, x.shape[0], num + pad), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=block["warps"], num_stages=block["stages"]),
        interpret=spec.interpret,
    )(x, col_idx, codes, scale, *(() if zero is None else (zero,)), slot)
    y = fix_up(jnp.swapaxes(partial, 1, 2), chunk_rows, n)
    return finish(y.T, bias, x.dtype)


IMPL = Impl("pallas_gpu", why_not, run)
