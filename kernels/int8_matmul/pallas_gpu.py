"""The product for Hopper GPUs: TMA brings int8 tiles to shared memory, wgmma multiplies them into int32 registers.

wgmma takes 64 rows of its left operand at once and 8 to 256 columns of its right one. With many tokens the
left operand is x; with few it is the weights, so no row of the unit idles, and the kernel writes y
transposed. One warpgroup loads, the others multiply; K is contiguous in both operands, as int8 wgmma needs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlab.kernels.common import dispatch, gpu, tuned
from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.int8_matmul import epilogue, reference

SMEM_BYTES = 227 << 10
STAGE_BYTES = 128  # of a row of the result that one warpgroup stages in shared memory at a time
CORES = 132  # of the H100 and H200: fewer blocks than that leave some idle


class Tiles(NamedTuple):
    """A warpgroup multiplies `rows` x `columns`, `groups` of them stacked by rows; `k` codes a step.

    swap: the left operand is w and the result y.T. steps: tiles in flight. band: width, in tiles, of the
    band of columns that is walked before the next one (reuse in L2).
    """

    swap: int
    groups: int
    rows: int
    columns: int
    k: int
    steps: int
    band: int


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def heuristic(m: int, k: int, n: int) -> Tiles:
    """Up to 64 tokens: weights left, 64 of them a block, so that many blocks stream.

    Else 128 tokens a block by the most weights (256, 128, 64) that still give every core a block.

    >>> heuristic(1, 8192, 8192)
    Tiles(swap=1, groups=1, rows=64, columns=16, k=128, steps=8, band=1)
    >>> heuristic(4096, 4096, 4096), heuristic(256, 4096, 4096).columns
    (Tiles(swap=0, groups=2, rows=64, columns=256, k=128, steps=4, band=8), 64)
    """
    if m <= 64:
        return Tiles(1, 1, 64, next(c for c in (16, 32, 64) if m <= c), 128, 8, 1)
    blocks = {c: -(-m // 128) * -(-n // c) for c in (256, 128, 64)}
    columns = next((c for c, num in blocks.items() if num >= CORES), 64)
    return Tiles(0, 2, 64, columns, 128, 4, 8)


def tiles(spec: Spec) -> Tiles:
    d = spec.dims
    default = heuristic(d["m"], d["k"], d["n"])._asdict()
    return Tiles(**tuned.blocks(spec, "pallas_gpu", default))


def stage_columns(spec: Spec, t: Tiles) -> int:
    return min(t.columns, STAGE_BYTES // jnp.dtype(spec.options["out"]).itemsize)


def smem_bytes(spec: Spec, t: Tiles) -> int:
    """Tiles in flight, two staging tiles of the result for each warpgroup, and 1 KiB for barriers."""
    out = jnp.dtype(spec.options["out"]).itemsize
    stage = 2 * t.groups * t.rows * stage_columns(spec, t) * out
    return t.steps * (t.groups * t.rows + t.columns) * t.k + stage + 1024


def why_not(spec: Spec) -> str:
    if why := dispatch.needs(spec, "gpu"):
        return why
    if not spec.interpret and not any(h in spec.device for h in gpu.HOPPER):
        return f"{spec.device} is no Hopper GPU (compute capability 9.0), and wgmma is Hopper's"
    t = tiles(spec)
    need = smem_bytes(spec, t)
    return "" if need <= SMEM_BYTES else f"{t} needs {need} bytes of shared memory of {SMEM_BYTES}"


def _swizzled(minor: int, bits: int) -> tuple:
    """The SMEM layout of a tile whose rows hold `minor` numbers of `bits` bits."""
    swizzle = plgpu.find_swizzle(minor * bits)
    return (
        plgpu.TilingTransform((8, 8 * swizzle // bits)),
        plgpu.SwizzleTransform(swizzle),
    )


def kernel(*refs, names: tuple[str, ...], t: Tiles, activation: str | None, interpret: bool):
    """refs: those named (x [M, K], w [N, K], vectors), the result in device memory, staging tiles.

    All sizes are multiples of the tiles.
    """
    o = epilogue.Operands(**dict.fromkeys(epilogue.Operands._fields))
    o = o._replace(**dict(zip(names, refs[:-2], strict=True)))
    out, stage = refs[-2:]
    left, right = (o.w, o.x) if t.swap else (o.x, o.w)
    k = left.shape[1]
    per_left = epilogue.COLUMNS if t.swap else epilogue.ROWS
    block_rows = t.groups * t.rows
    width = stage.shape[-1]
    right_axis = 1 if interpret else 0
    shape = (left.shape[0] // block_rows, right.shape[right_axis] // t.columns)
    i, j = plgpu.planar_snake(lax.axis_index("tile"), shape, 1, min(t.band, shape[1]))
    group = lax.axis_index("wg")
    row0 = i * block_rows + group * t.rows  # of this warpgroup
    column0 = j * t.columns

    def read(ref, at):
        # The interpreter knows no `load`, and plain indexing does not lower for device memory.
        return ref[at] if interpret else plgpu.load(ref, at, optimized=False)

    def store(acc):
        own = pl.ds(row0, t.rows)
        row = {v: read(getattr(o, v), own) for v in names[2:] if v in per_left}
        for number, first in enumerate(range(0, t.columns, width)):
            part = pl.ds(column0 + first, width)
            column = {v: read(getattr(o, v), part) for v in names[2:] if v not in row}
            spread = {v: lax.broadcast_in_dim(a, (t.rows, width), (0,)) for v, a in row.items()}
            for v, a in column.items():
                spread[v] = lax.broadcast_in_dim(a, (t.rows, width), (1,))
            some = acc[:, first : first + width]
            slot = stage.at[group, number % 2]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the slot's last copy has been read
            slot[...] = epilogue.finish(some, o._replace(**spread), activation, out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, out.at[own, part])

    def compute(pipeline):
        def scope(acc_ref):
            pipeline(acc_ref)
            return acc_ref[...]

        store(pl.run_scoped(scope, plgpu.ACC((t.rows, t.columns), jnp.int32)))

    def multiply(_, left_tile, right_tile, acc_ref):
        mine = left_tile.at[pl.ds(group * t.rows, t.rows)]
        if not interpret:
            right_tile = plgpu.transpose_ref(right_tile, (1, 0))
        plgpu.wgmma(acc_ref, mine, right_tile)
        plgpu.wgmma_wait(1)  # this step's product may still run; the tiles before it are free
        return acc_ref

    tile = dict(transforms=_swizzled(t.k, 8), delay_release=1)
    right_spec = plgpu.BlockSpec((t.columns, t.k), lambda s: (j, s), **tile)
    if interpret:  # which cannot transpose a Ref: it gets the right operand as [K, columns]
        right_spec = plgpu.BlockSpec((t.k, t.columns), lambda s: (s, j), delay_release=1)
    plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(k // t.k,),
        in_specs=[
            plgpu.BlockSpec((block_rows, t.k), lambda s: (i, s), **tile),
            right_spec,
        ],
        max_concurrent_steps=t.steps,
        memory_registers=40,
        wg_axis="wg",
        num_compute_wgs=t.groups,
        compute_context=compute,
    )(left, right)
    plgpu.wait_smem_to_gmem(0)


def _pad(a: jax.Array, *sizes: int) -> jax.Array:
    """a with zeros up to these sizes; itself where it has them."""
    more = [(0, size - n) for size, n in zip(sizes, a.shape, strict=True)]
    return jnp.pad(a, more) if any(hi for _, hi in more) else a


def run(spec: Spec, *arrays) -> jax.Array:
    if 0 in spec.dims.values():  # nothing to launch
        return reference.run(spec, *arrays)
    t = tiles(spec)
    m, n, k = spec.dims["m"], spec.dims["n"], spec.dims["k"]
    by_row, by_column = t.groups * t.rows, t.columns
    by_m, by_n = (by_column, by_row) if t.swap else (by_row, by_column)
    # Whole tiles only: a copy of an operand, but only where its size is no multiple of the tile.
    m_pad, n_pad, k_pad = round_up(m, by_m), round_up(n, by_n), round_up(k, t.k)
    o = epilogue.operands(spec, *arrays)
    put = {"x": _pad(o.x, m_pad, k_pad), "w": _pad(o.w, n_pad, k_pad)}
    put |= {v: _pad(getattr(o, v), m_pad) for v in epilogue.ROWS if getattr(o, v) is not None}
    put |= {v: _pad(getattr(o, v), n_pad) for v in epilogue.COLUMNS if getattr(o, v) is not None}
    names = ("x", "w", *(v for v in put if v not in ("x", "w")))
    shape = (n_pad, m_pad) if t.swap else (m_pad, n_pad)
    dtype = jnp.dtype(spec.options["out"])
    width = stage_columns(spec, t)
    call = plgpu.kernel(
        functools.partial(
            kernel,
            names=names,
            t=t,
            activation=spec.options["activation"],
            interpret=spec.interpret,
        ),
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=[
            plgpu.SMEM(
                (t.groups, 2, t.rows, width), dtype, transforms=_swizzled(width, 8 * dtype.itemsize)
            )
        ],
        grid=(shape[0] // by_row * (shape[1] // by_column),),
        grid_names=("tile",),
        num_threads=t.groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=gpu.interpreter() if spec.interpret else None,
    )
    if spec.interpret:
        right = "x" if t.swap else "w"
        put[right] = put[right].T
    y = call(*[put[name] for name in names])
    return (y.T if t.swap else y)[:m, :n]


IMPL = Impl("pallas_gpu", why_not, run)
