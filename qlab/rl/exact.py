"""Scores of an agent on a tabular process, computed exactly instead of by rollouts.

The process is small enough to enumerate, so the return of the greedy policy is the solution of a linear
system and the soft optimal value of the agent's own action grid comes from value iteration.
Letters: S = states, K = joint actions of the process, A = joint actions of the agent's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.rl.agent import Agent, Transition
from qlab.rl.c2f import ActionGrid, action_grid, all_bins, decode_c2f, encode_c2f
from qlab.rl.envs.coupled import Logged, Task, behaviour, draw_log
from qlab.rl.envs.tabular import (
    Solution,
    joint_index,
    policy_value,
    refine,
    solve,
)
from qlab.rl.loop import OfflineGroup


class ExactTask(NamedTuple):
    """A logged task with its optima, as arrays.

    Attributes:
      logged: the process and its log's controllers.
      low, best: f32[], returns of the uniform and the optimal policy (0 and 100 of the score).
      optimum: the hard optimum on the process's own actions, q f32[S, K].
      soft: the soft optimum on the agent's grid, q f32[S, A].
    """

    logged: Logged
    low: Any
    best: Any
    optimum: Solution
    soft: Solution


def exact_task(
    task: Task,
    mix: tuple[float, ...],
    *,
    noise: float,
    discount: float,
    grid: ActionGrid,
    alpha: float,
) -> ExactTask:
    """`task` logged by its controllers in shares `mix`; alpha = 0 compares with the hard optimum."""
    if len(mix) != task.controllers.shape[0] or min(mix) < 0 or abs(sum(mix) - 1) > 1e-6:
        raise ValueError(f"mix={mix}: expected a share for expert, medium and bad that sum to 1")
    mdp = task.mdp
    optimum = solve(mdp, discount)
    uniform = np.full(optimum.q.shape, 1 / optimum.q.shape[1])
    return ExactTask(
        logged=Logged(mdp, behaviour(task, noise), np.asarray(mix, np.float32)),
        low=np.float32(mdp.start @ policy_value(mdp, uniform, discount)),
        best=np.float32(mdp.start @ optimum.v),
        optimum=optimum,
        soft=solve(refine(mdp, task.num_bins, grid), discount, alpha),
    )


def greedy_choice(task: Task, agent: Agent, state: Any, key: jax.Array, num_states: int):
    """The greedy action in every state: f32[S, D], and its index in the process i32[S]."""
    action = agent.act(state, key, jnp.eye(num_states), greedy=True)
    return action, joint_index(action, task.num_bins)


def exact_score(
    task: Task, agent: Agent, discount: float, context: ExactTask, state: Any, key: jax.Array
) -> dict[str, jax.Array]:
    """score: normalised return of the greedy policy, 0 = uniform, 100 = optimal."""
    mdp = context.logged.mdp
    num_states, num_actions = mdp.transition.shape[:2]
    _, index = greedy_choice(task, agent, state, key, num_states)
    policy = jax.nn.one_hot(index, num_actions)
    value = mdp.start @ policy_value(mdp, policy, discount)
    return {"score": 100 * (value - context.low) / (context.best - context.low)}


def exact_inspect(
    task: Task,
    agent: Agent,
    grid: ActionGrid,
    alpha: float,
    context: ExactTask,
    state: Any,
    data: Transition,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """How close the agent is to the exact solution.

    optimal_states: share of states in which the greedy action is optimal. Where the agent has values:
    value_error: largest |V - V*| over states; q_error: mean |Q - Q*| over the (state, action) pairs of
    the log; argmax_states: share of states in which the greedy action maximises the agent's own Q
    (an independent critic does so by construction); policy_tv (alpha > 0): largest total variation over
    states between softmax(Q / alpha) and the soft optimal policy; joint_q: Q in state 0 as an array.
    """
    num_states = context.optimum.v.shape[0]
    obs = jnp.eye(num_states)
    action, index = greedy_choice(task, agent, state, key, num_states)
    chosen = jnp.take_along_axis(context.optimum.q, index[:, None], 1)[:, 0]
    out = {"optimal_states": (chosen >= context.optimum.v - 1e-5).mean()}
    if agent.value is None or agent.q_value is None:
        return out
    out["value_error"] = jnp.abs(agent.value(state, obs) - context.soft.v).max()

    actions = decode_c2f(jnp.asarray(all_bins(grid)), grid.num_bins)  # f32[A, D]
    q_fn = agent.q_value
    q = jax.vmap(lambda o: q_fn(state, jnp.broadcast_to(o, (len(actions), num_states)), actions))(
        obs
    )
    bins = encode_c2f(data.action, grid.num_levels, grid.num_bins)
    flat = jnp.zeros(bins.shape[0], jnp.int32)
    for t in range(grid.num_tokens):
        flat = flat * grid.num_bins + bins[:, t // grid.num_dims, t % grid.num_dims]
    seen = jnp.zeros(q.shape).at[data.obs.argmax(-1), flat].set(1.0)
    out["q_error"] = (seen * jnp.abs(q - context.soft.q)).sum() / seen.sum()
    own = q_fn(state, obs, action)
    out["argmax_states"] = (own >= q.max(-1) - 1e-5).mean()
    if alpha:
        gap = jnp.abs(jax.nn.softmax(q / alpha, -1) - context.soft.policy)
        out["policy_tv"] = gap.sum(-1).max() / 2
    if grid.num_dims == 2 and grid.num_levels == 1:
        out["joint_q"] = q[0].reshape(grid.num_bins, grid.num_bins)
    return out


def exact_groups(
    tasks: Mapping[str, tuple[Task, tuple[float, ...]]],
    make_agent: Callable[[int, ActionGrid], Agent],
    *,
    alpha: float,
    discount: float,
    noise: float,
    num_logged: int,
    demo_share: float = 1.0,
    num_levels: int = 1,
    num_bins: int = 0,
) -> list[OfflineGroup]:
    """Groups for `offline_rl`, one for each shape of task.

    Args:
      tasks: name -> (task, shares of its controllers in the log).
      make_agent: (obs_dim, grid of the agent's actions) -> Agent.
      alpha: temperature of the soft optimum to compare with; 0 = hard.
      num_levels, num_bins: the agent's grid; num_bins = 0 takes the task's own bins.
    """
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, (task, _) in tasks.items():
        shapes.setdefault((task.num_dims, task.num_bins, task.mdp.start.size), []).append(name)
    groups = []
    for (num_dims, bins, num_states), names in shapes.items():
        task = tasks[names[0]][0]
        grid = action_grid(num_dims, num_levels, num_bins or bins)
        agent = make_agent(num_states, grid)
        context = [
            exact_task(t, mix, noise=noise, discount=discount, grid=grid, alpha=alpha)
            for t, mix in (tasks[n] for n in names)
        ]
        groups.append(
            OfflineGroup(
                names=tuple(names),
                agent=agent,
                context=jax.tree.map(lambda *x: np.stack(x), *context),
                dataset=lambda x, key, task=task: draw_log(
                    task, x.logged, key, num_logged, discount, demo_share
                ),
                score=partial(exact_score, task, agent, discount),
                inspect=partial(exact_inspect, task, agent, grid, alpha),
            )
        )
    return groups
