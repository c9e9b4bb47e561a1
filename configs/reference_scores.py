"""SAC on Pendulum and deep Q-learning on CartPole: do the lab's agents reach published scores?

Reference: RL Baselines3 Zoo, benchmark.md: SAC, Pendulum-v1, 20k steps: -157.0; DQN, CartPole-v1, 50k steps: 500.0.
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid


def get_config(variant: str = "") -> ConfigDict:
    c = base(
        experiment="reference_scores",
        seed=0,
        seeds=5,
        # SAC on Pendulum-v1; the DQN arms below say what differs.
        env="pendulum",  # pendulum, cartpole
        agent="sac",  # sac, dqn, random
        num_steps=20_000,
        num_envs=1,  # an update follows each step of all of them
        round_steps=1000,
        batch=128,
        replay_size=20_000,
        learning_starts=100,
        discount=0.99,
        hidden=(64, 64),
        learning_rate=1e-3,
        temperature="learned",
        tau=0.005,
        # DQN
        double=True,
        target_every=128,  # updates between two copies of the net
        epsilon_decay=0.9992,
        epsilon_final=0.04,
        # Test
        eval_episodes=200,
    )
    dqn = dict(
        env="cartpole", agent="dqn", num_steps=50_000, num_envs=2, round_steps=2000, batch=64,
        replay_size=50_000, learning_starts=1000, learning_rate=1e-3, hidden=(256, 256),
    )  # fmt: skip
    c.arms = {
        "sac": {},
        "sac_fixed": {"temperature": 0.2},
        "random_pendulum": {"agent": "random"},
        "double_dqn": dqn,
        "dqn": dqn | {"double": False},
        "random_cartpole": dqn | {"agent": "random"},
    }
    if variant == "smoke":
        c.update(seeds=2, num_steps=1000, round_steps=500, eval_episodes=4, hidden=(32,))
        for name in ("sac_fixed", "dqn", "random_cartpole"):
            del c.arms[name]
        c.arms.double_dqn.update(
            num_steps=2000, round_steps=1000, hidden=(32,), learning_starts=100
        )
    return c


def sweep():
    """Updates, nets and target rates that the scores hang on."""
    yield from grid({"hidden": ((32, 32), (64, 64), (256, 256))})
    yield from grid({"learning_rate": (3e-4, 1e-3, 3e-3)})
    yield from grid({"batch": (64, 128, 256)})
    yield from grid({"target_every": (10, 100, 500)})
