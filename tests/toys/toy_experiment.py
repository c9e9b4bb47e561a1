"""Least squares by SGD with momentum; every corner of the contract behind a config key."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.experiment import Claim, Experiment, Figure, Metric, Phase

METRICS = {
    "err": Metric("", "lower"),
    "big_err": Metric("", "lower"),
    "pause": Metric("s", "lower"),
}
CLAIMS = (
    Claim("the larger step ends nearer", "Table 1", ("big", "err"), "<=", ("small", "err")),
    Claim("the smaller step ends nearer", "Table 2", ("small", "err"), "<=", ("big", "err")),
)
FIGURES = (Figure("Loss", "curve", "loss", logy=True),)


class State(NamedTuple):
    key: jax.Array
    seed: jax.Array  # i32[], only to choose which seed goes wrong
    step: jax.Array
    w: jax.Array  # f32[5]
    velocity: jax.Array
    target: jax.Array
    empty: jax.Array  # f32[0, 3]
    wall: jax.Array


def build(config):
    def init(key):
        time.sleep(config.init_pause_s)
        if config.fail:
            raise RuntimeError("the toy was told to fail")
        k_run, k_target = jax.random.split(key)
        keys = [jax.random.fold_in(jax.random.key(config.seed), i) for i in range(config.seeds)]
        match = [bool((jax.random.key_data(k) == jax.random.key_data(key)).all()) for k in keys]
        target = jax.random.normal(k_target, (5,)) * (0.5 if config.half else 1.0)
        zero = jnp.zeros(5)
        return State(
            k_run,
            jnp.int32(match.index(True)),
            jnp.int32(0),
            zero,
            zero,
            target,
            jnp.zeros((0, 3)),
            jnp.float32(0),
        )

    def step(s):
        x = jax.random.normal(jax.random.fold_in(s.key, s.step), (16, 5))
        loss, grad = jax.value_and_grad(lambda w: jnp.mean((x @ (w - s.target) + 0.1) ** 2))(s.w)
        wrong = ((s.seed == config.bad_seed) | (config.bad_seed == -2)) & (
            s.step == config.bad_step
        )
        loss = jnp.where(wrong, jnp.nan, loss)
        v = config.optimizer.momentum * s.velocity - config.lr * grad
        return s._replace(step=s.step + 1, w=s.w + v, velocity=v), {
            "loss": loss,
            "grad": jnp.abs(grad).mean(),
        }

    def host_step(s):
        time.sleep(config.pause_s)
        return s._replace(step=s.step + 1, wall=s.wall + jnp.float32(time.perf_counter())), {
            "count": float(s.step)
        }

    def evaluate(s):
        err = jnp.abs(s.w - s.target)
        return {"err": err.mean(), "worst/big_err": err.max(), "w": s.w, "pause": s.wall}

    phases = [Phase("train", config.steps, step, config.loop)]
    if config.host_steps:
        phases.append(Phase("host", config.host_steps, host_step, "host"))
    return Experiment(init, evaluate, tuple(phases), config.layout)
