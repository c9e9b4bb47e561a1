"""Nets as a chain of matmuls in canonical view: what quantization works on.

Layer i computes y_i = x_i w_i^T + b_i with x_i = pre[i](y_{i-1}), the last axis contracted; `pre` holds
everything without weights (activation, patches of a convolution, pooling, flattening). pre[0] takes
the images. A convolution is a matmul over patches in the order (kh, kw, C), C fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Layer(NamedTuple):
    w: jax.Array  # f32[out, in]
    b: jax.Array  # f32[out]


class Chain(NamedTuple):
    """The static part: names and the weightless functions between the layers."""

    names: tuple[str, ...]
    pre: tuple[Callable[[jax.Array], jax.Array], ...]


def affine(layer: Layer, x: jax.Array) -> jax.Array:
    """f32[..., out] from f32[..., in]."""
    return x @ layer.w.T + layer.b


def forward(chain: Chain, layers: Sequence[Layer], x: jax.Array) -> jax.Array:
    """The net's output, f32[N, classes]."""
    for pre, layer in zip(chain.pre, layers, strict=True):
        x = affine(layer, pre(x))
    return x


def flatten(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def relu_to(width: int) -> Callable[[jax.Array], jax.Array]:
    """ReLU, then zeros up to `width` columns."""

    def relu_padded(y: jax.Array) -> jax.Array:
        return jnp.pad(jax.nn.relu(y), [(0, 0)] * (y.ndim - 1) + [(0, width - y.shape[-1])])

    return relu_padded


def patches(x: jax.Array, size: int = 3, stride: int = 1) -> jax.Array:
    """f32[N, H', W', size * size * C] zero-padded ("same") patches of f32[N, H, W, C], by shifted views."""
    _, height, width, _ = x.shape
    rows, cols = -(-height // stride), -(-width // stride)
    pad_h = max((rows - 1) * stride + size - height, 0)
    pad_w = max((cols - 1) * stride + size - width, 0)
    # odd padding puts the extra row behind, as XLA's "SAME" does
    x = jnp.pad(
        x, [(0, 0), (pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2), (0, 0)]
    )
    views = [
        x[:, i : i + rows * stride : stride, j : j + cols * stride : stride][:, :rows, :cols]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(views, -1)


def padded(
    chain: Chain, shapes: Sequence[tuple[int, ...]]
) -> tuple[Chain, Callable[[Sequence[Layer]], tuple[Layer, ...]]]:
    """An MLP whose layers are zero-padded to one shape, so that one compiled step fits them all.

    Returns:
      (chain, pad): the same function of the padded layers; its output has extra columns of zeros.
    """
    num_out = max(rows for rows, _ in shapes)
    width = max(num_out, *(cols for _, cols in shapes))

    def pad(layers: Sequence[Layer]) -> tuple[Layer, ...]:
        free = [(num_out - a.w.shape[0], width - a.w.shape[1]) for a in layers]
        return tuple(
            Layer(jnp.pad(a.w, [(0, r), (0, c)]), jnp.pad(a.b, [(0, r)]))
            for a, (r, c) in zip(layers, free, strict=True)
        )

    def flatten_padded(x: jax.Array) -> jax.Array:
        x = chain.pre[0](x)
        return jnp.pad(x, [(0, 0), (0, width - x.shape[-1])])

    pre = (flatten_padded,) + (relu_to(width),) * (len(shapes) - 1)
    return Chain(chain.names, pre), pad


def inject_outliers(layers: Sequence[Layer], strength: float, key: jax.Array) -> tuple[Layer, ...]:
    """An outlier twin: the same function with hidden channels re-scaled by 2^U(-strength, strength).

    Channel c of a hidden layer is multiplied by a factor and its consumers' columns divided by it,
    which passes through ReLU, padding, patches, mean pooling and flattening (channels fastest).
    Quantization gets much harder. The twin is made of symmetries that smoothing methods invert.

    >>> one = Layer(jnp.ones((1, 1)), jnp.zeros(1))
    >>> a, b = inject_outliers((one, one), 2.0, jax.random.key(0))
    >>> float((a.w * b.w).item())
    1.0
    """
    layers = list(layers)
    for i in range(len(layers) - 1):
        num = layers[i].w.shape[0]
        draw = jax.random.uniform(
            jax.random.fold_in(key, i), (num,), minval=-strength, maxval=strength
        )
        factor = 2.0**draw
        consumer = layers[i + 1]
        if consumer.w.shape[1] % num:
            raise ValueError(
                f"layer {i + 1} has {consumer.w.shape[1]} columns, no multiple of the {num} channels of layer {i}"
            )
        columns = jnp.tile(factor, consumer.w.shape[1] // num)
        layers[i] = Layer(layers[i].w * factor[:, None], layers[i].b * factor)
        layers[i + 1] = consumer._replace(w=consumer.w / columns)
    return tuple(layers)
