"""The loop against plain Python: windows, freezing, layouts, chunk lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab import config as configs
from qlab.lab import loop, registry
from qlab.lab.experiment import Experiment, Phase, as_experiment


def run(phase, states, num, layout="vmap", log_points=7):
    carry = loop.begin(states, phase, num, np.full(num, -1))
    runner = loop.compile_phase(phase, carry, num, layout)
    windows = []
    for now, window in loop.run_phase(phase, carry, runner, log_points):
        carry = now
        windows += [window] if window else []
    return carry, windows


def counter(num_steps, kind="scan"):
    """x <- 0.9 x + noise(step); the loss is x, or NaN at step bad[seed]."""

    def step(s):
        noise = jax.random.normal(jax.random.fold_in(s["key"], s["i"]))
        x = 0.9 * s["x"] + noise
        loss = jnp.where(s["i"] == s["bad"], jnp.nan, x)
        return {**s, "x": x, "i": s["i"] + 1}, {"loss": loss, "i": s["i"]}

    return Phase("count", num_steps, step, kind)


def states(num, bad=()):
    keys = jax.random.split(jax.random.key(0), num)
    return {
        "key": keys,
        "i": jnp.zeros(num, jnp.int32),
        "x": jnp.arange(num, dtype=jnp.float32),
        "bad": jnp.array([*bad, *[-1] * (num - len(bad))], jnp.int32),
    }


@pytest.mark.parametrize("kind", ["scan", "step"])
@pytest.mark.parametrize("layout", ["vmap", "map"])
def test_equals_a_python_loop(kind, layout):
    num, steps = 3, 23
    phase = counter(steps, kind)
    carry, windows = run(phase, states(num), num, layout)
    assert int(carry.done) == steps
    assert [w.phase_step for w in windows] == [4, 8, 12, 16, 20, 23]
    for seed in range(num):
        s, losses = jax.tree.map(lambda x, i=seed: x[i], states(num)), []
        one = jax.jit(phase.step)
        for _ in range(steps):
            s, m = one(s)
            losses.append(float(m["loss"]))
        np.testing.assert_allclose(carry.states["x"][seed], s["x"], rtol=1e-6)
        ends = [0, *[w.phase_step for w in windows]]
        for w, a, b in zip(windows, ends, ends[1:], strict=False):
            np.testing.assert_allclose(w.means["loss"][seed], np.mean(losses[a:b]), rtol=1e-5)
            np.testing.assert_allclose(w.means["i"][seed], np.mean(np.arange(a, b)))


def test_chunk_ends_change_no_bit(monkeypatch):
    results = []
    for chunk_s in (1e-9, 1e-4, 1e9):
        monkeypatch.setattr(loop, "CHUNK_S", chunk_s)
        carry, windows = run(counter(50), states(2), 2)
        results.append(
            (np.asarray(carry.states["x"]).tobytes(), [w.means["loss"].tobytes() for w in windows])
        )
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("kind", ["scan", "step", "host"])
@pytest.mark.parametrize("layout", ["vmap", "map"])
def test_a_bad_seed_is_frozen_and_its_step_recorded(kind, layout):
    num, steps = 3, 20
    carry, _ = run(counter(steps, kind), states(num, bad=(-1, 11)), num, layout)
    assert np.asarray(carry.bad).tolist() == [-1, 11, -1]
    assert np.isfinite(np.asarray(carry.states["x"])).all()
    assert int(carry.states["i"][1]) <= 12
    assert np.asarray(carry.states["i"])[[0, 2]].tolist() == [steps, steps]
    good, _ = run(counter(steps, kind), states(num), num, layout)
    np.testing.assert_array_equal(
        good.states["x"][jnp.array([0, 2])], carry.states["x"][jnp.array([0, 2])]
    )


def test_a_step_must_keep_the_state():
    def step(s):
        return {**s, "x": s["x"].astype(jnp.bfloat16)}, {}

    with pytest.raises(TypeError, match=r"leaf \['x'\] from float32\[\] to bfloat16\[\]"):
        loop.begin(states(1), Phase("p", 1, step), 1, np.array([-1]))


def test_a_metric_must_be_a_scalar():
    with pytest.raises(TypeError, match=r"'m' has shape \(3,\)"):
        loop.begin(states(1), Phase("p", 1, lambda s: (s, {"m": jnp.zeros(3)})), 1, np.array([-1]))


def test_the_protocol_form_is_accepted():
    class Plain:
        num_steps = 3

        def init(self, key):
            return jnp.zeros(())

        def step(self, state):
            return state + 1, {"loss": state}

        def evaluate(self, state):
            return {"x": state}

    exp = as_experiment(Plain())
    assert isinstance(exp, Experiment)
    assert exp.num_steps == 3
    carry, _ = run(exp.phases[0], jnp.zeros(2), 2)
    assert np.asarray(carry.states).tolist() == [3.0, 3.0]
    with pytest.raises(TypeError, match="without `step`"):
        as_experiment(type("X", (), {"num_steps": 1, "init": 0, "evaluate": 0})())


def test_no_second_compilation_for_another_length(toy):
    config = configs.arm_config(configs.load(str(toy)).config, "big")
    exp = registry.experiment("./toy_experiment.py", toy).build(config)
    carry = loop.begin(
        loop.stack([exp.init(jax.random.fold_in(jax.random.key(0), i)) for i in range(4)]),
        exp.phases[0],
        4,
        np.full(4, -1),
    )
    chunk = jax.jit(loop.chunk_scan(exp.phases[0], "vmap"))
    for n in (1, 5, 9):
        carry = chunk(carry, jnp.int32(n))
    assert chunk._cache_size() == 1
    assert int(carry.done) == 15
