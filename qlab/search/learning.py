"""Training of heuristic nets on random states: exact labels, or bootstrapped Q-learning.

Agostinelli et al. (arXiv 2102.04518): states are goals scrambled by K ~ U{0..k_max} moves, one action
a state; the bootstrapped target is c + min_a' Q_target(T(s, a), a') with 0 in place of the minimum
where T(s, a) is a goal (done explicitly: the net never has to learn it), and 0 where s is one.
Letters: n states in a batch, A actions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.search.domains import Domain, exact_q
from qlab.search.nets import net_apply, net_init
from qlab.search.problem import expand

Target = Literal["h", "q", "q_taken", "q_bootstrap", "q_bootstrap_all", "h_bootstrap"]
BOOTSTRAPPED = ("q_bootstrap", "q_bootstrap_all", "h_bootstrap")


class LearnState(NamedTuple):
    params: Any
    opt_state: Any
    target: Any  # the target net; the params themselves where nothing is bootstrapped
    loss: jax.Array  # f32[], running mean of the loss, for target_sync = "loss"
    since: jax.Array  # i32[], updates since the target was copied
    step: jax.Array  # i32[]
    key: jax.Array


class Learner(NamedTuple):
    init: Callable[[jax.Array], LearnState]
    step: Callable[[LearnState], tuple[LearnState, dict[str, jax.Array]]]


def sample(domain: Domain, key: jax.Array, n: int, k_max: int) -> tuple[jax.Array, jax.Array]:
    """n states scrambled by U{0..k_max} moves, and an action for each."""
    k_state, k_action = jax.random.split(key)
    states = domain.scrambles(k_state, n, k_max)
    return states, jax.random.randint(k_action, (n,), 0, domain.problem.num_actions)


def q_target(domain: Domain, target: Any, states: jax.Array, actions: jax.Array) -> jax.Array:
    """Bootstrapped y(s, a): f32[n]."""
    p = domain.problem
    after = jax.vmap(p.next_state)(states, actions)
    ahead = net_apply(target, jax.vmap(p.encode)(after)).min(-1)
    ahead = jnp.where(jax.vmap(p.is_goal)(after), 0.0, ahead)
    y = jax.vmap(p.cost)(states, actions) + ahead
    return jnp.where(jax.vmap(p.is_goal)(states), 0.0, y)


def all_targets(domain: Domain, target: Any, states: jax.Array) -> jax.Array:
    """Bootstrapped y(s, a) of every action: f32[n, A]; `target` has A heads (Q) or one (h)."""
    p = domain.problem
    after, cost = jax.vmap(lambda s: expand(p, s))(states)
    flat = after.reshape(-1, *states.shape[1:])
    ahead = net_apply(target, jax.vmap(p.encode)(flat)).min(-1)
    ahead = jnp.where(jax.vmap(p.is_goal)(flat), 0.0, ahead).reshape(cost.shape)
    return jnp.where(jax.vmap(p.is_goal)(states)[:, None], 0.0, cost + ahead)


def learner(
    domain: Domain,
    kind: Target,
    *,
    widths: tuple[int, ...] = (128, 128),
    blocks: int = 0,
    batch: int = 256,
    k_max: int = 100,
    lr: float = 1e-3,
    lr_decay: float = 1.0,
    target_sync: Literal["loss", "every"] = "loss",
    sync_loss: float = 0.1,
    sync_every: int = 100,
) -> Learner:
    """Mean squared error on one value a state ("q" and "q_bootstrap_all": on all A).

    Args:
      kind: "h": exact h*(s), one head. "q": exact Q*(s, a) of every action, "q_taken": of one drawn
        action. "q_bootstrap": `q_target` of one drawn action; "q_bootstrap_all": of every action;
        "h_bootstrap": one head, its label the smallest of them.
      lr, lr_decay: Adam's step size is lr * lr_decay ** step.
      target_sync: copy the target net when the running loss is below sync_loss (and at least 20
        updates have passed, so that it is a loss against this target), or every sync_every updates.
    """
    p = domain.problem
    boots = kind in BOOTSTRAPPED
    if not boots and domain.distance is None:
        raise ValueError(f"{domain.name} has no exact distances: use the target 'q_bootstrap'")
    optimizer = optax.adam(optax.exponential_decay(lr, 1, lr_decay))
    table = exact_q(domain) if kind == "q" else None  # here: not while a step is traced
    heads = 1 if kind in ("h", "h_bootstrap") else p.num_actions

    def init(key: jax.Array) -> LearnState:
        k_net, k_run = jax.random.split(key)
        state = domain.scramble(k_run, jnp.int32(0), 1)
        params = net_init(k_net, p.encode(state).shape[0], heads, widths=widths, blocks=blocks)
        zero = jnp.int32(0)
        target = params if boots else jnp.zeros(0)
        return LearnState(params, optimizer.init(params), target, jnp.float32(0), zero, zero, k_run)

    def label(state: LearnState, states, actions):
        if kind == "q_bootstrap":
            return q_target(domain, state.target, states, actions)
        if boots:
            y = all_targets(domain, state.target, states)
            return y.min(-1) if kind == "h_bootstrap" else y
        assert domain.distance is not None
        if kind == "h":
            return domain.distance(states)
        if kind == "q_taken":
            after = jax.vmap(p.next_state)(states, actions)
            return jax.vmap(p.cost)(states, actions) + domain.distance(after)
        assert domain.number is not None
        assert table is not None
        return jnp.asarray(table)[domain.number(states)].astype(jnp.float32)

    def step(state: LearnState):
        states, actions = sample(domain, jax.random.fold_in(state.key, state.step), batch, k_max)
        y = label(state, states, actions)
        enc = jax.vmap(p.encode)(states)

        def loss_fn(params):
            value = net_apply(params, enc)
            if heads == 1:
                value = value[:, 0]
            elif kind not in ("q", "q_bootstrap_all"):
                value = jnp.take_along_axis(value, actions[:, None], 1)[:, 0]
            return jnp.square(value - y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        mean = jnp.where(state.since == 0, loss, 0.9 * state.loss + 0.1 * loss)
        since = state.since + 1
        target = state.target
        if boots:
            sync = (
                (since >= 20) & (mean < sync_loss) if target_sync == "loss" else since >= sync_every
            )
            target = jax.tree.map(lambda new, old: jnp.where(sync, new, old), params, target)
            since = jnp.where(sync, 0, since)
        new = LearnState(params, opt_state, target, mean, since, state.step + 1, state.key)
        return new, {"loss": loss, "label": y.mean()}

    return Learner(init, step)
