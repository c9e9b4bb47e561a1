"""Short circuits counted by brute force; UCCSD against its own exponentials."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qlab.lab.errors import UserError
from qlab.quantum import placement as pm
from qlab.quantum import ptm_circuit as pc
from qlab.quantum import reference_circuits as rc
from qlab.quantum.architecture_env import Task
from qlab.quantum.circuit_spec import apply_spec, circuit_spec
from qlab.quantum.pauli import ground_energy, to_dense
from qlab.quantum.search_problems import search_problem


@pytest.mark.parametrize(("n", "gates"), [(1, 3), (2, 2), (2, 3), (3, 2)])
def test_every_circuit_once(n, gates):
    """Distinct left-packed pictures of all legal sequences."""
    table, pictures = pm.actions(n), set()
    for row in itertools.product(range(pm.num_actions(n)), repeat=gates):
        free, last, picture, legal = [0] * n, [-1] * n, [], True
        for a in row:
            wires = {int(table.q0[a]), int(table.q1[a])}
            legal &= any(last[w] != a for w in wires)
            m = max(free[w] for w in wires)
            picture.append((m, a))
            for w in wires:
                free[w], last[w] = m + 1, a
        if legal:
            pictures.add(frozenset(picture))
    rows = rc.every_circuit(gates, n)
    assert len(rows) == len(pictures)


def test_h2_needs_two_gates():
    one, two = rc.exhaustive(Task(search_problem("h2_2q"), 6), 2)
    assert abs(one.energy - (-0.35119)) < 1e-5
    assert one.error > 0.7
    assert two.error < 1e-12
    assert (two.gates, two.depth, two.cnots) == (2, 2, 1)
    assert (one.circuits, two.circuits) == (8, len(rc.every_circuit(2, 2)))


def test_noise_raises_the_energy_but_not_the_noiseless_error():
    noisy = rc.exhaustive(Task(search_problem("h2_2q"), 6, pc.depolarizing_model(1e-3, 1e-2)), 2)[1]
    assert noisy.error < 1e-6
    assert noisy.energy > ground_energy(search_problem("h2_2q")) + 5e-3


def test_hardware_efficient_ansatz():
    ops = rc.hea_ops(3, 2)
    assert [o[0] for o in ops] == ["RY"] * 3 + (["CNOT"] * 2 + ["RY"] * 3) * 2
    found = rc.hardware_efficient(Task(search_problem("h2_2q"), 6), 1, num_starts=4, sweeps=60)
    assert [s.gates for s in found] == [2, 5]
    assert abs(found[0].error - 0.0205858) < 1e-6  # product states end at Hartree-Fock
    assert rc.shortest_good(found).gates == 5
    assert rc.shortest_good(found[:1]) is None


@pytest.mark.parametrize("n", [2, 3, 4])
def test_uccsd_is_its_exponentials(n, rng):
    ops, offset, weight = rc.uccsd_h2(n)
    theta = rng.uniform(-1, 1, 3)
    spec = circuit_spec(ops)
    angles = np.zeros((spec.num_slots, 3))
    angles[:, 0] = offset + weight @ theta
    psi = np.asarray(apply_spec(spec, jnp.asarray(angles), n))
    expected = np.zeros(2**n, complex)
    expected[int("".join(map(str, rc.HARTREE_FOCK[n])), 2)] = 1
    for k, (create, remove) in enumerate((((1,), (0,)), ((3,), (2,)), ((1, 3), (2, 0)))):
        # the Pauli strings of one excitation commute, so Trotter is exact within it
        g = to_dense(rc._encoded(rc._excitation(create, remove), n))
        expected = scipy.linalg.expm(-1j * theta[k] * g) @ expected
    assert abs(abs(expected.conj() @ psi) - 1) < 1e-12


def test_uccsd_reaches_the_ground_state():
    s = rc.coupled_cluster(Task(search_problem("h2_2q"), 6))
    assert s.error < 1e-7
    assert s.gates == len(rc.uccsd_h2(2)[0])


def test_hartree_fock_energy_is_the_same_in_all_encodings():
    for n, name in ((2, "h2_2q"), (3, "h2_3q"), (4, "h2_4q")):
        index = int("".join(map(str, rc.HARTREE_FOCK[n])), 2)
        assert abs(to_dense(search_problem(name))[index, index].real + 1.1166844) < 1e-6


def test_bad_input():
    with pytest.raises(UserError, match="too many"):
        rc.every_circuit(8, 3)
    with pytest.raises(UserError, match="on 5 qubits"):
        rc.uccsd_h2(5)
