"""Observers: folds over calibration batches that end in a range or a statistic.

`init() / update(state, x, mask) / merge(a, b) / finalize(state)`: pure, jittable, and (all but `ema`)
independent of how the samples are cut into batches or spread over devices (`merge` adds two states).
`calibrate` runs one pass of a BlockNet for any number of sites.

Letters: D = channels (the last axis), N = rows (everything before it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from qlab.nn.sites import BlockNet, Params, capture, pick
from qlab.quantization.elementwise import abs_power

Per = Literal["tensor", "channel"]
Correction = Literal["end", "repo"]
BINS = 4096  # of a histogram, half of them for either sign


class Observer(NamedTuple):
    """A fold. init: channels D -> state. update: (state, x f32[..., D], mask bool[...] or None) -> state.

    merge: (state, state) -> state. finalize: state -> what was asked for.
    """

    init: Callable[[int], Any]
    update: Callable[..., Any]
    merge: Callable[[Any, Any], Any]
    finalize: Callable[[Any], Any]


def _rows(x: jax.Array, mask) -> tuple[jax.Array, jax.Array]:
    """x f32[N, D] and bool[N, 1], which rows count."""
    rows = x.reshape(-1, x.shape[-1])
    keep = jnp.ones(len(rows), bool) if mask is None else jnp.asarray(mask).reshape(-1)
    return rows, keep[:, None]


def minmax(per: Per = "tensor") -> Observer:
    """(lo, hi) of everything seen, f32[] or f32[D].

    >>> o = minmax()
    >>> state = o.update(o.init(2), jnp.array([[1.0, -3.0]]))
    >>> [float(a) for a in o.finalize(o.update(state, jnp.array([[2.0, 0.0]])))]
    [-3.0, 2.0]
    """

    def init(num):
        shape = () if per == "tensor" else (num,)
        # not weakly typed: a fold's second step would compile again
        return jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)

    def update(state, x, mask=None):
        rows, keep = _rows(x, mask)
        axis = None if per == "tensor" else 0
        lo = jnp.where(keep, rows, jnp.inf).min(axis)
        hi = jnp.where(keep, rows, -jnp.inf).max(axis)
        return merge(state, (lo, hi))

    def merge(a, b):
        return jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])

    return Observer(init, update, merge, lambda state: state)


def ema(beta: float = 0.9, per: Per = "tensor", correction: Correction = "end") -> Observer:
    """(lo, hi): exponential mean of each batch's min and max, corrected for its start at 0.

    The order of batches matters, so states cannot be merged.

    Args:
      correction: "end" divides what `finalize` gives by 1 - beta^t, t batches seen. "repo" divides the stored mean at
        every update, as data-free quantization code does (GDFQ, AdaDFQ): that corrects again and again, and the range is
        thousands of times too wide after twenty batches and right (to 2 %) after some 150.

    >>> o = ema(correction="repo")
    >>> state = o.init(1)
    >>> for _ in range(5):
    ...     state = o.update(state, jnp.array([[0.0, 1.0]]))
    >>> round(float(o.finalize(state)[1]))  # each batch's max was 1
    104
    """
    inner = minmax(per)

    def init(num):
        lo, _ = inner.init(num)
        return jnp.zeros_like(lo), jnp.zeros_like(lo), jnp.zeros(())

    def update(state, x, mask=None):
        now = inner.update(inner.init(x.shape[-1]), x, mask)
        count = state[2] + 1
        by = 1.0 - beta**count if correction == "repo" else 1.0
        lo, hi = ((beta * old + (1 - beta) * v) / by for old, v in zip(state, now, strict=False))
        return lo, hi, count

    def merge(a, b):
        raise ValueError("an EMA depends on the order of batches; it cannot be merged")

    def finalize(state):
        by = 1.0 if correction == "repo" else 1.0 - beta ** state[2]
        return state[0] / by, state[1] / by

    return Observer(init, update, merge, finalize)


class Histogram(NamedTuple):
    """counts: f32[BINS], bin i holds x in [(i - BINS/2) 2^k, (i + 1 - BINS/2) 2^k). exponent: k, i32[].

    Bins are aligned to 0 and their width is a power of two, so widening them (two by two) is exact
    and the end state does not depend on the order. lo, hi: f32[], the true range.
    """

    counts: jax.Array
    exponent: jax.Array
    lo: jax.Array
    hi: jax.Array


def histogram() -> Observer:
    """A histogram of all values whose range grows as needed; finalize gives it."""
    half = BINS // 2

    def init(num):
        del num
        return Histogram(jnp.zeros(BINS), jnp.int32(-126), *minmax().init(1))

    def needed(peak):
        """Least k with |x| < half 2^k for all |x| <= peak."""
        return jnp.maximum(jnp.frexp(peak)[1] - half.bit_length() + 1, -126).astype(jnp.int32)

    def widen(state: Histogram, k) -> Histogram:
        to = jnp.right_shift(jnp.arange(BINS) - half, jnp.minimum(k - state.exponent, 31)) + half
        return state._replace(counts=jnp.zeros(BINS).at[to].add(state.counts), exponent=k)

    def merge(a: Histogram, b: Histogram) -> Histogram:
        k = jnp.maximum(a.exponent, b.exponent)
        counts = widen(a, k).counts + widen(b, k).counts
        return Histogram(counts, k, jnp.minimum(a.lo, b.lo), jnp.maximum(a.hi, b.hi))

    def update(state, x, mask=None):
        rows, keep = _rows(x, mask)
        lo, hi = minmax().update((state.lo, state.hi), x, mask)
        k = needed(jnp.maximum(jnp.abs(jnp.where(keep, rows, 0.0)).max(), 0.0))
        bins = jnp.floor(jnp.ldexp(rows, -k)).astype(jnp.int32) + half
        weight = jnp.broadcast_to(keep, rows.shape).astype(jnp.float32)
        counts = jnp.zeros(BINS).at[bins.ravel()].add(weight.ravel())
        return merge(state, Histogram(counts, k, lo, hi))

    return Observer(init, update, merge, lambda state: state)


def centres(h: Histogram) -> jax.Array:
    """f32[BINS], the middle of each bin."""
    return jnp.ldexp(jnp.arange(BINS) - BINS // 2 + 0.5, h.exponent)


def percentile(share: float = 0.9999) -> Observer:
    """(lo, hi): the 1 - share and share quantiles, to the width of a bin (range / 2000 or finer)."""
    inner = histogram()

    def finalize(h: Histogram):
        total = jnp.cumsum(h.counts)
        at = jnp.array([1.0 - share, share]) * total[-1]
        right = jnp.ldexp(jnp.arange(1, BINS + 1) - BINS / 2, h.exponent)
        left = jnp.ldexp(jnp.arange(BINS) - BINS / 2, h.exponent)
        lo = left[jnp.searchsorted(total, at[0], side="right").clip(0, BINS - 1)]
        hi = right[jnp.searchsorted(total, at[1], side="left").clip(0, BINS - 1)]
        return jnp.maximum(lo, h.lo), jnp.minimum(hi, h.hi)

    return inner._replace(finalize=finalize)


def least_error(
    bits: int, *, p: float = 2.0, steps: int = 100, symmetric: bool = False
) -> Observer:
    """(lo, hi): the share of the range whose grid has least mean |x - x_hat|^p over the histogram."""
    from qlab.quantization.activations import affine, fake

    inner = histogram()

    def finalize(h: Histogram):
        x = centres(h)
        shares = jnp.arange(1, steps + 1) / steps

        def error(share):
            record = affine(h.lo * share, h.hi * share, bits, symmetric=symmetric)
            return (h.counts * abs_power(fake(record, x) - x, p)).sum()

        best = shares[jax.lax.map(error, shares).argmin()]
        return h.lo * best, h.hi * best

    return inner._replace(finalize=finalize)


def least_divergence(bits: int, *, steps: int = 100, symmetric: bool = False) -> Observer:
    """(lo, hi): the share of the range whose grid keeps the histogram best, by KL divergence (TensorRT's calibration).

    Of a candidate range, P is the histogram in it with what lies outside added to its two end bins; Q spreads the
    count of each code, without what lies outside, evenly over the bins of that code where P > 0. The share of least
    KL(P || Q) wins, among those whose range has at least as many bins as codes (fewer bins than codes would
    keep any histogram); without any, the whole range.
    """
    from qlab.quantization.activations import affine, encode

    inner, levels = histogram(), 2**bits

    def finalize(h: Histogram):
        x, bins = centres(h), jnp.arange(BINS)
        shares = jnp.arange(1, steps + 1) / steps

        def divergence(share):
            lo, hi = h.lo * share, h.hi * share
            record = affine(lo, hi, bits, symmetric=symmetric)
            lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)  # as `affine` widens it
            half = jnp.ldexp(0.5, h.exponent)
            inside = (x >= lo - half) & (x <= hi + half)
            first, last = inside.argmax(), BINS - 1 - inside[::-1].argmax()
            kept = jnp.where(inside, h.counts, 0.0)
            below, above = (
                jnp.where(side, h.counts, 0.0).sum() for side in (bins < first, bins > last)
            )
            p = kept.at[first].add(below).at[last].add(above)
            code = (encode(record, x) - record.q_min).astype(jnp.int32)
            mass, filled = (
                jax.ops.segment_sum(a, code, num_segments=levels)[code]
                for a in (kept, 1.0 * (p > 0))
            )
            q = jnp.where(p > 0, mass / jnp.maximum(filled, 1.0), 0.0)
            p, q = p / jnp.maximum(p.sum(), 1e-30), q / jnp.maximum(q.sum(), 1e-30)
            log = jnp.log(jnp.where(p > 0, p, 1.0)) - jnp.log(
                jnp.maximum(jnp.where(p > 0, q, 1.0), 1e-12)
            )
            return jnp.where(inside.sum() >= levels, (p * log).sum(), jnp.inf)

        found = jax.lax.map(divergence, shares)
        best = jnp.where(jnp.isfinite(found).any(), shares[found.argmin()], 1.0)
        return h.lo * best, h.hi * best

    return inner._replace(finalize=finalize)


class Moments(NamedTuple):
    """mean f32[D], covariance f32[D, D] (biased, centred), count f32[]."""

    mean: jax.Array
    covariance: jax.Array
    count: jax.Array


def moments() -> Observer:
    """Mean and covariance of the channels (for KLT rotations, mean removal); finalize gives Moments."""

    def init(num):
        return Moments(jnp.zeros(num), jnp.zeros((num, num)), jnp.zeros(()))

    def update(state, x, mask=None):
        rows, keep = _rows(x, mask)
        count = keep.sum().astype(rows.dtype)
        mean = jnp.where(keep, rows, 0.0).sum(0) / jnp.maximum(count, 1.0)
        off = jnp.where(keep, rows - mean, 0.0)
        return merge(state, Moments(mean, off.T @ off / jnp.maximum(count, 1.0), count))

    def merge(a: Moments, b: Moments) -> Moments:
        count = a.count + b.count
        share = b.count / jnp.maximum(count, 1.0)
        gap = b.mean - a.mean
        covariance = (1 - share) * a.covariance + share * b.covariance
        covariance += share * (1 - share) * jnp.outer(gap, gap)
        return Moments(a.mean + share * gap, covariance, count)

    return Observer(init, update, merge, lambda state: state)


def second_moment() -> Observer:
    """f32[D, D]: mean of x x^T, GPTQ's Hessian."""
    from qlab.quantization.gptq import HessianState, hessian_init, hessian_update

    def update(state, x, mask=None):
        rows, keep = _rows(x, mask)
        return hessian_update(state, rows, keep[:, 0])

    def merge(a, b):
        count = a.count + b.count
        total = a.mean * a.count + b.mean * b.count
        return HessianState(total / jnp.maximum(count, 1.0), count)

    return Observer(hessian_init, update, merge, lambda state: state.mean)


OBSERVERS = {
    "minmax": minmax,
    "ema": ema,
    "percentile": percentile,
    "least_error": least_error,
    "histogram": histogram,
    "moments": moments,
    "second_moment": second_moment,
}


def calibrate(
    net: BlockNet,
    params: tuple[Params, ...],
    batches: Iterable[Any],
    observers: Mapping[str, Observer],
) -> dict[str, Any]:
    """One pass of the float net over calibration batches, for any number of sites.

    Args:
      batches: inputs of the net. observers: by site name (of `net.names` joined with the site:
        "encoder.2/qkv"), or by the site alone ("qkv": in every block that has it).
    Returns:
      {"encoder.2/qkv": finalized}, for every site that an observer was given for.
    Raises:
      ValueError: no batch, or an observer for a site that does not exist (its names are listed).
    """
    states: dict[str, Any] = {}
    chosen: dict[str, Observer] = {}
    for x in batches:
        seen = _capture_net(net, params, x)
        if not chosen:
            chosen = _choose(seen, observers)
            states = {name: o.init(seen[name].shape[-1]) for name, o in chosen.items()}
        states = {name: _update(o)(states[name], seen[name]) for name, o in chosen.items()}
    if not chosen:
        raise ValueError("calibrate was given no batch")
    return {name: o.finalize(states[name]) for name, o in chosen.items()}


@partial(jax.jit, static_argnums=0)
def _capture_net(net: BlockNet, params, x) -> dict[str, jax.Array]:
    seen = {}
    for group, stacked in zip(net.groups, params, strict=True):

        def body(x, p, block=group.block):
            return capture(block, p, x)

        if group.n == 1:  # its output may have another shape than its input
            x, here = body(x, pick(stacked, 0))
            here = jax.tree.map(lambda a: a[None], here)
        else:
            x, here = jax.lax.scan(body, x, stacked)
        for site, values in here.items():
            for i in range(group.n):
                name = group.name if group.n == 1 else f"{group.name}.{i}"
                seen[f"{name}/{site}"] = values[i]
    return seen


def _update(o: Observer):
    return jax.jit(o.update)


def _choose(seen: Mapping[str, Any], observers: Mapping[str, Observer]) -> dict[str, Observer]:
    chosen = {}
    for asked, observer in observers.items():
        names = [n for n in seen if asked in (n, n.split("/")[1])]
        if not names:
            raise ValueError(f"no site is called {asked!r}; there are {', '.join(seen)}")
        chosen |= dict.fromkeys(names, observer)
    return chosen
