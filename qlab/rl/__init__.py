"""Agents as pure functions: (init, act, update), jittable; the loop belongs to the caller.

from qlab.rl import AGENTS
agent = AGENTS["arsq"](obs_dim, num_dims, num_levels=2, num_bins=5)   # or: from qlab.rl.arsq import arsq
"""

from qlab.rl import arsq, cqn, dqn, joint_q, sac
from qlab.rl.agent import Agent, Transition, td_target

AGENTS = {
    "arsq": arsq.arsq,
    "cqn": cqn.cqn,
    "double_dqn": dqn.double_dqn,  # (net, num_actions): discrete, observations with a legal mask
    "joint_q": joint_q.joint_q,
    "sac": sac.sac,
}

__all__ = ["AGENTS", "Agent", "Transition", "td_target"]
