"""One layer of random weights on correlated inputs: how low each method brings the layer's own loss.

The loss is tr(E H E^T) / tr(w H w^T), H = E[x x^T] damped as decoupleQ has it, the same for every method.
Inputs look like hidden activations: a few common factors and noise, through ReLU.

A seed draws the weights, the inputs and the method's key, each with a sub-key of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.experiment import Experiment, Phase
from qlab.quantization.affine_fit import row_error
from qlab.quantization.decoupleq_walk import Found
from qlab.quantization.gptq import damping, hessian_init, hessian_update
from qlab.quantization.grid import calibrate
from qlab.quantization.methods import Method, Unit
from qlab.quantization.qtensor import dequantize

FACTORS = 4  # common causes of the inputs


class State(NamedTuple):
    key: jax.Array
    round: jax.Array  # i32[], rounds done
    w: jax.Array  # f32[out, in]
    x: jax.Array  # f32[N, in]
    carry: Any  # the method's, one entry a width of `bits`


def draw(key: jax.Array, shape: tuple[int, int], num_samples: int) -> tuple[jax.Array, jax.Array]:
    """(w f32[out, in], x f32[N, in])."""
    k_w, k_factor, k_load, k_noise = (jax.random.fold_in(key, i) for i in range(4))
    factors = jax.random.normal(k_factor, (num_samples, FACTORS))
    load = jax.random.normal(k_load, (FACTORS, shape[1]))
    noise = jax.random.normal(k_noise, (num_samples, shape[1]))
    return jax.random.normal(k_w, shape), jax.nn.relu(factors @ load + noise)


def one_layer(
    method: Method,
    bits: Sequence[int],
    *,
    shape: tuple[int, int] = (64, 64),
    num_samples: int = 256,
    damp: float = 0.01,
    grid_options: Mapping[str, Any] | None = None,
) -> Experiment[State]:
    """One arm: `method` on one layer, at each width of `bits`.

    Returns:
      An Experiment whose evaluate gives "w<bits>/loss" and, for decoupleQ, the arrays "history" (over the loss
      of the first width's nearest codes) and "half_step".
    """

    def unit_of(w, x, i) -> Unit:
        grid = calibrate(w, bits[i], False, max_bits=bits[i], **(grid_options or {}))
        forward = lambda w_hat, x, b=None: x @ w_hat[0].T  # noqa: E731
        return Unit((w,), (grid,), forward, x, x, x @ w.T, (jnp.zeros(len(w)),))

    def init(key: jax.Array) -> State:
        w, x = draw(jax.random.fold_in(key, 0), shape, num_samples)
        k_method = jax.random.fold_in(key, 1)
        units = [unit_of(w, x, i) for i in range(len(bits))]
        carry = tuple(method.init(u.w, u.grid, jax.random.fold_in(k_method, 0)) for u in units)
        return State(k_method, jnp.int32(0), w, x, carry)

    def step(state: State) -> tuple[State, dict[str, jax.Array]]:
        k_round = jax.random.fold_in(state.key, 1)
        done = [
            method.round(carry, unit_of(state.w, state.x, i), k_round, state.round)
            for i, carry in enumerate(state.carry)
        ]
        state = state._replace(round=state.round + 1, carry=tuple(carry for carry, _ in done))
        return state, {"loss": jnp.stack([loss for _, loss in done]).mean()}

    def evaluate(state: State) -> dict[str, jax.Array]:
        h = hessian_update(hessian_init(shape[1]), state.x).mean
        h = h + damping(h, damp) * jnp.eye(shape[1])
        scale = row_error(jnp.zeros(shape), state.w, h).sum()
        out = {}
        for i, carry in enumerate(state.carry):
            (q,), fallbacks = method.hard(carry, unit_of(state.w, state.x, i))
            out[f"w{bits[i]}/loss"] = row_error(dequantize(q), state.w, h).sum() / scale
            out[f"w{bits[i]}/fallbacks"] = fallbacks
            out[f"w{bits[i]}/sites_total"] = jnp.float32(1)
        first = state.carry[0]
        if isinstance(first, Found) and first.history.shape[-1]:
            out |= history(first.history[0])
        return out

    return Experiment(init, evaluate, (Phase("layer", method.rounds, jax.jit(step)),))


def history(losses: jax.Array) -> dict[str, jax.Array]:
    """Arrays for a figure: the loss after each half step over that of the nearest codes."""
    return {"history": losses / losses[0], "half_step": jnp.arange(len(losses))}
