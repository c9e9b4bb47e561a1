"""Tasks with demonstrations: from scripted controllers of mixed quality, or the user's own.

Letters: G = tasks of a group, N = demonstrations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError, nearest
from qlab.rl.agent import Agent, Transition
from qlab.rl.c2f import ActionGrid, action_grid
from qlab.rl.demos import load_demos
from qlab.rl.envs.brax_env import brax_env
from qlab.rl.envs.coupled_control import CONTROL_TASKS, EXPERT, ControlTask, Variation, task_env
from qlab.rl.envs.env import Env
from qlab.rl.envs.tabular import choose
from qlab.rl.rollout import best_share, collect, episode_returns, first_episode

ANCHOR_EPISODES = 256


class DemoTask(NamedTuple):
    """What a group of tasks needs, as functions of what makes its tasks differ (`variation`, arrays).

    Attributes:
      env: variation -> Env. horizon: steps of an episode.
      demos: (variation, key) -> Transition with leading axis N.
      anchors: variation -> (low, high), undiscounted returns that count as 0 and as 100.
    """

    env: Callable[[Any], Env]
    horizon: int
    demos: Callable[[Any, jax.Array], Transition]
    anchors: Callable[[Any], tuple[jax.Array, jax.Array]]


class DemoGroup(NamedTuple):
    """names: of the G tasks. task: of all. agent: learns each. variation: pytree with leading axis G."""

    names: tuple[str, ...]
    task: DemoTask
    agent: Agent
    variation: Any


def scripted(
    task: ControlTask,
    *,
    num_demos: int,
    num_streams: int,
    discount: float,
    noise: float,
    demo_share: float,
) -> DemoTask:
    """A task with its scripted controllers as demonstrators, in the shares of `variation.mix`.

    Args:
      num_demos: N, cut from num_streams runs of equal length; the last episode of a run may be cut short.
      noise: standard deviation of the Gaussian added to every scripted action.
      demo_share: share of the demonstrations that behaviour cloning may imitate (`demo` = 1), best episodes first.

    The score's 0 is a policy that draws every action uniformly, its 100 the expert without noise.
    """
    length = num_demos // num_streams
    if length < 1:
        raise UserError(f"num_demos={num_demos}: {num_streams} environments need a step each")

    def policy(v: Variation, mix: Any, std: float):
        def act(memory, key, obs, first):
            # one draw for all: each would compile as long as the rest of this
            u = jax.random.uniform(key, (5 + task.action_dim,), minval=-1.0)
            which = jnp.where(first, choose((1 + u[0]) / 2, mix), memory[0])
            mode = jnp.where(first, u[1:3], memory[1])
            action = task.control(v, which, mode, u[3:5], obs)
            normal = jnp.sqrt(2.0) * jax.scipy.special.erfinv(jnp.clip(u[5:], -1 + 1e-6, None))
            return (which, mode), jnp.clip(action + std * normal, -1, 1)

        return act

    start = (jnp.int32(0), jnp.zeros(2))

    def demos(v: Variation, key: jax.Array) -> Transition:
        def one(k):
            data, ends = collect(
                task_env(task, v), policy(v, v.mix, noise), start, k, length, discount
            )
            return data, episode_returns(data.reward, ends, discount)

        data, total = jax.vmap(one)(jax.random.split(key, num_streams))
        data, total = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (data, total))
        return data._replace(demo=best_share(total, demo_share))

    def anchors(v: Variation) -> tuple[jax.Array, jax.Array]:
        env = task_env(task, v)

        def uniform(memory, key, obs, first):
            return memory, jax.random.uniform(key, (env.action_dim,), minval=-1.0)

        expert = policy(v, jax.nn.one_hot(EXPERT, 3), 0.0)

        def either(memory, key, obs, first):
            is_expert, rest = memory
            action = jnp.where(is_expert, *(f(rest, key, obs, first)[1] for f in (expert, uniform)))
            return (is_expert, expert(rest, key, obs, first)[0]), action

        def one(is_expert, key):
            return first_episode(env, either, (is_expert, start), key, task.horizon, 1.0)[0]

        keys = jax.random.split(jax.random.key(0), ANCHOR_EPISODES)
        both = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.array([False, True]), keys)
        return both[0].mean(), both[1].mean()

    return DemoTask(lambda v: task_env(task, v), task.horizon, demos, anchors)


class Demonstrations(NamedTuple):
    """Where they come from.

    Attributes:
      source: "" = the task's scripted controllers; a file or Minari set as in `load_demos`.
      mixes: config key -> shares of expert, medium and bad episodes. num_demos, num_streams, noise: see `scripted`.
      discount: gamma. share: of the steps that may be imitated, best episodes first.
      reward_scale: multiplies the rewards of a source.
    """

    source: str
    mixes: Mapping[str, Sequence[float]]
    num_demos: int
    num_streams: int
    noise: float
    discount: float
    share: float = 1.0
    reward_scale: float = 1.0


def is_control(name: str) -> bool:
    """Whether a name belongs to `demo_groups`.

    >>> is_control("gates"), is_control("brax:ant"), is_control("chain")
    (True, True, False)
    """
    return name in CONTROL_TASKS or name.startswith("brax:")


def _uniform_return(env: Env, horizon: int) -> jax.Array:
    def one(key):
        def act(memory, k, obs, first):
            return memory, jax.random.uniform(k, (env.action_dim,), minval=-1.0)

        return first_episode(env, act, (), key, horizon, 1.0)[0]

    return jax.vmap(one)(jax.random.split(jax.random.key(0), ANCHOR_EPISODES)).mean()


def _given(env_of: Callable[[Any], Env], horizon: int, base: DemoTask | None) -> DemoTask:
    """A task whose demonstrations are its variation: (variation of the task, Transition, best return f32[])."""

    def anchors(v: Any):
        return base.anchors(v[0]) if base else (_uniform_return(env_of(v[0]), horizon), v[2])

    return DemoTask(lambda v: env_of(v[0]), horizon, lambda v, key: v[1], anchors)


def demo_groups(
    names: Sequence[str],
    make_agent: Callable[[int, ActionGrid], Agent],
    given: Demonstrations,
    *,
    num_levels: int,
    num_bins: int,
) -> list[DemoGroup]:
    """Groups for `demo_rl`, one for each shape of task.

    Args:
      names: of CONTROL_TASKS, or "brax:<environment>" (needs brax and a source).
      make_agent: (obs_dim, grid of the agent's actions) -> Agent.
    Raises:
      UserError: an unknown name, shares that are no distribution, or demonstrations that do not fit.
    """
    for key, mix in given.mixes.items():
        if len(mix) != 3 or min(mix) < 0 or abs(sum(mix) - 1) > 1e-6:
            raise UserError(
                f"{key}={tuple(mix)}: expected shares of expert, medium and bad that sum to 1"
            )
    if given.source and len(names) != 1:
        raise UserError(
            f"demos={given.source}: name the one task they are of, not {len(names)} tasks"
        )
    if not 0 < given.share <= 1:
        raise UserError(f"bc_filter={given.share}: expected a share above 0, at most 1")
    groups: dict[Any, list[str]] = {}
    for name in names:
        if not is_control(name):
            raise UserError(f"tasks: unknown {name!r}{nearest(name, list(CONTROL_TASKS))}")
        groups.setdefault(CONTROL_TASKS[name].task if name in CONTROL_TASKS else name, []).append(
            name
        )

    def group(shape: Any, members: list[str]) -> DemoGroup:
        if isinstance(shape, str):
            if not given.source:
                raise UserError(
                    f"tasks: {shape} has no scripted controllers; give demos=<file.npz>"
                )
            env, horizon = brax_env(shape.removeprefix("brax:"))
            task, variation, env_of = None, np.zeros(1), lambda v: env
        else:
            task = scripted(
                shape, num_demos=given.num_demos, num_streams=given.num_streams, discount=given.discount,
                noise=given.noise, demo_share=given.share,
            )  # fmt: skip
            named = [CONTROL_TASKS[n] for n in members]
            mix = np.array([given.mixes[n.mix] for n in named], np.float32)
            variation = Variation(mix, np.array([n.coupling for n in named], np.float32))
            env_of, horizon = task.env, task.horizon
            env = env_of(jax.tree.map(lambda x: x[0], variation))
        agent = make_agent(env.obs_dim, action_grid(env.action_dim, num_levels, num_bins))
        if given.source:
            data, best = load_demos(
                given.source, env.obs_dim, env.action_dim, discount=given.discount, demo_share=given.share,
                reward_scale=given.reward_scale,
            )  # fmt: skip
            own = jax.tree.map(lambda x: x[None], (data, best))
            return DemoGroup(
                tuple(members), _given(env_of, horizon, task), agent, (variation, *own)
            )
        assert task is not None
        return DemoGroup(tuple(members), task, agent, variation)

    return [group(shape, members) for shape, members in groups.items()]
