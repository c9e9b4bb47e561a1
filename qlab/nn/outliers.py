"""Outlier twins of nets with norms or ReLU: the same function, but channels of very different ranges.

Small nets lack the channels of wide range that a LayerNorm of a large transformer puts out, and so hide what
smoothing, rotation and reparameterisation are for. The twin multiplies the output of a norm by a factor per
channel and divides its consumers' input rows by it. It is made of a symmetry that smoothing methods
invert too, so an arm that does only that belongs beside every result on it.

A link is (norm, consumers): a norm and every weight product that reads it. Letters: n = blocks, D = channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qlab.nn.resnet import NORM
from qlab.nn.sites import Params

Link = tuple[str, tuple[str, ...]]


def norm_outliers(
    stacked: Params, links: Sequence[Link], strength: float, key: jax.Array
) -> Params:
    """Blocks (one, or n stacked) with the outputs of their norms re-scaled by 2^U(-strength, strength).

    >>> import jax.numpy as jnp
    >>> block = {"norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)}, "fc": {"kernel": jnp.ones((2, 1))}}
    >>> twin = norm_outliers(block, [("norm", ("fc",))], 2.0, jax.random.key(0))
    >>> (twin["norm"]["scale"] * twin["fc"]["kernel"][:, 0]).tolist()
    [1.0, 1.0]
    """
    out = dict(stacked)
    for i, (norm, consumers) in enumerate(links):
        shape = out[norm]["scale"].shape
        draw = jax.random.uniform(
            jax.random.fold_in(key, i), shape, minval=-strength, maxval=strength
        )
        k = 2.0**draw
        out[norm] = {name: a * k for name, a in out[norm].items()}
        for site in consumers:
            out[site] = {**out[site], "kernel": out[site]["kernel"] / k[..., None]}
    return out


def norm_twin(
    params: Sequence[Params],
    links: Sequence[Link],
    strength: float,
    key: jax.Array,
) -> tuple[Params, ...]:
    """The outlier twin of a net: `norm_outliers` in every group that has the norm of a link.

    Raises:
      ValueError: no group has any of the norms.
    """
    twin, found = [], False
    for g, stacked in enumerate(params):
        here = [link for link in links if link[0] in stacked]
        found |= bool(here)
        twin.append(norm_outliers(stacked, here, strength, jax.random.fold_in(key, g)))
    if not found:
        raise ValueError(f"no block has a norm called {' or '.join(link[0] for link in links)}")
    return tuple(twin)


def relu_twin(
    params: Sequence[Params], pairs: Sequence[tuple[str, str]], strength: float, key: jax.Array
) -> tuple[Params, ...]:
    """The outlier twin of a net with pairs (product before a ReLU, the product that alone reads it).

    Output channel c of the first is multiplied by 2^U(-strength, strength), the second's rows of that channel (in
    every tap of a patch, channels fastest) divided by it; ReLU passes positive factors. A batch norm behind the first
    ("conv1_bn" of `qlab.nn.resnet`) takes the factors in its place, so that folding the twin gives the folded net's.

    >>> block = {"a": {"kernel": jnp.ones((1, 3, 2)), "bias": jnp.ones((1, 2))}, "b": {"kernel": jnp.ones((1, 4, 1))}}
    >>> (twin,) = relu_twin([block], [("a", "b")], 2.0, jax.random.key(0))
    >>> (twin["a"]["bias"][0] * twin["b"]["kernel"][0, 2:, 0]).tolist()
    [1.0, 1.0]
    """
    twin = []
    for g, stacked in enumerate(params):
        out = dict(stacked)
        for i, (first, second) in enumerate(pairs):
            if first not in out or second not in out:
                continue
            at = jax.random.fold_in(jax.random.fold_in(key, g), i)
            norm = first + NORM
            kernel = out[second]["kernel"]
            bias = out[norm if norm in out else first]["bias"]
            k = 2.0 ** jax.random.uniform(at, bias.shape, minval=-strength, maxval=strength)
            if norm in out:
                out[norm] = out[norm] | {name: out[norm][name] * k for name in ("scale", "bias")}
            else:
                out[first] = {"kernel": out[first]["kernel"] * k[:, None, :], "bias": bias * k}
            rows = jnp.tile(k, (1, kernel.shape[1] // k.shape[1]))
            out[second] = out[second] | {"kernel": kernel / rows[..., None]}
        twin.append(out)
    return tuple(twin)
