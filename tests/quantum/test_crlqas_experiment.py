"""The comparison as a whole on a small task: what arms share, what seeds vary, and one-line errors."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.experiments import crlqas
from qlab.lab.config import load
from qlab.lab.errors import UserError


def arm(name, **changes):
    c = copy.deepcopy(load("crlqas:smoke").config)
    c.arms.unlock()
    arms = load("crlqas").config.arms
    for key, value in {**arms[name].to_dict(), **changes}.items():
        if isinstance(value, dict):
            c[key].update(value)
        elif key == "accept_err":
            c.accept_err = value
        elif key != "only":
            c[key] = value
    return c


@pytest.fixture(scope="module")
def crl():
    with jax.enable_x64(True):
        experiment = crlqas.build(arm("crlqas", episodes=24))
        step = jax.jit(experiment.phases[0].step)

        def run(seed):
            state = experiment.init(jax.random.key(seed))
            for _ in range(2):
                state, metrics = step(state)
            return state, metrics

        return experiment, run


def test_rounds_end_with_their_episodes(crl):
    experiment, run = crl
    assert [p.num_steps for p in experiment.phases] == [2]
    state, metrics = run(0)
    records = state["h2_2q"][0].env.records
    assert (np.asarray(records.success) >= 0).all()
    assert 1 <= records.length.min() <= records.length.max() <= 6
    assert float(metrics["h2_2q/length"]) == np.asarray(records.length)[12:].mean()
    out = experiment.evaluate(state)
    assert out["h2_2q/pennylane_gap"] < 1e-12
    assert out["h2_2q/circuits"] == np.asarray(records.length).sum()
    assert set(out) <= {f"h2_2q/{k}" for k in crlqas.METRICS}


def test_seeds_vary_and_repeat(crl):
    _, run = crl
    a, b, c = (run(s)[0]["h2_2q"][0] for s in (0, 0, 1))
    same = [
        np.array_equal(x, y)
        for x, y in zip(*(jax.tree.leaves((s.agent, s.env)) for s in (a, b)), strict=True)
    ]
    assert all(same)
    assert not np.array_equal(a.env.records.length, c.env.records.length)


def test_arms_without_a_part_share_the_program(crl):
    """The switches are data: only their values differ."""
    whole = crlqas.build(arm("crlqas", episodes=24)).init(jax.random.key(0))
    for name in ("told_e0", "no_curriculum", "no_mask", "no_halting"):
        other = crlqas.build(arm(name, episodes=24)).init(jax.random.key(0))
        a, b = whole["h2_2q"][0], other["h2_2q"][0]
        assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
        jax.tree.map(np.testing.assert_array_equal, a.agent.params, b.agent.params)
    assert float(other["h2_2q"][0].env.switches.threshold.xi) == 0.1848
    assert (np.asarray(other["h2_2q"][0].env.cap) == 6).all()


def test_no_curriculum_never_succeeds_and_told_e0_knows():
    told = (
        crlqas.build(arm("told_e0", episodes=24)).init(jax.random.key(0))["h2_2q"][0].env.switches
    )
    assert abs(float(told.threshold.rule.e_ref) + 1.1372702) < 1e-6
    assert float(told.threshold.xi) == 1.6e-3
    none = (
        crlqas.build(arm("no_curriculum", episodes=24))
        .init(jax.random.key(0))["h2_2q"][0]
        .env.switches
    )
    assert float(none.threshold.xi) < 0
    assert not bool(none.threshold.rule.moving)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sac"}, "method='sac'"),
        ({"e_ref": "bound"}, "e_ref='bound'"),
        ({"episodes": 50}, "does not divide"),
        ({"optimiser": {"name": "bfgs"}}, "optimiser='bfgs'"),
        ({"replay_size": 40}, "replay_size=40"),
        ({"rand_halt": {"p": 0.0}}, "halting with"),
    ],
)
def test_bad_configs_get_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        crlqas.build(arm("crlqas", **changes)).init(jax.random.key(0))


def test_bad_noise_and_problem():
    c = arm("crlqas")
    c.tasks.h2_2q.noise = "depol:0.1"
    with pytest.raises(UserError, match="two probabilities"):
        crlqas.build(c)
    c.tasks.h2_2q.noise = "ourens"
    with pytest.raises(UserError, match="did you mean ourense"):
        crlqas.build(c)
