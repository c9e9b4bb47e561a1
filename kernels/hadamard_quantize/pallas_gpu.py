"""The transform on a Hopper GPU (Mosaic GPU): two Kronecker factors as two warpgroup products.

A block of n = a c columns, seen as an a x c matrix X (memory as it is), is transformed as S_a X H_c^T. 64
rows of width c, that is 64 / a blocks, make one tile: the left factor is I (x) S_a, 64 x 64. Both factors
are exact in bf16; the tile, and again the product with the right factor, is cut into bf16 pieces whose sum
has 16 bits (16-bit x; error 2^-17 before the second product) or all 24 (f32). Each warpgroup keeps the
factors in shared memory and walks over tiles.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlab.kernels.common import gpu, grid, layout, tuned
from qlab.kernels.common.dispatch import Impl, Spec, needs
from qlab.kernels.hadamard_quantize import matrices, reference

ROWS = 64  # of a warpgroup product
PIECES = {"bfloat16": (1, 2), "float16": (2, 2), "float32": (3, 3)}  # of x, of the first product


def split(x: jax.Array, count: int) -> list[jax.Array]:
    """`count` bf16 arrays that sum to x: 8 bits of the mantissa each by masking, the last rounded."""
    out, rest = [], x
    for _ in range(count - 1):
        bits = lax.bitcast_convert_type(rest, jnp.int32) & np.int32(-65536)
        head = lax.bitcast_convert_type(bits, jnp.float32)
        out.append(head.astype(jnp.bfloat16))
        rest = rest - head
    return [*out, rest.astype(jnp.bfloat16)]


def _transforms(c: int):
    swizzle = plgpu.find_swizzle(c * 16)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def plan(spec: Spec) -> tuple[int, str]:
    """(c, "" or why no width of a tile will do)."""
    k, (bits, block) = spec.dims["k"], (spec.options["bits"], spec.options["block"])
    m, stages = matrices.decompose(block)
    widths = [m << j for j in range(stages + 1)]
    widths = [c for c in widths if c % 16 == 0 and c <= 256 and block // c <= ROWS]
    if not widths:
        return 0, f"block={block} is no a x c with a <= {ROWS}, c <= 256 and c % 16 == 0"
    first = [c for c in widths if c == block and c <= 128]
    why = ""
    for c in [*first, *widths]:
        rows = k // c  # of a token
        held = max(rows, ROWS) * c if bits and bits < 8 and rows > 1 else 0
        shared = 2 * c * c + 2 * ROWS * c * max(PIECES[spec.dtypes["x"]]) + 2 * ROWS * ROWS + held
        if shared > gpu.SHARED:
            why = (
                f"tiles of {c} columns need {shared} bytes of shared memory, there are {gpu.SHARED}"
            )
        elif bits and rows != 1 and (rows < 8 or (ROWS % rows and rows % ROWS)):
            why = f"a token of K={k} is {rows} rows of a tile; 1, 8, 16, 32 or a multiple of 64 fit"
        elif bits and bits < 8:
            least = min(p for p, _ in layout.parts(bits))
            plane = c * least // 8 if rows == 1 else rows * least // 8 * c
            whole = (rows == 1 or rows * least % 8 == 0) and plane % (8 if rows == 1 else 128) == 0
            if whole and plane:
                return c, ""
            why = f"planes of {k * least // 8} columns do not fill the threads"
        else:
            return c, ""
    return 0, why


def _kernel(x_ref, h_ref, l_ref, *rest, c, block, k, bits, tiles, total, ctas, counts, interpret):
    num_outs = 1 if not bits else 1 + len(layout.parts(bits))
    outs, (h, left, barrier, held, *buffers) = rest[:num_outs], rest[num_outs:]
    plgpu.copy_gmem_to_smem(h_ref, h, barrier)
    plgpu.copy_gmem_to_smem(l_ref, left, barrier)
    plgpu.barrier_wait(barrier)
    how, shape = plgpu.Layout.WGMMA, (ROWS, c)
    cast = (lambda v: v) if interpret else (lambda v: plgpu.layout_cast(v, how))

    def product(pairs):
        def body(acc):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)
            plgpu.wgmma_wait(0)
            return acc[...]

        return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))

    def put(value, count):
        for ref, piece in zip(buffers, split(value, count), strict=False):
            ref[...] = piece
        plgpu.commit_smem()
        return buffers[:count][::-1]  # the small ones are added first

    def transform(start):
        x = gpu.load(x_ref, (pl.ds(start, ROWS), slice(None)), how, interpret)
        y = product([(p, h) for p in put(x.astype(jnp.float32), counts[0])])
        if block > c:
            y = product([(left, p) for p in put(y, counts[1])])
        return y * np.float32(block**-0.5)

    options = {"bits": bits, **reference.GRID}
    token_rows = k // c if bits else 1

    def most(v):
        return v.max(1).max(0)  # one axis at a time is what lowers

    def absolute(v):
        return jnp.abs(grid.finite(v, jnp.inf))

    def write(code, start, at):
        """Codes of a tile: 8 bits go out, fewer are merged, in registers or once the token is held."""
        if bits == 8:
            outs[0][pl.ds(start, ROWS), :] = (code - 128).astype(jnp.int8)
        elif token_rows == 1:
            width = c * min(p for p, _ in layout.parts(bits)) // 8
            chunks = [code[:, i : i + width] for i in range(0, c, width)]
            for out, merged in zip(outs, gpu.merge(chunks, bits), strict=False):
                for i, byte in enumerate(merged):
                    out[pl.ds(start, ROWS), pl.ds(i * width, width)] = byte
        else:
            held[pl.ds(at, ROWS), :] = code.astype(jnp.uint8)

    def write_token(token, at):
        """The token whose codes lie in rows at, at + 1, ... of `held`."""
        if bits == 8 or token_rows == 1:
            return
        rows = token_rows * min(p for p, _ in layout.parts(bits)) // 8
        chunks = [
            held[pl.ds(at + i, rows), :].astype(jnp.int32) for i in range(0, token_rows, rows)
        ]
        parts = layout.parts(bits)
        for (p, _), out, merged in zip(parts, outs, gpu.merge(chunks, bits), strict=False):
            for i, byte in enumerate(merged):
                out[pl.ds(token * (token_rows * p // 8) + i * rows, rows), :] = byte

    def one(tile):
        """A tile of whole tokens, or (token_rows > 64) one token."""
        if token_rows > ROWS:
            starts = [tile * token_rows + i for i in range(0, token_rows, ROWS)]
            amax = functools.reduce(jnp.maximum, [most(absolute(transform(s))) for s in starts])
            scale = grid.absmax_scale(amax, bits)
            outs[-1][tile] = scale
            for i, s in enumerate(starts):  # made again rather than kept
                write(grid.codes(transform(s), 1.0 / scale, None, None, options), s, i * ROWS)
            write_token(tile, 0)
            return
        start = jnp.minimum(tile * ROWS, total - ROWS)  # the last tile may repeat rows, alike
        y = transform(start)
        if not bits:
            outs[0][pl.ds(start, ROWS), :] = y.astype(outs[0].dtype)
            return
        if token_rows == 1:
            scale = grid.absmax_scale(absolute(y).max(1), bits)
            outs[-1][pl.ds(start, ROWS)] = scale
            inverse = cast(lax.broadcast_in_dim(1.0 / scale, shape, (0,)))
            write(grid.codes(y, inverse, None, None, options), start, 0)
            return
        num = ROWS // token_rows
        owner = (
            lax.div(gpu.iota(shape, 0, how, interpret), jnp.int32(token_rows)) if num > 1 else None
        )
        inverse = None
        for t in range(num):
            mine = absolute(y) if owner is None else jnp.where(owner == t, absolute(y), 0.0)
            scale = grid.absmax_scale(most(mine), bits)
            outs[-1][lax.div(start, token_rows) + t] = scale
            inverse = (
                1.0 / scale if inverse is None else jnp.where(owner == t, 1.0 / scale, inverse)
            )
        write(grid.codes(y, inverse, None, None, options), start, 0)
        for t in range(num):
            write_token(lax.div(start, token_rows) + t, t * token_rows)

    def step(i, _):
        one(jnp.minimum(lax.axis_index("cta") + i * ctas, tiles - 1))

    lax.fori_loop(0, pl.cdiv(tiles, ctas), step, None)


def run(spec: Spec, x: jax.Array):
    o, (n, k) = spec.options, x.shape
    bits, block, c = o["bits"], o["block"], plan(spec)[0]
    token_rows, rows = k // c, n * (k // c)
    total = max(rows, ROWS)
    x = jnp.pad(x.reshape(rows, c), ((0, total - rows), (0, 0)))
    parts = layout.parts(bits) if bits else ()
    if not bits:
        shapes = [jax.ShapeDtypeStruct((total, c), x.dtype)]
    elif bits == 8:
        shapes = [jax.ShapeDtypeStruct((total, c), jnp.int8)]
    elif token_rows == 1:
        shapes = [jax.ShapeDtypeStruct((total, c * p // 8), jnp.uint8) for p, _ in parts]
    else:
        shapes = [jax.ShapeDtypeStruct((total * p // 8, c), jnp.uint8) for p, _ in parts]
    if bits:
        shapes.append(jax.ShapeDtypeStruct((total // token_rows,), jnp.float32))
    spans = bits and token_rows > ROWS
    tiles = n if spans else pl.cdiv(total, ROWS)
    ctas = min(tiles, tuned.blocks(spec, "pallas_gpu", {"ctas": 264})["ctas"])
    counts, transforms = PIECES[spec.dtypes["x"]], _transforms(c)
    left = np.kron(np.eye(ROWS * c // block or 1, dtype=np.int8), matrices.sylvester(block // c))
    right = matrices.dense(c)
    scratch = [
        plgpu.SMEM((c, c), jnp.bfloat16, transforms=transforms),
        plgpu.SMEM((ROWS, ROWS), jnp.bfloat16, transforms=transforms),
        plgpu.Barrier(num_arrivals=2),
        plgpu.SMEM(
            (max(token_rows, ROWS) if bits and bits < 8 and token_rows > 1 else 8, c), jnp.uint8
        ),
        *[plgpu.SMEM((ROWS, c), jnp.bfloat16, transforms=transforms) for _ in range(max(counts))],
    ]
    outs = plgpu.kernel(
        functools.partial(
            _kernel, c=c, block=block, k=k, bits=bits, tiles=tiles, total=total, ctas=ctas,
            counts=counts, interpret=spec.interpret,
        ),
        out_type=shapes,
        scratch_types=scratch,
        grid=(ctas,),
        grid_names=("cta",),
        interpret=gpu.interpreter() if spec.interpret else None,
    )(
        x,
        jnp.asarray(right if o["inverse"] else right.T, jnp.bfloat16),
        jnp.asarray(left[:ROWS, :ROWS], jnp.bfloat16),
    )  # fmt: skip
    if not bits:
        return outs[0][:rows].reshape(n, k)
    parts = [(8, 0)] if bits == 8 else parts
    codes = [
        a.reshape(-1)[: n * k * p // 8].reshape(n, -1)
        for (p, _), a in zip(parts, outs[:-1], strict=True)
    ]
    return (jnp.concatenate(codes, 1) if len(codes) > 1 else codes[0]), outs[-1][:n, None]


def why_not(spec: Spec) -> str:
    return plan(spec)[1] or needs(spec, "gpu")


IMPL = Impl("pallas_gpu", why_not, run)
