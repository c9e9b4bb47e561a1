"""Auto-Regressive Soft Q-network (Liu et al. 2025, arXiv 2502.00288) against critics that treat the
dimensions of an action independently, a joint critic and behaviour cloning, on logged suboptimal data
of tasks that can be solved exactly.

A seed draws the log of each task, the initial network and the minibatches; arms share all three draws.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from qlab.lab.errors import UserError
from qlab.lab.experiment import Claim, Experiment, Figure, Metric
from qlab.rl import exact
from qlab.rl.agent import Agent
from qlab.rl.arsq import arsq
from qlab.rl.c2f import ActionGrid, action_grid
from qlab.rl.cqn import cqn
from qlab.rl.envs import coupled
from qlab.rl.joint_q import joint_q
from qlab.rl.loop import OfflineGroup, offline_rl

# Tasks of one shape are learned side by side. The second item: which mix of controllers is logged.
TASKS = {
    "bandit": ("demo_mix", lambda c: coupled.bandit()),
    "chain": ("demo_mix", lambda c: coupled.chain(c.slip)),
    "chain_expert": ("expert_mix", lambda c: coupled.chain(c.slip)),
    "separable": ("demo_mix", lambda c: coupled.separable(c.slip)),
    "chain_1d": ("demo_mix", lambda c: coupled.chain(c.slip, num_dims=1)),
}
BAD_MAJORITY = ("bandit", "chain")


def make_agent(c: ConfigDict, obs_dim: int, grid: ActionGrid) -> Agent:
    """The arm's agent; the hyper-parameters it does not have are not passed."""
    shared: dict[str, Any] = {
        "num_levels": grid.num_levels,
        "num_bins": grid.num_bins,
        "hidden": tuple(c.hidden),
        "learning_rate": c.lr,
        "weight_decay": c.weight_decay,
        "tau": c.tau,
    }
    if c.agent == "arsq":
        agent = arsq(
            obs_dim,
            grid.num_dims,
            **shared,
            alpha=c.alpha,
            dim_order=c.dim_order,
            conditioning=c.conditioning,
            action_mode=c.action_mode,
            lambda_td=c.lambda_td,
            lambda_bc=c.lambda_bc,
            reward_scale=c.reward_scale,
        )
        return agent if c.lambda_td else agent._replace(value=None, q_value=None)
    if c.agent == "cqn":
        return cqn(
            obs_dim,
            grid.num_dims,
            **shared,
            distribution=c.distribution,
            v_min=c.v_min,
            v_max=c.v_max,
            lambda_bc=c.lambda_bc,
        )
    if c.agent == "joint_q":
        return joint_q(obs_dim, grid.num_dims, **shared, alpha=c.alpha)
    raise UserError(f"agent={c.agent!r}: expected arsq, cqn or joint_q")


def make_group(c: ConfigDict, names: tuple[str, ...]) -> OfflineGroup:
    tasks = [TASKS[n][1](c) for n in names]
    task = tasks[0]
    grid = action_grid(task.num_dims, c.L, c.B or task.num_bins)
    alpha = 0.0 if c.agent == "cqn" else c.alpha / c.reward_scale
    context = [
        exact.exact_task(
            t, tuple(c[TASKS[n][0]]), noise=c.noise, discount=c.discount, grid=grid, alpha=alpha
        )
        for n, t in zip(names, tasks, strict=True)
    ]
    agent = make_agent(c, task.mdp.start.shape[0], grid)
    return OfflineGroup(
        names=names,
        agent=agent,
        context=jax.tree.map(lambda *x: np.stack(x), *context),
        dataset=lambda x, key: coupled.draw_log(
            task, x.logged, key, c.num_logged, c.discount, c.bc_filter
        ),
        score=partial(exact.exact_score, task, agent, c.discount),
        inspect=partial(exact.exact_inspect, task, agent, grid, alpha),
    )


def build(config: ConfigDict) -> Experiment:
    unknown = [n for n in config.tasks if n not in TASKS]
    if unknown:
        raise UserError(
            f"tasks={tuple(config.tasks)}: unknown {unknown[0]!r}; known: {', '.join(TASKS)}"
        )
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name in config.tasks:
        task = TASKS[name][1](config)
        shapes.setdefault((task.num_dims, task.num_bins, task.mdp.start.size), []).append(name)
    experiment = offline_rl(
        [make_group(config, tuple(names)) for names in shapes.values()],
        num_updates=config.updates,
        batch_size=config.batch,
        updates_per_step=config.updates_per_step,
    )

    def evaluate(state):
        out = dict(experiment.evaluate(state))
        for name in ("score", "auc_score"):
            values = [out[f"{t}/{name}"] for t in BAD_MAJORITY if t in config.tasks]
            if values:
                out[f"bad_majority/{name}"] = jnp.stack(values).mean()
        return out

    return experiment._replace(evaluate=evaluate)


METRICS = {
    "score": Metric("%", "higher", "return of the greedy policy, 0 = uniform, 100 = optimal"),
    "auc_score": Metric("%", "higher", "mean score over training"),
    "optimal_states": Metric("", "higher", "share of states with an optimal greedy action"),
    "value_error": Metric("", "lower", "largest |V - exact V|"),
    "q_error": Metric("", "lower", "mean |Q - exact Q| over logged pairs"),
    "argmax_states": Metric("", "higher", "share of states where greedy maximises the agent's Q"),
    "policy_tv": Metric("", "lower", "largest total variation to the exact soft policy"),
}
CLAIMS: tuple[Claim, ...] = ()
FIGURES: tuple[Figure, ...] = ()
