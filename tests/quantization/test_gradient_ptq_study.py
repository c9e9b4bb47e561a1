"""Options, recipe, summaries and allocations of the study; and one study, whole."""

import math

import jax
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.lab.registry import names
from qlab.quantization import ptq_options as opt
from qlab.quantization.calibration_sets import photo_patches
from qlab.quantization.gradient_ptq_study import Plan, _calls, _space
from qlab.quantization.gradient_ptq_tables import PLANS, allocations, summaries
from qlab.quantization.ptq_stages import SiteInfo

ALL = tuple(opt.OPTIONS)


def plan(options=ALL, widths=(2, 3), rates=(1e-2, 3e-2, 1e-1)):
    return Plan(options, widths, rates, 10, 8, 1.0, (), (2, 3, 4), 2, {})


def test_the_study_is_a_paper_of_the_house():
    assert "gradient_ptq" in names()


def test_an_option_changes_its_axis_only():
    for name in ALL:
        own = opt.settings(name)
        changed = {k for k in own if own[k] != opt.BASE[k]}
        assert changed == set(opt.OPTIONS[name]), name
    with pytest.raises(UserError, match="d_l2x"):
        opt.settings("d_l2x")


def test_every_option_is_run_once_at_each_width_and_tuned_where_the_scale_changes():
    calls = _calls(plan())
    assert {r.option for r in calls[0]} == {"base"}
    for runs in calls:
        assert len(runs) <= 6
        assert len({opt.shared(r.settings) for r in runs}) == 1
    seen: dict[tuple[str, int], list[float]] = {}
    for r in (r for runs in calls for r in runs):
        seen.setdefault((r.option, r.width), []).append(r.rate)
    assert set(seen) == {(n, w) for n in ALL for w in (2, 3)}
    for (name, _), rates in seen.items():
        assert len(rates) == (3 if opt.is_tuned(name) else 1)
        assert math.isnan(rates[0]) == (not opt.is_tuned(name))
    assert opt.is_tuned("d_l1")
    assert opt.is_tuned("g_sgd")
    assert not opt.is_tuned("c_16")
    assert not opt.is_tuned("e_bias")


def test_a_program_holds_only_the_branches_in_use():
    space = _space(plan(("base", "d_l1", "g_lion")))
    assert space.rules == ("sigmoid",)
    assert set(space.losses) == {"l2", "l1"}
    assert set(space.optimizers) == {"adam", "lion"}
    assert not space.augment
    assert _space(plan(("base", "b_noise"))).augment


def test_the_recipe_takes_each_axis_winner_and_the_base_otherwise():
    found = dict.fromkeys(ALL, 2.0) | {"base": 1.0}
    assert opt.recipe(found) == dict(opt.BASE)
    found |= {
        "a_middle": 0.9, "b_noise": 0.8, "c_64": 0.7, "d_cosine": 0.6, "d_l1": 0.9, "e_bias": 0.5,
        "f_power": 0.5, "g_ste": 0.4, "e_flexround": 0.45, "g_lion": 0.3, "x_fp_input": 0.0, "rtn": 0.0, "r_1": 0.0,
    }  # fmt: skip
    changed = {k: v for k, v in opt.recipe(found).items() if v != opt.BASE[k]}
    assert changed == {
        "select": "middle", "noise": 0.1, "count": 64, "loss": "cosine", "bias": 1.0, "grid": "power",
        "rule": "ste", "optimizer": "lion",
    }  # fmt: skip
    core = {k: v for k, v in opt.recipe(found, core=True).items() if v != opt.BASE[k]}
    assert core == {"loss": "cosine", "grid": "power", "rule": "ste", "optimizer": "lion"}
    # error correction, nearest and repeats never enter; a rule with its own scale needs no other
    found |= {"e_flexround": 0.1, "e_scale": 0.1}
    assert opt.recipe(found)["rule"] == "flexround"
    assert opt.recipe(found)["scale"] == 0.0
    # options that were not run are no candidates
    assert opt.recipe({"base": 1.0, "d_l1": 0.5})["loss"] == "l1"


