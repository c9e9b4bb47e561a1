"""Optimizers of learned rounding by name, on optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Each of learning rate 1: the update of all of them is linear in the rate, which may therefore be data.
UNIT: dict[str, optax.GradientTransformation] = {
    "sgd": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
    "adam": optax.adam(1.0),
    "adamw": optax.adamw(1.0, weight_decay=1e-2),
    "adamax": optax.adamax(1.0),
    "lion": optax.lion(1.0),
    "sign_sgd": optax.sign_sgd(1.0),
}
SCHEDULES = ("cosine", "constant")


def make_optimizer(
    name: str, lr, schedule: str = "cosine", *, num_steps: int = 1
) -> optax.GradientTransformation:
    """The optax optimizer `name`; "cosine" lets the rate fall to 0 over num_steps.

    Args:
      name: sgd, momentum (0.9), adam, adamw (decay 1e-2), adamax, lion or sign_sgd. lr: may be traced.

    >>> opt = make_optimizer("sign_sgd", 0.1, "constant")
    >>> opt.update(jnp.array([3.0, -2.0]), opt.init(jnp.zeros(2)))[0].tolist()
    [-0.10000000149011612, 0.10000000149011612]
    """
    if name not in UNIT:
        raise ValueError(f"optimizer={name!r}; use one of {', '.join(UNIT)}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}; use one of {', '.join(SCHEDULES)}")
    constant = jnp.asarray(schedule == "constant")
    return optax.chain(
        UNIT[name], optax.scale_by_schedule(lambda i: lr * rate(i, num_steps, constant))
    )


def rate(i, num_steps: int, constant) -> jax.Array:
    """The share of the learning rate at step i: 1, or a cosine to 0."""
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(i / num_steps, 1.0)))
    return jnp.where(constant, 1.0, cosine)


def keep_within(low: float, high: float) -> optax.GradientTransformation:
    """Projection: the update is cut so that parameters stay in [low, high]. Put it last in a chain.

    >>> opt = optax.chain(optax.sgd(1.0), keep_within(-0.5, 0.5))
    >>> opt.update(jnp.array([3.0]), opt.init(jnp.zeros(1)), jnp.zeros(1))[0].tolist()
    [-0.5]
    """

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("keep_within needs params in update")
        cut = jax.tree.map(lambda u, p: jnp.clip(p + u, low, high) - p, updates, params)
        return cut, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class Choosable(NamedTuple):
    """Several optimizers of one flat vector behind a traced index.

    init: vector f32[P] -> (count i32[], moments f32[2, P]): optax's counter and its moments in their order, zeros
    where an optimizer has fewer. update: (which, grad, state, vector) -> (update at rate 1, state).
    """

    init: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    update: Callable[..., Any]


def choosable(names: tuple[str, ...]) -> Choosable:
    """The optimizers `names` of UNIT, of learning rate 1, as one.

    >>> opt = choosable(("adam", "sgd"))
    >>> w = jnp.ones(2)
    >>> opt.update(1, jnp.array([0.5, 0.0]), opt.init(w), w)[0].tolist()
    [-0.5, -0.0]
    """

    def init(vector):
        return jnp.zeros((), jnp.int32), jnp.zeros((2, *vector.shape))

    def update(which, grad, state, vector):
        branches = [_branch(UNIT[name], vector) for name in names]
        if len(branches) == 1:
            return branches[0](grad, state, vector)
        return jax.lax.switch(which, branches, grad, state, vector)

    return Choosable(init, update)


def _branch(optimizer: optax.GradientTransformation, like: jax.Array):
    leaves, tree = jax.tree.flatten(jax.eval_shape(optimizer.init, like))
    is_count = [jnp.issubdtype(a.dtype, jnp.integer) for a in leaves]

    def run(grad, state, vector):
        count, moments = state
        places = iter(range(2))
        filled: list[Any] = [count if c else moments[next(places)] for c in is_count]
        updates, new = optimizer.update(grad, jax.tree.unflatten(tree, filled), vector)
        out = jax.tree.leaves(new)
        kept = [a for a, c in zip(out, is_count, strict=True) if not c]
        kept += [jnp.zeros_like(vector)] * (2 - len(kept))
        counted = [a for a, c in zip(out, is_count, strict=True) if c]
        return updates, (counted[0] if counted else count, jnp.stack(kept))

    return run
