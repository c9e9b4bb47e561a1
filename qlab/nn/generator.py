"""Conditional image generators of data-free quantization (GDFQ, Xu et al., ECCV 2020; AdaDFQ, Qian et al., CVPR 2023).

z and y -> Dense, BN -> twice (nearest 2x, conv 3 x 3, BN, leaky ReLU) -> conv 3 x 3, tanh, BN without scale and bias.
So images have mean 0 and variance 1 per channel over the batch. Batch norms always use the batch's own statistics, as
the generator only ever runs in training. Those behind the first two convolutions add 0.8 to the variance: torch's
second positional argument of BatchNorm2d is eps, and so the published nets read.

Letters: N = samples, S = side, C = classes, L = latent width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.lab.errors import UserError
from qlab.nn.taps import Kind, conv

Params = dict[str, Any]
WIDE_EPS = 0.8  # of the two norms behind convolutions
EPS = 1e-5  # of the first and the last one


class GeneratorSize(NamedTuple):
    """Hyper-parameters; the defaults are the published ones for CIFAR but for side and channels.

    Attributes:
      labels: "product": z times an embedding of y (CIFAR). "norms": norms with scale and bias per class (ImageNet).
    """

    side: int = 16
    channels: int = 1
    classes: int = 10
    latent: int = 100
    widths: tuple[int, int] = (128, 64)
    labels: Literal["product", "norms"] = "product"


class Generator(NamedTuple):
    """Pure functions.

    Attributes:
      init: key -> params. apply: (params, z f32[N, L], y i32[N]) -> images f32[N, S, S, channels], standardised.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array, jax.Array], jax.Array]
    size: GeneratorSize


def standardise(x: jax.Array, eps: float) -> jax.Array:
    """f32[..., K] with mean 0 and variance v / (v + eps) per channel over all other axes (biased variance v)."""
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) * jax.lax.rsqrt(x.var(axes) + eps)


class _Norm(nnx.Module):
    """standardise, then a scale and bias per channel, of each class its own where `classes` > 1."""

    def __init__(self, width: int, eps: float, classes: int = 1):
        self.eps, self.per_class = eps, classes > 1
        self.scale = nnx.Param(jnp.ones((classes, width)))
        self.bias = nnx.Param(jnp.zeros((classes, width)))

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        at = y if self.per_class else jnp.zeros_like(y)
        scale, bias = self.scale[...][at], self.bias[...][at]
        wide = (len(x),) + (1,) * (x.ndim - 2) + (-1,)
        return standardise(x, self.eps) * scale.reshape(wide) + bias.reshape(wide)


def _linear(num_in: int, num_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Kernel and bias from U(-1, 1) / sqrt(num_in), torch's default."""

    def uniform(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / math.sqrt(num_in)

    return nnx.Linear(num_in, num_out, kernel_init=uniform, bias_init=uniform, rngs=rngs)


class _Net(nnx.Module):
    def __init__(self, s: GeneratorSize, *, rngs: nnx.Rngs):
        a, b = s.widths
        self.first = (s.side // 4, s.side // 4, a)
        per_norm = s.classes if s.labels == "norms" else 1
        if s.labels == "product":
            self.embedding = nnx.Param(jax.random.normal(rngs.params(), (s.classes, s.latent)))
        self.dense = _linear(s.latent, math.prod(self.first), rngs)
        self.conv1, self.conv2 = _linear(9 * a, a, rngs), _linear(9 * a, b, rngs)
        self.conv3 = _linear(9 * b, s.channels, rngs)
        self.norm0 = _Norm(a, EPS, per_norm)
        self.norm1, self.norm2 = _Norm(a, WIDE_EPS, per_norm), _Norm(b, WIDE_EPS, per_norm)

    def __call__(self, z: jax.Array, y: jax.Array) -> jax.Array:
        if hasattr(self, "embedding"):
            z = z * self.embedding[...][y]
        x = self.norm0(self.dense(z).reshape(-1, *self.first), y)
        for layer, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = jax.nn.leaky_relu(norm(_conv(x, layer, "nearest"), y), 0.2)
        return standardise(jnp.tanh(_conv(x, self.conv3, "same")), EPS)


def _conv(x: jax.Array, layer: nnx.Linear, kind: Kind) -> jax.Array:
    assert layer.bias is not None
    return conv(x, layer.kernel[...], kind) + layer.bias[...]


def generator(size: GeneratorSize = GeneratorSize()) -> Generator:  # noqa: B008 (a constant tuple)
    """The generator of a size.

    Raises:
      UserError: a side that four does not divide, or an unknown way to use labels.

    >>> g = generator(GeneratorSize(side=8, widths=(4, 2)))
    >>> images = g.apply(g.init(jax.random.key(0)), jnp.ones((3, 100)), jnp.array([0, 1, 1]))
    >>> images.shape, abs(float(images.mean())) < 1e-5
    ((3, 8, 8, 1), True)
    """
    if size.side % 4 or size.side < 4:
        raise UserError(f"generator of side {size.side}: it doubles twice, use a multiple of 4")
    if size.labels not in ("product", "norms"):
        raise UserError(f'generator with labels={size.labels!r}: "product" or "norms"')
    graph = nnx.graphdef(nnx.eval_shape(lambda: _Net(size, rngs=nnx.Rngs(0))))

    def init(key: jax.Array) -> Params:
        return _init(size, key)

    def apply(params: Params, z: jax.Array, y: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(z, y)

    return Generator(init, apply, size)


@partial(jax.jit, static_argnums=0)
def _init(size: GeneratorSize, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(_Net(size, rngs=nnx.Rngs(params=key))))
