"""Demonstrations from files and sets: what is read is what was written, and everything else is one line."""

import sys
import types

import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.rl.demo_tasks import Demonstrations, demo_groups
from qlab.rl.demos import load_demos, save_demos

GAMMA = 0.9


def arrays(n=12, obs=4, action=2, seed=0):
    rng = np.random.default_rng(seed)
    terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
    terminated[4], truncated[9] = True, True
    return {
        "obs": rng.normal(size=(n, obs)),
        "action": rng.uniform(-1, 1, (n, action)),
        "reward": rng.normal(size=n),
        "terminated": terminated,
        "truncated": truncated,
        "next_obs": rng.normal(size=(n, obs)),
    }


def test_a_file_is_read_back_with_discounts_and_the_best_episodes_marked(tmp_path):
    x = arrays()
    save_demos(tmp_path / "d.npz", x)
    got, best = load_demos(
        str(tmp_path / "d.npz"), 4, 2, discount=GAMMA, demo_share=0.3, reward_scale=0.5
    )
    for name in ("obs", "action", "next_obs"):
        np.testing.assert_allclose(getattr(got, name), x[name], rtol=1e-6)
    np.testing.assert_allclose(got.reward, x["reward"] / 2, rtol=1e-6)
    want = np.full(12, GAMMA)
    want[4] = 0  # terminated; the truncated step 9 still bootstraps
    np.testing.assert_allclose(got.discount, want, rtol=1e-6)
    episodes = [slice(0, 5), slice(5, 10), slice(10, 12)]
    totals = [(x["reward"][e] / 2 * GAMMA ** np.arange(e.stop - e.start)).sum() for e in episodes]
    assert best == pytest.approx(max(x["reward"][e].sum() / 2 for e in episodes), rel=1e-5)
    demo = np.zeros(12)
    left = 4  # round(0.3 * 12) steps, then the rest of the episode in which they end
    for i in np.argsort(totals)[::-1]:
        if left > 0:
            demo[episodes[i]] = 1
            left -= episodes[i].stop - episodes[i].start
    np.testing.assert_array_equal(got.demo, demo)


def broken(**change):
    x = arrays()
    for name, value in change.items():
        x[name] = value(x[name])
    return x


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (arrays(action=3), r"action \(12, 3\), expected \(12, 2\)"),
        (arrays(obs=5), r"obs \(12, 5\), expected \(12, 4\)"),
        (broken(next_obs=lambda v: v[:-1]), r"next_obs \(11, 4\), expected \(12, 4\)"),
        (broken(reward=lambda v: v[:, None]), r"reward \(12, 1\), expected \(12,\)"),
        (broken(reward=lambda v: np.where(v > 1, np.nan, v * 0 + np.inf)), "reward holds something that is no finite"),
        (broken(obs=lambda v: v.astype(str)), "obs holds something"),
        (broken(action=lambda v: 2 * np.sign(v)), r"action of size 2; scale the actions to \[-1, 1\]"),
        ({k: v[:0] for k, v in arrays().items()}, "no steps"),
        (broken(reward=lambda v: np.float64(1)), "no steps"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_one_line(x, words, tmp_path):
    save_demos(tmp_path / "d.npz", x)
    with pytest.raises(UserError, match=words) as e:
        load_demos(str(tmp_path / "d.npz"), 4, 2, discount=GAMMA)
    assert "\n" not in str(e.value)
    assert "d.npz" in str(e.value)


def test_what_is_no_file_of_demonstrations_is_one_line(tmp_path):
    (tmp_path / "text.npz").write_text("obs")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "half.npz", obs=np.zeros((2, 4)))
    for name, words in (
        ("none.npz", "no such file"),
        ("text.npz", "not an .npz"),
        ("one.npy", "not an .npz"),
        ("half.npz", "no array 'action'"),
    ):
        with pytest.raises(UserError, match=words) as e:
            load_demos(str(tmp_path / name), 4, 2, discount=GAMMA)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="no array 'reward'"):
        save_demos(tmp_path / "x.npz", {k: v for k, v in arrays().items() if k != "reward"})


class Box:
    def __init__(self, low, high):
        self.low, self.high = np.array(low), np.array(high)


def fake_minari(monkeypatch, space, episodes):
    """A module with the two calls of Minari that are used."""

    def load_dataset(name):
        if name != "mine/set-v0":
            raise FileNotFoundError(name)
        return types.SimpleNamespace(action_space=space, iterate_episodes=lambda: iter(episodes))

    module = types.ModuleType("minari")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "minari", module)


