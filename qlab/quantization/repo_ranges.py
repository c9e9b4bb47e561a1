"""Ranges of a decoder's inputs as Q-VLM's published code finds them (ChangyuanWang17/QVLM), for comparison with its formulation.

Batch after batch, layer after layer: a layer's range (per channel, from 0) takes in the batch's min and max only if the
proxy of the layer before is at least the mean of the proxies so far, or its block is the first of three, or it is
the first batch. Then again over the batches: each range is replaced by the p of {1, .9, ..., .4} times itself with the least mean
|x - x_hat|^0.5, so that shrinkage compounds from batch to batch. No layer sees what its rounding does to a later one.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.nn.gpt import STAGES
from qlab.nn.sites import BlockNet, Params, Run, pick
from qlab.quantization.activations import affine, fake
from qlab.quantization.language_layers import (
    Ranges,
    State,
    channel_range,
    decoder_at,
    repo_dependency,
    repo_entropy,
    start_state,
)
from qlab.quantization.range_search import Cost

POWER = 0.5
EVERY = 3  # the first of so many blocks always takes its range


def repo_ranges(
    net: BlockNet, params: Params, tokens: jax.Array, bits, grid: jax.Array, num_batches: int = 8
) -> tuple[Ranges, Cost]:
    """({stage: (lo, hi) f32[n, D]}, Cost) of the decoder on tokens f32[N, T, D] in num_batches batches.

    params: of the decoder, stacked, with rounded weights.
    """
    group = net.groups[decoder_at(net)]
    num_batches = min(num_batches, len(tokens))
    size = len(tokens) // num_batches
    batches = [tokens[b * size : (b + 1) * size] for b in range(num_batches)]
    widths = {s: params[s]["kernel"].shape[1] for s in STAGES}
    zeros = {s: jnp.zeros((group.n, w)) for s, w in widths.items()}
    ends: Ranges = {s: (a, a) for s, a in zeros.items()}
    order = [(i, s) for i in range(group.n) for s in STAGES]
    for b, batch in enumerate(batches):
        state, before, proxies = start_state(params, batch), None, []
        for i, name in order:
            joins = bool(proxies) and proxies[-1] >= sum(proxies) / len(proxies)
            take = b == 0 or joins or i % EVERY == 0
            related = (
                before if name in ("proj", "gate_up") and _fits(before, widths[name]) else None
            )
            ends[name], state, before, proxy = _observe(
                net, name, params, ends[name], i, state, related, bits, take
            )
            proxies.append(float(proxy))
    for batch in batches:
        state = start_state(params, batch)
        for i, name in order:
            ends[name], state = _shrink(net, name, params, ends[name], i, state, bits, grid)
    return ends, Cost(0, 2 * num_batches * len(order))


def _fits(before: jax.Array | None, width: int) -> bool:
    return before is not None and before.shape[-1] == width


def _layer(net: BlockNet, name: str, params: Params, i, state: State, rounded) -> State:
    """The state after stage `name` of block i with its input x replaced by rounded(x)."""
    block = nnx.merge(net.groups[decoder_at(net)].block.graph, pick(params, i))
    run = Run(lambda site, product, x: product(rounded(x)), lambda site, x: x)
    return block.stage(name, *state, run)


@partial(jax.jit, static_argnums=(0, 1))
def _observe(net, name: str, params, ends, i, state, before, bits, take):
    """(ends with this batch's where taken, state, |x_hat|, proxy)."""
    seen = []

    def rounded(x):
        lo, hi = channel_range(x, (0, 1))
        lo = jnp.where(take, jnp.minimum(ends[0][i], lo), ends[0][i])
        hi = jnp.where(take, jnp.maximum(ends[1][i], hi), ends[1][i])
        seen.extend((lo, hi, fake(affine(lo, hi, bits), x)))
        return seen[-1]

    state = _layer(net, name, params, i, state, rounded)
    lo, hi, x_hat = seen
    now = jnp.abs(x_hat)
    proxy = repo_entropy(now) if before is None else repo_dependency(before, now)
    return (ends[0].at[i].set(lo), ends[1].at[i].set(hi)), state, now, proxy


@partial(jax.jit, static_argnums=(0, 1))
def _shrink(net, name: str, params, ends, i, state, bits, grid):
    """(ends with the best share of block i's, state)."""
    seen = []

    def rounded(x):
        lo, hi = ends[0][i], ends[1][i]

        def error(share):
            return (jnp.abs(fake(affine(lo * share, hi * share, bits), x) - x) ** POWER).mean()

        best = grid[jax.lax.map(error, grid).argmin()]
        seen.extend((lo * best, hi * best))
        return fake(affine(lo * best, hi * best, bits), x)

    state = _layer(net, name, params, i, state, rounded)
    return (ends[0].at[i].set(seen[0]), ends[1].at[i].set(seen[1])), state
