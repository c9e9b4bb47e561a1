"""ARSQ (Liu et al. 2025): auto-regressive against independent and joint critics on suboptimal logs."""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid


def get_config(variant: str = "") -> ConfigDict:
    c = base(
        experiment="arsq",
        seeds=5,
        tasks=("bandit", "chain", "chain_expert", "separable", "chain_1d"),
        demo_mix=(0.2, 0.4, 0.4),
        expert_mix=(0.8, 0.1, 0.1),
        noise=0.1,
        slip=0.0,
        num_logged=2000,
        discount=0.9,
        agent="arsq",
        L=1,
        B=0,
        dim_order="identity",
        conditioning="ar",
        action_mode="sample",
        alpha=0.01,
        reward_scale=1.0,
        lambda_td=1.0,
        lambda_bc=0.0,
        bc_filter=1.0,
        distribution="c51",
        v_min=-2.0,
        v_max=2.0,
        hidden=(64, 64),
        lr=1e-3,
        weight_decay=0.0,
        tau=0.02,
        batch=128,
        updates=4000,
        updates_per_step=20,
    )
    c.arms = {
        "arsq": {},
        "no_ar": {"conditioning": "level"},
        "independent": {"agent": "cqn"},
        "independent_scalar": {"agent": "cqn", "distribution": "scalar"},
        "flat": {"agent": "joint_q"},
        "bc": {"lambda_td": 0.0, "lambda_bc": 1.0},
    }
    if variant == "smoke":
        c.update(seeds=2, tasks=("bandit", "chain"), updates=400, num_logged=500)
    return c


def sweep():
    yield from grid({"alpha": (0.001, 0.01, 0.1, 1.0)})
