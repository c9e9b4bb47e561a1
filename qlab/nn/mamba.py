"""Mamba-1 with split projections and named sites (Gu & Dao, arXiv 2312.00752), small enough for digits.

A mixer computes, row vectors on the left of (in, out) kernels,
    v = SiLU(conv(u W_s)),  g = u W_g,  dt = softplus((v W_xdt) W_dt + b_dt),  B = v W_B,  C = v W_C,
    h_t = exp(dt_t A) h_(t-1) + dt_t B_t v_t,  y_t = h_t C_t + D v_t,  out = (y * SiLU(g)) W_o
with u the RMS norm of the residual stream. in_proj stands as (W_s, W_g) and x_proj as (W_xdt, W_B, W_C), so
that methods can rewrite each alone.

Sites of a mixer: w_s, w_g, conv (its input and its kernel), w_xdt, w_B, w_C, w_dt, h and C (the operands of
their product), w_o; of the stem: embed (not of a token table); of the head: head.

`parts` name what a rewritten mixer may hold besides: what a method adds to run online. Each is the identity
until it is rewritten (`with_parts`), and a net that is trained has none.

Letters: N = samples, T = tokens, d = width, e = inner width, S = states, r = rank of dt, K = taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlab.nn.draws import pooled_init
from qlab.nn.sites import FLOAT, BlockNet, Params, Run, block_net

EPS = 1e-6
PARTS = {
    "gate": "f32[e], the scale inside the gate's sigmoid: g sigmoid(gate g)",
    "h_scale": "f32[e], divides h before the product with C and multiplies y after it",
    "mean": "a bias of W_xdt, f32[r]",
    "r2": "f32[e, e], rotates the input of W_o",
    "r3": "f32[e, e], rotates h over e, undone after the product",
    "r4": "f32[S, S], rotates h over its states (C's half lies in W_C)",
    "r6": "f32[e, e], rotates the input of W_xdt, W_B and W_C",
}


class MambaSize(NamedTuple):
    """Hyper-parameters; the default is for 8 x 8 digits scanned by row: 16 tokens of 4 pixels.

    Attributes:
      vocab: token ids in; 0: real values, `chunk` of a flattened sample to a token.
      expand: e / d. answers: logits of how many last tokens; 1: f32[N, outputs], 0: of all.
      scan: a key of SCANS, the same function. parts: names of PARTS, in any order.
    """

    vocab: int = 0
    chunk: int = 4
    dim: int = 32
    depth: int = 3
    expand: int = 2
    states: int = 8
    rank: int = 4
    taps: int = 4
    outputs: int = 10
    answers: int = 1
    scan: str = "loop"
    parts: tuple[str, ...] = ()


def ssm_states(x, dt, a, b, h0=None) -> jax.Array:
    """h f32[..., T, e, S] of h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t, by an associative scan.

    Args:
      x, dt: f32[..., T, e]. a: f32[e, S], < 0. b: f32[..., T, S]. h0: f32[..., e, S]; None: zeros.
    """
    decay = jnp.exp(dt[..., None] * a)
    drive = (dt * x)[..., None] * b[..., None, :]
    if h0 is not None:
        drive = drive.at[..., 0, :, :].add(decay[..., 0, :, :] * h0)

    def then(one, two):
        return one[0] * two[0], two[0] * one[1] + two[1]

    return jax.lax.associative_scan(then, (decay, drive), axis=decay.ndim - 3)[1]


def ssm_states_loop(x, dt, a, b, h0=None) -> jax.Array:
    """The same as `ssm_states`, token after token: fewer passes over memory, no parallelism over T.

    A training step of the digits net takes a quarter of the time on a CPU.
    """

    def step(h, token):
        x, dt, b = token
        h = jnp.exp(dt[..., None] * a) * h + (dt * x)[..., None] * b[..., None, :]
        return h, h

    if h0 is None:
        h0 = jnp.zeros((*x.shape[:-2], x.shape[-1], b.shape[-1]), x.dtype)
    tokens = tuple(jnp.moveaxis(v, -2, 0) for v in (x, dt, b))
    return jnp.moveaxis(jax.lax.scan(step, h0, tokens, unroll=2)[1], 0, -3)


SCANS = {"associative": ssm_states, "loop": ssm_states_loop}


def selective_scan(x, dt, a, b, c, d, h0=None) -> jax.Array:
    """y f32[..., T, e] of y_t = h_t C_t + D x_t (eq. 2, discretised as in Mamba's code).

    Args:
      x, dt: f32[..., T, e]. a: f32[e, S]. b, c: f32[..., T, S]. d: f32[e]. h0: see ssm_states.

    >>> one = jnp.ones((3, 1))
    >>> [round(float(v), 3) for v in selective_scan(one, one, -one[:1], one, one, 0 * one[0]).ravel()]
    [1.0, 1.368, 1.503]
    """
    return read_out(ssm_states(x, dt, a, b, h0), c) + d * x


def read_out(h: jax.Array, c: jax.Array) -> jax.Array:
    """y f32[..., T, e] = h f32[..., T, e, S] times C f32[..., T, S], token by token."""
    return jnp.einsum("...es,...s->...e", h, c)


def causal_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depthwise: y_t = sum_k kernel[:, k] x_(t - K + 1 + k), zeros before the start; x f32[N, T, e], kernel [e, K]."""
    taps = kernel.shape[1]
    padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    y = padded[:, : x.shape[1]] * kernel[:, 0]
    for k in range(1, taps):
        y = y + padded[:, k : k + x.shape[1]] * kernel[:, k]
    return y


def s_silu(v: jax.Array, s: jax.Array | float = 1.0) -> jax.Array:
    """v sigmoid(s v): SiLU for s = 1, and s_silu(v / s, s) = SiLU(v) / s (MambaQuant's S-SiLU)."""
    return v * jax.nn.sigmoid(s * v)


def uniform_init(rngs: nnx.Rngs, num: int) -> Callable[..., jax.Array]:
    """A kernel initialiser, uniform within +-in^(-1/2) as in Mamba's code; num draws at once."""
    return pooled_init(jax.random.uniform(rngs.params(), (num,), minval=-1.0))


class Depthwise(nnx.Module):
    """kernel f32[e, K] and bias f32[e] of the causal convolution."""

    def __init__(self, inner: int, taps: int, init: Callable[..., jax.Array]):
        self.kernel = nnx.Param(init(None, (taps, inner)).T)
        self.bias = nnx.Param(jnp.zeros(inner))


class Mixer(nnx.Module):
    """x + mixer(RMSNorm x), f32[N, T, d]."""

    def __init__(self, s: MambaSize, *, rngs: nnx.Rngs):
        d, e = s.dim, s.expand * s.dim
        init = uniform_init(rngs, e * (3 * d + 2 * s.rank + 2 * s.states + s.taps + 1))

        def linear(a: int, b: int, bias: bool = False) -> nnx.Linear:
            return nnx.Linear(a, b, use_bias=bias, kernel_init=init, rngs=rngs)

        self.norm = nnx.RMSNorm(d, epsilon=EPS, rngs=rngs)
        self.w_s, self.w_g = linear(d, e), linear(d, e)
        self.conv = Depthwise(e, s.taps, init)
        self.w_xdt = linear(e, s.rank, "mean" in s.parts)
        self.w_B, self.w_C = linear(e, s.states), linear(e, s.states)
        self.w_dt = linear(s.rank, e, True)
        # softplus(bias) is log-uniform in [0.001, 0.1], as in Mamba's code
        dt = jnp.exp(-4.6 + 2.3 * init(None, (1, e))[0])
        self.w_dt.bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))
        self.a_log = nnx.Param(jnp.log(jnp.tile(jnp.arange(1.0, s.states + 1), (e, 1))))
        self.d = nnx.Param(jnp.ones(e))
        self.w_o = linear(e, d)
        self.states = SCANS[s.scan]
        self.parts = tuple(sorted(s.parts))
        for name in self.parts:
            if name != "mean":
                setattr(self, name, nnx.Param(_identity(name, e, s.states)))

    def __call__(self, x: jax.Array, run: Run = FLOAT) -> jax.Array:
        u = self.norm(x)
        v = run.operand("conv", run.linear("w_s", self.w_s, u))
        v = causal_conv(v, run.weight("conv", self.conv.kernel[...])) + self.conv.bias[...]
        v, g = jax.nn.silu(v), run.linear("w_g", self.w_g, u)
        p = self._turned("r6", v)
        dt = run.linear("w_dt", self.w_dt, run.linear("w_xdt", self.w_xdt, p))
        b, c = run.linear("w_B", self.w_B, p), run.linear("w_C", self.w_C, p)
        h = self.states(v, jax.nn.softplus(dt), -jnp.exp(self.a_log[...]), b)
        y = self._product(h, c, run) + self.d[...] * v
        gate = self._part("gate")
        y = self._turned("r2", y * s_silu(g, 1.0 if gate is None else gate))
        return x + run.linear("w_o", self.w_o, y)

    def _product(self, h: jax.Array, c: jax.Array, run: Run) -> jax.Array:
        """h C over the states, f32[N, T, e]. The site h sees a token's e S values as one row."""
        scale, r3 = self._part("h_scale"), self._part("r3")
        h = h if scale is None else h / scale[:, None]
        h = h if r3 is None else jnp.einsum("...es,ef->...fs", h, r3)
        h = self._turned("r4", h)
        h = run.operand("h", h.reshape(*h.shape[:-2], -1)).reshape(h.shape)
        y = read_out(h, run.operand("C", c))
        y = y if r3 is None else y @ r3.T
        return y if scale is None else y * scale

    def _turned(self, part: str, x: jax.Array) -> jax.Array:
        r = self._part(part)
        return x if r is None else x @ r

    def _part(self, name: str) -> jax.Array | None:
        return getattr(self, name)[...] if name in self.parts else None


