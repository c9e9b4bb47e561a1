"""Trials and the loop that drives them, with a launcher that starts nothing."""

import signal
from pathlib import Path

import pytest

from qlab.lab import launch
from qlab.lab.errors import UserError
from qlab.lab.launch import Event, Launcher, Outcome, RunSpec
from qlab.lab.signals import Stop

SPEC = RunSpec("toy", {}, (), None, Path("x"))


class Fake:
    """Ends the oldest running trial at each wait, with the next exit code of its script."""

    def __init__(self, scripts, slots=1):
        self.scripts = {name: list(codes) for name, codes in scripts.items()}
        self.running, self.most, self.stopped, self.order = {}, 0, 0, []
        self.launcher = Launcher(slots, self.submit, self.wait, self.stop)
        self.on_wait = lambda: None

    def submit(self, spec, log):
        handle = len(self.order)
        self.order.append(log.stem)
        self.running[handle] = log.stem
        self.most = max(self.most, len(self.running))
        return handle

    def wait(self, timeout_s):
        self.on_wait()
        handle, name = next(iter(self.running.items()))
        del self.running[handle]
        return {handle: Outcome(self.scripts[name].pop(0), "why", 1.0)}

    def stop(self):
        self.stopped += 1
        for name in self.running.values():
            self.scripts[name] = [75]

    def events(self, stop=None, **kwargs):
        specs = dict.fromkeys(self.scripts, SPEC)
        found = launch.run_all(specs, self.launcher, Path(), stop or Stop(), **kwargs)
        return [(e.id, e.kind) for e in found if e.kind != "started"]


def test_all_run_in_order_and_no_more_at_once_than_slots():
    fake = Fake({"a": [0], "b": [0], "c": [0]}, slots=2)
    assert fake.events() == [("a", "done"), ("b", "done"), ("c", "done")]
    assert fake.most == 2


def test_one_failure_stops_nothing():
    assert Fake({"a": [0], "b": [1], "c": [0]}).events() == [
        ("a", "done"),
        ("b", "failed"),
        ("c", "done"),
    ]


@pytest.mark.parametrize(
    ("codes", "retry", "kinds"),
    [
        ([1, 0], 0, ["failed"]),
        ([1, 0], 1, ["retry", "done"]),
        ([1, -9, 1], 2, ["retry", "retry", "failed"]),
        ([2, 0], 5, ["failed"]),  # bad input stays bad
        ([3, 0], 5, ["failed"]),  # no finite seed: the same numbers again
        ([75, 0], 0, ["resume", "done"]),  # stopped from outside is no failure
        ([-signal.SIGTERM, 1, 0], 1, ["resume", "retry", "done"]),
    ],
)
def test_what_is_attempted_again(codes, retry, kinds):
    assert [kind for _, kind in Fake({"a": codes}).events(retry=retry)] == kinds


def test_a_trial_that_is_stopped_for_ever_fails_in_the_end():
    kinds = [kind for _, kind in Fake({"a": [75] * 100}).events()]
    assert kinds == ["resume"] * launch.MAX_RESUMES + ["failed"]


def test_retries_come_after_the_others():
    fake = Fake({"a": [1, 0], "b": [0]})
    fake.events(retry=1)
    assert fake.order == ["a", "b", "a"]


def test_a_stop_asks_the_running_ones_once_and_starts_nothing_more():
    fake, stop = Fake({"a": [0], "b": [0], "c": [0]}, slots=2), Stop()
    fake.on_wait = lambda: stop.raise_flag("SIGTERM")
    # "a" had ended by itself when the stop came
    assert fake.events(stop) == [("a", "done"), ("b", "stopped")]
    assert fake.stopped == 1
    assert fake.order == ["a", "b"]


def test_a_caller_that_gives_up_leaves_nothing_running():
    fake = Fake({"a": [0], "b": [0]}, slots=2)
    events = launch.run_all(dict.fromkeys("ab", SPEC), fake.launcher, Path(), Stop())
    assert next(events) == Event("a", "started", 1)
    events.close()
    assert fake.stopped == 1
    assert not fake.running


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("", ""),
        ("step 1\nstep 2\n\n", "step 2"),
        ("Traceback (most recent call last):\n  File x\nKeyError: 'a'\n\nDuring handling of the above "
         "exception, another exception occurred:\n\nTraceback (most recent call last):\n  File y\n"
         "my.pkg.BadError: two\n", "my.pkg.BadError: two"),
        ("Traceback (most recent call last):\n  File x\nTypeError: shapes\n  of a\n--------------------\n"
         "For simplicity, JAX has removed its internal frames.\n", "TypeError: shapes"),
        ("error: old\nTraceback (most recent call last):\n  File x\nValueError\n", "ValueError"),
        ("Traceback (most recent call last):\n  x\nValueError: caught\nerror: bad config\n", "bad config"),
    ],
)  # fmt: skip
def test_the_line_that_says_why(output, line):
    assert launch.last_error(output) == line


@pytest.mark.parametrize("num_cpus", [1, 2, 3, 8, 10])
@pytest.mark.parametrize("jobs", [1, 2, 3, 8])
def test_cpu_shares_cover_all_cores_evenly(num_cpus, jobs):
    shares = launch.cpu_shares(range(100, 100 + num_cpus), jobs)
    assert len(shares) == jobs
    assert {c for s in shares for c in s} == set(range(100, 100 + num_cpus))
    sizes = [len(s) for s in shares]
    assert max(sizes) - min(sizes) <= 1
    if jobs <= num_cpus:
        assert sum(sizes) == num_cpus  # nobody shares a core


def test_a_command_says_everything():
    spec = RunSpec(
        "toy:smoke", {"a.b": (1, 2), "s": "x y"}, ("p", "q"), 4, Path("r/t"), ("--device", "cpu")
    )
    assert launch.command(spec) == (
        "python -m qlab.run --config toy:smoke '--config.a.b=(1, 2)' '--config.s=x y' "
        "--arms p,q --seeds 4 --device cpu --workdir r/t"
    )


@pytest.mark.parametrize(
    ("name", "jobs", "says"),
    [("ray", 1, "not there yet"), ("slurm", 1, "not there yet"), ("slrum", 1, "did you mean slurm"),
     ("local", 0, "give 1 or more")],
)  # fmt: skip
def test_launchers_that_are_not_there(name, jobs, says):
    with pytest.raises(UserError, match=says):
        launch.launcher(name, jobs)
