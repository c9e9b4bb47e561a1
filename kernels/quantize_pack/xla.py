"""Quantize and pack for XLA: one loop for the grid, one for codes of a byte each, one that merges them."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp

from qlab.kernels.common import grid, layout
from qlab.kernels.common.dispatch import Impl, Spec
from qlab.kernels.quantize_pack import reference


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """u8[N, row_bytes] of unsigned codes u8[N, G, g]: whole planes shifted and merged."""
    n, g = codes.shape[0], codes.shape[-1]
    out = []
    for p, first in layout.parts(bits):
        v = 8 // p
        num = -(-g // v)
        part = (codes >> jnp.uint8(first)) & jnp.uint8(2**p - 1)
        part = jnp.pad(part, ((0, 0), (0, 0), (0, num * v - g)))
        planes = [part[..., j * num : (j + 1) * num] << jnp.uint8(p * j) for j in range(v)]
        out.append(functools.reduce(operator.or_, planes).reshape(n, -1))
    return jnp.concatenate(out, -1) if len(out) > 1 else out[0]


@functools.partial(jax.jit, static_argnames=("names", "values"))
def _run(x, scale, zero, key, *, names, values):
    o, (n, k) = dict(zip(names, values, strict=True)), x.shape
    x = x.astype(jnp.float32)
    scale, zero = reference.calibrated(o, x, scale, zero)
    word = reference.words(o, n, k, key)
    num = layout.num_groups(k, o["group"])
    codes = grid.codes(
        x.reshape(n, num, -1),
        (1.0 / scale)[..., None],
        None if zero is None else zero[..., None],
        None if word is None else word.reshape(n, num, -1),
        o,
    )
    # the barrier keeps the compiler from computing a code again for every part and plane it is in
    codes = jax.lax.optimization_barrier(codes.astype(jnp.uint8))
    return pack(codes, o["bits"]), scale, zero


def run(spec: Spec, x, scale, zero, key):
    o = spec.options
    return _run(x, scale, zero, key, names=tuple(o), values=tuple(o.values()))


IMPL = Impl("xla", lambda spec: "", run)
