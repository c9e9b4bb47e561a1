"""Decoding with a KV cache for a net of `qlab.nn.gpt`: prefill, single steps, and generation under one jit.

    tokens, lengths = generate(net, params, ids, keep, key, max_new=32, eos=2)

Letters: N = rows, T = tokens of the prompt, S = room of the cache, L = blocks, K, C = key heads and their width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.nn.gpt import Position, causal, padded
from qlab.nn.sites import FLOAT, BlockNet, Params, Run, pick


class Cache(NamedTuple):
    """k, v: f32[L, N, S, K, C]. keep: bool[N, S], which places hold a token. index: i32[N], the next free place."""

    k: jax.Array
    v: jax.Array
    keep: jax.Array
    index: jax.Array


def prefill(
    net: BlockNet,
    params: tuple[Params, ...],
    ids: jax.Array,
    keep: jax.Array | None,
    room: int,
    run: Run = FLOAT,
) -> tuple[jax.Array, Cache]:
    """(logits as the net gives them, Cache) of prompts.

    Args:
      ids: i32[N, T]. keep: bool[N, T], False at pads, which stand on the left; None: no pads.
      room: S, at least T and the tokens still to come.
    Raises:
      ValueError: S < T.
    """
    n, t = ids.shape
    if room < t:
        raise ValueError(f"room={room} for {t} tokens of prompt; use at least {t}")
    stem, decoder, head = net.groups
    at = causal(t) if keep is None else padded(keep)
    x = stem.block(pick(params[0], 0), ids)

    def body(x, p):
        return nnx.merge(decoder.block.graph, p).extend(x, at, None, run)

    x, (k, v) = jax.lax.scan(body, x, params[1])
    pad = ((0, 0), (0, 0), (0, room - t), (0, 0), (0, 0))
    keep = jnp.ones((n, t), bool) if keep is None else keep
    cache = Cache(
        jnp.pad(k, pad), jnp.pad(v, pad), jnp.pad(keep, ((0, 0), (0, room - t))),
        jnp.full(n, t, jnp.int32),
    )  # fmt: skip
    return head.block(pick(params[2], 0), x, run), cache


def decode_step(
    net: BlockNet, params: tuple[Params, ...], cache: Cache, ids: jax.Array, run: Run = FLOAT
) -> tuple[jax.Array, Cache]:
    """(logits f32[N, V] behind these tokens, Cache with them). ids: i32[N], one token a row.

    A row whose cache is full loses the token: give `prefill` the room.
    """
    stem, decoder, head = net.groups
    here = jnp.arange(cache.keep.shape[1]) == cache.index[:, None]
    keep = cache.keep | here
    at = Position(cache.keep.sum(1)[:, None], keep[:, None, :])
    x = stem.block(pick(params[0], 0), ids[:, None])
    put = here[:, :, None, None]

    def body(x, layer):
        p, k, v = layer

        def write(new_k, new_v):
            return jnp.where(put, new_k, k), jnp.where(put, new_v, v)

        return nnx.merge(decoder.block.graph, p).extend(x, at, write, run)

    x, (k, v) = jax.lax.scan(body, x, (params[1], cache.k, cache.v))
    logits = head.block(pick(params[2], 0), x, run)
    logits = logits if logits.ndim == 2 else logits[:, -1]
    return logits, Cache(k, v, keep, cache.index + 1)


def sample_token(
    key: jax.Array,
    logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """i32[N] of logits f32[N, V]: temperature, then top-k, then top-p, then a draw.

    Args:
      temperature: 0: the largest logit. top_k: 0: all. top_p: the smallest prefix of the sorted tokens is kept in
        which the mass before each token is below top_p, so at least one token.

    >>> int(sample_token(jax.random.key(0), jnp.array([[0.0, 3.0]]), 0.0)[0])
    1
    """
    greedy = logits.argmax(-1)
    if isinstance(temperature, (int, float)) and temperature == 0:
        return greedy.astype(jnp.int32)
    z = logits / jnp.maximum(temperature, 1e-6)
    if top_k:
        least = jax.lax.top_k(z, min(top_k, z.shape[-1]))[0][..., -1:]
        z = jnp.where(z < least, -jnp.inf, z)
    if top_p < 1:
        order = jnp.argsort(-z, -1)
        mass = jnp.take_along_axis(jax.nn.softmax(z, -1), order, -1)
        cut = jnp.cumsum(mass, -1) - mass >= top_p
        cut = jnp.take_along_axis(cut, jnp.argsort(order, -1), -1)
        z = jnp.where(cut, -jnp.inf, z)
    drawn = jax.random.categorical(key, z, -1)
    return jnp.where(temperature <= 0, greedy, drawn).astype(jnp.int32)


@partial(jax.jit, static_argnums=0, static_argnames=("max_new", "eos", "top_k", "top_p"))
def generate(
    net: BlockNet,
    params: tuple[Params, ...],
    ids: jax.Array,
    keep: jax.Array | None,
    key: jax.Array,
    *,
    max_new: int,
    eos: int = -1,
    temperature: float | jax.Array = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """(new tokens i32[N, max_new], how many of them i32[N]); the loop ends behind the last row's eos.

    Args:
      ids, keep: as in `prefill`. eos: ends a row and counts as one of its tokens; -1: none does. What stands
        behind a row's end is eos. temperature, top_k, top_p: of `sample_token`.
    """
    logits, cache = prefill(net, params, ids, keep, ids.shape[1] + max_new)
    logits = logits if logits.ndim == 2 else logits[:, -1]
    n = len(ids)

    def alive(carry):
        i, _, _, _, _, done = carry
        return (i < max_new) & ~done.all()

    def body(carry):
        i, logits, cache, out, length, done = carry
        new = sample_token(jax.random.fold_in(key, i), logits, temperature, top_k, top_p)
        new = jnp.where(done, eos, new)
        out = out.at[:, i].set(new)
        length = length + ~done
        logits, cache = decode_step(net, params, cache, jnp.maximum(new, 0))
        return i + 1, logits, cache, out, length, done | (new == eos)

    out = jnp.full((n, max_new), eos, jnp.int32)
    start = (0, logits, cache, out, jnp.zeros(n, jnp.int32), jnp.zeros(n, bool))
    _, _, _, out, length, _ = jax.lax.while_loop(alive, body, start)
    return out, length
