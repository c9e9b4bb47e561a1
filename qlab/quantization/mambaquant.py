"""MambaQuant (Xu et al., arXiv 2501.13484): rotations and smoothing that suit a Mamba mixer.

Rewrites of a qlab.nn.mamba net, each of which keeps its function:
    fold_norm    the weight of each RMSNorm goes into its consumers, so that rotations commute with the norm
    smooth       S1 norm -> in_proj, S2 gate -> out_proj (S-SiLU), S3 h by inner channel (online), S4 B -> C by
                 state, S5 dt rank, S7 conv
    remove_mean  the dt vector is centred by biases
    rotate       R1 residual stream, R5 dt rank (both offline), R2 input of out_proj, R4 states, R3 h over the
                 inner width, R6 input of x_proj (online)
`mambaquant` puts them in order. Smoothing and means come before rotations: they scale channels, which a
rotated net no longer has. R = K H by default for R1 and R5 (`klt_rotation`), plain random Hadamard for the
online ones, whose K could not be folded away from the fast transform.

Where the published code and this differ: its R5 applies R and R^T the other way round (flag r5_transposed: the
same function, but t H^T K^T has no equal variances), it measures K before smoothing and before the norm's
weight is folded (flag k_order="before" for the first), and it multiplies the R2 of successive layers.

Kernels are (in, out): "rows" are inputs. Letters: n = mixers, N = samples, T = tokens, d, e, S, r as in
qlab.nn.mamba.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qlab.nn.sites import BlockNet, Params, capture, run_group
from qlab.quantization.activations import PerToken, affine
from qlab.quantization.blocks import ActMethod, SiteInput
from qlab.quantization.rotation import hadamard, klt_rotation, variance_ratio
from qlab.quantization.transforms import Transform, Tree, chain, identity, scale_norm, smooth_scale

SMOOTHING = ("s1", "s2", "s3", "s4", "s5", "s7")
ROTATIONS = ("r1", "r2", "r3", "r4", "r5", "r6")
FLOOR, CEILING = 1e-2, 100.0  # of a scale (the ceiling: of S4 alone)
KFrom = Literal["activations", "weights", "none"]


def parts_of(smoothing: Sequence[str], rotations: Sequence[str], mean: bool) -> tuple[str, ...]:
    """The parts (qlab.nn.mamba.PARTS) that a net needs for these rewrites."""
    online = {"s2": "gate", "s3": "h_scale", "r2": "r2", "r3": "r3", "r4": "r4", "r6": "r6"}
    named = [online[name] for name in (*smoothing, *rotations) if name in online]
    return (*named, *(["mean"] if mean else []))


@partial(jax.jit, static_argnums=0)
def captured(net: BlockNet, params: Tree, x: Any) -> dict[str, jax.Array]:
    """{site of a mixer: its inputs f32[n, N, T, ...]} of the float net.

    The costly part of every measurement: jitted by itself, so that all of them share one program.
    """
    stem, mixer = net.groups[:2]
    x = run_group(stem, params[0], x)
    return jax.lax.scan(lambda x, p: capture(mixer.block, p, x), x, params[1])[1]


@jax.jit
def fold_norm(params: Tree) -> Tree:
    """The weights of the norms moved into W_s, W_g and the head; the norms are then 1."""
    stem, mixer, head = params
    mixer = scale_norm(mixer, "norm", ("w_s", "w_g"), mixer["norm"]["scale"])
    return stem, mixer, scale_norm(head, "norm", ("head",), head["norm"]["scale"])


def _rows(m: Params, site: str, s: jax.Array) -> Params:
    """Input channel c of a weight times s[c]; s f32[n, in]."""
    return {**m[site], "kernel": m[site]["kernel"] * s[..., None]}


def _columns(m: Params, site: str, s: jax.Array) -> Params:
    """Output channel c of an affine map times s[c]; s f32[n, out]."""
    out = {**m[site], "kernel": m[site]["kernel"] * s[..., None, :]}
    return out | {"bias": out["bias"] * s} if "bias" in out else out


@jax.jit
def smoothed(m: Params, s: dict[str, jax.Array]) -> Params:
    """A group of mixers with these divisors of its activations; any of SMOOTHING, f32[n, channels], > 0."""
    m = dict(m)
    if "s1" in s:
        m = scale_norm(m, "norm", ("w_s", "w_g"), s["s1"])
    if "s2" in s:  # g / s sigmoid(s gate (g / s)) = S-SiLU(g) / s
        m["w_g"], m["w_o"] = _columns(m, "w_g", 1 / s["s2"]), _rows(m, "w_o", s["s2"])
        m["gate"] = m["gate"] * s["s2"]
    if "s3" in s:
        m["h_scale"] = m["h_scale"] * s["s3"]
    if "s4" in s:  # A is diagonal, so h / s obeys the same recurrence
        m["w_B"], m["w_C"] = _columns(m, "w_B", 1 / s["s4"]), _columns(m, "w_C", s["s4"])
    if "s5" in s:
        m["w_xdt"], m["w_dt"] = _columns(m, "w_xdt", 1 / s["s5"]), _rows(m, "w_dt", s["s5"])
    if "s7" in s:
        m["w_s"] = _columns(m, "w_s", 1 / s["s7"])
        m["conv"] = {**m["conv"], "kernel": m["conv"]["kernel"] * s["s7"][..., None]}
    return m


def smooth(net: BlockNet, names: Sequence[str], alpha: float = 0.5) -> Transform:
    """Smoothing by s = max |act|^alpha / max |W|^(1 - alpha) per channel, at least 1e-2, all from one pass.

    S4's other side is |C|, and its scale is at most 100; S3's scale is the 0.999999 quantile of |h|.
    """
    _known("smoothing", names, SMOOTHING)

    def init(params: Tree, x: Any, key: jax.Array) -> dict[str, jax.Array]:
        del key
        return _scales(tuple(names), alpha, params[1], captured(net, params, x))

    return Transform(init, lambda params, s: (params[0], smoothed(params[1], s), params[2]))


@partial(jax.jit, static_argnums=(0, 1))
def _scales(
    names: tuple[str, ...], alpha: float, m: Params, seen: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """{name: f32[n, channels]} for mixers m and what their sites have seen."""

    def top(a):  # over samples and tokens
        return jnp.abs(a).max((1, 2))

    def weight(*sites):  # largest |weight| of each input channel
        return jnp.stack([jnp.abs(m[s]["kernel"]).max(-1) for s in sites]).max(0)

    scale = partial(smooth_scale, alpha=alpha, floor=1e-5)
    states = seen["h"].reshape(*seen["h"].shape[:3], -1, m["w_B"]["kernel"].shape[-1])
    s = {
        "s1": lambda: scale(top(seen["w_s"]), weight("w_s", "w_g")),
        "s2": lambda: scale(top(seen["w_o"]), weight("w_o")),
        "s4": lambda: jnp.minimum(scale(top(states).max(1), top(seen["C"])), CEILING),
        "s5": lambda: scale(top(seen["w_dt"]), weight("w_dt")),
        "s7": lambda: scale(top(seen["conv"]), weight("conv")),
    }
    out = {name: jnp.maximum(s[name](), FLOOR) for name in names if name != "s3"}
    if "s3" in names:
        h = states / out["s4"][:, None, None, None] if "s4" in out else states
        h = jnp.abs(jnp.moveaxis(h, 3, 1)).reshape(len(h), h.shape[3], -1)
        top_h = jax.vmap(jax.vmap(lambda v: tail(v, 0.999999)))(h)
        out["s3"] = jnp.maximum(top_h, FLOOR)
    return out


def remove_mean(net: BlockNet) -> Transform:
    """The dt vector minus its mean over calibration: W_xdt takes the bias -mu and b_dt gains mu W_dt."""

    def init(params: Tree, x: Any, key: jax.Array) -> jax.Array:
        del key
        return captured(net, params, x)["w_dt"].mean((1, 2))

    def apply(params: Tree, mu: jax.Array) -> Tree:
        m = dict(params[1])
        m["w_xdt"] = {**m["w_xdt"], "bias": m["w_xdt"]["bias"] - mu}
        shift = jnp.einsum("nr,nre->ne", mu, m["w_dt"]["kernel"])
        m["w_dt"] = {**m["w_dt"], "bias": m["w_dt"]["bias"] + shift}
        return params[0], m, params[2]

    return Transform(init, apply)


@jax.jit
def rotated(params: Tree, r: dict[str, jax.Array]) -> Tree:
    """The net with these orthogonal matrices; r1 f32[d, d], the others f32[n, channels, channels].

    Norms are folded first: x R1 / rms(x R1) = (x / rms x) R1 only then.
    """
    stem, m, head = fold_norm(params)
    m = dict(m)

    def into(site: str, q: jax.Array) -> None:  # the input of a site arrives times q
        m[site] = {**m[site], "kernel": jnp.swapaxes(q, -1, -2) @ m[site]["kernel"]}

    def out_of(site: str, q: jax.Array) -> None:  # the output of a site leaves times q
        m[site] = {k: jnp.einsum("n...o,noq->n...q", v, q) for k, v in m[site].items()}

    if "r1" in r:
        stem = jax.tree.map(lambda a: a @ r["r1"], stem)  # a table, or a kernel and a bias
        everywhere = jnp.broadcast_to(r["r1"], (len(m["d"]), *r["r1"].shape))
        into("w_s", everywhere)
        into("w_g", everywhere)
        out_of("w_o", everywhere)
        head = {**head, "head": {**head["head"], "kernel": r["r1"].T @ head["head"]["kernel"]}}
    if "r2" in r:
        m["r2"] = m["r2"] @ r["r2"]
        into("w_o", r["r2"])
    if "r3" in r:
        m["r3"] = m["r3"] @ r["r3"]
    if "r4" in r:
        m["r4"] = m["r4"] @ r["r4"]
        out_of("w_C", r["r4"])
    if "r5" in r:
        out_of("w_xdt", r["r5"])
        into("w_dt", r["r5"])
    if "r6" in r:
        m["r6"] = m["r6"] @ r["r6"]
        for site in ("w_xdt", "w_B", "w_C"):
            into(site, r["r6"])
    return stem, m, head


def rotate(
    net: BlockNet,
    names: Sequence[str],
    *,
    k_from: KFrom = "activations",
    r5_transposed: bool = False,
) -> Transform:
    """Rotations by fresh random Hadamard matrices, times K where offline (R1, R5).

    Args:
      k_from: K of the site's inputs on calibration data (R1: of the first mixer, for the whole stream);
        "weights": of its weights' input channels; "none": K = I, plain Hadamard as in QuaRot.
    """
    _known("rotation", names, ROTATIONS)
    if k_from not in ("activations", "weights", "none"):
        raise ValueError(f"k_from={k_from!r}; use activations, weights or none")

    def init(params: Tree, x: Any, key: jax.Array) -> dict[str, jax.Array]:
        m = fold_norm(params)[1]
        keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(ROTATIONS)}
        offline = {"r1", "r5"} & set(names)
        seen = {}
        if k_from == "activations" and offline:
            seen = captured(net, fold_norm(params), x)
        n, inner, states = m["a_log"].shape

        def random(name: str, width: int) -> jax.Array:
            return jax.vmap(partial(hadamard, width))(jax.random.split(keys[name], n))

        out = {name: random(name, inner) for name in ("r2", "r3", "r6") if name in names}
        if "r4" in names:
            out["r4"] = random("r4", states)
        if "r1" in names:
            rows = jnp.concatenate([m["w_s"]["kernel"], m["w_g"]["kernel"]], -1)[0].T
            if k_from == "none":
                out["r1"] = hadamard(rows.shape[-1], keys["r1"])
            else:
                data = seen["w_s"][0] if k_from == "activations" else rows
                out["r1"] = klt_rotation(data, keys["r1"])
        if "r5" in names:
            weights = jnp.swapaxes(m["w_dt"]["kernel"], -1, -2)
            data = seen["w_dt"] if k_from == "activations" else weights
            if k_from == "none":
                r5 = random("r5", weights.shape[-1])
            else:
                r5 = jax.vmap(klt_rotation)(data, jax.random.split(keys["r5"], n))
            out["r5"] = jnp.swapaxes(r5, -1, -2) if r5_transposed else r5
        return out

    return Transform(init, rotated)


def mambaquant(
    net: BlockNet,
    *,
    smoothing: Sequence[str] = ("s2", "s4", "s5", "s7"),
    rotations: Sequence[str] = ("r1", "r2", "r4", "r5"),
    mean: bool = False,
    alpha: float = 0.5,
    k_from: KFrom = "activations",
    k_order: Literal["after", "before"] = "after",
    r5_transposed: bool = False,
) -> Transform:
    """The paper's rewrite in its order, by default as for language models.

    The net must have the parts that `parts_of` names.

    Args:
      k_order: K is measured after smoothing, which makes rotated variances equal, or before it.
    """
    if k_order not in ("after", "before"):
        raise ValueError(f"k_order={k_order!r}; use after or before")
    soft = chain(
        smooth(net, smoothing, alpha) if smoothing else identity(),
        remove_mean(net) if mean else identity(),
    )
    turn = rotate(net, rotations, k_from=k_from, r5_transposed=r5_transposed)
    if not rotations:
        return soft
    if k_order == "after":
        return chain(soft, turn)

    def init(params: Tree, x: Any, key: jax.Array):
        k_soft, k_turn = (jax.random.fold_in(key, i) for i in range(2))  # as `chain` draws them
        return soft.init(params, x, k_soft), turn.init(params, x, k_turn)

    return Transform(init, lambda params, t: turn.apply(soft.apply(params, t[0]), t[1]))


def _known(what: str, names: Sequence[str], all_: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in all_]:
        raise ValueError(f"no {what} is called {unknown[0]!r}; use some of {', '.join(all_)}")


def tail(x: jax.Array, share: float) -> jax.Array:
    """f32[]: jnp.quantile(x, share) for a share near 1, without sorting x.

    >>> float(tail(jnp.arange(11.0), 0.95))
    9.5
    """
    x = x.reshape(-1)
    at = (x.size - 1) * (1.0 - share)
    i = int(at)
    top = largest(x, min(i + 2, x.size))
    return top[i] + (at - i) * (top[-1] - top[i])


def largest(x: jax.Array, k: int) -> jax.Array:
    """f32[k]: the k largest of x f32[n], descending.

    A few come from passes of max: XLA on a CPU may turn top_k into a full sort, a hundred times slower.

    >>> largest(jnp.array([3.0, 5.0, 1.0, 5.0]), 3).tolist()
    [5.0, 5.0, 3.0]
    """
    if k > 4:
        return jax.lax.top_k(x, k)[0]
    out = [x.max()]
    for j in range(1, k):  # a value stays while copies of it are left
        below = jnp.where(x < out[-1], x, -jnp.inf).max()
        out.append(jnp.where((x >= out[-1]).sum() > j, out[-1], below))
    return jnp.stack(out)


def static_and_token(
    *,
    state: Literal["static", "token"] = "token",
    state_bits: int = 8,
    share: float = 0.999999,
    ranges: Literal["fp", "quantized"] = "fp",
) -> ActMethod:
    """Static grids per tensor from quantiles of calibration inputs; h and C by token at run time.

    Args:
      state: "static" treats h and C like all others. state_bits: of h and C; 0: like all others.
      ranges: of the float net's inputs (one calibration pass), or behind the quantized sites before.
    """
    if not 0.5 < share <= 1.0:
        raise ValueError(f"share={share} must lie in (0.5, 1]")
    if state not in ("static", "token") or ranges not in ("fp", "quantized"):
        raise ValueError(f"state={state!r} (static, token), ranges={ranges!r} (fp, quantized)")

    def act(i: SiteInput):
        operand = i.site in ("h", "C")
        bits = jnp.float32(state_bits) if operand and state_bits else i.bits
        if operand and state == "token":
            return PerToken(bits)
        x = i.x_fp if ranges == "fp" else i.x
        low, high = jax.vmap(partial(tail, share=share))(jnp.stack([-x, x]))
        return affine(-low, high, bits)

    return act


def channel_ratios(net: BlockNet, params: Tree, x: Any) -> dict[str, jax.Array]:
    """`variance_ratio` of four sites' inputs on calibration samples, f32[] each.

    ratio_w_s: of the first mixer, whose K is R1's. ratio_w_dt, ratio_w_o, ratio_h (over states): the
    geometric mean over mixers.
    """
    return _ratios(params[1]["w_B"]["kernel"].shape[-1], captured(net, params, x))


@partial(jax.jit, static_argnums=0)
def _ratios(states: int, seen: dict[str, jax.Array]) -> dict[str, jax.Array]:
    rows = {**seen, "h": seen["h"].reshape(*seen["h"].shape[:3], -1, states)}
    mean = {
        f"ratio_{s}": jnp.exp(jnp.log(jax.vmap(variance_ratio)(rows[s])).mean())
        for s in ("w_dt", "w_o", "h")
    }
    return mean | {"ratio_w_s": variance_ratio(rows["w_s"][0])}
