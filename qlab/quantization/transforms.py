"""Rewrites of a net's parameters that keep its function: what smoothing, rotation and reparameterisation are.

A Transform measures what it needs (`init`: params and calibration inputs -> t, a pytree) and rewrites
(`apply`: params, t -> params). The contract, held by one test for all: the float outputs are the same before
and after, for any t of the right form. `chain` measures each transform on the net that the ones before it left.

Weights here are nnx kernels (in, out): channel c of a layer's input is row c. Leaves of a group are stacked
on axis 0 (qlab.nn.sites). Letters: D = channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.nn.sites import Params

Tree = tuple[Params, ...]


class Transform(NamedTuple):
    """init: (params, x_cal, key) -> t. apply: (params, t) -> params of the same function."""

    init: Callable[[Tree, Any, jax.Array], Any]
    apply: Callable[[Tree, Any], Tree]

    def __call__(self, params: Tree, x_cal: Any, key: jax.Array) -> Tree:
        return self.apply(params, self.init(params, x_cal, key))


def identity() -> Transform:
    """Nothing."""
    return Transform(lambda params, x, key: (), lambda params, t: params)


def chain(*transforms: Transform) -> Transform:
    """One after another, each measured on what the ones before it left."""

    def init(params, x, key):
        made = []
        for i, transform in enumerate(transforms):
            t = transform.init(params, x, jax.random.fold_in(key, i))
            params = transform.apply(params, t)
            made.append(t)
        return tuple(made)

    def apply(params, t):
        for transform, own in zip(transforms, t, strict=True):
            params = transform.apply(params, own)
        return params

    return Transform(init, apply)


def smooth_scale(act_max, w_max, alpha: float = 0.5, floor: float = 1e-5) -> jax.Array:
    """f32[D]: act_max^alpha / w_max^(1 - alpha), SmoothQuant's divisor of an input (arXiv 2211.10438, eq. 4).

    Args:
      act_max, w_max: f32[D], largest |input| and largest |weight| of each input channel.

    >>> smooth_scale(jnp.array([4.0]), jnp.array([1.0])).tolist()
    [2.0]
    """
    scale = jnp.maximum(act_max, floor) ** alpha / jnp.maximum(w_max, floor) ** (1.0 - alpha)
    return jnp.maximum(scale, floor)


def scale_norm(params: Params, norm: str, consumers: tuple[str, ...], s: jax.Array) -> Params:
    """Divides the output of a norm by s f32[..., D] and multiplies its consumers' input rows by s.

    Exact: a norm's scale and bias act per channel just before the products. Every consumer of the
    norm has to be named. Works on one block or on a stacked group (s then f32[n, D]).
    """
    out = dict(params)
    out[norm] = {k: v / s for k, v in params[norm].items()}
    for site in consumers:
        out[site] = {**params[site], "kernel": params[site]["kernel"] * s[..., None]}
    return out


def affine_norm(
    params: Params, norm: str, consumers: tuple[str, ...], r: jax.Array, c: jax.Array | None = None
) -> Params:
    """The output x of a norm becomes x / r - c, and its consumers undo it: W' = W r, b' = b + W' c.

    Exact. Every consumer of the norm has to be named. r, c: f32[D], or f32[n, D] for a stacked group.

    Raises:
      ValueError: a shift c, but the norm or a consumer has no bias to hold it.
    """
    out = scale_norm(params, norm, consumers, r)
    if c is None:
        return out
    if missing := [name for name in (norm, *consumers) if "bias" not in out[name]]:
        raise ValueError(
            f"{missing[0]!r} has no bias to hold a shift; use grids without zero point"
        )
    out[norm] = {**out[norm], "bias": out[norm]["bias"] - c}
    for site in consumers:
        shift = jnp.einsum("...io,...i->...o", out[site]["kernel"], c)
        out[site] = {**out[site], "bias": out[site]["bias"] + shift}
    return out
