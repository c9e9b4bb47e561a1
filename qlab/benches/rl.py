"""Reinforcement learning: environment steps with an update after each, SAC and double DQN, beside JAX and PyTorch loops.

Contestants of a task do the same work: nets, batch, one update a step of one environment, a replay of the same size.
    qlab    the lab's agents in its off-policy loop, under jit
    jax     gymnax, flashbax and flax under one scan, as one writes it in JAX
    torch   Gymnasium and eager PyTorch, as one writes it there
Tasks: sac on Pendulum, dqn on CartPole with nets of 2 x 64 units, where overheads rule; sac_256 and dqn_256 with the
2 x 256 units of the published settings, where matrix products rule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.benches import rl_peers
from qlab.benches.kernel_peers import Absent
from qlab.benches.measure import Number, Sample, Tell, find, interleave, ratio
from qlab.benches.rl_peers import Loop, Size
from qlab.lab.experiment import Claim, Figure, Metric
from qlab.rl.agent import Agent
from qlab.rl.dqn import double_dqn, mlp_q, unmasked
from qlab.rl.envs.classic import cartpole_v1, pendulum_v1
from qlab.rl.envs.env import Env
from qlab.rl.off_policy import OnlineConfig, off_policy
from qlab.rl.sac import sac

METRICS = {
    "steps_per_s": Metric("1/s", "higher", "steps of the environment, each with an update"),
    "step_us": Metric("us", "lower", "the same, a step"),
    "to_jax": Metric("times", "higher", "over the JAX loop"),
    "to_torch": Metric("times", "higher", "over the PyTorch loop"),
    "compile_s": Metric("s", "lower", "first call less a later one of as many steps"),
}


class Task(NamedTuple):
    """size: of the nets and batches. qlab, jax, torch: size -> loop."""

    size: Size
    qlab: Callable[[Size], Loop]
    jax: Callable[[Size], Loop]
    torch: Callable[[Size], Loop]


def _loop(env: Env, agent: Agent, size: Size) -> Loop:
    """n -> the mean return of the episodes that ended within n more steps."""

    def env_step(state, action, key):
        inner, running, total, count = state
        inner, ts = jax.vmap(env.step)(inner, action, key[None])
        running = running + ts.reward
        over = ts.terminated | ts.truncated
        total, count = total + (running * over).sum(), count + over.sum()
        return (inner, jnp.where(over, 0.0, running), total, count), ts

    config = OnlineConfig(size.discount, 1, size.batch, 1, size.capacity, size.batch)
    online = off_policy(env_step, agent, config)

    def start(key):
        state, obs = jax.vmap(env.reset)(key[None])
        zero = jnp.zeros(1), jnp.float32(0), jnp.int32(0)
        return online.init(key, (state, *zero), obs, True)

    def run(state, n):
        inner, running, *_ = state.env
        state = state._replace(env=(inner, running, jnp.float32(0), jnp.int32(0)))
        return jax.lax.fori_loop(0, n, lambda i, s: online.step(s), state)

    run = jax.jit(run, donate_argnums=0)
    at = [jax.jit(start)(jax.random.key(0))]

    def call(n: int) -> float:
        at[0] = run(at[0], n)
        _, _, total, count = jax.block_until_ready(at[0]).env
        return float(total) / int(count) if int(count) else math.nan

    return call


def qlab_sac(size: Size) -> Loop:
    agent = sac(
        3, 1, hidden=size.hidden, lr_actor=size.rate, lr_critic=size.rate, lr_alpha=size.rate,
        tau=size.tau, shared_actor=True,
    )  # fmt: skip
    return _loop(pendulum_v1(), agent, size)


def qlab_dqn(size: Size) -> Loop:
    learner = double_dqn(
        mlp_q(4, size.hidden, 2, slope=0.0), 2, discount=size.discount, learning_rate=size.rate,
        target_every=size.target_every, epsilon=size.epsilon, epsilon_final=size.epsilon,
    )  # fmt: skip
    return _loop(cartpole_v1(), unmasked(learner, 2), size)


_SAC = qlab_sac, rl_peers.jax_sac, rl_peers.torch_sac
_DQN = qlab_dqn, rl_peers.jax_dqn, rl_peers.torch_dqn
TASKS = {
    "sac": Task(Size((64, 64), 128), *_SAC),
    "dqn": Task(Size((64, 64), 64), *_DQN),
    "sac_256": Task(Size((256, 256), 256), *_SAC),
    "dqn_256": Task(Size((256, 256), 64), *_DQN),
}
FIGURES = (Figure("Steps with an update a second", "bars", "steps_per_s", ylabel="1/s", logy=True),)


def goals(s: dict[str, Any]) -> tuple[Claim, ...]:
    """As fast as the JAX loop, five times the PyTorch loop."""
    wanted = (("to_jax", "As fast as a JAX loop", 1.0), ("to_torch", "5 times a PyTorch loop", 5.0))
    return tuple(
        Claim(f"{task}: {text[0].lower()}{text[1:]}", "goal", ("qlab", f"{task}/{name}"), ">=", bound)
        for task in s["tasks"]
        for name, text, bound in wanted
    )  # fmt: skip


def settings(quick: bool) -> dict[str, Any]:
    return {
        "tasks": ("sac", "dqn") if quick else tuple(TASKS),
        "run_s": 0.3 if quick else 2.0,  # of a repetition
        "repetitions": 3 if quick else 7,
        "budget_s": 6.0 if quick else 60.0,
    }


def one_task(name: str, s: dict[str, Any]) -> list[Number]:
    task = TASKS[name]
    ways: dict[str, Callable[[], Sample]] = {}
    numbers: list[Number] = []
    for arm in ("qlab", "jax", "torch"):
        try:
            loop = getattr(task, arm)(task.size)
            first = 2 * task.size.batch  # from the second half on every step has its update
            begun = time.perf_counter()
            for _ in range(2):  # the second call of a loop may compile once more
                loop(first)
            middle = time.perf_counter()
            loop(first)
            took = time.perf_counter() - middle
        except Absent as e:
            numbers.append(Number(arm, "steps_per_s", status="absent", note=str(e)))
            continue
        if arm != "torch":  # nothing is compiled there
            numbers.append(Number(arm, "compile_s", (max(middle - begun - 2 * took, 0.0),)))
        # one number of steps for all calls: gymnax's scan compiles for each
        steps = first * max(1, round(s["run_s"] * first / took / first))

        def sample(loop=loop, steps=first, calls=steps // first) -> Sample:
            begun = time.perf_counter()
            for _ in range(calls):
                loop(steps)
            took = (time.perf_counter() - begun) / (calls * steps)
            return {"steps_per_s": 1 / took, "step_us": 1e6 * took}

        ways[arm] = sample
    numbers += interleave(ways, s["repetitions"], s["budget_s"])
    for other in ("jax", "torch"):
        if other in ways:
            numbers.append(ratio(numbers, "qlab", other, "steps_per_s", f"to_{other}"))
    return [n._replace(name=f"{name}/{n.name}") for n in numbers]


def measure(s: dict[str, Any], tell: Tell) -> list[Number]:
    numbers: list[Number] = []
    for name in s["tasks"]:
        size = TASKS[name].size
        tell(f"rl: {name}, nets {size.hidden}, batches of {size.batch}")
        numbers += one_task(name, s)
    return numbers


def summary(numbers: list[Number]) -> str:
    texts = []
    for task in TASKS:
        rate = find(numbers, "qlab", f"{task}/steps_per_s")
        if not rate.values:
            continue
        others = []
        for other, called in (("jax", "a JAX loop"), ("torch", "PyTorch")):
            times = find(numbers, "qlab", f"{task}/to_{other}")
            if times.values:
                others.append(f"{times.median:.2g} x {called}")
        compiled = find(numbers, "qlab", f"{task}/compile_s").median
        beside = f" ({', '.join(others)})" if others else ""
        texts.append(f"{task} {rate.median:.0f} steps/s{beside}, compiled in {compiled:.1f} s")
    return "; ".join(texts)
