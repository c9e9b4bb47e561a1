"""The decoupleQ study's config and claims fit together."""

import pytest

from qlab.configs import decoupleq as config_file
from qlab.experiments import decoupleq as experiment
from qlab.lab.config import arm_config


def test_every_claim_names_arms_and_a_measured_cell():
    c = config_file.get_config()
    for claim in experiment.CLAIMS:
        for arms, metric in (claim.left, claim.right):
            assert set((arms,) if isinstance(arms, str) else arms) <= set(c.arms)
            cell, name = metric.split("/")
            assert cell in {t.name for t in experiment.tasks(c)}
            assert name in experiment.METRICS


LARGE = ("ablation", "cnn", "full")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.slow if v in LARGE else ()) for v in config_file.VARIANTS],
)
def test_every_arm_of_every_variant_can_be_built(variant):
    c = config_file.get_config(variant)
    assert {t.name for t in experiment.tasks(c) if t.run or t.draw} == {c.anchor}
    for name in c.arms:
        exp = experiment.build(arm_config(c, name))
        assert exp.num_steps >= 1


def test_switches_and_sweep_name_keys_of_the_config_and_other_values():
    c = config_file.get_config()
    for key, values in config_file.CONVENTIONS.items():
        assert c[key] not in values
        assert all(type(v) is type(c[key]) for v in values)
    trials = list(config_file.sweep())
    assert len({k for t in trials for k in t}) >= 3
    assert all(k in c for t in trials for k in t)


def test_compared_arms_share_target_data_and_grid():
    c = config_file.get_config()
    own = {
        "method",
        "learning_rate",
        "calibration",
        "unit",
        "block_step",
        "block_learning_rate",
        "target",
    }
    for name, arm in c.arms.items():
        assert set(arm) <= own
        assert (arm_config(c, name).target == "fp") == name.endswith("_fp")
