"""Neural zero-noise extrapolation: one small net per curve (the paper), or one net for all curves.

Per curve (arXiv 2403.07025; sizes and activation are not in its abstract, those here are ours): a net 1-32-32-1
learns lam -> E(lam) from the m noisy points, both standardised, and is asked for lam = 0. Nets train in one
batch of N; `fit_step` is one full-batch Adam step of all of them.

Amortised: one net sees all m noisy values of a circuit and returns its E(0), trained on random circuits whose
noise-free value was simulated.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qlab.lab.errors import UserError

Params = tuple[
    tuple[jax.Array, jax.Array], ...
]  # (weight f[..., in, out], bias f[..., 1, out]) a layer


class Hyper(NamedTuple):
    """Of the per-curve net; the defaults are the standard comparison's."""

    hidden: tuple[int, ...] = (32, 32)
    activation: str = "tanh"
    learning_rate: float = 1e-2
    l2: float = 1e-4  # times the sum of squared weights, biases excepted
    steps: int = 3000
    ensemble: int = 5
    standardise: bool = True


DEFAULT_HYPER = Hyper()


class NNState(NamedTuple):
    """N nets, in float32 whatever the curves are in."""

    params: Params  # leading axis N
    opt_state: Any
    step: jax.Array  # i32[]


ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "silu": jax.nn.silu}


def _activation(name: str):
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r}; one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def mlp_init(key: jax.Array, sizes: tuple[int, ...]) -> Params:
    """Weights normal with variance 1 / fan-in, biases zero; float32."""
    keys = jax.random.split(key, len(sizes) - 1)
    return tuple(
        (
            jax.random.normal(k, (i, o), jnp.float32) / jnp.sqrt(jnp.float32(i)),
            jnp.zeros((1, o), jnp.float32),
        )
        for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    )


def mlp_apply(params: Params, x: jax.Array, activation: str) -> jax.Array:
    """f[..., B, out] from x f[..., B, in]; leading axes of params and x broadcast."""
    act = _activation(activation)
    for w, b in params[:-1]:
        x = act(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def _moments(values: jax.Array, on: bool) -> tuple[jax.Array, jax.Array]:
    """Mean and (population) standard deviation over the last axis; 1 for a constant curve, 0 and 1 if off."""
    mean, std = values.mean(-1, keepdims=True), values.std(-1, keepdims=True)
    if not on:
        return jnp.zeros_like(mean), jnp.ones_like(std)
    return mean, jnp.where(std > 1e-12, std, 1.0)


@functools.partial(jax.jit, static_argnames=("num_nets", "sizes"))
def _fresh_nets(key: jax.Array, num_nets: int, sizes: tuple[int, ...]) -> Params:
    return jax.vmap(lambda k: mlp_init(k, sizes))(jax.random.split(key, num_nets))


def fit_init(key: jax.Array, num_curves: int, hp: Hyper) -> NNState:
    """Fresh nets for `num_curves` curves: N = num_curves * ensemble, curve-major."""
    params = _fresh_nets(key, num_curves * hp.ensemble, (1, *hp.hidden, 1))
    return NNState(params, optax.adam(hp.learning_rate).init(params), jnp.int32(0))


def fit_step(
    state: NNState, lams: jax.Array, energies: jax.Array, hp: Hyper
) -> tuple[NNState, jax.Array]:
    """One full-batch Adam step of every net on its curve.

    Args:
      lams: f[m]; energies: f[num_curves, m].
    Returns:
      The next state and the mean squared error of the standardised curves, averaged over nets.
    """
    x_mean, x_std = _moments(lams, hp.standardise)
    y_mean, y_std = _moments(energies, hp.standardise)
    x = ((lams - x_mean) / x_std).astype(jnp.float32)[:, None]
    y = ((energies - y_mean) / y_std).astype(jnp.float32)
    y = jnp.repeat(y, hp.ensemble, axis=0)[..., None]
    x = jnp.broadcast_to(x, (y.shape[0], *x.shape))

    def loss_fn(params):  # nets do not interact: the gradient of the sum is each one's own
        mse = ((mlp_apply(params, x, hp.activation) - y) ** 2).mean((-2, -1))
        decay = sum((w**2).sum() for w, _ in params)
        return mse.sum() + hp.l2 * decay, mse.mean()

    grads, mse = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optax.adam(hp.learning_rate).update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return NNState(params, opt_state, state.step + 1), mse  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames="hp")
