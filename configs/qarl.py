"""QARL (Reddi et al. 2024): two SACs, an adversary whose rationality grows by a self-paced Gamma curriculum.

TODO
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid


def get_config(variant: str = "") -> ConfigDict:
    c = base(
        experiment="qarl",
        seeds=3,
        part="control",  # control, or exact: games solved instead of learned
        # Game.
        env="cartpole",  # cartpole, pendulum, point_mass
        adv_max_force=0.5,  # N on the pole (N m, N)
        horizon=100,
        discount=0.99,
        # Curriculum.
        adversary_algo="sac_adaptive",  # sac_adaptive, sac, constant_temp, none
        teacher="gamma",  # gamma, linear, step, none, force
        conc0=50.0,
        conc_target=1.0,
        rate=1000.0,
        kl_eps=0.5,
        j_lb=30.0,
        min_pairs=30,
        explore=False,
        temperature_visible=True,
        force0=0.1,  # share of the force with which the force curriculum begins
        # Training: an iteration is episodes_per_phase x horizon steps for each player.
        iterations=19,
        episodes_per_phase=16,
        steps_per_update=4,
        batch=128,
        replay_size=60_000,
        learning_starts=1000,
        hidden=(64, 64),
        lr_actor=1e-3,
        lr_critic=1e-3,
        lr_alpha=1e-3,
        tau=0.005,
        actor_warmup=0,
        init_temperature=0.1,
        # Tests.
        best_response_steps=8,
        eval_episodes=16,
        grid_size=5,
        grid_mass=(1.0, 10.0),  # times the training mass
        grid_friction=(0.0, 2.0),
        # The exact part.
        exact_high=100.0,
        exact_low=0.01,
        exact_points=25,
        exact_games=10,
        exact_states=4,
        exact_discount=0.8,
    )
    c.arms = {
        "sac": {"adversary_algo": "none"},
        "sac_half": {"adversary_algo": "none", "iterations": 10},
        "rarl": {"adversary_algo": "sac", "teacher": "none"},
        "qarl": {},
        "linear": {"teacher": "linear"},
        "force": {"adversary_algo": "sac", "teacher": "force"},
        "fixed_temp": {"adversary_algo": "constant_temp", "teacher": "none"},
        "exact": {"part": "exact"},
    }
    if variant == "smoke":
        c.update(seeds=1, iterations=2, hidden=(32,), horizon=50, best_response_steps=1)
        c.update(episodes_per_phase=8, learning_starts=100, batch=32, eval_episodes=4)
        c.update(replay_size=2000, exact_games=2, exact_points=9, exact_states=2)
        for arm in ("sac_half", "rarl", "linear", "force", "fixed_temp"):
            del c.arms[arm]
    return c
