"""Block-sparse rows of quantized 1 x G groups: building, reading, counting and dividing the work.

N output rows, K input columns, groups of G neighbouring columns of one row; nnz groups are kept.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.kernels.common import checks, layout

OP = "group_sparse_matmul"


class BSR(NamedTuple):
    """The kept groups, row after row, columns rising within a row.

    Attributes:
      row_ptr: i32[N + 1], row r owns the groups row_ptr[r] .. row_ptr[r + 1] - 1.
      col_idx: i16 or i32[nnz], column group of each kept group.
      codes: u8[nnz, layout.row_bytes(G, bits)], packed codes.
      scale: f32[nnz]. zero: f32[nnz], or None: symmetric, code 2^(bits - 1) stands for 0.
    """

    row_ptr: jax.Array
    col_idx: jax.Array
    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None


class Plan(NamedTuple):
    """The flat list of groups cut into P equal chunks of T (the last may be short).

    Attributes:
      row: i32[1, P T], row of each group in order, N after the last group.
      slot: i32[P, T], which of the rows that its chunk touches a group belongs to; -1: none.
      chunk_rows: i32[P, R], the rows that a chunk touches, N for unused slots.
    """

    row: jax.Array
    slot: jax.Array
    chunk_rows: jax.Array


def from_dense(codes, scale, zero, mask, *, bits: int, group: int) -> BSR:
    """Keeps the groups of `mask`.

    Args:
      codes: ints[N, K], unsigned codes below 2^bits. group: G, a multiple of 8 that divides K.
      scale: float[N, K / G]. zero: the same shape, or None (symmetric).
      mask: bool[N, K / G], True: kept. Concrete, since its sum is a shape.
    Returns:
      A BSR; col_idx is i16 where K / G fits.
    Raises:
      ValueError: an argument does not fit.
    """
    checks.one_of(OP, "bits", bits, range(1, 9))
    n, k = np.shape(codes)
    checks.group(OP, group, k)
    if not group:
        checks.fail(OP, "group=0; a group-sparse weight needs a group, e.g. 16")
    for name, a in (("scale", scale), ("zero", zero), ("mask", mask)):
        if a is not None:
            checks.shape(OP, name, a, (n, k // group), f"K={k} in groups of {group}")
    checks.dtype(OP, "mask", mask, (jnp.bool_,))
    row, col = np.nonzero(np.asarray(mask))
    row_ptr = np.zeros(n + 1, np.int32)
    np.cumsum(np.bincount(row, minlength=n), out=row_ptr[1:])
    kept = np.asarray(codes).reshape(n, k // group, group)[row, col]
    small = np.int16 if k // group <= 2**15 else np.int32
    return BSR(
        jnp.asarray(row_ptr),
        jnp.asarray(col.astype(small)),
        jax.jit(layout.pack, static_argnums=1)(kept, bits),
        jnp.asarray(np.asarray(scale, np.float32)[row, col]),
        None if zero is None else jnp.asarray(np.asarray(zero, np.float32)[row, col]),
    )


def values(bsr: BSR, *, bits: int, group: int) -> jax.Array:
    """f32[nnz, G], the kept weights: scale (code - zero)."""
    q = layout.unpack(bsr.codes, group, bits).astype(jnp.float32)
    zero = 2.0 ** (bits - 1) if bsr.zero is None else bsr.zero.astype(jnp.float32)[:, None]
    return (q - zero) * bsr.scale.astype(jnp.float32)[:, None]


def rows(row_ptr: jax.Array, nnz: int) -> jax.Array:
    """i32[nnz]: the row of each group; empty rows have none."""
    n = row_ptr.shape[0] - 1
    return jnp.repeat(jnp.arange(n, dtype=jnp.int32), jnp.diff(row_ptr), total_repeat_length=nnz)


def to_dense(bsr: BSR, k: int, *, bits: int, group: int) -> jax.Array:
    """f32[N, K], zero where no group was kept; the exact inverse of `from_dense` up to dequantizing."""
    n, nnz = bsr.row_ptr.shape[0] - 1, bsr.col_idx.shape[0]
    w = jnp.zeros((n, k // group, group), jnp.float32)
    at = (rows(bsr.row_ptr, nnz), bsr.col_idx.astype(jnp.int32))
    return w.at[at].set(values(bsr, bits=bits, group=group)).reshape(n, k)


def partition_tasks(row_ptr, num_workers: int, mode: str = "task") -> tuple[np.ndarray, int]:
    """Who does which of the nnz groups.

    Args:
      row_ptr: i32[N + 1], concrete. num_workers: P >= 1.
      mode: "task": the flat list of groups in P equal contiguous parts, rows may be split; "data": whole
        rows, N / P neighbouring rows a worker.
    Returns:
      (starts i64[P + 1], makespan): worker p does the groups starts[p] .. starts[p + 1] - 1; the makespan
      is the longest such range. "task" gives ceil(nnz / P), never more than "data".

    >>> partition_tasks([0, 6, 7, 7, 8], 2)[1], partition_tasks([0, 6, 7, 7, 8], 2, "data")[1]
    (4, 7)
    """
    checks.one_of(OP, "mode", mode, ("task", "data"))
    if num_workers < 1:
        checks.fail(OP, f"num_workers={num_workers}; use 1 or more")
    ptr = np.asarray(row_ptr, np.int64)
    cut = np.arange(num_workers + 1)
    if mode == "task":
        starts = cut * ptr[-1] // num_workers
    else:
        starts = ptr[cut * (len(ptr) - 1) // num_workers]
    return starts, int(np.diff(starts).max())


def bits_per_weight(
    bsr: BSR, k: int, scale_bits: int | None = None, zero_bits: int | None = None
) -> float:
    """Stored bits per weight of the dense N x K matrix.

    scale_bits, zero_bits: count these widths instead of the arrays' own (GQSA stores 16 and 4:
    (1 - rho) (b + 36 / G) + 32 / K with 16-bit columns).
    """
    nnz, n = bsr.col_idx.shape[0], bsr.row_ptr.shape[0] - 1

    def width(a, given):
        if a is None:
            return 0
        return a.dtype.itemsize * 8 if given is None else given

    fixed = 8 * (bsr.codes.size + bsr.col_idx.size * bsr.col_idx.dtype.itemsize + 4 * (n + 1))
    per_group = width(bsr.scale, scale_bits) + width(bsr.zero, zero_bits)
    return (fixed + nnz * per_group) / (n * k)


def make_plan(row_ptr: jax.Array, nnz: int, chunk: int) -> Plan:
    """Helper arrays of the kernels, built once from row_ptr.

    chunk: T, groups of one worker. R is the most rows that a chunk touches; under jit, where row_ptr is
    not known, R is min(T, N), so build the plan outside.
    """
    n = row_ptr.shape[0] - 1
    most = min(chunk, max(n, 1))
    if not isinstance(row_ptr, jax.core.Tracer):
        filled = np.flatnonzero(np.diff(np.asarray(row_ptr)))
        start, end = np.asarray(row_ptr)[filled], np.asarray(row_ptr)[filled + 1]
        cut = np.arange(0, max(nnz, 1), chunk)
        touched = np.searchsorted(start, cut + chunk) - np.searchsorted(end, cut, side="right")
        most = max(1, int(touched.max()))
    return _plan(row_ptr, nnz, chunk, most)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _plan(row_ptr: jax.Array, nnz: int, chunk: int, most: int) -> Plan:
    n, p = row_ptr.shape[0] - 1, max(1, -(-nnz // chunk))
    row = jnp.pad(rows(row_ptr, nnz), (0, p * chunk - nnz), constant_values=n).reshape(p, chunk)
    used = row < n
    changes = used[:, 1:] & (row[:, 1:] != row[:, :-1])
    slot = jnp.pad(jnp.cumsum(changes.astype(jnp.int32), 1), ((0, 0), (1, 0)))
    slot = jnp.where(used, slot, -1)
    chunk_rows = jnp.full((p, most), n, jnp.int32)
    where = (jnp.arange(p)[:, None], jnp.where(used, slot, most))
    return Plan(row.reshape(1, -1), slot, chunk_rows.at[where].set(row, mode="drop"))


def fix_up(partial: jax.Array, chunk_rows: jax.Array, n: int) -> jax.Array:
    """f32[N, M] from the chunks' partial sums f32[P, R, M]: rows split over chunks are added up."""
    flat = partial.reshape(-1, partial.shape[-1])
    return (
        jnp.zeros((n, flat.shape[1]), jnp.float32).at[chunk_rows.reshape(-1)].add(flat, mode="drop")
    )
