"""The weight matrix inside any linear layer of flax (nnx or linen): Linear, LinearGeneral, Conv, Einsum.

A View shows a layer's kernel as W f32[out, in], its inputs as rows f32[N, in] of the products it takes part
in, and puts a changed W back into the kernel's own shape. Layers whose product is not one matrix (grouped
convolutions, kernels with batch axes) have no view, and `view_of` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

KINDS = {
    "Linear": "linear",
    "Dense": "linear",
    "LinearGeneral": "general",
    "DenseGeneral": "general",
    "Conv": "conv",
    "Einsum": "einsum",
}


class View(NamedTuple):
    """matrix: kernel -> W f32[out, in]. kernel: W -> the kernel. rows: input -> f32[N, in]."""

    matrix: Callable[[jax.Array], jax.Array]
    kernel: Callable[[jax.Array], jax.Array]
    rows: Callable[[jax.Array], jax.Array]


def kind_of(layer: Any) -> str:
    """ "linear", "general", "conv", "einsum", or "" for anything else."""
    if not type(layer).__module__.startswith("flax."):
        return ""
    return KINDS.get(type(layer).__name__, "")


def view_of(layer: Any, shape: tuple[int, ...]) -> View | str:
    """The View of a flax layer whose kernel has `shape`, or the reason why there is none."""
    kind = kind_of(layer)
    if kind == "linear":
        return _general(shape, 1, (-1,)) if len(shape) == 2 else f"kernel of {len(shape)} axes"
    if kind == "general":
        axis = layer.axis if isinstance(layer.axis, Sequence) else (layer.axis,)
        batch = getattr(layer, "batch_axis", None) or getattr(layer, "batch_dims", None)
        return "kernel with batch axes" if batch else _general(shape, len(axis), tuple(axis))
    if kind == "conv":
        return _conv(layer, shape)
    if kind == "einsum":
        return _einsum(layer.einsum_str, shape)
    return f"{type(layer).__name__} is no linear layer"


def _general(shape: tuple[int, ...], num_in: int, axis: tuple[int, ...]) -> View:
    """The first num_in axes of the kernel meet the axes `axis` of the input."""
    width = math.prod(shape[:num_in])

    def rows(x):
        at = tuple(a % x.ndim for a in axis)
        last = tuple(range(x.ndim - len(at), x.ndim))
        return jnp.moveaxis(x, at, last).reshape(-1, width)

    return View(lambda k: k.reshape(width, -1).T, lambda w: w.T.reshape(shape), rows)


def _pair(value: Any, rank: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _conv(layer: Any, shape: tuple[int, ...]) -> View | str:
    rank = len(shape) - 2
    if layer.feature_group_count != 1:
        return f"grouped convolution (feature_group_count={layer.feature_group_count})"
    padding = layer.padding
    if isinstance(padding, str) and padding not in ("SAME", "VALID"):
        return f"padding={padding!r}"
    if isinstance(padding, int):
        padding = [(padding, padding)] * rank
    elif not isinstance(padding, str):
        padding = [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
    names = "DHW"[-rank:]
    numbers = (f"N{names}C", f"{names}IO", f"N{names}C")
    order = (rank + 1, rank, *range(rank))  # (out, C, window): the order of lax's patches
    back = tuple(range(2, rank + 2)) + (1, 0)
    whole = (shape[-1], shape[-2], *shape[:rank])

    def rows(x):
        x = x.reshape(-1, *x.shape[-rank - 1 :])
        patches = jax.lax.conv_general_dilated_patches(
            x,
            shape[:rank],
            _pair(layer.strides, rank),
            padding,
            _pair(layer.input_dilation, rank),
            _pair(layer.kernel_dilation, rank),
            dimension_numbers=numbers,
        )
        return patches.reshape(-1, patches.shape[-1])

    return View(
        lambda k: k.transpose(order).reshape(shape[-1], -1),
        lambda w: w.reshape(whole).transpose(back),
        rows,
    )


def _einsum(text: str, shape: tuple[int, ...]) -> View | str:
    """`...ab,bcd->...acd`: letters of the kernel that the output lacks are contracted."""
    sides, _, out = text.replace(" ", "").partition("->")
    x_names, _, k_names = sides.partition(",")
    if not out or "..." in k_names:
        return f"einsum {text!r}"
    contracted = [c for c in k_names if c not in out]
    kept = [c for c in k_names if c in out]
    if any(c in x_names for c in kept) or any(c not in x_names for c in contracted):
        return f"einsum {text!r} has batch letters"
    if not contracted or not kept:
        return f"einsum {text!r} is no matrix product"
    sizes = dict(zip(k_names, shape, strict=True))
    width = math.prod(sizes[c] for c in contracted)
    order = [k_names.index(c) for c in kept + contracted]
    back = [order.index(i) for i in range(len(order))]
    whole = tuple(shape[i] for i in order)
    free = [c for c in x_names.replace("...", "") if c not in contracted]

    def rows(x):
        dots = "..." if "..." in x_names else ""
        moved = jnp.einsum(f"{x_names}->{dots}{''.join(free + contracted)}", x)
        return moved.reshape(-1, width)

    return View(
        lambda k: k.transpose(order).reshape(-1, width),
        lambda w: w.reshape(whole).transpose(back),
        rows,
    )
