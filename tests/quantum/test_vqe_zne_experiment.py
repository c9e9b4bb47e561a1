"""The wiring of the study: names that must agree, shared data, and one tiny run of each kind of arm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.configs import vqe_zne as paper
from qlab.experiments import vqe_zne
from qlab.lab import config as configs
from qlab.quantum import zne_study


def tiny(**values):
    c = paper.get_config("smoke")
    c.update(num_vqe=1, num_random=1, curve_problem="zn_n2", curve_shots=(100, 10_000))
    c.vqe.steps = 3
    c.nn.steps = 3
    c.nn.hidden = (4,)
    c.amortised.update(num_circuits=4, steps=3, hidden=(4,))
    for key, value in values.items():
        configs.override(c, key, value)
    return c


def run(c, arm):
    experiment = vqe_zne.build(configs.arm_config(c, arm))
    state = experiment.init(jax.random.key(0))
    for phase in experiment.phases:
        step = jax.jit(phase.step)
        for _ in range(phase.num_steps):
            state, metrics = step(state)
            assert np.isfinite(metrics["loss"])
    return state, experiment.evaluate(state)


@pytest.mark.parametrize("arm", list(paper.get_config().arms))
def test_every_arm_runs_and_reports_the_same_names(arm):
    _, out = run(tiny(), arm)
    scalars = {k for k, v in out.items() if np.ndim(v) == 0}
    assert {f"zn_n2_{s}/{m}" for s in ("inf", "1e4") for m in ("bias", "spread", "mse")} <= scalars
    assert all(np.isfinite(float(out[k])) for k in scalars)
    assert {k.split("/")[-1] for k in scalars} <= set(vqe_zne.METRICS)
    if arm == "raw":
        assert float(out["vqe_inf/p90_ratio"]) == pytest.approx(1)
        assert float(out["vqe_inf/win_share"]) == 0


def test_arms_see_the_same_curves():
    c = tiny()
    fit, _ = run(c, "gp")
    for arm in ("nn", "nn_amortised"):
        curves = run(c, arm)[0][0]
        jax.tree.map(np.testing.assert_array_equal, fit, curves)


def test_claims_and_figures_name_what_the_standard_study_measures():
    c = paper.get_config()
    spec = vqe_zne.study_spec(c)
    shape = (len(zne_study.tasks(spec)), c.num_random + c.num_vqe)
    zeros = jnp.zeros(shape)
    curves = zne_study.Curves(zeros[..., None], zeros[..., None], zeros[..., None], zeros)
    names = zne_study.score(zeros, curves, spec)
    for claim in vqe_zne.CLAIMS:
        sides = [claim.left] + ([claim.right] if isinstance(claim.right, tuple) else [])
        for arms, metric in sides:
            assert metric in names
            assert {arms} if isinstance(arms, str) else set(arms) <= set(c.arms)
    for figure in vqe_zne.FIGURES:
        assert set(figure.arms) <= set(c.arms)


def test_conventions_and_sweep_are_settings_of_the_config():
    for key, values in paper.CONVENTIONS.items():
        for value in values:
            c = paper.get_config()
            configs.override(c, key, value)
            assert configs.canonical(c) != configs.canonical(paper.get_config())
    for overrides in paper.sweep():
        c = paper.get_config()
        for key, value in overrides.items():
            configs.override(c, key, value)


def test_convention_of_the_noise_reaches_the_curves():
    plain, _ = run(tiny(), "raw")
    for key, value in (
        ("lam1_over_lam2", 0.1),
        ("noise_convention", "pauli_p"),
        ("theta_mode", "reopt"),
    ):
        other, _ = run(tiny(**{key: value}), "raw")
        assert np.abs(other.energies - plain.energies).max() > 1e-7, key


def test_device_variant_folds_a_hidden_noise():
    device = paper.get_config("device")
    c = tiny(
        noise=device.noise, readout=device.readout, amplify=device.amplify, scales=device.scales
    )
    c.amortised.noise = device.amortised.noise
    curves, out = run(c, "richardson5")
    assert curves.energies.shape[-1] == 4
    assert float(out["vqe_inf/bias"]) > 1e-3  # read-out error does not scale: it must stay
    run(c, "nn_amortised")
