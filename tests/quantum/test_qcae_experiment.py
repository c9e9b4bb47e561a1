"""The wiring of the study: every arm on two tiny cells, what they share, and what the settings change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.configs import qcae as paper
from qlab.experiments import qcae
from qlab.lab import config as configs
from qlab.lab.errors import UserError

CELLS = ("n2_p1", "n2_p2")


def tiny(variant="", **values):
    c = paper.get_config(variant)
    settings = dict(num_train=32, num_test=20, epochs=1, batch=16, cells=CELLS)
    for key, value in (settings | values).items():
        configs.override(c, key, value)
    return c


def run(c, arm, steps=None):
    experiment = qcae.build(configs.arm_config(c, arm))
    state = experiment.init(jax.random.key(0))
    for phase in experiment.phases:
        step = jax.jit(phase.step)
        for _ in range(phase.num_steps if steps is None else steps):
            state, metrics = step(state)
            assert np.isfinite(metrics["loss"])
    evaluate = jax.jit(experiment.evaluate) if experiment.jittable else experiment.evaluate
    return state, evaluate(state)


@pytest.fixture(autouse=True)
def x32():
    with jax.enable_x64(False):
        yield


EVERY = [(v, a) for v in ("", "matched", "ablation") for a in paper.get_config(v).arms]


@pytest.mark.slow  # the smoke study of test_conformance.py runs nets and a linear map from end to end
@pytest.mark.parametrize(("variant", "arm"), EVERY)
def test_every_arm_runs_and_reports_the_same_names(variant, arm):
    c = tiny(variant)
    _, out = run(c, arm, steps=1)
    cells = configs.arm_config(c, arm).cells  # an arm of the ablation may have its own
    assert tuple(cells) == CELLS or "cells" in c.arms[arm]
    names = {"mse", "psnr", "ssim", "train_mse", "latent_params"}
    assert {f"{cell}/{m}" for cell in (*cells, "mean") for m in names} <= set(out)
    assert {k.split("/")[-1] for k in out} <= set(qcae.METRICS)
    assert all(np.isfinite(float(v)) for v in out.values())
    for m in names:
        mean = np.mean([float(out[f"{cell}/{m}"]) for cell in cells])
        assert float(out[f"mean/{m}"]) == pytest.approx(mean, rel=1e-5)


def test_claims_and_figures_name_what_the_standard_study_measures():
    c = paper.get_config("matched")
    c.arms.update(paper.get_config().arms)  # the matched rivals have a variant of their own
    names = {f"mean/{m}" for m in qcae.METRICS}
    for claim in qcae.CLAIMS:
        sides = [claim.left] + ([claim.right] if isinstance(claim.right, tuple) else [])
        for arms, metric in sides:
            assert metric in names
            assert {arms} if isinstance(arms, str) else set(arms) <= set(c.arms)
    for figure in qcae.FIGURES:
        assert set(figure.arms) <= set(c.arms)


def test_what_arms_share_and_what_seeds_vary():
    """Noise, order, and how encoder and decoder start, whatever the latent is; a filter has that noise too."""
    c = tiny(cells=("n2_p1",))
    key = jax.random.key(3)
    build = {a: qcae.build(configs.arm_config(c, a)) for a in ("linear", "qaoa", "tv")}
    linear, qaoa, other = jax.jit(
        lambda k, l: (build["linear"].init(k), build["qaoa"].init(k), build["qaoa"].init(l))
    )(key, jax.random.key(4))
    first, second = linear.params["n2"], qaoa.params["n2_p1"]
    for part in ("encoder", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, first[part], second[part])
    noise = [jax.random.key_data(k) for k in (build["tv"].init(key), linear.k_noise, qaoa.k_noise)]
    np.testing.assert_array_equal(noise[0], noise[1])
    np.testing.assert_array_equal(noise[0], noise[2])
    for field in ("k_noise", "k_train"):
        data = [jax.random.key_data(getattr(s, field)) for s in (linear, qaoa, other)]
        np.testing.assert_array_equal(data[0], data[1])
        assert np.any(data[1] != data[2])
    differ = jax.tree.map(lambda x, y: bool(np.any(x != y)), qaoa.params, other.params)["n2_p1"]
    assert differ["latent"]["gamma"]
    assert differ["encoder"]["conv1"]["kernel"]


def test_arms_of_the_variants_train_alike():
    """An arm that stands in two variants has the same settings in both but for the cells."""
    known = {}
    for variant in ("", "grid", "matched", "ablation"):
        c = paper.get_config(variant)
        for arm in c.arms:
            s = configs.arm_config(c, arm)
            key = (s.method, s.latent, s.match, s.frozen, s.skip)
            assert known.setdefault(key, s.lr) == s.lr, (variant, arm)


def test_depth_and_parameters_of_the_arms():
    c = paper.get_config("matched")
    c.arms.update(paper.get_config().arms)
    c.arms.untied = dict(latent="qaoa_untied")

    def params(arm, n, p):
        return qcae.make_net(configs.arm_config(c, arm), 8, n, p).latent.num_params

    assert [params("qaoa", 4, p) for p in (1, 2, 3)] == [2, 4, 6]
    assert params("untied", 6, 2) == 24
    assert params("mlp", 4, 1) >= params("untied", 4, 3)
    assert params("cosine", 4, 2) == params("frozen", 4, 2) == params("linear", 4, 2) == 0
    for rival in ("basic", "ry_cz", "iqp"):
        assert [params(f"{rival}_m", 8, p) for p in (1, 2, 3)] == [2, 4, 6]
        assert params(rival, 8, 2) == 16
    assert [params("strong_m", 4, p) for p in (1, 2, 3)] == [3, 6, 6]


@pytest.mark.slow
def test_parameter_shift_trains_like_backprop():
    c = tiny(cells=("n2_p1",))
    start, _ = run(c, "qaoa", steps=0)
    states = []
    for grad in ("backprop", "parameter-shift"):
        configs.override(c, "grad", grad)
        states.append(run(c, "qaoa", steps=2)[0].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *states)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), states[0], start.params)
    assert min(jax.tree.leaves(moved["n2_p1"]["latent"])) > 1e-4


def test_conventions_and_sweep_are_settings_of_the_config():
    for key, values in paper.CONVENTIONS.items():
        for value in values:
            c = paper.get_config()
            configs.override(c, key, value)
            assert configs.canonical(c) != configs.canonical(paper.get_config()), key
    trials = list(paper.sweep())
    assert len(trials[0]) >= 3
    for overrides in trials:
        c = paper.get_config()
        for key, value in overrides.items():
            configs.override(c, key, value)


def test_bad_settings_are_one_line():
    with pytest.raises(UserError, match="n4_p2"):
        qcae.build(configs.arm_config(tiny(cells=("4x2", "n2_p1")), "qaoa"))
    with pytest.raises(UserError, match="depth or params"):
        qcae.build(configs.arm_config(tiny(match="parameters"), "basic"))
    with pytest.raises(UserError, match="did you mean"):
        qcae.build(configs.arm_config(tiny(method="medain"), "qaoa"))
    with pytest.raises(UserError, match="split"):
        qcae.build(configs.arm_config(tiny(split="valid"), "qaoa"))