def episode(t, ends, seed=0):
    rng = np.random.default_rng(seed)
    flag = np.zeros(t, bool)
    last = flag.copy()
    last[-1] = True
    return types.SimpleNamespace(
        observations=rng.normal(size=(t + 1, 4)),
        actions=np.stack([rng.uniform(-2, 2, t), rng.uniform(0, 1, t)], 1),
        rewards=rng.normal(size=t),
        terminations=last if ends == "terminated" else flag,
        truncations=last if ends == "truncated" else flag,
    )


def test_a_minari_set_is_read_episode_by_episode(monkeypatch):
    episodes = [episode(5, "terminated"), episode(3, "truncated", 1), episode(4, "cut", 2)]
    fake_minari(monkeypatch, Box([-2, 0], [2, 1]), episodes)
    got, _ = load_demos("minari:mine/set-v0", 4, 2, discount=GAMMA)
    np.testing.assert_allclose(got.obs[5:8], episodes[1].observations[:3], rtol=1e-6)
    np.testing.assert_allclose(got.next_obs[5:8], episodes[1].observations[1:], rtol=1e-6)
    np.testing.assert_allclose(got.action[:5, 0], episodes[0].actions[:, 0] / 2, atol=1e-6)
    np.testing.assert_allclose(got.action[:5, 1], 2 * episodes[0].actions[:, 1] - 1, atol=1e-6)
    np.testing.assert_allclose(got.discount, [GAMMA] * 4 + [0] + [GAMMA] * 7, rtol=1e-6)


def test_minari_sets_that_cannot_be_used_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(UserError, match="pip install 'qlab\\[minari\\]'"):
        load_demos("minari:mine/set-v0", 4, 2, discount=GAMMA)
    fake_minari(monkeypatch, Box([-2, 0], [2, np.inf]), [episode(2, "cut")])
    with pytest.raises(UserError, match="no box with finite bounds"):
        load_demos("minari:mine/set-v0", 4, 2, discount=GAMMA)
    with pytest.raises(UserError, match=r"not on this machine .*minari download other-v0"):
        load_demos("minari:other-v0", 4, 2, discount=GAMMA)
    fake_minari(monkeypatch, types.SimpleNamespace(n=3), [episode(2, "cut")])
    with pytest.raises(UserError, match="no box"):
        load_demos("minari:mine/set-v0", 4, 2, discount=GAMMA)
    fake_minari(monkeypatch, Box([-2, 0], [2, 1]), [])
    with pytest.raises(UserError, match="no episodes"):
        load_demos("minari:mine/set-v0", 4, 2, discount=GAMMA)


def test_a_real_minari_set(tmp_path, monkeypatch):
    """Recorded by Minari itself from Gymnasium's pendulum, whose observations are those of our own."""
    minari = pytest.importorskip("minari")
    gymnasium = pytest.importorskip("gymnasium")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = minari.DataCollector(gymnasium.make("Pendulum-v1", max_episode_steps=7))
    for seed in range(3):
        env.reset(seed=seed)
        over = False
        while not over:
            *_, terminated, truncated, _ = env.step(env.action_space.sample())
            over = terminated or truncated
    env.create_dataset("mine/pendulum-v0", eval_env="Pendulum-v1")
    got, _ = load_demos("minari:mine/pendulum-v0", 3, 1, discount=GAMMA, reward_scale=0.003)
    assert got.obs.shape == (21, 3)
    np.testing.assert_allclose(got.obs[1:7], got.next_obs[:6])
    assert float(got.reward.max()) <= 0
    np.testing.assert_allclose(got.discount, GAMMA, rtol=1e-6)


BASE = Demonstrations("", {"demo_mix": (0.2, 0.4, 0.4), "expert_mix": (0.8, 0.1, 0.1)}, 100, 4, 0.2, GAMMA)  # fmt: skip


@pytest.mark.parametrize(
    ("names", "given", "words"),
    [
        (("gate",), BASE, "unknown 'gate'; did you mean gates"),
        (("gates",), BASE._replace(mixes={"demo_mix": (0.5, 0.6, -0.1)}), "demo_mix=.*sum to 1"),
        (("gates",), BASE._replace(mixes={"demo_mix": (0.5, 0.5)}), "demo_mix=.*expert, medium and bad"),
        (("gates", "thrusters"), BASE._replace(source="d.npz"), "name the one task"),
        (("gates",), BASE._replace(share=0.0), "bc_filter=0"),
        (("gates",), BASE._replace(num_demos=3), "num_demos=3"),
        (("gates",), BASE._replace(source="nowhere.npz"), "nowhere.npz: no such file"),
        (("brax:ant",), BASE, "brax:ant"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(names, given, words):
    with pytest.raises(UserError, match=words) as e:
        demo_groups(names, lambda obs_dim, grid: None, given, num_levels=1, num_bins=3)  # type: ignore[arg-type,return-value]
    assert "\n" not in str(e.value)
