"""The study as a config asks for it: bad keys are one line, a user's own demonstrations run through it."""

import jax
import numpy as np
import pytest

from qlab.lab.config import load
from qlab.lab.errors import UserError
from qlab.rl.arsq_study import study
from qlab.rl.demos import save_demos


def config(**changes):
    c = load("arsq:control").config
    with c.unlocked():
        for name, value in changes.items():
            c[name] = value
    return c


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ("gates", "gate")}, "tasks: unknown 'gate'"),
        ({"agent": "dqn"}, "agent: unknown 'dqn'"),
        ({"demo_fraction": 0.0}, "demo_fraction=0"),
        ({"demo_fraction": 1.5}, "demo_fraction=1.5"),
        ({"demo_mix": (1.0, 1.0, 0.0)}, r"demo_mix=\(1.0, 1.0, 0.0\)"),
        ({"demos": "none.npz"}, "demos=none.npz"),
        ({"demos": "none.npz", "tasks": ("gates",)}, "none.npz: no such file"),
        ({"tasks": ("brax:ant",)}, "brax:ant"),
        ({"num_demos": 3}, "num_demos=3"),
    ],
)
def test_bad_keys_are_one_line(changes, words):
    with pytest.raises(UserError, match=words) as e:
        study(config(**changes))
    assert "\n" not in str(e.value)


def test_a_file_for_another_task_is_one_line(tmp_path):
    n = 5
    rows = {"obs": np.zeros((n, 6)), "action": np.zeros((n, 4)), "reward": np.zeros(n), "terminated": np.zeros(n, bool), "truncated": np.zeros(n, bool), "next_obs": np.zeros((n, 6))}  # fmt: skip
    save_demos(tmp_path / "thrusters.npz", rows)
    with pytest.raises(UserError, match=r"thrusters.npz: obs \(5, 6\), expected \(5, 4\)"):
        study(config(tasks=("gates",), demos=str(tmp_path / "thrusters.npz")))


@pytest.mark.slow
@pytest.mark.parametrize("arm", list(load("arsq:control").config.arms))
def test_every_arm_keeps_the_structure_of_its_state(arm):
    """By shapes alone, which compiles nothing: D = 2 and D = 1, all agents of the variant."""
    given = load("arsq:control").config.arms[arm].to_dict()
    experiment = study(config(tasks=("gates", "pendulum"), hidden=(8,), **given))
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    after, metrics = jax.eval_shape(experiment.phases[0].step, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert set(metrics) == {"loss", "gates/score", "pendulum/score"}
    out = jax.eval_shape(experiment.evaluate, state)
    # SAC has no V, and what cloning alone learns is none
    assert ("gates/value_bias" in out) == (arm not in ("sac", "bc"))
    rows = state.groups[0].online.demos.reward.shape
    assert rows == (1, 20_000)


@pytest.mark.slow
def test_a_users_demonstrations_are_what_is_learned_from(tmp_path):
    rng = np.random.default_rng(0)
    n = 60
    over = np.arange(n) % 10 == 9
    obs = rng.uniform(-0.5, 0.5, (n, 4))
    rows = {"obs": obs, "action": rng.uniform(-1, 1, (n, 2)), "reward": rng.normal(size=n), "terminated": over, "truncated": 0 * over, "next_obs": obs + 0.1}  # fmt: skip
    save_demos(tmp_path / "mine.npz", rows)
    small = dict(env_steps=96, num_envs=4, eval_points=2, eval_episodes=2, replay_size=100)
    experiment = study(
        config(
            tasks=("gates",), demos=str(tmp_path / "mine.npz"), hidden=(8,), learning_starts=8,
            demo_reward_scale=2.0, **small,
        )
    )  # fmt: skip
    state = experiment.init(jax.random.key(0))
    demos = state.groups[0].online.demos
    np.testing.assert_allclose(demos.obs[0], rows["obs"], rtol=1e-6)
    np.testing.assert_allclose(demos.reward[0], 2 * rows["reward"], rtol=1e-6)
    assert float(state.groups[0].low[0]) < float(
        state.groups[0].high[0]
    )  # still the scripted anchors
    step = jax.jit(experiment.phases[0].step)
    for _ in range(experiment.num_steps):
        state, metrics = step(state)
    assert np.isfinite(metrics["loss"])
    out = experiment.evaluate(state)
    assert set(out) == {"gates/score", "gates/auc_score", "gates/value_bias"}
    assert all(np.isfinite(v) for v in out.values())
