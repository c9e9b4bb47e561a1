"""The product for TPUs: int8 blocks into the MXU, int32 sums in VMEM over the K axis, epilogue on the last step.

Blocks need not divide the sizes. What lies beyond M or N is never written; beyond K, garbage in x would
be added, so the last K step zeroes it there (garbage in w then meets zeros, and integers have no NaN).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qlab.kernels.common import dispatch, tuned
from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.int8_matmul import epilogue, reference

NO_INT8 = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")  # their compiler knows no int8 product
STRIP = 32  # rows the epilogue takes at a time: its values stay in registers
VMEM_BYTES = 12 << 20  # of the 16 MiB that a kernel may take by default on the smallest generation


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def heuristic(m: int, k: int, n: int) -> dict[str, int]:
    """Large products: 512 x 1024 sums, K by 1024. Few tokens: long K blocks, the weights are the traffic.

    >>> heuristic(4096, 4096, 4096), heuristic(1, 8192, 8192)
    ({'m': 512, 'n': 1024, 'k': 1024}, {'m': 1, 'n': 512, 'k': 4096})
    """
    few = m <= 64
    n_block, k_block = (512, 4096) if few else (1024, 1024)
    return {
        "m": m if few else min(512, round_up(m, 32)),
        "n": min(n_block, round_up(n, 128)),  # never 1, which Mosaic takes for a vector
        "k": min(k_block, round_up(k, 128)),
    }


def written(spec: Spec):
    """The dtype the kernel writes: a TPU has no float16 vectors, so XLA narrows that afterwards."""
    out = jnp.dtype(spec.options["out"])
    return jnp.dtype(jnp.float32) if out == jnp.float16 else out


def vmem_bytes(spec: Spec, b: dict[str, int]) -> int:
    """Two buffers of each operand and of the result, and the sums; rows padded to 32, columns to 128."""
    m, n, k = round_up(b["m"], 32), round_up(b["n"], 128), round_up(b["k"], 128)
    out = written(spec).itemsize
    return 2 * (m * k + n * k) + m * n * (4 + 2 * out)


def why_not(spec: Spec) -> str:
    if why := dispatch.needs(spec, "tpu"):
        return why
    if not spec.interpret and spec.device in NO_INT8:
        return f"{spec.device} does not multiply int8; needs a TPU v5e or later"
    need = vmem_bytes(spec, blocks(spec))
    return "" if need <= VMEM_BYTES else f"its blocks need {need} bytes of VMEM, {VMEM_BYTES} fit"


def blocks(spec: Spec) -> dict[str, int]:
    """Tuned for the bucket, else the heuristic; all M rows where the bucket's block does not suit this M."""
    d = spec.dims
    b = tuned.blocks(spec, "pallas_tpu", heuristic(d["m"], d["k"], d["n"]))
    return {**b, "m": d["m"]} if d["m"] <= b["m"] or b["m"] % 8 else b


def kernel(*refs, names: tuple[str, ...], k: int, activation: str | None):
    """refs: those named, the result [bm, bn], the sums i32[bm, bn]."""
    o = epilogue.Operands(**dict.fromkeys(epilogue.Operands._fields))
    o = o._replace(**dict(zip(names, refs[:-2], strict=True)))
    out_ref, acc_ref = refs[-2:]
    step, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(step == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def add(x):
        dims = (((1,), (1,)), ((), ()))
        acc_ref[...] += lax.dot_general(x, o.w[...], dims, preferred_element_type=jnp.int32)

    if left := k % o.x.shape[1]:  # columns of the last block

        @pl.when(step < last)
        def _():
            add(o.x[...])

        @pl.when(step == last)
        def _():
            x = o.x[...].astype(jnp.int32)
            column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
            add(jnp.where(column < left, x, 0).astype(jnp.int8))
    else:
        add(o.x[...])

    strip = STRIP if acc_ref.shape[0] % STRIP == 0 else acc_ref.shape[0]

    def finish(i, _):
        at = pl.ds(i * strip, strip)
        row = {n: getattr(o, n)[at, :] for n in names if n in epilogue.ROWS}
        column = {n: getattr(o, n)[...] for n in names if n in epilogue.COLUMNS}
        y = epilogue.finish(acc_ref[at, :], o._replace(**row, **column), activation, out_ref.dtype)
        out_ref[at, :] = y
        return 0

    @pl.when(step == last)
    def _():
        lax.fori_loop(0, acc_ref.shape[0] // strip, finish, 0)


def run(spec: Spec, *arrays) -> jax.Array:
    if 0 in spec.dims.values():  # nothing to launch
        return reference.run(spec, *arrays)
    o = epilogue.broadcast(epilogue.operands(spec, *arrays))
    (m, k), n = o.x.shape, o.w.shape[0]
    b = blocks(spec)
    names = tuple(name for name, a in o._asdict().items() if a is not None)
    where = {
        "x": pl.BlockSpec((b["m"], b["k"]), lambda i, j, s: (i, s)),
        "w": pl.BlockSpec((b["n"], b["k"]), lambda i, j, s: (j, s)),
        **dict.fromkeys(epilogue.ROWS, pl.BlockSpec((b["m"], 1), lambda i, j, s: (i, 0))),
        **dict.fromkeys(epilogue.COLUMNS, pl.BlockSpec((1, b["n"]), lambda i, j, s: (0, j))),
    }
    call = pl.pallas_call(
        functools.partial(kernel, names=names, k=k, activation=spec.options["activation"]),
        grid=(pl.cdiv(m, b["m"]), pl.cdiv(n, b["n"]), pl.cdiv(k, b["k"])),
        in_specs=[where[name] for name in names],
        out_specs=pl.BlockSpec((b["m"], b["n"]), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), written(spec)),
        scratch_shapes=[pltpu.VMEM((b["m"], b["n"]), jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=spec.interpret,
    )
    return call(*[getattr(o, name) for name in names]).astype(spec.options["out"])


IMPL = Impl("pallas_tpu", why_not, run)
