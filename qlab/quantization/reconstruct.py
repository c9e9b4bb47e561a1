"""The inner loop of every reconstruction method: minibatch gradient steps on one unit of a net."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def reconstruct_steps(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    opt_state: Any,
    data: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    first,
    *,
    num_steps: int,
    total: int,
    batch_size: int,
):
    """`num_steps` steps from step number `first` on: (params, opt_state, losses f32[num_steps]).

    A run cut anywhere into such stretches equals the run in one piece, bit for bit: batches are
    drawn (with replacement) from fold_in(key, step), not from a position kept elsewhere.
    """
    num = jax.tree.leaves(data)[0].shape[0]

    def body(carry, i):
        params, opt_state = carry
        k_batch, k_loss = jax.random.split(jax.random.fold_in(key, i))
        batch = data
        if batch_size < num:
            picked = jax.random.randint(k_batch, (batch_size,), 0, num)
            batch = jax.tree.map(lambda a: a[picked], data)
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, k_loss, i / total)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    steps = first + jnp.arange(num_steps)
    (params, opt_state), losses = jax.lax.scan(body, (params, opt_state), steps)
    return params, opt_state, losses


def block_reconstruct(loss_fn, params, data, optimizer, n_iters: int, key, *, batch_size: int = 32):
    """Minimises loss_fn over params by n_iters minibatch steps.

    Args:
      loss_fn: (params, batch, key, t) -> f32[]; t in [0, 1) is the share of the steps done.
      data: pytree of arrays with the samples first. optimizer: an optax transformation.
    Returns:
      (params, metrics) with the losses of the first and last tenth of the steps.

    >>> def loss_fn(w, x, key, t):
    ...     return ((x - w) ** 2).mean()
    >>> w, metrics = block_reconstruct(loss_fn, jnp.zeros(()), jnp.ones((8, 1)), optax.sgd(0.1), 50, jax.random.key(0))
    >>> round(float(w), 3), bool(metrics["loss_last"] < metrics["loss_first"])
    (1.0, True)
    """
    params, _, losses = reconstruct_steps(
        loss_fn,
        params,
        optimizer.init(params),
        data,
        optimizer,
        key,
        0,
        num_steps=n_iters,
        total=n_iters,
        batch_size=batch_size,
    )
    tenth = max(n_iters // 10, 1)
    return params, {"loss_first": losses[:tenth].mean(), "loss_last": losses[-tenth:].mean()}
