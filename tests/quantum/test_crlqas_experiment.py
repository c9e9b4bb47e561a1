"""The comparison as a whole on a small task: what arms share, what seeds vary, and one-line errors."""

import copy
import functools

import jax
import numpy as np
import pytest

from qlab.experiments import crlqas
from qlab.lab.config import load
from qlab.lab.errors import UserError
from qlab.quantum import architecture_env as ae


def arm(name, **changes):
    c = copy.deepcopy(load("crlqas:smoke").config)
    c.arms.unlock()
    arms = load("crlqas").config.arms
    for key, value in {**arms[name].to_dict(), **changes}.items():
        if isinstance(value, dict):
            c[key].update(value)
        elif key == "accept_err":
            c.accept_err = value
        else:
            c[key] = value
    c.only = changes.get("only", ())
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
    assert (np.asarray(records.solved) >= 0).all()
    assert 1 <= records.length.min() <= records.length.max() <= 6
    assert float(metrics["h2_2q/length"]) == np.asarray(records.length)[12:].mean()
    out = experiment.evaluate(state)
    assert out["h2_2q/pennylane_gap"] < 1e-12
    assert out["h2_2q/circuits"] == np.asarray(records.length).sum()
    drawn = out.pop("h2_2q/circuit")
    assert drawn.shape == (6, 6)
    assert (drawn[:, 0] > 0).sum() == out[
        "h2_2q/gates"
    ]  # on two qubits chemical accuracy is reached
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


def switches(name):
    c = arm(name)
    env = ae.architecture_env(crlqas.make_task(c, "h2_2q"), c.num_envs, c.episodes)
    return crlqas.make_switches(c, "h2_2q", env)


@functools.cache
def shapes(name):
    return jax.eval_shape(crlqas.build(arm(name)).init, jax.random.key(0))


@pytest.mark.parametrize("name", ["random", "told_e0", "no_curriculum", "no_mask", "no_halting"])
def test_arms_without_a_part_share_the_program(name):
    """The switches, and whether anything is learnt, are data: only their values differ."""
    whole, other = shapes("crlqas"), shapes(name)
    assert jax.tree.structure(whole) == jax.tree.structure(other)
    assert jax.tree.leaves(whole) == jax.tree.leaves(other)


def test_values_of_the_switches():
    whole, mask, halt = (switches(n) for n in ("crlqas", "no_mask", "no_halting"))
    assert bool(whole.masked & whole.halting & whole.halt_ends & whole.threshold.rule.moving)
    assert float(whole.threshold.xi) == np.float32(0.1848)
    assert abs(float(whole.threshold.rule.e_ref) + 1.320446) < 1e-6
    assert not mask.masked
    assert mask.halting
    assert not halt.halting
    assert halt.masked


def test_no_curriculum_never_succeeds_and_told_e0_knows():
    told, none = switches("told_e0").threshold, switches("no_curriculum").threshold
    assert abs(float(told.rule.e_ref) + 1.1372702) < 1e-6
    assert float(told.xi) == np.float32(1.6e-3)
    assert not told.rule.moving
    assert float(none.xi) < 0  # |E - e_ref| is never below it
    assert not none.rule.moving


def test_a_claim_for_each_task_names_it():
    texts = [c.text for c in crlqas.CLAIMS]
    assert len(set(texts)) == len(texts)
    for c in crlqas.CLAIMS:
        task = c.left[1].split("/")[0]
        assert crlqas.TASKS[task] in c.text or c.source == "ours"
        assert isinstance(c.right, float) or c.right[1] == c.left[1]
    for variant in ("crlqas", "crlqas:smoke", "crlqas:full"):
        assert set(load(variant).config.tasks) <= set(crlqas.TASKS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sac"}, "method='sac'"),
        ({"e_ref": "bound"}, "e_ref='bound'"),
        ({"episodes": 50}, "does not divide"),
        ({"optimiser": {"name": "bfgs"}}, "optimiser='bfgs'"),
        ({"replay_size": 40}, "replay_size=40"),
        ({"only": ("h2_3q",)}, "'h2_3q' is no task"),
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
