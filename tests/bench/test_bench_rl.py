"""The contestants of the rl bench do the same work: each takes the steps it is asked for, and each learns."""

import math

import pytest

from qlab.benches import rl
from qlab.benches.kernel_peers import Absent
from qlab.benches.measure import Number
from qlab.benches.rl_peers import Size

SMALL = Size((16,), 32, capacity=500)


def loop_of(task, arm, size):
    try:
        return getattr(rl.TASKS[task], arm)(size)
    except Absent as e:
        pytest.skip(str(e))


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["qlab", "jax", "torch"])
@pytest.mark.parametrize("task", ["sac", "dqn"])
def test_a_loop_counts_episodes_across_calls(task, arm):
    """Pendulum is cut after 200 steps: 150 end none, 100 more one of 200 steps."""
    call = loop_of(task, arm, SMALL)
    first, second = call(150), call(100)
    if task == "sac":
        assert math.isnan(first)
        assert -2200 < second < -100
    else:
        assert 8 <= first <= 150
        assert 8 <= second <= 250


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["qlab", "jax", "torch"])
def test_every_loop_learns_the_pendulum(arm):
    call = loop_of("sac", arm, Size((64, 64), 128))
    before = call(1000)
    for _ in range(7):
        after = call(1000)
    assert before < -900
    assert after > -350


def test_numbers_goals_and_summary_without_peers(monkeypatch):
    def gone(size):
        raise Absent("nowhere to be had")

    s = rl.settings(True) | {"tasks": ("dqn",), "run_s": 0.01, "repetitions": 2, "budget_s": 0.1}
    task = rl.TASKS["dqn"]._replace(size=SMALL, jax=gone, torch=gone)
    monkeypatch.setitem(rl.TASKS, "dqn", task)
    said = []
    numbers = rl.measure(s, said.append)
    by_name = {(n.arm, n.name): n for n in numbers}
    assert len(by_name["qlab", "dqn/steps_per_s"].values) == 2
    assert by_name["torch", "dqn/steps_per_s"].status == "absent"
    assert said == ["rl: dqn, nets (16,), batches of 32"]
    assert [g.left for g in rl.goals(s)] == [("qlab", "dqn/to_jax"), ("qlab", "dqn/to_torch")]
    assert rl.summary(numbers).startswith("dqn ")
    numbers.append(Number("qlab", "dqn/to_torch", (6.0, 8.0, 7.0)))
    assert "(7 x PyTorch)" in rl.summary(numbers)
