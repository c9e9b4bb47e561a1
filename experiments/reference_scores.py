"""SAC and deep Q-learning on two standard environments, beside scores that others published.

The published scores are RL Baselines3 Zoo's (benchmark.md at 22e3ff2: one run each, greedy, 150,000 test
steps): SAC on Pendulum-v1 -157.0 after 20,000 steps, DQN on CartPole-v1 500.0 after 50,000. The environments are
Gymnasium's equations in JAX; a seed draws the net, exploration, minibatches, and starts of training and test.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import optax

from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.rl.agent import Agent, random_agent
from qlab.rl.control_study import Budget, control_study
from qlab.rl.dqn import double_dqn, mlp_q, unmasked
from qlab.rl.envs.classic import SOLVED_CARTPOLE, cartpole_v1, pendulum_v1
from qlab.rl.envs.control import ENVS
from qlab.rl.off_policy import OnlineConfig
from qlab.rl.sac import sac

ENV = {"pendulum": pendulum_v1, "cartpole": cartpole_v1}
PUBLISHED = {"pendulum": -156.995, "cartpole": 500.0}


def make_agent(c: Any, obs_dim: int, action_dim: int) -> Agent:
    if c.agent == "sac":
        return sac(
            obs_dim, action_dim, temperature=c.temperature or "learned", hidden=c.hidden, lr_actor=c.learning_rate,
            lr_critic=c.learning_rate, lr_alpha=c.learning_rate, tau=c.tau, shared_actor=True,
        )  # fmt: skip
    if c.agent == "dqn":
        num_updates = c.num_steps // c.num_envs
        rate = optax.linear_schedule(c.learning_rate, c.final_rate * c.learning_rate, num_updates)
        net = mlp_q(obs_dim, c.hidden, action_dim, slope=0.0)
        learner = double_dqn(
            net, action_dim, discount=c.discount, n_step=c.n_step, learning_rate=rate, double=c.double,
            target_every=c.target_every, epsilon_decay=c.epsilon_decay, epsilon_final=c.epsilon_final,
        )  # fmt: skip
        return unmasked(learner, action_dim)
    if c.env == "pendulum":
        return random_agent(lambda key, n: jax.random.uniform(key, (n, action_dim), minval=-1.0))
    return random_agent(lambda key, n: jax.random.randint(key, (n,), 0, action_dim))


def build(config: Any) -> Experiment:
    c = config
    env, default = ENV[c.env](), ENVS[c.env]
    return control_study(
        c.env,
        env,
        make_agent(c, env.obs_dim, env.action_dim),
        OnlineConfig(c.discount, 1, c.batch, c.n_step, c.replay_size, c.learning_starts),
        Budget(c.num_steps, c.num_envs, c.round_steps, default.horizon, c.eval_episodes),
        film=True,
        num_seeds=c.seeds,
    )


METRICS = {
    "return": Metric("", "higher", "mean undiscounted return of the greedy policy over the test's episodes"),
    "least": Metric("", "higher", "the worst of them"),
}  # fmt: skip
_close = partial(Claim, source="RL Baselines3 Zoo", op=">=")
_ONE = "published: one run, 150,000 test steps"
CLAIMS = (
    _close("SAC reaches the published score on Pendulum-v1 (at most 10 below)",
           left=("sac", "pendulum/return"), right=PUBLISHED["pendulum"], margin=-10.0, note=_ONE),
    _close("Double DQN reaches the published score on CartPole-v1 (at most 25 below, which is Gymnasium's mark)",
           left=("double_dqn", "cartpole/return"), right=PUBLISHED["cartpole"], margin=SOLVED_CARTPOLE - 500.0,
           exact=True, note=_ONE + "; 500 is the cap, where seeds do not vary"),
)  # fmt: skip
_PENDULUM, _CARTPOLE = (
    ("sac", "sac_fixed", "random_pendulum"),
    ("double_dqn", "dqn", "random_cartpole"),
)
FIGURES = (
    *(Figure(f"Return while exploring, {t}", "curve", f"{t}/return", xlabel="round", arms=a)
      for t, a in (("pendulum", _PENDULUM), ("cartpole", _CARTPOLE))),
    *(Figure(f"Share of runs above a return, {t}", "profile", "return", xlabel="return", arms=a, tasks=(t,))
      for t, a in (("pendulum", _PENDULUM), ("cartpole", _CARTPOLE))),
    Figure("The first seconds of a test episode, greedy policy", "filmstrip", "film", "film_step"),
)  # fmt: skip
