"""Small flax.nnx nets on 8 x 8 to 28 x 28 images, split at the edge: below it, functions of pure arrays.

Letters: N = samples, H, W, C = image height, width, channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.nn.chain import Chain, Layer, flatten, patches

HE_NORMAL = nnx.initializers.he_normal()


class MLP(nnx.Module):
    """Linear layers of the given widths with ReLU between them; f32[N, H, W, C] -> f32[N, classes]."""

    def __init__(self, widths: Sequence[int], *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [
                nnx.Linear(a, b, kernel_init=HE_NORMAL, rngs=rngs)
                for a, b in itertools.pairwise(widths)
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = flatten(x)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class CNN(nnx.Module):
    """Three 3 x 3 convolutions (strides 1, 2, 2) with ReLU, mean pool, linear head.

    Convolutions are matmuls over patches: inside lax.scan that is several times faster on CPU.
    """

    strides = (1, 2, 2)

    def __init__(
        self, channels: Sequence[int], in_channels: int = 1, classes: int = 10, *, rngs: nnx.Rngs
    ):
        ins = (in_channels, *channels[:-1])
        self.convs = nnx.List(
            [
                nnx.Linear(9 * a, b, kernel_init=HE_NORMAL, rngs=rngs)
                for a, b in zip(ins, channels, strict=True)
            ]
        )
        self.head = nnx.Linear(channels[-1], classes, kernel_init=HE_NORMAL, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, stride in zip(self.convs, self.strides, strict=True):
            x = nnx.relu(conv(patches(x, 3, stride)))
        return self.head(x.mean((1, 2)))


class Model(NamedTuple):
    """A net family, all pure.

    Attributes:
      init: key -> params (a pytree of arrays). apply: (params, x) -> logits.
      chain: the static part of the canonical view; layers: params -> tuple[Layer, ...] in it.
    """

    init: Callable[[jax.Array], nnx.State]
    apply: Callable[[nnx.State, jax.Array], jax.Array]
    chain: Chain
    layers: Callable[[nnx.State], tuple[Layer, ...]]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """(out, in) of every layer, without making one."""
        made = jax.eval_shape(lambda key: self.layers(self.init(key)), jax.random.key(0))
        return tuple(layer.w.shape for layer in made)


def mlp(widths: Sequence[int]) -> Model:
    """A ReLU MLP; `widths` from input to classes.

    >>> model = mlp((64, 24, 10))
    >>> [layer.w.shape for layer in model.layers(model.init(jax.random.key(0)))]
    [(24, 64), (10, 24)]
    """
    depth = len(widths) - 1
    chain = Chain(
        tuple(f"dense{i}" for i in range(depth)), (flatten,) + (jax.nn.relu,) * (depth - 1)
    )
    return _model(lambda rngs: MLP(widths, rngs=rngs), chain, lambda net: list(net.layers))


def cnn(channels: Sequence[int] = (8, 16, 16), in_channels: int = 1) -> Model:
    """Three convolutions and a head.

    >>> model = cnn()
    >>> [layer.w.shape for layer in model.layers(model.init(jax.random.key(0)))]
    [(8, 9), (16, 72), (16, 144), (10, 16)]
    """

    def relu_patches(stride: int) -> Callable[[jax.Array], jax.Array]:
        return lambda y: patches(jax.nn.relu(y), 3, stride)

    chain = Chain(
        ("conv0", "conv1", "conv2", "head"),
        (
            partial(patches, size=3, stride=1),
            relu_patches(2),
            relu_patches(2),
            lambda y: jax.nn.relu(y).mean((1, 2)),
        ),
    )
    return _model(
        lambda rngs: CNN(channels, in_channels, rngs=rngs),
        chain,
        lambda net: [*net.convs, net.head],
    )


def _model(make, chain: Chain, linears) -> Model:
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: jax.Array) -> nnx.State:
        return nnx.state(make(nnx.Rngs(params=key)), nnx.Param)

    def apply(params: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(x)

    def layers(params: nnx.State) -> tuple[Layer, ...]:
        net = nnx.merge(graphdef, params)
        return tuple(
            Layer(jnp.asarray(d.kernel[...]).T, jnp.asarray(d.bias[...])) for d in linears(net)
        )

    return Model(init, apply, chain, layers)
