"""Losses of reconstruction: how far a quantized unit's output is from the float unit's, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlab.quantization.methods import squared_error
from qlab.quantization.site_study import divergence

EXACT = 1e-12  # a loss of rounding to nearest below this leaves nothing to learn
EPS = 1e-12  # under the logarithm of an error that may be 0


class Aux(NamedTuple):
    """What some losses need beside the outputs.

    activation: y -> what the next layer reads. logits: y -> logits of the net from this output on. fisher: like y,
    squared gradients of the net's loss at the float output (BRECQ, arXiv 2102.05426, eq. 10).
    """

    activation: Callable[[jax.Array], jax.Array] | None = None
    logits: Callable[[jax.Array], jax.Array] | None = None
    fisher: jax.Array | None = None


Loss = Callable[[jax.Array, jax.Array, Aux], jax.Array]


def _l2(y, y_q, aux):
    return squared_error(y_q, y)


def _l1(y, y_q, aux):
    return jnp.abs(y_q - y).sum(-1).mean()


def _log_l2(y, y_q, aux):
    """Free of the layer's scale; falls without end as the error goes to 0, but for EPS."""
    return jnp.log(EPS + _l2(y, y_q, aux))


def _cosine(y, y_q, aux):
    """1 - cos of the angle between the outputs; blind to their length."""
    dot = (y * y_q).sum(-1)
    norms = jnp.sqrt((y**2).sum(-1) + EPS) * jnp.sqrt((y_q**2).sum(-1) + EPS)
    return (1.0 - dot / norms).mean()


def _kl(y, y_q, aux):
    """KL(softmax of the float logits || of the quantized ones), the rest of the net being float."""
    logits = aux.logits or (lambda a: a)
    return divergence(logits(y), logits(y_q))


def _activation(y, y_q, aux):
    f = aux.activation or (lambda a: a)
    return _l2(f(y), f(y_q), aux)


def _fisher(y, y_q, aux):
    if aux.fisher is None:
        raise ValueError('loss "fisher" needs aux.fisher, squared gradients like y')
    return (aux.fisher * (y_q - y) ** 2).sum(-1).mean()


LOSSES: dict[str, Loss] = {
    "l2": _l2,
    "l1": _l1,
    "log_l2": _log_l2,
    "cosine": _cosine,
    "activation": _activation,
    "fisher": _fisher,
    "kl": _kl,
}


def recon_loss(name: str) -> Loss:
    """(y, y_q, aux) -> f32[], y f32[..., out] the float output, y_q the quantized one.

    Errors are summed over outputs and averaged over the rest. "l2", "l1", "log_l2" (log(1e-12 + L2)), "cosine",
    "activation" (L2 behind aux.activation), "fisher" (L2 weighted by aux.fisher), "kl" (of aux.logits; without it y
    are the logits).

    >>> y = jnp.array([[3.0, 4.0]])
    >>> [float(recon_loss(name)(y, 2 * y, Aux())) for name in ("l2", "l1")]
    [25.0, 7.0]
    >>> float(recon_loss("cosine")(y, 2 * y, Aux()))
    0.0
    """
    if name not in LOSSES:
        raise ValueError(f"loss={name!r}; use one of {', '.join(LOSSES)}")
    return LOSSES[name]
