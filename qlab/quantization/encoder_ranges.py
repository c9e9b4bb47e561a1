"""Ranges of what stands before a decoder: static ends per token row, searched product by product or learned.

The groups before "decoder" (encoder, projector) run as they are; the input of each product named in `products` is
rounded on its own range (lo, hi) f32[T, 1] of every token row, widened to hold 0.

Letters: N = samples, T = token rows, n = blocks of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlab.nn.gpt import STAGES
from qlab.nn.sites import BlockNet, Params, Run, capture, pick
from qlab.quantization.activations import Affine, affine, fake
from qlab.quantization.code_entropy import soft_entropy
from qlab.quantization.language_layers import FloatPass, channel_range, decoder_at
from qlab.quantization.qtensor import clip_ste, round_ste

Ends = dict[str, tuple[jax.Array, jax.Array]]  # {site: (lo, hi) f32[n, T, 1]}
START = 4.0  # of the learned ends: sigmoid(4)


def row_grid(lo: jax.Array, hi: jax.Array, bits) -> Affine:
    """`affine` with gradients for its ends through the zero point too."""
    grid = affine(lo, hi, bits)
    zero = clip_ste(round_ste(-jnp.minimum(lo, 0.0) / grid.scale), 0.0, grid.q_max)
    return dataclasses.replace(grid, zero=zero)


def _through(net: BlockNet, params: Sequence[Params], x: Any, block_fn) -> tuple[Any, tuple]:
    """x through all groups before the decoder by block_fn(g, params, x) -> (x, found); found stacked per group."""
    out = []
    for g in range(decoder_at(net)):
        group = net.groups[g]

        def body(x, i, g=g):
            return block_fn(g, pick(params[g], i), x, i)

        if group.n == 1:
            x, found = body(x, 0)
            found = jax.tree.map(lambda a: a[None], found)
        else:
            x, found = jax.lax.scan(body, x, jnp.arange(group.n))
        out.append(found)
    return x, tuple(out)


def front_ranges(
    net: BlockNet, params: tuple[Params, ...], x: Any, products: Mapping[str, Sequence[str]]
) -> tuple[tuple[Ends, ...], jax.Array]:
    """(per group the float net's ranges on x, the decoder's tokens f32[N, T, D])."""
    named = tuple((g.name, tuple(products.get(g.name, ()))) for g in net.groups)
    return _front_ranges(net, named, params, x)


@partial(jax.jit, static_argnums=(0, 1))
def _front_ranges(net, named, params, x):
    def body(g, p, x, i):
        y, seen = capture(net.groups[g].block, p, x)
        rows = {s: channel_range(seen[s], (0, 2)) for s in named[g][1]}
        return y, jax.tree.map(lambda a: a[:, None], rows)

    tokens, ranges = _through(net, params, x, body)
    return ranges, tokens


def _front(
    net: BlockNet, params: Sequence[Params], ends: Sequence[Ends], x: Any, bits, choose=None
):
    """(tokens, per group the ends in use): each input rounded on choose(lo, hi, x), or on its ends as they are."""

    def body(g, p, x, i):
        near, used = pick(ends[g], i), {}

        def linear(site, product, x):
            if site not in near:
                return product(x)
            lo, hi = near[site]
            used[site] = (lo, hi) = (lo, hi) if choose is None else choose(lo, hi, x)
            return product(fake(row_grid(lo, hi, bits), x))

        return net.groups[g].block(p, x, Run(linear, lambda site, x: x)), used

    return _through(net, params, x, body)


@partial(jax.jit, static_argnums=0)
def front(net: BlockNet, params: Sequence[Params], ends: Sequence[Ends], x: Any, bits) -> jax.Array:
    """The decoder's tokens f32[N, T, D] with inputs rounded on their ends, per group {site: (lo, hi) f32[n, T, 1]}."""
    return _front(net, params, ends, x, bits)[0]


@partial(jax.jit, static_argnums=0)
def search_front(
    net: BlockNet, params: Sequence[Params], ranges: Sequence[Ends], x: Any, bits, shares: jax.Array,
    power=2.0,
) -> tuple[Ends, ...]:  # fmt: skip
    """Ends: of each product's ranges the share with the least mean |x - x_hat|^power over all rows together."""

    def choose(lo, hi, x):
        def error(share):
            grid = row_grid(lo * share, hi * share, bits)
            return (jnp.abs(fake(grid, x) - x) ** power).mean()

        best = shares[jax.lax.map(error, shares).argmin()]
        return lo * best, hi * best

    return _front(net, params, ranges, x, bits, choose)[1]


@partial(jax.jit, static_argnums=0, static_argnames=("num_steps", "norms", "max_bits"))
def tune_encoder(
    net: BlockNet,
    params: tuple[Params, ...],
    ends: tuple[Ends, ...],
    seen: FloatPass,
    x: Any,
    bits,
    *,
    num_steps: int,
    learning_rate=5e-2,
    eta=0.01,
    norms: bool = False,
    max_bits: int = 8,
) -> tuple[tuple[Ends, ...], tuple[Params, ...], jax.Array]:
    """Ends of the encoder's ranges (and its norms) learned for the decoder: Q-VLM's third point.

    Adam on |v - v_q|^2 / |v|^2 + eta mean_k H(k): v the decoder's tokens, H(k) the soft entropy of the input of product k of
    its first block (floats, on their ranges). Each end of each row is ends * sigmoid(u) / sigmoid(START); the best
    iterate is returned, the first of which is `ends`.

    Args:
      params: with rounded weights. seen: the float decoder on the calibration samples x. bits: at most max_bits.
      norms: scales and biases of the norms before the decoder are learned too.
    Returns:
      (ends, the norms per group, objective f32[num_steps + 1] over the iterates).
    """
    at = decoder_at(net)
    tokens = seen.start[0]
    power = jnp.maximum((tokens**2).mean(), 1e-30)
    first = pick(params[at], 0)
    near = pick(seen.ranges, 0)
    held = tuple({s: a for s, a in p.items() if "norm" in s} for p in params[:at])

    def objective(v):
        u, own = v
        moved = jax.tree.map(lambda a, b: a * jax.nn.sigmoid(b) / jax.nn.sigmoid(START), ends, u)
        here = [{**p, **n} for p, n in zip(params, own if norms else held, strict=False)]
        got = _front(net, here, moved, x, bits)[0]
        inputs = capture(net.groups[at].block, first, got)[1]
        entropies = [
            soft_entropy(inputs[s], near[s][0], near[s][1], 2.0**bits, room=2**max_bits)
            for s in STAGES
        ]
        return ((got - tokens) ** 2).mean() / power + eta * jnp.stack(entropies).mean()

    optimizer = optax.adam(learning_rate)

    def step(carry, _):
        v, state, best, least = carry
        value, grads = jax.value_and_grad(objective)(v)
        best = jax.tree.map(lambda a, b: jnp.where(value < least, a, b), v, best)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(v, updates), state, best, jnp.minimum(value, least)), value

    v = (jax.tree.map(lambda a: jnp.full_like(a, START), ends), held)
    start = (v, optimizer.init(v), v, jnp.inf)
    # the last iterate is judged by one step more, whose update is dropped
    (_, _, (u, own), _), values = jax.lax.scan(step, start, length=num_steps + 1)
    moved = jax.tree.map(lambda a, b: a * jax.nn.sigmoid(b) / jax.nn.sigmoid(START), ends, u)
    return moved, own if norms else held, values
