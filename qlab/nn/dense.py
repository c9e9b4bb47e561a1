"""A ReLU MLP as a BlockNet, so that what quantizes sites of blocks takes it too; its layers come from a trained chain.

Sites: dense, the product of every block. Groups: first, hidden (all layers of one shape), head, without ReLU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.nn.chain import Layer, flatten
from qlab.nn.sites import FLOAT, BlockNet, Params, Run, block_net


class Dense(nnx.Module):
    """f32[N, ...] -> f32[N, out]: a linear layer of the flattened samples, then ReLU unless it is the last."""

    def __init__(self, width_in: int, width: int, last: bool, *, rngs: nnx.Rngs):
        self.last = last
        self.dense = nnx.Linear(width_in, width, rngs=rngs)

    def __call__(self, x: jax.Array, run: Run = FLOAT) -> jax.Array:
        y = run.linear("dense", self.dense, flatten(x))
        return y if self.last else jax.nn.relu(y)


def _groups(widths: Sequence[int]) -> list[list[tuple[int, int, bool]]]:
    """Per group the (in, out, last) of its layers: neighbours of one shape share a group, the first and last do not."""
    specs = [(a, b, False) for a, b in itertools.pairwise(widths)]
    specs[-1] = (*specs[-1][:2], True)
    inner = [list(same) for _, same in itertools.groupby(specs[1:-1])]
    return [specs[:1], *inner, specs[-1:]] if len(specs) > 1 else [specs]


def dense_net(widths: Sequence[int]) -> BlockNet:
    """The net of these widths, input to classes.

    >>> dense_net((64, 24, 24, 24, 10)).names
    ('first', 'hidden1.0', 'hidden1.1', 'head')
    """
    groups = _groups(widths)
    inner = [f"hidden{i}" for i in range(1, len(groups) - 1)]
    names = ["first", *inner, "head"] if len(groups) > 1 else ["head"]

    def make(rngs: nnx.Rngs):
        return [[Dense(*spec, rngs=rngs) for spec in group] for group in groups]

    return block_net(names, make)


def dense_params(layers: Sequence[Layer]) -> tuple[Params, ...]:
    """The params of `dense_net` from the layers of a chain (`qlab.nn.models.mlp`).

    >>> from qlab.nn.models import mlp
    >>> model, x = mlp((4, 3, 3, 2)), jnp.ones((5, 4))
    >>> made = model.init(jax.random.key(0))
    >>> y = dense_net((4, 3, 3, 2)).apply(dense_params(model.layers(made)), x)
    >>> bool(jnp.allclose(y, model.apply(made, x), atol=1e-6))
    True
    """
    widths = (layers[0].w.shape[1], *(a.w.shape[0] for a in layers))
    params, rest = [], list(layers)
    for group in _groups(widths):
        own, rest = rest[: len(group)], rest[len(group) :]
        dense = {
            "kernel": jnp.stack([a.w.T for a in own]),
            "bias": jnp.stack([a.b for a in own]),
        }
        params.append({"dense": dense})
    return tuple(params)