def nn_predict(
    params: Params, lams: jax.Array, energies: jax.Array, at: jax.Array, hp: Hyper
) -> jax.Array:
    """f[num_curves, ensemble, Q]: every net's E at the noise levels `at` f[Q]."""
    x_mean, x_std = _moments(lams, hp.standardise)
    y_mean, y_std = _moments(energies, hp.standardise)
    x = ((at - x_mean) / x_std).astype(jnp.float32)[:, None]
    num_nets = energies.shape[0] * hp.ensemble
    out = mlp_apply(params, jnp.broadcast_to(x, (num_nets, *x.shape)), hp.activation)[..., 0]
    out = out.reshape(energies.shape[0], hp.ensemble, -1).astype(energies.dtype)
    return y_mean[:, None] + y_std[:, None] * out


def nn_zne_fit(
    key: jax.Array, lams: jax.Array, energies: jax.Array, hp: Hyper = DEFAULT_HYPER
) -> Params:
    """All `hp.steps` steps for the curve(s) energies f[m] or f[num_curves, m]; returns the trained nets."""
    energies = jnp.atleast_2d(energies)

    def body(state, _):
        return fit_step(state, lams, energies, hp)[0], None

    return jax.lax.scan(body, fit_init(key, energies.shape[0], hp), None, length=hp.steps)[0].params


def nn_zne_predict(
    params: Params,
    lams: jax.Array,
    energies: jax.Array,
    at: jax.Array = 0.0,  # type: ignore[assignment]
    hp: Hyper = DEFAULT_HYPER,
) -> tuple[jax.Array, jax.Array]:
    """Ensemble mean and standard deviation at one noise level: f[num_curves] each."""
    at = jnp.asarray(at, lams.dtype).reshape(1)
    out = nn_predict(params, lams, jnp.atleast_2d(energies), at, hp)[..., 0]
    return out.mean(1), out.std(1)


# ---- amortised ----------------------------------------------------------------------------------


class Amortised(NamedTuple):
    """One net for all curves, with the moments of its training features."""

    params: Params
    opt_state: Any
    step: jax.Array  # i32[]
    mean: jax.Array  # f32[F]
    std: jax.Array  # f32[F]; inf where a feature never varied, which switches it off


class AmortisedHyper(NamedTuple):
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "relu"
    learning_rate: float = 3e-3  # at the start, falls to zero along a cosine
    batch: int = 256
    steps: int = 12_000


def _amortised_adam(hp: AmortisedHyper) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(hp.learning_rate, hp.steps))


@functools.partial(jax.jit, static_argnames="hp")
def amortised_init(key: jax.Array, train_x: jax.Array, hp: AmortisedHyper) -> Amortised:
    """A fresh net for features train_x f[B, F]."""
    params = mlp_init(key, (train_x.shape[-1], *hp.hidden, 1))
    std = train_x.std(0)
    std = jnp.where(std > 1e-9, std, jnp.inf)
    opt_state = _amortised_adam(hp).init(params)
    mean = train_x.mean(0).astype(jnp.float32)
    return Amortised(params, opt_state, jnp.int32(0), mean, std.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="hp")
def amortised_predict(
    model: Amortised, x: jax.Array, raw: jax.Array, hp: AmortisedHyper
) -> jax.Array:
    """f[B]: `raw` (each curve's value at the smallest lam) plus the net's correction."""
    z = ((x - model.mean) / model.std).astype(jnp.float32)
    return raw + mlp_apply(model.params, z, hp.activation)[..., 0].astype(raw.dtype)


def amortised_step(
    model: Amortised,
    key: jax.Array,
    x: jax.Array,
    raw: jax.Array,
    target: jax.Array,
    hp: AmortisedHyper,
) -> tuple[Amortised, jax.Array]:
    """One Adam step on a drawn batch of (features f[B, F], raw f[B], E(0) f[B]); returns the loss too."""
    pick = jax.random.randint(jax.random.fold_in(key, model.step), (hp.batch,), 0, x.shape[0])

    def loss_fn(params):
        error = (
            amortised_predict(model._replace(params=params), x[pick], raw[pick], hp) - target[pick]
        )
        return (error.astype(jnp.float32) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_fn)(model.params)
    updates, opt_state = _amortised_adam(hp).update(grads, model.opt_state)
    params = optax.apply_updates(model.params, updates)
    return model._replace(params=params, opt_state=opt_state, step=model.step + 1), loss  # type: ignore[arg-type]