def _identity(part: str, inner: int, states: int) -> jax.Array:
    if part in ("gate", "h_scale"):
        return jnp.ones(inner)
    return jnp.eye(states if part == "r4" else inner)


class Stem(nnx.Module):
    """Tokens f32[N, T, d]: rows of a table for ids i32[N, T], else a linear map of chunks of values."""

    def __init__(self, s: MambaSize, *, rngs: nnx.Rngs):
        self.chunk = 0 if s.vocab else s.chunk
        if s.vocab:
            self.table = nnx.Param(0.5 * jax.random.normal(rngs.params(), (s.vocab, s.dim)))
        else:
            init = uniform_init(rngs, s.chunk * s.dim)
            self.embed = nnx.Linear(s.chunk, s.dim, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array, run: Run = FLOAT) -> jax.Array:
        if not self.chunk:
            return self.table[...][x]
        return run.linear("embed", self.embed, x.reshape(len(x), -1, self.chunk))


class Head(nnx.Module):
    """RMSNorm and logits of the last tokens, f32[N, answers, outputs], f32[N, outputs] of one."""

    def __init__(self, s: MambaSize, *, rngs: nnx.Rngs):
        self.answers = s.answers
        self.norm = nnx.RMSNorm(s.dim, epsilon=EPS, rngs=rngs)
        init = uniform_init(rngs, s.dim * s.outputs)
        self.head = nnx.Linear(s.dim, s.outputs, use_bias=False, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array, run: Run = FLOAT) -> jax.Array:
        x = x[:, -1] if self.answers == 1 else x[:, -self.answers :]  # -0: all
        return run.linear("head", self.head, self.norm(x))