def test_range_and_gain_of_an_axis():
    accuracy = {"base": 80.0, "d_l1": 85.0, "d_kl": 60.0, "a_middle": 79.0}
    held = {"base": 1.0, "d_l1": 0.8, "d_kl": 0.9, "a_middle": 2.0}
    at = {(n, 2): {"accuracy": accuracy[n], "heldout_kl": held[n]} for n in accuracy}
    out = summaries(at, tuple(accuracy), (2,))
    assert out["axis_d/spread"] == 25.0
    assert out["axis_d/spread_rest"] == 5.0
    assert out["axis_d/gain"] == 5.0
    assert (out["axis_a/spread"], out["axis_a/spread_rest"], out["axis_a/gain"]) == (1.0, 0.0, 0.0)
    assert out["axes_abc/spread"] == 1.0
    assert out["axes_defg/spread"] == 25.0


def test_allocations_keep_the_budget_by_site_and_by_row():
    rng = np.random.default_rng(0)
    infos = [SiteInfo("a", 4, 8), SiteInfo("b", 2, 16), SiteInfo("c", 3, 4)]
    menu = (2, 3, 4, 6, 8)
    omega = -np.sort(-rng.random((2, 5, 3)), 1)
    rows = -np.sort(-rng.random((5, 3, 4)), 0)
    weights = sum(s.rows * s.columns for s in infos)
    for budget in (2.0, 2.5, 3.0, 8.0):
        found = allocations(omega, rows, infos, menu, budget, 1)
        assert set(found) == set(PLANS)
        for name, bits in found.items():
            used = sum(bits[i, : s.rows].sum() * s.columns for i, s in enumerate(infos))
            assert used <= budget * weights + 1e-6
            assert set(np.unique(bits)) <= set(menu)
            if name != "ig_rows":
                assert all(len(set(bits[i, : s.rows])) == 1 for i, s in enumerate(infos))
            if budget == 8.0:
                assert used == 8 * weights
            if budget == 2.0:
                assert used == 2 * weights


def test_photographs_are_patches_in_range_and_drawn_by_their_seed():
    a = photo_patches(20, (8, 8, 1), 0)
    assert a.shape == (20, 8, 8, 1)
    assert a.dtype == np.float32
    assert 0 <= a.min() < a.max() <= 1
    np.testing.assert_array_equal(a, photo_patches(20, (8, 8, 1), 0))
    assert not np.array_equal(a, photo_patches(20, (8, 8, 1), 1))


@pytest.mark.slow
def test_a_study_whole_repeats_itself_and_measures_what_it_says():
    """Few options on a small net: equal rows where options are equal, recipe no worse on what chose it."""
    from qlab.experiments.gradient_ptq import build
    from qlab.lab.config import base

    c = base(experiment="gradient_ptq")
    c.update(
        net="digits_shallow", split="val", bits=(2,), options=("base", "d_l1", "rtn", "r_1", "c_synthetic"),
        num_iters=100, batch_size=32, rates=(3e-2, 1e-1), reg_weight=10.0, budgets=(3.0,), menu=(2, 3, 4),
        midpoints=4, closed=("gptq",), damp=0.01,
    )  # fmt: skip
    done = build(c)

    def whole():
        state = done.init(jax.random.key(7))
        for phase in done.phases:
            for _ in range(phase.num_steps):
                state, _ = phase.step(state)
        return {k: float(v) for k, v in done.evaluate(state).items()}

    a, b = whole(), whole()
    assert a == b
    assert all(math.isfinite(v) for v in a.values())
    assert a["w2_rtn/heldout_kl"] > a["w2_base/heldout_kl"]
    assert a["w2_gptq/heldout_kl"] < a["w2_rtn/heldout_kl"]
    assert a["w2_r_1/heldout_kl"] != a["w2_base/heldout_kl"]
    assert a["mp_ig_3/kl"] <= a["w2_base/kl"]
