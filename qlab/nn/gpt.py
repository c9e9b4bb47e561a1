"""A decoder-only language model with named sites (pre-RMSNorm, RoPE, grouped queries, SwiGLU; Qwen2 and Llama).

A block computes x += proj(attention(qkv(RMSNorm x))), then x += down(silu(g) * u) with [g, u] = gate_up(RMSNorm x).
qkv holds the rows of q (H heads), k and v (K heads each), gate_up those of gate and up. Attention is causal; scores
and norms are computed in float32. Query head h reads key head floor(h K / H).

Sites of a block: qkv, q, k, probs, v, proj, gate_up, down; of the head: head. The table of tokens is none. A block
runs in four stages, each around one weight product (`stage`), for methods that work on parts of a block.

Padding goes on the left: for (ids, keep) instead of ids the blocks carry keep along and positions count from the first
token kept. Tied weights are two arrays here: an importer copies the table into the head (`qlab.nn.gpt_import`).
`qlab.nn.gpt_decode` has the KV cache and sampling.

Letters: N = samples, T = tokens, D = width, H = query heads, K = key heads, C = width of a head, V = vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.nn.draws import pooled_init
from qlab.nn.sites import FLOAT, BlockNet, Run, block_net

# The norms of a block, each with the weight products that read it (see qlab.nn.outliers).
LINKS = (("attn_norm", ("qkv",)), ("mlp_norm", ("gate_up",)))
STAGES = ("qkv", "proj", "gate_up", "down")
MASKED = -1e30  # finite: a row that sees nothing has a uniform softmax, not NaN


class GPTSize(NamedTuple):
    """Hyper-parameters; the default is `tiny`.

    Attributes:
      hidden: inner width of the MLP. base: of RoPE. qkv_bias: Qwen2's. head_dim: 0: dim / heads.
      answers: logits of how many last tokens; 1: f32[N, V], 0: of all.
      prefix, part: part > 0: a sequence is `prefix` tokens and then parts of `part` tokens that do not see one
        another, each numbered as if it alone followed the prefix; the logits are those of each part's last token,
        f32[N, parts, V], and `answers` is not read.
    """

    vocab: int = 65
    dim: int = 64
    depth: int = 2
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 192
    base: float = 1e4
    eps: float = 1e-6
    qkv_bias: bool = False
    head_dim: int = 0
    answers: int = 0
    prefix: int = 0
    part: int = 0

    @property
    def width(self) -> int:
        """C."""
        return self.head_dim or self.dim // self.heads


PRESETS = {
    "tiny": GPTSize(),
    "small": GPTSize(dim=128, depth=4, hidden=384),
}


class RMSNorm(nnx.Module):
    """scale * x / sqrt(mean x^2 + eps), the quotient in float32 and cast back before the scale."""

    def __init__(self, dim: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim))

    def __call__(self, x: jax.Array) -> jax.Array:
        f = x.astype(jnp.float32)
        f = f * jax.lax.rsqrt((f**2).mean(-1, keepdims=True) + self.eps)
        return self.scale[...] * f.astype(x.dtype)


def rope(x: jax.Array, position: jax.Array, base: float) -> jax.Array:
    """Rotary embedding, "rotate half": pairs (i, i + C/2) of x f32[..., T, heads, C] turned by p base^(-2i/C).

    position: int[..., T], p of each token.

    >>> x = jnp.ones((1, 1, 1, 4))
    >>> bool((rope(x, jnp.zeros((1, 1)), 1e4) == x).all())
    True
    """
    half = x.shape[-1] // 2
    angle = position[..., None] * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, visible: jax.Array) -> jax.Array:
    """Probabilities f32[N, K, H/K, T, S] of queries f32[N, T, H, C] over keys f32[N, S, K, C].

    visible: bool[N or 1, T, S]; a row that sees nothing is uniform.
    """
    n, t, _, c = q.shape
    q = q.reshape(n, t, k.shape[2], -1, c)
    scores = jnp.einsum("ntkgc,nskc->nkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * c**-0.5, MASKED)
    return jax.nn.softmax(scores, -1).astype(q.dtype)


class Position(NamedTuple):
    """What attention knows of the tokens at hand. position: int[N or 1, T]; visible: bool[N or 1, T, S]."""

    position: jax.Array
    visible: jax.Array


def causal(t: int) -> Position:
    """Tokens 0 .. t - 1, each seeing itself and those before."""
    return Position(jnp.arange(t)[None], jnp.tril(jnp.ones((t, t), bool))[None])


def padded(keep: jax.Array) -> Position:
    """The same with pads, keep bool[N, T] False there: positions count from the first token kept."""
    t = keep.shape[1]
    position = jnp.maximum(jnp.cumsum(keep, 1) - 1, 0)
    return Position(position, causal(t).visible & keep[:, None, :])


def parted(t: int, prefix: int, part: int) -> Position:
    """A prefix and parts behind it that do not see one another (see GPTSize); part = 0: `causal`.

    >>> parted(5, 1, 2).position.tolist(), parted(5, 1, 2).visible[0, 3].tolist()
    ([[0, 1, 2, 1, 2]], [True, False, False, True, False])
    """
    if not part:
        return causal(t)
    at = jnp.arange(t)
    number = jnp.where(at < prefix, -1, (at - prefix) // part)
    position = jnp.where(at < prefix, at, prefix + (at - prefix) % part)
    apart = (number[None] >= 0) & (number[None] != number[:, None])
    return Position(position[None], causal(t).visible & ~apart)


class Decoder(nnx.Module):
    """A block, f32[N, T, D] -> the same; with pads (f32[N, T, D], keep bool[N, T]) -> the same."""

    def __init__(self, s: GPTSize, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.width, self.base = s.heads, s.kv_heads, s.width, s.base
        self.prefix, self.part = s.prefix, s.part

        wide = s.heads * s.width
        per = s.dim * (2 * wide + 2 * s.kv_heads * s.width + 3 * s.hidden)
        init = pooled_init(jax.random.normal(rngs.params(), (per,)))

        def linear(a: int, b: int, bias: bool = False) -> nnx.Linear:
            return nnx.Linear(a, b, use_bias=bias, kernel_init=init, rngs=rngs)

        self.attn_norm = RMSNorm(s.dim, s.eps)
        self.qkv = linear(s.dim, wide + 2 * s.kv_heads * s.width, s.qkv_bias)
        self.proj = linear(wide, s.dim)
        self.mlp_norm = RMSNorm(s.dim, s.eps)
        self.gate_up = linear(s.dim, 2 * s.hidden)
        self.down = linear(s.hidden, s.dim)
        for last in (self.proj, self.down):  # they add to the residual stream: small, as in GPT-2
            last.kernel = nnx.Param(last.kernel[...] * (2 * s.depth) ** -0.5)

    def __call__(self, x: Any, run: Run = FLOAT) -> Any:
        if isinstance(x, tuple):
            return (self.extend(x[0], padded(x[1]), None, run)[0], x[1])
        return self.extend(x, self.alone(x.shape[1]), None, run)[0]

    def alone(self, t: int) -> Position:
        """Of t tokens without pads or a cache."""
        return parted(t, self.prefix, self.part)

    def extend(self, x: jax.Array, at: Position, write, run: Run = FLOAT):
        """(x, keys and values). write: (k, v) of these tokens -> (k, v) of all S tokens; None: these alone."""
        mixed, kv = self.mix(run.linear("qkv", self.qkv, self.attn_norm(x)), at, write, run)
        x = x + run.linear("proj", self.proj, mixed)
        m = self.gated(run.linear("gate_up", self.gate_up, self.mlp_norm(x)))
        return x + run.linear("down", self.down, m), kv

    def stage(self, name: str, x: jax.Array, m: jax.Array, run: Run = FLOAT):
        """(x, m) after one weight product of a block: m is what "qkv" and "gate_up" leave for the next one.

        x: f32[N, T, D], the residual stream. m: f32[N, T, E], of which the first columns are read and written,
        E the larger of the outputs of qkv and the inputs of down. All four in order are the block without pads.
        """
        if name == "qkv":
            return x, _into(m, run.linear("qkv", self.qkv, self.attn_norm(x)))
        if name == "proj":
            wide = (self.heads + 2 * self.kv_heads) * self.width
            mixed, _ = self.mix(m[..., :wide], self.alone(x.shape[1]), None, run)
            return x + run.linear("proj", self.proj, mixed), m
        if name == "gate_up":
            return x, _into(m, self.gated(run.linear("gate_up", self.gate_up, self.mlp_norm(x))))
        return x + run.linear("down", self.down, m[..., : self.down.kernel.shape[0]]), m

    def mix(self, qkv: jax.Array, at: Position, write, run: Run = FLOAT):
        """(what the heads bring together f32[N, T, H C], keys and values), from the outputs of qkv."""
        shape = (*qkv.shape[:2], -1, self.width)
        q, k, v = (
            a.reshape(shape)
            for a in jnp.split(
                qkv, [self.heads * self.width, (self.heads + self.kv_heads) * self.width], -1
            )
        )
        q, k = (rope(a, at.position, self.base) for a in (q, k))
        kv = (k, v) if write is None else write(k, v)
        q, k, v = run.operand("q", q), run.operand("k", kv[0]), run.operand("v", kv[1])
        probs = run.operand("probs", attention(q, k, at.visible))
        mixed = jnp.einsum("nkgts,nskc->ntkgc", probs, v)
        return mixed.reshape(*qkv.shape[:2], -1), kv

    def gated(self, gate_up: jax.Array) -> jax.Array:
        """silu(gate) * up."""
        gate, up = jnp.split(gate_up, 2, -1)
        return jax.nn.silu(gate) * up


def _into(m: jax.Array, a: jax.Array) -> jax.Array:
    return jnp.pad(a, ((0, 0), (0, 0), (0, m.shape[-1] - a.shape[-1])))


class Table(nnx.Module):
    """Rows of the table of tokens: i32[N, T] -> f32[N, T, D]; (ids, keep) -> (rows, keep)."""

    def __init__(self, s: GPTSize, *, rngs: nnx.Rngs):
        self.table = nnx.Param(0.5 * jax.random.normal(rngs.params(), (s.vocab, s.dim)))

    def __call__(self, x: Any, run: Run = FLOAT) -> Any:
        del run
        table = jnp.asarray(self.table[...])  # NumPy's, where blocks are constants of a program
        if isinstance(x, tuple):
            return (table[x[0]], *x[1:])
        return table[x]


class Head(nnx.Module):
    """RMSNorm and logits of the last tokens (see GPTSize), f32[N, answers, V], f32[N, V] of one; (x, keep) -> the same."""

    def __init__(self, s: GPTSize, *, rngs: nnx.Rngs):
        self.answers, self.prefix, self.part = s.answers, s.prefix, s.part
        self.norm = RMSNorm(s.dim, s.eps)
        init = nnx.initializers.normal(s.dim**-0.5)
        self.head = nnx.Linear(s.dim, s.vocab, use_bias=False, kernel_init=init, rngs=rngs)

    def __call__(self, x: Any, run: Run = FLOAT) -> jax.Array:
        x = x[0] if isinstance(x, tuple) else x
        if self.part:
            x = x[:, self.prefix + self.part - 1 :: self.part]
        else:
            x = x[:, -1] if self.answers == 1 else x[:, -self.answers :]  # -0: all
        return run.linear("head", self.head, self.norm(x))


def check_size(s: GPTSize) -> None:
    """Raises a ValueError if no net has this size."""
    for name, value in zip(s._fields[:6], s[:6], strict=True):
        if value < 1:
            raise ValueError(f"{name}={value} is no size; use at least 1")
    if s.heads % s.kv_heads or (not s.head_dim and s.dim % s.heads) or s.width % 2:
        raise ValueError(
            f"kv_heads={s.kv_heads} must divide heads={s.heads}, and heads dim={s.dim} into even widths"
        )
    if min(s.answers, s.prefix, s.part) < 0:
        raise ValueError(f"answers={s.answers}, prefix={s.prefix}, part={s.part}; use 0 or more")


def gpt(s: GPTSize = GPTSize()) -> BlockNet:  # noqa: B008 (a constant tuple)
    """The net as a BlockNet: stem (table of tokens), decoder (depth blocks), head; i32[N, T] -> logits.

    Raises:
      ValueError: a size below 1, heads that do not divide, or an odd head width.

    >>> net = gpt(GPTSize(vocab=5, dim=8, hidden=16))
    >>> net.names
    ('stem', 'decoder.0', 'decoder.1', 'head')
    >>> net.apply(net.init(jax.random.key(0)), jnp.array([[1, 2, 3]])).shape
    (1, 3, 5)
    """
    check_size(s)

    def make(rngs: nnx.Rngs):
        return [
            [Table(s, rngs=rngs)],
            [Decoder(s, rngs=rngs) for _ in range(s.depth)],
            [Head(s, rngs=rngs)],
        ]

    return block_net(("stem", "decoder", "head"), make)
