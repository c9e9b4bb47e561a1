"""Agents as pure functions: (init, act, update), jittable; the loop belongs to the caller.

from qlab.rl import AGENTS, arsq
agent = arsq(obs_dim=3, num_dims=2, num_levels=2, num_bins=5)
"""

from qlab.rl.agent import Agent, Transition, td_target
from qlab.rl.arsq import arsq
from qlab.rl.cqn import cqn
from qlab.rl.joint_q import joint_q

AGENTS = {"arsq": arsq, "cqn": cqn, "joint_q": joint_q}

__all__ = ["AGENTS", "Agent", "Transition", "arsq", "cqn", "joint_q", "td_target"]
