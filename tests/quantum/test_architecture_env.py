"""The environment, replayed gate by gate in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import architecture_env as ae
from qlab.quantum import moving_threshold as mt
from qlab.quantum import placement as pm
from qlab.quantum import ptm_circuit as pc
from qlab.quantum.angle_search import Settings
from qlab.quantum.circuit_spec import apply_spec, circuit_spec
from qlab.quantum.noise_model import NoiseModel
from qlab.quantum.pauli import ground_energy, to_coords, to_dense
from qlab.quantum.search_problems import search_problem

E, D, L = 6, 5, 400


def switches(env, xi, *, masked=True, halting=False, halt_ends=False, d=D, **rule):
    table = mt.halting_table(d, d, 0.6)
    cur = mt.moving_threshold(xi, mt.ThresholdRule(env.e_ref, **rule))
    flags = (jnp.bool_(x) for x in (masked, halting, halt_ends))
    return ae.Switches(*flags, jnp.asarray(table), cur)


def rollout(env, sw, steps, key=0, choose=None):
    """Every step's action, state after it, and Step; random legal actions."""

    def body(carry, k):
        state, obs = carry
        k_act, k_env = jax.random.split(k)
        action = jax.random.categorical(k_act, jnp.where(obs[1], 0.0, -jnp.inf)).astype(jnp.int32)
        state, ts = env.step(state, action, k_env)
        return (state, ts.obs), (action, state, ts)

    start = env.reset(jax.random.key(key), sw)
    keys = jax.random.split(jax.random.key(key + 1), steps)
    return start, jax.lax.scan(body, start, keys)[1]


@pytest.fixture(scope="module")
def played():
    """40 steps of H2 on 2 qubits, by name: clean; lagging, with random lengths that are ends; noisy, with shots and
    lengths that are not."""
    obs = search_problem("h2_2q")
    noise, quick = pc.depolarizing_model(0.01, 0.05), Settings(steps=3)
    tasks = {
        "clean": ae.Task(obs, D),
        "lag": ae.Task(obs, D, lag_optimisation=True),
        "noisy": ae.Task(obs, D, noise, shots=1000, optimiser=quick),
    }

    @functools.cache
    def play(name):
        with jax.enable_x64(True):
            env = ae.architecture_env(tasks[name], E, L)
            halting = {"halting": name != "clean", "halt_ends": name == "lag"}
            sw = switches(env, 0.97, **halting, delta=5e-4, every=12, wins_needed=2)
            return tasks[name], env, jax.jit(lambda: rollout(env, sw, 40))()

    return play


place, legal_mask = jax.jit(pm.place), jax.jit(pm.legal_mask)


