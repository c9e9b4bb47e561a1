"""--trial: memory and time to expect, before anything is written."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from qlab.lab.console import Console
from qlab.lab.experiment import Experiment, Phase, side_by_side
from qlab.lab.trial import table, try_arm
from qlab.run import main


class Config:
    arm, seed, seeds = "a", 0, 3


def test_a_trial_tells_each_arm_and_writes_nothing(toy, capsys):
    assert main(["--config", "toy.py:smoke", "--trial"]) == 0
    out = capsys.readouterr().out
    assert "small  init" in out and "big    init" in out  # noqa: PT018 (one table)
    assert "peak memory" in out and "in all about" in out  # noqa: PT018
    assert not Path("runs").exists()
    assert main(["--config", "toy.py:smoke", "--trial", "--arms", "tiny"]) == 2
    assert "no arm 'tiny'" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["vmap", "map"])
@pytest.mark.parametrize("how", ["scan", "step", "host"])
def test_the_widest_step_is_the_one_that_runs(layout, how):
    seen = []

    def step(s):
        jax.debug.callback(lambda a: seen.append(int(a)), s)
        return s + 1, {"loss": jnp.float32(0)}

    phase = Phase("walk", 10, step, how, lambda s: s * 0 + 7)
    exp = Experiment(lambda key: jnp.int32(0), lambda s: {}, (phase,), layout)
    found = try_arm(lambda c: exp, Config, Console(True), "a")
    jax.effects_barrier()
    assert set(seen) == {7}
    assert found.untried == ()
    assert found.memory_mb > 0
    assert found.total_s(3) >= found.steps_s >= 0


def test_later_phases_on_the_host_are_named_not_tried():
    ran = []

    def step(s):
        ran.append(int(s))
        return s + 1, {}

    first, second = Phase("one", 2, step, "host"), Phase("two", 2, step, "host")
    walk = Experiment(lambda key: jnp.int32(0), lambda s: {}, (first, second), "map", False)
    found = try_arm(lambda c: walk, Config, Console(True), "a")
    assert found.untried == ("two",)
    assert "not tried: two" in table([found], 3)
    assert set(ran) <= {0, 1}
    both = side_by_side({"x": walk, "y": Experiment(walk.init, lambda s: {}, (
        Phase("own", 3, step, "host", lambda s: s + 5),), "map", False)})  # fmt: skip
    ran.clear()
    found = try_arm(lambda c: both, Config, Console(True), "a")
    assert found.untried == ("x two",)
    assert 5 in ran
