"""The transform on a TPU: small Hadamard factors on the matrix unit, the rest as sums of whole registers.

A row is cut into slabs of W columns, whole registers wide: 128 for a power of two, 32 m for a base m. One
matrix product with a W x W matrix of +-1 transforms all slabs, then Sylvester's stages add and subtract
slabs. +-1 is exact in bf16; x is cut into as many bf16 pieces as its mantissa needs (bf16 1, f32 3),
so that every product is exact and only the sums, in float32, are rounded. Rows that are not whole slabs
take one dense matrix of the whole row, up to MOST_DENSE columns.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qlab.kernels.common import grid, layout, tpu, tuned
from qlab.kernels.common.dispatch import Impl, Spec, needs
from qlab.kernels.hadamard_quantize import matrices, reference

MOST_DENSE = 1024
MOST_COLUMNS = 32768
VMEM = 64 * 2**20


def pieces(x: jax.Array) -> list[jax.Array]:
    """bf16 arrays whose sum is x exactly: 8 bits of the mantissa each, cut off rather than rounded.

    By masking the bits: converting to bf16 and back is a step that compilers may leave out.
    """
    if x.dtype == jnp.bfloat16:
        return [x]
    rest, out = x.astype(jnp.float32), []
    for _ in range(2):
        bits = lax.bitcast_convert_type(rest, jnp.int32) & np.int32(-65536)
        head = lax.bitcast_convert_type(bits, jnp.float32)
        out.append(head.astype(jnp.bfloat16))
        rest = rest - head
    return [*out, rest.astype(jnp.bfloat16)]


def slab(k: int, block: int) -> tuple[int, np.ndarray] | None:
    """(W, the W x W matrix of +-1 that acts on slabs); None if the row takes neither form."""
    m, _ = matrices.decompose(block)
    wide = tpu.LANES if m == 1 else 32 * m
    if block % wide == 0 and wide <= MOST_DENSE:
        return wide, matrices.dense(wide)
    if m == 1 and k % tpu.LANES == 0 and block < tpu.LANES:  # several blocks in a register
        return tpu.LANES, np.kron(np.eye(tpu.LANES // block, dtype=np.int8), matrices.dense(block))
    if k <= MOST_DENSE:
        return k, np.kron(np.eye(k // block, dtype=np.int8), matrices.dense(block))
    return None


def _kernel(x_ref, h_ref, *outs, block, bits):
    wide, k = h_ref.shape[0], x_ref.shape[1]
    y = []
    for at in range(0, k, wide):
        dots = [
            jnp.dot(p, h_ref[...], preferred_element_type=jnp.float32)
            for p in pieces(x_ref[:, at : at + wide])
        ]
        y.append(functools.reduce(lax.add, dots[::-1]))  # the small ones first
    step = 1
    while step * wide < block:
        for i in range(len(y)):
            if not i & step:
                y[i], y[i + step] = y[i] + y[i + step], y[i] - y[i + step]
        step *= 2
    y = [v * np.float32(block**-0.5) for v in y]
    if not bits:
        for i, v in enumerate(y):
            outs[0][:, i * wide : (i + 1) * wide] = v.astype(outs[0].dtype)
        return
    most = [jnp.abs(grid.finite(v, jnp.inf)).max(1, keepdims=True) for v in y]
    scale = grid.absmax_scale(functools.reduce(jnp.maximum, most), bits)
    outs[-1][...] = scale
    options = {"bits": bits, **reference.GRID}
    code = [grid.codes(v, 1.0 / scale, None, None, options) for v in y]
    if bits == 8:
        for i, c in enumerate(code):
            outs[0][:, i * wide : (i + 1) * wide] = (c - 128).astype(jnp.int8)
        return
    code = jnp.concatenate(code, 1) if len(code) > 1 else code[0]
    if k % tpu.LANES:
        code = jnp.pad(code, ((0, 0), (0, -k % tpu.LANES)))
    for (p, first), out in zip(layout.parts(bits), outs, strict=False):
        out[...] = tpu.row_bytes_of(code, p, first, out.shape[1])


def run(spec: Spec, x: jax.Array):
    o, (n, k) = spec.options, x.shape
    bits, block = o["bits"], o["block"]
    wide, h = slab(k, block)
    rows = tuned.blocks(spec, "pallas_tpu", {"rows": max(32, min(256, 2**18 // k // 32 * 32))})
    rows = min(rows["rows"], -(-n // 8) * 8)
    if not bits:
        sizes = [(k, x.dtype)]
    elif bits == 8:
        sizes = [(k, jnp.int8), (1, jnp.float32)]
    else:
        sizes = [(layout.part_bytes(k, 0, p), jnp.uint8) for p, _ in layout.parts(bits)]
        sizes.append((1, jnp.float32))
    outs = pl.pallas_call(
        functools.partial(_kernel, block=block, bits=bits),
        grid=(pl.cdiv(n, rows),),
        in_specs=[
            pl.BlockSpec((rows, k), lambda i: (i, 0)),
            pl.BlockSpec((wide, wide), lambda i: (0, 0)),
        ],
        out_specs=[pl.BlockSpec((rows, size), lambda i: (i, 0)) for size, _ in sizes],
        out_shape=[jax.ShapeDtypeStruct((n, size), dtype) for size, dtype in sizes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM
        ),
        interpret=spec.interpret,
    )(x, jnp.asarray(h if o["inverse"] else h.T, jnp.bfloat16))
    if not bits:
        return outs[0]
    codes = outs[:-1]
    return (jnp.concatenate(codes, 1) if len(codes) > 1 else codes[0]), outs[-1]


def why_not(spec: Spec) -> str:
    k, block = spec.dims["k"], spec.options["block"]
    if spec.dtypes["x"] == "float16":
        return "a TPU has no float16; use bfloat16 or float32"
    if slab(k, block) is None:
        return f"block={block} is not whole slabs of registers and K={k} is above {MOST_DENSE}"
    if k > MOST_COLUMNS:
        return f"K={k}; rows above {MOST_COLUMNS} columns do not fit into VMEM"
    return needs(spec, "tpu")


IMPL = Impl("pallas_tpu", why_not, run)
