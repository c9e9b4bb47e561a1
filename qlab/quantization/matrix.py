"""One weight matrix of your own, quantized by any method of the lab.

from qlab.quantization import dequantize, quantize_matrix
qt = quantize_matrix(kernel.T, x_calib, method="flexround", bits=3, verbose=True)
kernel_hat = dequantize(qt).T                                  # a flax kernel is (in, out)
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlab.lab.errors import UserError, nearest
from qlab.quantization.adaquant import adaquant
from qlab.quantization.adaround import adaround
from qlab.quantization.decoupleq import DecoupleQ, decoupleq_layer
from qlab.quantization.flexround import flexround, lrq
from qlab.quantization.gptq import LADDER, gptq_solve, hessian_init, hessian_update
from qlab.quantization.grid import MAX_BITS, Calibration, Grid, group_size, make_grid
from qlab.quantization.methods import squared_error
from qlab.quantization.qtensor import QTensor, dequantize
from qlab.quantization.reconstruct import block_reconstruct
from qlab.quantization.rounding import RoundingRule, rtn

# method -> (rule, learning rate of Adam); closed forms stand without a rule
RULES = {
    "adaround": (adaround, 3e-2),
    "adaquant": (adaquant, 3e-2),
    "flexround": (flexround, 3e-2),
    "lrq": (lrq, 3e-2),
}
METHODS = ("rtn", "gptq", "decoupleq", *RULES)


def quantize_matrix(
    w,
    x_calib=None,
    *,
    method: str = "flexround",
    bits: int = 4,
    granularity: str = "channel",
    symmetric: bool = False,
    calibration: Calibration = "searched",
    num_iters: int = 1000,
    learning_rate: float | None = None,
    key: jax.Array | None = None,
    verbose: bool = False,
) -> QTensor:
    """Quantizes w f32[out, in] so that w_hat x stays near w x on calibration inputs.

    Args:
      w: the matrix, rows = outputs. x_calib: f32[N, in] inputs of the layer; may be None for "rtn".
      method: "rtn", "gptq", "decoupleq", "adaround", "adaquant", "flexround" or "lrq".
      bits: 1 to 8. granularity: "tensor" (not for "decoupleq"), "channel" or "group:g".
      symmetric: without zero point (for "decoupleq": without real offset). calibration: of the grid,
        "searched" or "minmax"; "decoupleq" finds its own.
      num_iters, learning_rate: of Adam with cosine decay, for the learned methods. On inputs without
        correlation, where little is to be gained, 3e-2 at 4 bits can end a few percent above rounding to
        nearest: `verbose` shows it, and 3e-4 ends below.
      key: order of the minibatches; None: key(0). verbose: print the layer error in a line.

    >>> w = jax.random.normal(jax.random.key(0), (8, 16))
    >>> x = jax.random.normal(jax.random.key(1), (64, 16)).cumsum(1)  # correlated inputs
    >>> qt = quantize_matrix(w, x, method="flexround", bits=3, num_iters=200)
    >>> qt
    QTensor(8 x 16, 3 bits asymmetric, per channel, 192 bytes unpacked)
    >>> layer_report(w, qt, x)["mse_ratio"] < 0.5  # less than half the error of rounding to nearest
    True
    """
    w = _matrix("w", w)
    if method not in METHODS:
        raise UserError(f"method={method!r} is not known{nearest(method, METHODS)}")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise UserError(f"bits={bits!r}; a width from 1 to {MAX_BITS} is expected")
    if calibration not in ("searched", "minmax"):
        raise UserError(f'calibration={calibration!r}; use "searched" or "minmax"')
    try:
        group = group_size(granularity, w.shape[1])
    except ValueError as e:
        raise UserError(str(e)) from None
    x = None if x_calib is None else _matrix("x_calib", x_calib)
    if x is None and method != "rtn":
        raise UserError(
            f'method={method!r} needs x_calib f32[N, in={w.shape[1]}]; or use method="rtn"'
        )
    if x is not None and x.shape[1] != w.shape[1]:
        hint = "; w seems to be (in, out): pass w.T" if x.shape[1] == w.shape[0] else ""
        raise UserError(
            f"x_calib has {x.shape[1]} columns, w f32[out, in] has in={w.shape[1]}; they must agree{hint}"
        )
    num_in = w.shape[1]
    if method == "decoupleq":
        qt = _decoupleq(w, x, bits, granularity, symmetric)
        if verbose:
            print(_line(method, granularity, layer_report(w, qt, x)))
        return qt
    pad = [(0, 0), (0, -num_in % group if group else 0)]
    w, x = jnp.pad(w, pad), None if x is None else jnp.pad(x, pad)
    grid = make_grid(w, bits, granularity, symmetric=symmetric, calibration=calibration)
    if method == "rtn":
        qt = rtn().hard((), w, grid)
    elif method == "gptq":
        qt, failed = _gptq(w, grid, x)
        if bool(failed):
            raise ValueError(
                f"no damping made the Hessian of {w.shape[1]} inputs positive definite; use more samples"
            )
    else:
        factory, rate = RULES[method]
        rate = rate if learning_rate is None else learning_rate
        qt = _learn(
            factory(), w, grid, x, key, num_iters, optax.cosine_decay_schedule(rate, num_iters)
        )
    qt = dataclasses.replace(qt, shape=(qt.shape[0], num_in))
    if granularity == "tensor":  # one scale is stored once
        once = jax.tree.map(lambda a: a[:1], (qt.scale, qt.zero))
        qt = dataclasses.replace(qt, scale=once[0], zero=once[1], axes=(0, 1))
    if verbose:
        print(
            _line(
                method,
                granularity,
                layer_report(w[:, :num_in], qt, None if x is None else x[:, :num_in]),
            )
        )
    return qt


@jax.jit
def _gptq(w, grid: Grid, x) -> tuple[QTensor, jax.Array]:
    """GPTQ of a matrix, and bool[]: no rung of the damping ladder held."""
    h = hessian_update(hessian_init(w.shape[1]), x).mean
    offset = jnp.zeros_like(grid.scale) if grid.zero is None else -grid.scale * grid.zero
    perm = jnp.argsort(-jnp.diagonal(h))
    codes, rung = gptq_solve(w, h, grid.scale, offset, grid.q_min, grid.q_max, perm=perm)
    return grid.qtensor(codes, w.shape), rung >= LADDER


def grid_search(bits: int) -> Calibration:
    """ "searched" up to 5 bits; wider grids lose little to min/max, and the search's time doubles with each bit."""
    return "searched" if bits <= 5 else "minmax"