def mamba(s: MambaSize = MambaSize()) -> BlockNet:  # noqa: B008 (a constant tuple)
    """The net as a BlockNet: stem, mixer (depth blocks), head; equal sizes give equal blocks.

    Raises:
      ValueError: a size below 1, or a part that does not exist.

    >>> net = mamba(MambaSize(dim=8, depth=2, states=4, rank=2))
    >>> net.names
    ('stem', 'mixer.0', 'mixer.1', 'head')
    >>> net.apply(net.init(jax.random.key(0)), jnp.ones((3, 8, 8, 1))).shape
    (3, 10)
    """
    for name, value in zip(s._fields[1:9], s[1:9], strict=True):
        if value < 1:
            raise ValueError(f"{name}={value} is no size; use at least 1")
    if min(s.vocab, s.answers) < 0:
        raise ValueError(f"vocab={s.vocab}, answers={s.answers}; use 0 or more")
    if s.scan not in SCANS:
        raise ValueError(f"scan={s.scan!r}; use one of {', '.join(SCANS)}")
    if unknown := sorted(set(s.parts) - set(PARTS)):
        raise ValueError(f"no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")

    def make(rngs: nnx.Rngs):
        return [
            [Stem(s, rngs=rngs)],
            [Mixer(s, rngs=rngs) for _ in range(s.depth)],
            [Head(s, rngs=rngs)],
        ]

    return block_net(("stem", "mixer", "head"), make)


def with_parts(params: tuple[Params, ...], size: MambaSize) -> tuple[Params, ...]:
    """Params of `size` from those of a net with fewer parts: each new part is the identity."""
    stem, mixer, head = params
    n, inner, states = mixer["a_log"].shape
    mixer = dict(mixer)
    for name in size.parts:
        if name == "mean":
            zeros = jnp.zeros((n, size.rank))
            mixer["w_xdt"] = {"bias": zeros, **mixer["w_xdt"]}
        elif name not in mixer:
            mixer[name] = jnp.broadcast_to(one := _identity(name, inner, states), (n, *one.shape))
    return stem, mixer, head


def outlier_twin(params: tuple[Params, ...], strength: float, key: jax.Array) -> tuple[Params, ...]:
    """The same function with channels rescaled by k = 2^U(-strength, strength), drawn for each layer and place.

    The places are exact scaling symmetries, those that MambaQuant's smoothing inverts: norm weight k and
    rows of W_s, W_g / k; columns of W_g k, the gate's scale / k and rows of W_o / k; columns of W_B k and
    of W_C / k. Needs the part "gate" in the params; rotations must not have been applied.
    """
    stem, m, head = params
    shapes = {"norm": m["norm"]["scale"].shape, "gate": m["gate"].shape}
    shapes["state"] = m["w_B"]["kernel"].shape[::2]
    k = {
        name: 2.0 ** jax.random.uniform(
            jax.random.fold_in(key, i), shape, minval=-strength, maxval=strength
        )
        for i, (name, shape) in enumerate(shapes.items())
    }  # fmt: skip

    def kernel(site: str, factor: jax.Array) -> Params:
        return {**m[site], "kernel": m[site]["kernel"] * factor}

    mixer = {
        **m,
        "norm": {"scale": m["norm"]["scale"] * k["norm"]},
        "w_s": kernel("w_s", 1 / k["norm"][..., None]),
        "w_g": kernel("w_g", k["gate"][..., None, :] / k["norm"][..., None]),
        "gate": m["gate"] / k["gate"],
        "w_o": kernel("w_o", 1 / k["gate"][..., None]),
        "w_B": kernel("w_B", k["state"][..., None, :]),
        "w_C": kernel("w_C", 1 / k["state"][..., None, :]),
    }
    return stem, mixer, head
