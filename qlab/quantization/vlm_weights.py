"""Weights of a vision-language model rounded to nearest, and the memory that the quantized net takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qlab.nn.gpt import STAGES
from qlab.nn.sites import BlockNet, Params
from qlab.quantization.activations import Affine
from qlab.quantization.blocks import QuantizedBlock
from qlab.quantization.grid import calibrate, nearest_codes
from qlab.quantization.qtensor import QTensor, dequantize, pack_qtensor

# Weight products that are quantized, by group.
PRODUCTS = {"vision": ("qkv", "proj", "fc1", "fc2"), "join": ("project",), "decoder": STAGES}


@partial(jax.jit, static_argnums=0, static_argnames=("group", "grid", "max_bits"))
def round_weights(
    net: BlockNet, params: tuple[Params, ...], bits, *, group: int = 64, grid: str = "shares",
    max_bits: int = 8,
) -> tuple[dict[str, QTensor], ...]:  # fmt: skip
    """Per group {site: QTensor (n, out, in)} of PRODUCTS, rounded to nearest; rows without whole groups have one scale.

    Rows of one width, whatever their product, are rounded together: one program for each width.
    """
    found: dict[tuple[int, str], jax.Array] = {
        (g, s): params[g][s]["kernel"].swapaxes(1, 2)
        for g, own in enumerate(net.groups)
        for s in PRODUCTS.get(own.name, ())
    }
    width = {at: w.shape[2] if w.shape[2] % group else group for at, w in found.items()}
    out: tuple[dict[str, QTensor], ...] = tuple({} for _ in net.groups)
    for size in sorted(set(width.values())):
        here = [at for at in found if width[at] == size]
        rows = jnp.concatenate([found[at].reshape(-1, size) for at in here])
        made = calibrate(rows, bits, False, max_bits=max_bits, calibration=grid)  # type: ignore[arg-type]
        assert made.zero is not None
        codes = nearest_codes(rows, made).astype(jnp.uint8)
        end = 0
        for g, s in here:
            shape = found[g, s].shape
            start, end = end, end + found[g, s].size // size
            scale, zero = (a[start:end].reshape(*shape[:2], -1) for a in (made.scale, made.zero))
            kept = codes[start:end].reshape(shape)
            out[g][s] = QTensor(kept, scale, zero, bits=max_bits, axes=(1,), shape=shape[1:])
    return out


@jax.jit
def with_weights(params: tuple[Params, ...], weights) -> tuple[Params, ...]:
    """The params with every weight in its place as what its codes stand for."""
    return tuple(
        {
            **p,
            **{s: {**p[s], "kernel": jax.vmap(dequantize)(q).swapaxes(1, 2)} for s, q in w.items()},
        }
        for p, w in zip(params, weights, strict=True)
    )


def memory_report(
    params: tuple[Params, ...], blocks: Sequence[QuantizedBlock], w_bits: int
) -> dict[str, float]:
    """Bytes counted from arrays: packed codes, scales (f32), zero points (u8), grids of inputs, what stays float (bf16).

    Returns:
      {"bytes", "float_bytes" (all params in bf16), "memory_ratio", "stored_bits" (per quantized weight)}.
    """

    def size(tree: Any) -> int:
        return sum(a.nbytes for a in jax.tree.leaves(tree))

    def half(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)

    packed, rest, inputs, num = 0, 0, 0, 0
    for p, q in zip(params, blocks, strict=True):
        for qt in q.weights.values():
            assert qt.zero is not None
            record = dataclasses.replace(qt, bits=w_bits, zero=qt.zero.astype(jnp.uint8))
            packed += size(pack_qtensor(record))
            num += qt.codes.size
        kept = {
            s: {n: a for n, a in p[s].items() if n != "kernel"} if s in q.weights else p[s]
            for s in p
        }
        rest += size(half(kept))
        inputs += sum(size((r.scale, r.zero)) for r in q.acts.values() if isinstance(r, Affine))
    whole, total = size(half(params)), packed + rest + inputs
    return {
        "bytes": float(total), "float_bytes": float(whole), "memory_ratio": whole / total,
        "stored_bits": 8.0 * packed / max(num, 1),
    }  # fmt: skip