@pytest.mark.parametrize(
    "name", ["clean", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lag", "noisy"))]
)
def test_replay(played, name):
    """Circuits, energies, rewards, ends, threshold, numbers and records, from actions and angles alone."""
    task, env, ((first, obs0), (action, state, ts)) = played(name)
    obs, n = task.observable, 2
    tables = pc.noise_tables(task.noise, n)
    energy = jax.jit(lambda s, a: pc.ptm_energy(s, a, tables, to_coords(obs)))
    dense, e0 = to_dense(obs), ground_energy(obs)
    blank = pm.sequence(pm.empty(D, n))
    zero_energy = float(energy(blank, jnp.zeros(D)))
    np.testing.assert_allclose(first.energy, zero_energy, atol=1e-12)
    np.testing.assert_allclose(obs0[0][1], zero_energy, atol=1e-6)
    run = jax.jit(lambda s, a: apply_spec(s, jnp.zeros((D, 3)).at[:, 0].set(a), n))
    sequence, update = jax.jit(pm.sequence), jax.jit(mt.moving_threshold_update)
    gates = [[] for _ in range(E)]
    before, number, solved = np.full(E, zero_energy), np.arange(E), np.zeros(E, int)
    cap, upcoming, cur = np.asarray(first.cap), E, first.switches.threshold
    best, least, lowest, shortest = float(first.best), np.inf, np.inf, D + 1
    solved_by_number = -np.ones(L)
    for t in range(40):
        now = jax.tree.map(lambda x, t=t: np.asarray(x[t]), (action, state, ts))
        act, st, step = now
        energies, ends = [], []
        for i in range(E):
            gates[i].append(int(act[i]))
        over = np.asarray(step.terminated | step.truncated)
        grid = np.asarray(step.final_obs[0][0]).reshape(E, D, n + 3, n)
        for i in range(E):
            circuit = pm.empty(D, n)
            for g in gates[i]:
                circuit = place(circuit, g)
            np.testing.assert_array_equal(grid[i], circuit.grid)
            energies.append(float(step.final_obs[0][1][i]))
            success = abs(energies[i] - env.e_ref) < float(cur.xi)
            last = len(gates[i]) == D
            halted = len(gates[i]) - 1 == cap[i]
            # f32 of the observation against f64: only clear cases are compared
            if abs(abs(energies[i] - env.e_ref) - float(cur.xi)) > 1e-6:
                end = success or last or (halted and name == "lag")
                assert bool(step.terminated[i]) == end
                assert bool(step.truncated[i]) == (halted and not end)
                gain = np.clip((before[i] - energies[i]) / abs(before[i] - env.e_ref), -1, 1)
                reward = 5.0 if success else -5.0 if last else gain
                assert abs(float(step.reward[i]) - reward) < 1e-5
            ends.append(bool(step.reward[i] == 5.0))
            if not over[i] and name != "noisy":
                spec = sequence(circuit)
                angles = np.asarray(st.angles[i])
                assert abs(float(energy(spec, jnp.asarray(angles))) - energies[i]) < 1e-6
                psi = np.asarray(run(spec, jnp.asarray(angles)))
                error = abs((psi.conj() @ dense @ psi).real - e0)
                if error < ae.CHEMICAL_ACCURACY and not solved[i]:
                    solved[i] = len(gates[i])
                assert st.solved[i] == solved[i]
        best = min(best, *energies)
        assert abs(best - float(st.best)) < 1e-6
        for i in np.flatnonzero(over):
            cur = update(cur, jnp.bool_(ends[i]), jnp.float64(st.best))
            assert solved_by_number[number[i]] == -1
            solved_by_number[number[i]] = st.records.solved[number[i]]
            assert st.records.length[number[i]] == len(gates[i])
            number[i], upcoming = upcoming, upcoming + 1
            gates[i], energies[i], solved[i] = [], zero_energy, 0
        np.testing.assert_allclose(float(cur.xi), float(st.switches.threshold.xi), atol=1e-6)
        np.testing.assert_array_equal(number, st.number)
        cap, before = np.asarray(st.cap), np.array(energies)
        low = st.records.lowest
        assert float(low.energy) <= lowest + 1e-12
        lowest, least = float(low.energy), float(st.records.least_error)
        shortest = int(st.records.shortest.gates)
        assert (shortest <= D) == (least < ae.CHEMICAL_ACCURACY)
        np.testing.assert_array_equal(solved_by_number, st.records.solved)
        legal = np.asarray(step.obs[1])
        for i in range(E):
            circuit = pm.empty(D, n)
            for g in gates[i]:
                circuit = place(circuit, g)
            np.testing.assert_array_equal(legal[i], legal_mask(circuit))


@pytest.mark.slow
def test_the_lagging_gate_is_not_optimised(played):
    _, _, (_, (_, state, _ts)) = played("lag")
    count = np.asarray(state.circuit.count)
    angles = np.asarray(state.angles)
    t, e = np.nonzero(count > 0)
    assert not angles[t, e, count[t, e] - 1].any()


def test_energies_are_counted(played):
    _, _env, (_, (_action, state, _)) = played("clean")
    spent = np.diff(np.asarray(state.records.energies), prepend=0)
    assert (spent >= E).all()  # one a step, and three for each angle and sweep
    assert ((spent - E) % 3 == 0).all()


def test_shot_noise_has_its_size():
    obs = search_problem("h2_3q")
    w = obs.coeffs[obs.paulis.any(1)]
    assert abs(ae.shot_sigma(obs, 400) - np.sqrt((w**2).sum() / 400)) < 1e-15
    env = ae.architecture_env(ae.Task(obs, 1, shots=400, optimiser=Settings(steps=1)), 2000, 4)
    state, _ = env.reset(jax.random.key(0), switches(env, 0.1, d=1))
    # RZ on qubit 0 of |000>: the energy does not depend on the angle
    _, ts = jax.jit(env.step)(state, jnp.full(2000, 8, jnp.int32), jax.random.key(1))
    e = np.asarray(ts.final_obs[0][1]) - float(state.energy[0])
    assert abs(e.std() / ae.shot_sigma(obs, 400) - 1) < 0.1
    assert abs(e.mean()) < 4 * ae.shot_sigma(obs, 400) / np.sqrt(2000)


@pytest.mark.parametrize(
    ("name", "e_ref", "e0"),
    [
        ("h2_2q", -1.320446, -1.13727017),
        ("h2_3q", -1.983914, -1.13727017),
        ("h2_4q_r70", -1.990097, -1.13618945),
        ("tfim_4q", -8.0, -2 / np.sin(np.pi / 8)),
        pytest.param("lih_4q", -10.0718, -7.78908890, marks=pytest.mark.slow),
        pytest.param("lih_4q_r220", None, -7.84487909, marks=pytest.mark.slow),
        pytest.param("lih_4q_r120", None, -7.85069838, marks=pytest.mark.slow),
    ],
)
def test_published_energies_and_lower_bounds(name, e_ref, e0):
    obs = search_problem(name)
    assert abs(ground_energy(obs) - e0) < 1e-7
    assert e_ref is None or abs(ae.lower_bound(obs) - e_ref) < 1e-4
    assert ae.lower_bound(obs) < ground_energy(obs)


def test_h2_in_two_gates(rng):
    """RY(t) on qubit 0, then CNOT(0 -> 1): E(t) in closed form, whose minimum is the ground energy."""
    obs = search_problem("h2_2q")
    tables, h = pc.noise_tables(NoiseModel(), 2), to_coords(obs)
    spec = circuit_spec([("RY", [0], [0.0]), ("CNOT", [0, 1])])
    t = rng.uniform(0, 6, 5)
    e = jax.vmap(lambda t: pc.ptm_energy(spec, jnp.array([t, 0.0]), tables, h))(jnp.asarray(t))
    closed = 0.78796736 * np.cos(t) + 0.18128881 * np.sin(t) + 0.01123659 - 0.33995361
    np.testing.assert_allclose(e, closed, atol=2e-8)
    least = -np.hypot(0.78796736, 0.18128881) + 0.01123659 - 0.33995361
    assert abs(least - ground_energy(obs)) < 2e-8


@pytest.mark.slow
def test_a_random_policy_meets_the_measured_yardstick():
    """H2-2q, exact inner optimum, small-run curriculum, D = 6, no random lengths: first success near episode 73, then in
    about half of the episodes."""
    env = ae.architecture_env(
        ae.Task(search_problem("h2_2q"), 6, optimiser=Settings(restarts=3)), 32, 600
    )
    sw = switches(env, 0.97, d=6, delta=5e-4, every=50, wins_needed=2)
    run = jax.jit(lambda: rollout(env, sw, 200)[1][1].records.solved[-1])
    success = np.asarray(run()) > 0
    assert 50 <= success.argmax() <= 100
    assert 0.4 < success[150:].mean() < 0.6


def test_bad_input():
    obs = search_problem("h2_2q")
    with pytest.raises(UserError, match="num_envs=0"):
        ae.architecture_env(ae.Task(obs, 3), 0, 1)
    with pytest.raises(UserError, match="max_gates=0"):
        ae.architecture_env(ae.Task(obs, 0), 1, 1)
    with pytest.raises(UserError, match="shots=-1"):
        ae.architecture_env(ae.Task(obs, 3, shots=-1), 1, 1)
    with pytest.raises(UserError, match="with shots use"):
        ae.architecture_env(ae.Task(obs, 3, shots=10, optimiser=Settings("adam")), 1, 1)
    with pytest.raises(UserError, match="did you mean"):
        search_problem("h2_5q")
