"""Convolutional denoising autoencoders with an exchangeable latent layer, split at the edge into pure functions.

y -> Conv 3x3 stride 2, ReLU -> Conv 3x3 stride 2, ReLU -> Dense n = z -> latent -> q
  -> Dense, ReLU -> ConvT 3x3 stride 2, ReLU -> ConvT 3x3 stride 2 -> sigmoid
The latent layer is any function of n numbers: a circuit (qlab.quantum), or one of the classical ones here.
Convolutions are matrix products, which inside lax.scan on a CPU are several times faster, and quick to compile.
Letters: N = images, S = side (a multiple of 4), n = latent width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlab.lab.errors import UserError, nearest
from qlab.nn.taps import Kind, conv

Params = Any


class Latent(NamedTuple):
    """What stands between encoder and decoder.

    Attributes:
      init: key -> params. apply: (params, z f[n], key) -> q f[n], one sample.
      num_params: how many of them are trained.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array, jax.Array], jax.Array]
    num_params: int


def latent_linear() -> Latent:
    """q = z: the encoder's last Dense alone."""
    return Latent(lambda key: {}, lambda w, z, key: z, 0)


def latent_tanh() -> Latent:
    """q = tanh(z): bounded as a circuit's output is, without parameters."""
    return Latent(lambda key: {}, lambda w, z, key: jnp.tanh(z), 0)


def latent_mlp(n: int) -> Latent:
    """q = tanh(W2 tanh(W1 z + b1) + b2), n -> n -> n: 2 n (n + 1) parameters.

    >>> latent_mlp(4).num_params
    40
    """

    def init(key):
        k1, k2 = jax.random.split(key)
        glorot = jax.nn.initializers.glorot_normal()
        return {"w1": glorot(k1, (n, n)), "b1": jnp.zeros(n), "w2": glorot(k2, (n, n)), "b2": jnp.zeros(n)}  # fmt: skip

    def apply(w, z, key):
        return jnp.tanh(jnp.tanh(z @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"])

    return Latent(init, apply, 2 * n * (n + 1))


CLASSICAL: dict[str, Callable[[int], Latent]] = {
    "linear": lambda n: latent_linear(),
    "tanh": lambda n: latent_tanh(),
    "mlp": latent_mlp,
}


def classical_latent(name: str, n: int) -> Latent:
    """The classical latent layer called `name`, of width n."""
    if name not in CLASSICAL:
        raise UserError(f"no latent is called {name!r}{nearest(name, tuple(CLASSICAL))}")
    return CLASSICAL[name](n)


def _layer(x: jax.Array, dense: Any, kind: Kind) -> jax.Array:
    return conv(x, dense.kernel[...], kind) + dense.bias[...]


class Encoder(nnx.Module):
    """f[N, S, S, 1] -> (z f[N, n], the two feature maps)."""

    def __init__(self, side: int, n: int, channels: tuple[int, int], *, rngs: nnx.Rngs):
        c1, c2 = channels
        self.conv1 = nnx.Linear(9, c1, rngs=rngs)
        self.conv2 = nnx.Linear(9 * c1, c2, rngs=rngs)
        self.dense = nnx.Linear((side // 4) ** 2 * c2, n, rngs=rngs)

    def __call__(self, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        h1 = nnx.relu(_layer(y, self.conv1, "down"))
        h2 = nnx.relu(_layer(h1, self.conv2, "down"))
        return self.dense(h2.reshape(len(y), -1)), (h1, h2)


class Decoder(nnx.Module):
    """q f[N, n] -> logits f[N, S, S, 1]; with skip = True it also sees the encoder's feature maps."""

    def __init__(self, side: int, n: int, channels: tuple[int, int], skip: bool, *, rngs: nnx.Rngs):
        c1, c2 = channels
        self.side, self.c2, self.skip = side, c2, skip
        self.dense = nnx.Linear(n, (side // 4) ** 2 * c2, rngs=rngs)
        self.up1 = nnx.Linear(9 * c2 * (1 + skip), c1, rngs=rngs)
        self.up2 = nnx.Linear(9 * c1 * (1 + skip), 1, rngs=rngs)

    def __call__(self, q: jax.Array, maps: tuple[jax.Array, jax.Array]) -> jax.Array:
        h = nnx.relu(self.dense(q)).reshape(len(q), self.side // 4, self.side // 4, self.c2)
        h = jnp.concatenate([h, maps[1]], -1) if self.skip else h
        h = nnx.relu(_layer(h, self.up1, "up"))
        h = jnp.concatenate([h, maps[0]], -1) if self.skip else h
        return _layer(h, self.up2, "up")


def _he_normal(key: jax.Array, shapes: Params) -> Params:
    """Kernels N(0, 2 / fan-in) and biases 0, for a tree of shapes; one draw for all of them compiles quickly."""
    leaves, tree = jax.tree.flatten(shapes)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    parts = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
    made = [
        part.reshape(leaf.shape) * math.sqrt(2 / leaf.shape[0])
        if len(leaf.shape) == 2
        else jnp.zeros(leaf.shape)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


class Denoiser(NamedTuple):
    """A net as pure functions: init key -> params, apply (params, y f[N, S, S, 1], key) -> logits of the image."""

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array, jax.Array], jax.Array]
    latent: Latent


def denoiser(
    side: int, n: int, latent: Latent, *, channels: tuple[int, int] = (8, 16), skip: bool = False
) -> Denoiser:
    """The autoencoder around a latent layer.

    Args:
      side: S. channels: of the two convolutions. skip: U-Net style connections around the bottleneck.
    Returns:
      A Denoiser whose params are {"encoder", "latent", "decoder"}; the pixels are sigmoid(logits).

    >>> net = denoiser(8, 4, latent_tanh())
    >>> w = net.init(jax.random.key(0))
    >>> net.apply(w, jnp.zeros((2, 8, 8, 1)), jax.random.key(1)).shape
    (2, 8, 8, 1)
    """
    if side % 4 or side < 4:
        raise UserError(f"images of side {side}; two strides of 2 need a multiple of 4")

    def parts():
        rngs = nnx.Rngs(0)
        return (
            Encoder(side, n, channels, rngs=rngs),
            Decoder(side, n, channels, skip, rngs=rngs),
        )

    enc, dec = nnx.eval_shape(parts)
    enc_graph, dec_graph = nnx.graphdef(enc), nnx.graphdef(dec)
    shapes = {
        name: nnx.to_pure_dict(nnx.state(m, nnx.Param))
        for name, m in (("encoder", enc), ("decoder", dec))
    }

    def init(key):
        k_net, k_latent = jax.random.split(key)
        return _he_normal(k_net, shapes) | {"latent": latent.init(k_latent)}

    def rebuild(graph, pure):
        return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, pure)))

    def apply(params, y, key):
        z, maps = rebuild(enc_graph, params["encoder"])(y)
        keys = jax.random.split(key, len(y))
        q = jax.vmap(latent.apply, (None, 0, 0))(params["latent"], z, keys)
        return rebuild(dec_graph, params["decoder"])(q, maps)

    return Denoiser(init, apply, latent)
