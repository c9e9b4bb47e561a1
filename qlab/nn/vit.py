"""A vision transformer with named sites (pre-LN; Dosovitskiy et al., arXiv 2010.11929), small enough for digits.

Sites of an encoder block: qkv, q, k, probs, v, proj, fc1, fc2; of the stem: patch; of the head: head.
Letters: N = samples, T = tokens, D = width, H = heads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.nn.sites import FLOAT, BlockNet, Run, block_net

EPS = 1e-6
# The norms of an encoder block, each with the weight products that read it (see qlab.nn.outliers).
LINKS = (("norm1", ("qkv",)), ("norm2", ("fc1",)))


class Stem(nnx.Module):
    """f32[N, H, W, C] -> f32[N, T, D]: linear patch embedding plus learned positions."""

    def __init__(self, size: int, channels: int, patch: int, dim: int, *, rngs: nnx.Rngs):
        self.size = patch
        self.patch = nnx.Linear(patch * patch * channels, dim, rngs=rngs)
        tokens = (size // patch) ** 2
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, dim)))

    def __call__(self, x: jax.Array, run: Run = FLOAT) -> jax.Array:
        return run.linear("patch", self.patch, patchify(x, self.size)) + self.position[...]


def patchify(x: jax.Array, size: int) -> jax.Array:
    """f32[N, T, size * size * C] from f32[N, H, W, C], patches row by row, C fastest."""
    n, height, width, c = x.shape
    x = x.reshape(n, height // size, size, width // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, size * size * c)


class Encoder(nnx.Module):
    """A pre-LN block: x + attention(LN x), then x + MLP(LN x) with exact GELU; f32[N, T, D]."""

    def __init__(self, dim: int, heads: int, hidden: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm1 = nnx.LayerNorm(dim, epsilon=EPS, rngs=rngs)
        self.qkv = nnx.Linear(dim, 3 * dim, rngs=rngs)
        self.proj = nnx.Linear(dim, dim, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=EPS, rngs=rngs)
        self.fc1 = nnx.Linear(dim, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x: jax.Array, run: Run = FLOAT) -> jax.Array:
        qkv = run.linear("qkv", self.qkv, self.norm1(x))
        q, k, v = (heads_apart(a, self.heads) for a in jnp.split(qkv, 3, -1))
        scores = jnp.einsum("nqhd,nkhd->nhqk", run.operand("q", q), run.operand("k", k))
        probs = run.operand("probs", jax.nn.softmax(scores * q.shape[-1] ** -0.5, -1))
        mixed = jnp.einsum("nhqk,nkhd->nqhd", probs, run.operand("v", v))
        x = x + run.linear("proj", self.proj, mixed.reshape(x.shape))
        h = run.linear("fc1", self.fc1, self.norm2(x))
        return x + run.linear("fc2", self.fc2, jax.nn.gelu(h, approximate=False))


def heads_apart(x: jax.Array, heads: int) -> jax.Array:
    """f32[N, T, H, D / H] from f32[N, T, D]."""
    return x.reshape(*x.shape[:-1], heads, -1)


class Head(nnx.Module):
    """Final LN, mean over tokens, linear classifier; f32[N, T, D] -> f32[N, classes]."""

    def __init__(self, dim: int, classes: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(dim, epsilon=EPS, rngs=rngs)
        self.head = nnx.Linear(dim, classes, rngs=rngs)

    def __call__(self, x: jax.Array, run: Run = FLOAT) -> jax.Array:
        return run.linear("head", self.head, self.norm(x).mean(1))


class ViTSize(NamedTuple):
    """Hyper-parameters; the default is for 8 x 8 digits: 16 tokens of width 64, four blocks."""

    size: int = 8
    channels: int = 1
    patch: int = 2
    dim: int = 64
    depth: int = 4
    heads: int = 4
    hidden: int = 128
    classes: int = 10


def vit(s: ViTSize = ViTSize()) -> BlockNet:  # noqa: B008 (a constant tuple)
    """The net as a BlockNet: stem, encoder (depth blocks), head.

    Raises:
      ValueError: the patch does not divide the image, or the heads the width.

    >>> net = vit(ViTSize(dim=8, depth=2, heads=2, hidden=16))
    >>> net.names
    ('stem', 'encoder.0', 'encoder.1', 'head')
    >>> net.apply(net.init(jax.random.key(0)), jnp.ones((3, 8, 8, 1))).shape
    (3, 10)
    """
    if s.size % s.patch or s.dim % s.heads:
        raise ValueError(
            f"patch={s.patch} must divide size={s.size}, and heads={s.heads} dim={s.dim}"
        )

    def make(rngs: nnx.Rngs):
        return [
            [Stem(s.size, s.channels, s.patch, s.dim, rngs=rngs)],
            [Encoder(s.dim, s.heads, s.hidden, rngs=rngs) for _ in range(s.depth)],
            [Head(s.dim, s.classes, rngs=rngs)],
        ]

    return block_net(("stem", "encoder", "head"), make)
