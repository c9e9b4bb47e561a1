"""Units of a chain: which layers are quantized together, and which units share a compiled step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlab.nn.chain import Chain


class Plan(NamedTuple):
    """Units of one shape that share a compiled step.

    layers: the layer indices of each unit. first: number of the first unit's first round.
    """

    layers: tuple[tuple[int, ...], ...]
    first: int


def unit_layers(num_layers: int, unit: str) -> list[tuple[int, ...]]:
    """Layer indices of each unit: "layer", "block" (two layers), or "net".

    >>> unit_layers(3, "block")
    [(0, 1), (2,)]
    """
    sizes = {"layer": 1, "block": 2, "net": num_layers}
    if unit not in sizes:
        raise ValueError(f'unit={unit!r}; use "layer", "block" or "net"')
    layers = range(num_layers)
    return [tuple(layers[i : i + sizes[unit]]) for i in range(0, num_layers, sizes[unit])]


def plan_units(
    chain: Chain,
    shapes: Sequence[tuple[int, ...]],
    units: Sequence[tuple[int, ...]],
    sample: jax.ShapeDtypeStruct,
    rounds: int,
) -> tuple[Plan, ...]:
    """Consecutive units of one shape, with one pre-function before each but the first, form a group."""
    plans: list[Plan] = []
    x = jax.eval_shape(chain.pre[0], sample)
    last = None
    for number, unit in enumerate(units):
        inner = tuple(chain.pre[i] for i in unit[1:])
        same = (tuple(shapes[i] for i in unit), inner, x.shape)
        pre = chain.pre[unit[0]]
        # `last` is set once there is a group; its second unit tells the function before the others.
        if same == last and all(chain.pre[u[0]] is pre for u in plans[-1].layers[1:]):
            plans[-1] = plans[-1]._replace(layers=(*plans[-1].layers, unit))
        else:
            plans.append(Plan((unit,), number * rounds))
        last = same
        for j, i in enumerate(unit):
            x = x if j == 0 else jax.eval_shape(chain.pre[i], x)
            x = jax.ShapeDtypeStruct((*x.shape[:-1], shapes[i][0]), x.dtype)
        if unit[-1] + 1 < len(chain.pre):
            x = jax.eval_shape(chain.pre[unit[-1] + 1], x)
    return tuple(plans)


def next_shape(
    chain: Chain, plan: Plan, w: tuple[jax.Array, ...], x_shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Shape (with T) of the inputs of the group after this one."""
    x = jax.ShapeDtypeStruct(x_shape, jnp.float32)
    for j, i in enumerate(plan.layers[-1]):
        x = x if j == 0 else jax.eval_shape(jax.vmap(chain.pre[i]), x)
        x = jax.ShapeDtypeStruct((*x.shape[:-1], w[j].shape[-2]), jnp.float32)
    after = plan.layers[-1][-1] + 1
    return jax.eval_shape(jax.vmap(chain.pre[after]), x).shape if after < len(chain.pre) else ()
