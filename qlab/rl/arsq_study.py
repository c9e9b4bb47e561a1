"""How ARSQ's study is put together: an agent from a config, experiments on logs and in control.

`c` is a merged config of configs/arsq.py.
"""

from __future__ import annotations

from typing import Any

from qlab.lab.errors import UserError
from qlab.lab.experiment import Experiment, side_by_side
from qlab.rl.agent import Agent
from qlab.rl.arsq import arsq
from qlab.rl.c2f import ActionGrid
from qlab.rl.cqn import cqn
from qlab.rl.demo_rl import Schedule, demo_rl
from qlab.rl.demo_tasks import Demonstrations, demo_groups, is_control
from qlab.rl.envs import coupled
from qlab.rl.envs.coupled_control import CONTROL_TASKS
from qlab.rl.exact import exact_groups
from qlab.rl.joint_q import joint_q
from qlab.rl.loop import offline_rl
from qlab.rl.off_policy import OnlineConfig
from qlab.rl.sac import sac

# Task: which mix of controllers is logged, and how the task is made.
TASKS = {
    "bandit": ("demo_mix", lambda c: coupled.bandit(c.bandit_bins, c.bandit_contexts)),
    "chain": ("demo_mix", lambda c: coupled.chain(c.slip)),
    "chain_expert": ("expert_mix", lambda c: coupled.chain(c.slip)),
    "separable": ("demo_mix", lambda c: coupled.separable(c.slip)),
    "chain_1d": ("demo_mix", lambda c: coupled.chain(c.slip, num_dims=1)),
}
SHARED = ("hidden", "weight_decay", "tau")
AGENTS = {
    "arsq": (arsq, "alpha dim_order conditioning action_mode lambda_td lambda_bc reward_scale"),
    "cqn": (cqn, "distribution v_min v_max lambda_bc"),
    "joint_q": (joint_q, "alpha"),
    "sac": (sac, ""),
}


def make_agent(c: Any, obs_dim: int, grid: ActionGrid) -> Agent:
    """The agent c.agent with its options; for "sac" `alpha` is where the learned temperature starts."""
    if c.agent == "sac":
        rates = {f"lr_{part}": c.lr for part in ("actor", "critic", "alpha")}
        return sac(
            obs_dim, grid.num_dims, hidden=c.hidden, tau=c.tau, init_temperature=c.alpha, layer_norm=True, **rates
        )  # fmt: skip
    make, names = AGENTS[c.agent]
    options = {name: c[name] for name in (*SHARED, *names.split())}
    size = {"num_levels": grid.num_levels, "num_bins": grid.num_bins}
    agent = make(obs_dim, grid.num_dims, **size, learning_rate=c.lr, **options)
    is_cloning = c.agent == "arsq" and not c.lambda_td  # its values mean nothing
    return agent._replace(value=None, q_value=None) if is_cloning else agent


def logs(c: Any, tasks: list[str]) -> Experiment:
    groups = exact_groups(
        {n: (TASKS[n][1](c), tuple(c[TASKS[n][0]])) for n in tasks},
        lambda obs_dim, grid: make_agent(c, obs_dim, grid),
        alpha=0.0 if c.agent == "cqn" else c.alpha / c.reward_scale,
        discount=c.discount, noise=c.noise, num_logged=c.num_logged, demo_share=c.bc_filter,
        num_levels=c.L, num_bins=c.B,
    )  # fmt: skip
    return offline_rl(
        groups, num_updates=c.updates, batch_size=c.batch, updates_per_step=c.updates_per_step
    )


def control(c: Any, tasks: list[str]) -> Experiment:
    if not 0 < c.demo_fraction <= 1:
        raise UserError(f"demo_fraction={c.demo_fraction}: expected a share above 0, at most 1")
    mixes = {key: tuple(c[key]) for key in ("demo_mix", "expert_mix")}
    given = Demonstrations(
        c.demos, mixes, c.num_demos, c.num_envs, c.action_noise, c.control_discount, c.bc_filter, c.demo_reward_scale
    )  # fmt: skip
    groups = demo_groups(
        tasks, lambda obs_dim, grid: make_agent(c, obs_dim, grid), given, num_levels=c.L, num_bins=c.B or 5
    )  # fmt: skip
    config = OnlineConfig(
        c.control_discount, c.utd, c.batch, 1, c.replay_size, c.learning_starts, max(1, round(c.demo_fraction * c.batch))
    )  # fmt: skip
    schedule = Schedule(c.env_steps, c.num_envs, c.eval_points, c.eval_episodes)
    return demo_rl(groups, config, schedule, num_seeds=c.seeds)


def study(c: Any) -> Experiment:
    """The tasks of c, each where it belongs.

    Raises:
      UserError: an unknown task or agent.
    """
    known = [*TASKS, *CONTROL_TASKS, "brax:<environment>"]
    if unknown := [n for n in c.tasks if n not in TASKS and not is_control(n)]:
        raise UserError(f"tasks: unknown {unknown[0]!r}; known: {', '.join(known)}")
    if c.agent not in AGENTS:
        raise UserError(f"agent: unknown {c.agent!r}; known: {', '.join(AGENTS)}")
    parts = {"logs": (logs, False), "control": (control, True)}
    tasks = {
        name: [n for n in c.tasks if is_control(n) == here] for name, (_, here) in parts.items()
    }
    return side_by_side({name: parts[name][0](c, own) for name, own in tasks.items() if own})
