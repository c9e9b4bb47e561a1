"""The FlexRound study's config and claims fit together."""

import pytest
from ml_collections import ConfigDict

from qlab.configs import flexround as config_file
from qlab.experiments import flexround as experiment
from qlab.lab.config import arm_config


def test_every_claim_names_an_arm_and_a_measured_cell():
    c = config_file.get_config()
    cells = {t.name for t in experiment.tasks(c) if not (t.draw or t.run)}
    assert len(cells) == 12
    for claim in experiment.CLAIMS:
        for arm, metric in (claim.left, claim.right):
            assert arm in c.arms
            cell, name = metric.split("/")
            assert cell in cells
            assert name in experiment.METRICS


@pytest.mark.parametrize("variant", config_file.VARIANTS)
def test_variants_have_their_anchor_and_whole_rounds(variant):
    c = config_file.get_config(variant)
    tasks = experiment.tasks(c)
    repeats = [t for t in tasks if t.draw or t.run]
    assert {t.name for t in repeats} == {c.anchor}
    assert sorted((t.draw > 0, t.run > 0) for t in repeats) == [(False, True), (True, True)]
    assert c.num_iters % c.rounds == 0


def test_switches_and_sweep_name_keys_of_the_config_and_other_values():
    c = config_file.get_config()
    for key, values in config_file.CONVENTIONS.items():
        assert key in c
        assert c[key] not in values
        assert all(type(v) is type(c[key]) for v in values)
    trials = list(config_file.sweep())
    assert len(trials) == 18
    assert len({k for t in trials for k in t}) >= 3
    assert all(k in c for t in trials for k in t)


def test_arms_differ_only_in_their_method_and_its_tuned_numbers():
    c = config_file.get_config()
    own = {"method", "learning_rate", "calibration", "learn_s1"}
    for name in c.arms:
        assert set(c.arms[name]) <= own
        assert isinstance(arm_config(c, name), ConfigDict)
    assert [a for a in c.arms if "calibration" in c.arms[a]] == ["rtn_minmax"]
    for name in c.arms:
        assert experiment.method(arm_config(c, name)).rounds in (1, c.rounds)