_layer = jax.jit(decoupleq_layer, static_argnames="cfg")


def _decoupleq(w, x, bits: int, granularity: str, symmetric: bool) -> QTensor:
    if granularity == "tensor":
        raise UserError(
            'method="decoupleq" fits scales to rows or groups; use granularity="channel" or "group:g"'
        )
    if not bool((x != 0).any()):
        raise UserError("x_calib holds nothing but zeros; pass inputs that the layer meets")
    cfg = DecoupleQ(bits, group_size(granularity, w.shape[1]), symmetric)
    h = hessian_update(hessian_init(w.shape[1]), x).mean
    return _layer(w, h, cfg)[0]


def _learn(rule: RoundingRule, w, grid: Grid, x, key, num_iters: int, rate) -> QTensor:
    key = jax.random.key(0) if key is None else key
    k_init, k_steps = jax.random.split(key)

    def loss_fn(v, batch, k, t):
        x, y = batch
        return squared_error(x @ rule.soft(v, w, grid).T, y) + rule.reg(v, t)

    run = partial(
        block_reconstruct, loss_fn, optimizer=optax.adam(rate), n_iters=num_iters, key=k_steps
    )
    v, _ = jax.jit(run)(rule.init(w, grid, k_init), (x, x @ w.T))
    return rule.hard(v, w, grid)


def layer_report(w, qt: QTensor, x=None) -> dict[str, float]:
    """How far a QTensor is from its matrix.

    Args:
      w: f32[out, in]. x: f32[N, in] inputs, to weigh the error by; None: plain weight error.
    Returns:
      mse (per output), nearest_mse (rounding to nearest on a grid of the same kind, see `grid_search`),
      mse_ratio of the two, relative (mse over the mean square of the output), stored_bits.
    """
    w = jnp.asarray(w, jnp.float32)
    x = jnp.eye(w.shape[1]) if x is None else jnp.asarray(x, jnp.float32)
    y = x @ w.T
    kind = "tensor" if qt.axes == (0, 1) else "channel"
    kind = f"group:{qt.group}" if qt.group else kind
    near = quantize_matrix(
        w,
        method="rtn",
        bits=qt.bits,
        granularity=kind,
        symmetric=qt.signed,
        calibration=grid_search(qt.bits),
    )
    mse, nearest_mse = (float(((x @ dequantize(q).T - y) ** 2).mean()) for q in (qt, near))
    return {
        "mse": mse,
        "nearest_mse": nearest_mse,
        "mse_ratio": mse / max(nearest_mse, 1e-30),
        "relative": mse / max(float((y**2).mean()), 1e-30),
        "stored_bits": qt.stored_bits,
    }


def _line(method: str, granularity: str, r: dict[str, float]) -> str:
    return (
        f"{method}, per {granularity}, {r['stored_bits']:.2f} bits a weight: output error "
        f"{100 * r['relative']:.3g} % of its power, {r['mse_ratio']:.3g} times that of rounding to nearest"
    )


def _matrix(name: str, value) -> jax.Array:
    try:
        a = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise UserError(
            f"{name} is a {type(value).__name__}; a 2-D array of numbers is expected"
        ) from None
    if a.ndim != 2 or not a.size:
        raise UserError(
            f"{name} has shape {a.shape}; a 2-D array is expected (reshape a convolution to (out, kh * kw * in))"
        )
    bad = int((~np.isfinite(a)).sum())
    if bad:
        raise UserError(f"{name} holds {bad} values that are not finite; remove them first")
    return jnp.asarray(a)
