"""Scores of circuits, against PennyLane's optimiser, brute force, and the card's numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import circuit_spec as cs
from qlab.quantum import qas_pool as qp
from qlab.quantum import qas_tasks as qt

POOL = qp.PoolSpec(size=60)


@pytest.fixture(scope="module")
def pool():
    with jax.enable_x64(False):
        return qp.sample_circuits(jax.random.key(1), POOL)


def test_ground_energies_are_the_cards():
    best = lambda t, n: qt.energy_objective(t, n, 50, 100).best  # noqa: E731
    assert best("tfim", 4) == pytest.approx(-5.2262519, abs=1e-6)
    assert best("tfim", 8) == pytest.approx(-10.2516618, abs=1e-6)
    assert best("h2", 4) == pytest.approx(-1.1361892, abs=1e-6)
    assert best("maxcut", 4) == pytest.approx(-4)
    assert len(qt.maxcut_edges(8)) == 15
    assert best("maxcut", 8) == pytest.approx(-12)
    h2 = qt.energy_objective("h2", 4, 50, 100).matrix
    assert np.diag(h2).real.min() == pytest.approx(-1.1173489, abs=1e-6)  # Hartree-Fock


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_maxcut_of_a_basis_state_is_its_cut(n):
    diagonal = np.diag(qt.energy_objective("maxcut", n, 1, 1).matrix).real
    edges = qt.maxcut_edges(n)
    for k, bits in enumerate(itertools.product((0, 1), repeat=n)):
        assert -diagonal[k] == pytest.approx(sum(bits[a] != bits[b] for a, b in edges))


@pytest.mark.slow
def test_inner_run_is_pennylanes(pool):
    """float64, ten steps: angles run the same path; the objectives of both signs."""
    state = qt.draw_target(jax.random.key(2), pool, POOL)
    with jax.enable_x64(True):
        double = pool._replace(angle=pool.angle.astype(np.float64))
        for objective in (qt.fidelity_objective(state, 10), qt.energy_objective("tfim", 4, 1, 10)):
            got = qt.label_pool(double, objective, num_qubits=4)
            for i in range(3):
                one = cs.CircuitSpec(*(x[i] for x in double))
                want = qt.reference_score(one, objective, 4)
                assert float(got[i]) == pytest.approx(want, abs=1e-6)


@pytest.mark.slow
def test_the_run_stops_at_a_small_change(pool):
    """A circuit without angles scores what it is; one that has converged does not move on."""
    still = cs.circuit_spec([("X", [0]), ("X", [2])], 10)
    objective = qt.energy_objective("maxcut", 4, 50, 100)
    score, angles = qt.optimise_angles(jax.tree.map(jnp.asarray, still), objective, 4)
    assert float(score) == pytest.approx(1.0)
    assert not np.any(angles)
    # at the top of cos^2, Adagrad's first step would still be of size 0.5
    top = cs.circuit_spec([("RX", [0], [0.0]), ("RX", [2], [np.pi])], 10)
    _, moved = qt.optimise_angles(
        jax.tree.map(jnp.asarray, top), objective._replace(steps=np.int32(0)), 4
    )
    np.testing.assert_allclose(moved, top.angle)


@pytest.mark.slow
def test_scores_are_shares_more_steps_help_and_one_program_serves_all(pool):
    with jax.enable_x64(False):
        before = qt._label._cache_size()
        objective = qt.energy_objective("tfim", 4, 1, 50)
        long = np.asarray(qt.label_pool(pool, objective, num_qubits=4))
        none = np.asarray(qt.label_pool(pool, objective._replace(steps=0), num_qubits=4))
        fid = qt.fidelity_objective(np.eye(16)[0], 5)
        other = np.asarray(qt.label_pool(pool, fid, num_qubits=4))
        assert qt._label._cache_size() == before + 1
    with jax.enable_x64(False):
        parts = qt.label_pool(pool, fid, num_qubits=4, chunk=25)  # 25 + 25 + 10
    np.testing.assert_allclose(parts, other, atol=1e-5)
    for y in (long, none, other):
        assert (y >= 0).all()
        assert (y <= 1).all()
    assert long.mean() > none.mean() + 0.1
    psi = jax.vmap(lambda s: cs.apply_spec(s, s.angle, 4))(pool)
    want = np.einsum("pi,ij,pj->p", psi.conj(), objective.matrix, psi).real / objective.best
    np.testing.assert_allclose(none, np.clip(want, 0, 1), atol=2e-6)


def test_targets_are_states_of_circuits_outside_the_pool(pool):
    with jax.enable_x64(False):
        a, b = (qt.draw_target(jax.random.key(k), pool, POOL) for k in (5, 6))
    assert np.linalg.norm(a) == pytest.approx(1, abs=1e-5)
    assert not np.allclose(a, b)
    tiny = qp.PoolSpec(2, (1, 1), (0, 1), 6, ("H", "X", "Y"))
    with jax.enable_x64(False):
        every = qp.sample_circuits(jax.random.key(0), tiny)
        with pytest.raises(UserError, match="holds every circuit"):
            qt.draw_target(jax.random.key(1), every, tiny)


def test_bad_tasks_get_one_line():
    with pytest.raises(UserError, match="did you mean tfim"):
        qt.energy_objective("tfmi", 4, 1, 1)
    with pytest.raises(UserError, match="h2 takes 4"):
        qt.energy_objective("h2", 8, 1, 1)
