"""Noisy circuits as data against dense density matrices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import noise_model as nm
from qlab.quantum import ptm as pt
from qlab.quantum import ptm_circuit as pc
from qlab.quantum.angle_search import host_energy
from qlab.quantum.circuit_spec import CNOT, GATES, U3, CircuitSpec, circuit_spec
from qlab.quantum.pauli import PAULIS, PauliSum, from_dense, to_coords, to_dense

READOUT = (0.02, 0.05)
MODELS = {
    "none": nm.NoiseModel(),
    "depol": pc.depolarizing_model(0.01, 0.05),
    "thermal": nm.NoiseModel(
        default={
            1: (nm.Channel("amplitude_damping", {"gamma": 0.03}),),
            2: (
                nm.Channel("amplitude_damping", {"gamma": 0.1}),
                nm.Channel("depolarizing", {"p": 0.02}),
            ),
        },
        gates={"RZ": ()},
        readout=READOUT,
    ),
}
FIXED = {
    "X": PAULIS[1], "Y": PAULIS[2], "Z": PAULIS[3], "H": np.array([[1, 1], [1, -1]]) / 2**0.5,
    "CNOT": np.eye(4)[[0, 1, 3, 2]], "CZ": np.diag([1, 1, 1, -1]), "SWAP": np.eye(4)[[0, 2, 1, 3]],
}  # fmt: skip
USED = [g for g in GATES[1:] if g != "U3"]


def random_ops(rng, n, count):
    ops = []
    for name in rng.choice(USED, count):
        two = name in ("CNOT", "CZ", "SWAP")
        if two and n == 1:
            name, two = "H", False
        wires = rng.permutation(n)[: 1 + two].tolist()
        ops.append((str(name), wires, rng.uniform(0, 6, 1) if name[0] == "R" else ()))
    return ops


def embed(u, wires, n):
    """Dense c[2^n, 2^n] of u on wires, by its action on basis states."""
    out, k = np.zeros((2**n, 2**n), complex), len(wires)
    for col in range(2**n):
        bits = [(col >> (n - 1 - q)) & 1 for q in range(n)]
        small = sum(bits[w] << (k - 1 - i) for i, w in enumerate(wires))
        for row in range(2**k):
            new = list(bits)
            for i, w in enumerate(wires):
                new[w] = (row >> (k - 1 - i)) & 1
            out[sum(b << (n - 1 - q) for q, b in enumerate(new)), col] += u[row, small]
    return out


def channel(rho, model, wires, n):
    """Damping by gamma on each wire, then a uniform non-identity Pauli with probability p."""
    if model == "none":
        return rho
    two = len(wires) == 2
    gamma = 0.0 if model == "depol" else (0.1 if two else 0.03)
    p = {"depol": 0.05 if two else 0.01, "thermal": 0.02 if two else 0.0}[model]
    for w in wires if gamma else ():
        kraus = (np.diag([1, (1 - gamma) ** 0.5]), np.array([[0, gamma**0.5], [0, 0]]))
        full = [embed(k, [w], n) for k in kraus]
        rho = sum(k @ rho @ k.conj().T for k in full)
    mixed = 0
    for letters in itertools.product(range(4), repeat=len(wires)):
        if any(letters):
            u = np.ones((1, 1))
            for letter in letters:
                u = np.kron(u, PAULIS[letter])
            full = embed(u, wires, n)
            mixed = mixed + full @ rho @ full.conj().T / (4 ** len(wires) - 1)
    return (1 - p) * rho + p * mixed


def dense_energy(ops, model, obs):
    n = obs.num_qubits
    rho = np.zeros((2**n, 2**n), complex)
    rho[0, 0] = 1
    for name, wires, angle in ops:
        if name[0] == "R":
            pauli = PAULIS["IXYZ".index(name[1])]
            u = np.cos(angle[0] / 2) * np.eye(2) - 1j * np.sin(angle[0] / 2) * pauli
        else:
            u = FIXED[name]
        full = embed(u, wires, n)
        rho = full @ rho @ full.conj().T
        if not (model == "thermal" and name == "RZ"):
            rho = channel(rho, model, wires, n)
    flips = READOUT if model == "thermal" else (0.0, 0.0)
    total = 0.0
    for coeff, string in zip(obs.coeffs, obs.paulis, strict=True):
        # each Pauli's own basis, its outcomes misread one by one
        term = np.ones((1, 1))
        for letter in string:
            values, vectors = np.linalg.eigh(PAULIS[letter])
            read = np.where(values > 0, 1 - 2 * flips[0], 2 * flips[1] - 1) if letter else values
            term = np.kron(term, vectors @ np.diag(read) @ vectors.conj().T)
        total += coeff * np.trace(rho @ term).real
    return total


def hermitian(rng, n):
    a = rng.standard_normal((2**n, 2**n)) + 1j * rng.standard_normal((2**n, 2**n))
    return from_dense(a + a.conj().T)


@pytest.fixture(scope="module")
def compiled():
    def call(spec, angles, tables, h, n):
        wires = pc.wiring(spec, tables, n)
        return (
            pc.energy(wires, angles, h),
            pc.slices(wires, angles, h),
            pc.descend(wires, angles, h),
        )

    return jax.jit(call, static_argnums=4)


def run(compiled, ops, tables, obs, slots=10):
    spec = circuit_spec(ops, slots)
    spec = spec._replace(angle=np.zeros((slots, 3)))
    spec.angle[: len(ops), 0] = [a[0] if len(a) else 0.0 for *_, a in ops]
    h = pc.effective_observable(to_coords(obs), tables)
    out = compiled(spec, jnp.asarray(spec.angle[:, 0]), tables, h, obs.num_qubits)
    return spec, h, out


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_energy_is_the_density_matrix_one(n, model, compiled, rng):
    tables = pc.noise_tables(MODELS[model], n)
    for _ in range(4):
        ops, obs = random_ops(rng, n, 8), hermitian(rng, n)
        spec, h, (e, *_) = run(compiled, ops, tables, obs)
        assert abs(float(e) - dense_energy(ops, model, obs)) < 1e-10
        w = pc.wiring(spec, tables, n)
        host = host_energy(np.asarray(w.maps), np.asarray(w.into), np.asarray(h), spec.angle[:, 0])
        assert abs(host - float(e)) < 1e-12


def test_slices_are_the_energy_along_each_angle(compiled, rng):
    tables = pc.noise_tables(MODELS["thermal"], 3)
    ops, obs = random_ops(rng, 3, 9), hermitian(rng, 3)
    spec, _h, (_e, abc, _) = run(compiled, ops, tables, obs)
    angles = jnp.asarray(spec.angle[:, 0])
    assert np.isfinite(abc).all()
    for g in range(9):
        for t in (0.0, 1.3, 4.0):
            there = run(compiled, [(a, b, [t]) if i == g and a[0] == "R" else (a, b, c) for i, (a, b, c) in enumerate(ops)], tables, obs)[2][0]  # fmt: skip
            t_here = t if ops[g][0][0] == "R" else 0.0
            expected = abc[g, 0] + abc[g, 1] * np.cos(t_here) + abc[g, 2] * np.sin(t_here)
            assert abs(float(there) - float(expected)) < 1e-10
    grad = jax.grad(lambda a: pc.ptm_energy(spec, a, tables, to_coords(obs)))(angles)
    mine = abc[:, 2] * np.cos(angles) - abc[:, 1] * np.sin(angles)
    turns = np.isin(spec.gate, [5, 6, 7])
    np.testing.assert_allclose(grad[turns], mine[turns], atol=1e-12)
    assert not np.asarray(grad)[~turns].any()


def test_a_sweep_is_exact_coordinate_descent(compiled, rng):
    tables = pc.noise_tables(MODELS["depol"], 2)
    ops = [
        ("RY", [0], [0.3]),
        ("RX", [1], [1.0]),
        ("CNOT", [0, 1], ()),
        ("RZ", [1], [0.2]),
        ("RY", [1], [2.0]),
    ]
    obs = hermitian(rng, 2)
    _, _, (before, _, new) = run(compiled, ops, tables, obs)
    x = np.array([o[2][0] if len(o[2]) else 0.0 for o in ops])

    def at(g, t):
        x[g] = t
        return dense_energy(
            [(a, b, [v]) for (a, b, _), v in zip(ops, x, strict=True)], "depol", obs
        )

    for g in (0, 1, 3, 4):  # in order, each from three dense energies
        e0, plus, minus = (at(g, t) for t in (0.0, np.pi / 2, -np.pi / 2))
        mean = (plus + minus) / 2
        least = mean - np.hypot(e0 - mean, (plus - minus) / 2)
        here = at(g, float(new[g]))
        assert abs(here - least) < 1e-12
    assert here < float(before)
    assert float(new[2]) == 0.0


def test_an_angle_without_influence_stays(compiled):
    obs = PauliSum(np.array([1.0]), np.array([[3, 0]], np.uint8))
    tables = pc.noise_tables(MODELS["none"], 2)
    _, _, (_, _, new) = run(compiled, [("RZ", [0], [0.7]), ("RX", [1], [0.4])], tables, obs)
    assert new[:2].tolist() == [0.7, 0.4]


def test_tables_are_trace_preserving_and_cnot_a_signed_permutation():
    for model in MODELS.values():
        tables = pc.noise_tables(model, 2)
        for code in range(len(GATES)):
            if code == U3:
                continue
            whole = (
                tables.gates[code, 0]
                + np.cos(0.7) * tables.gates[code, 1]
                + np.sin(0.7) * tables.gates[code, 2]
            )
            np.testing.assert_allclose(whole[0], np.eye(16)[0], atol=1e-12)
            if model is not MODELS["thermal"]:  # unital
                np.testing.assert_allclose(whole[:, 0], np.eye(16)[0], atol=1e-12)
    cnot = pc.noise_tables(MODELS["none"], 2).gates[CNOT, 0]
    assert (np.abs(cnot).sum(0) == 1).all()
    assert (np.abs(cnot).sum(1) == 1).all()
    assert set(np.unique(cnot)) == {-1.0, 0.0, 1.0}
    assert (cnot @ cnot == np.eye(16)).all()


def test_ptm_of_a_product_is_the_product(rng):
    def unitary():
        return np.linalg.qr(rng.standard_normal((4, 4)) + 1j * rng.standard_normal((4, 4)))[0]

    u, v = unitary(), unitary()
    product = pt.fixed_ptm(u) @ pt.fixed_ptm(v)
    np.testing.assert_allclose(pt.fixed_ptm(u @ v), product, atol=1e-12)
    np.testing.assert_allclose(product[:, 0], np.eye(16)[0], atol=1e-12)


def test_circuits_of_one_size_share_a_program(rng):
    obs, tables = hermitian(rng, 3), pc.noise_tables(MODELS["depol"], 3)
    ops = [random_ops(rng, 3, 5) for _ in range(4)]
    specs = [circuit_spec(o, 6) for o in ops]
    batch = jax.tree.map(lambda *x: np.stack(x), *specs)
    f = jax.jit(
        jax.vmap(lambda s: pc.ptm_energy(s, jnp.asarray(s.angle, float), tables, to_coords(obs)))
    )
    np.testing.assert_allclose(f(batch), [dense_energy(o, "depol", obs) for o in ops], atol=1e-6)


def test_bad_input_is_one_line():
    with pytest.raises(UserError, match=r"p1=1\.5"):
        pc.depolarizing_model(1.5, 0.0)
    spec = circuit_spec([("U3", [0], (0.1, 0.2, 0.3))])
    with pytest.raises(UserError, match="three angles"):
        pc.ptm_energy(spec, spec.angle, pc.noise_tables(MODELS["none"], 1), np.ones(4))


def test_float32_follows_the_tables():
    tables = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), pc.noise_tables(MODELS["depol"], 2)
    )
    spec = circuit_spec([("RX", [0], [0.3]), ("CNOT", [0, 1])])
    h = to_coords(PauliSum(np.array([1.0]), np.array([[3, 3]], np.uint8))).astype(np.float32)
    e = pc.ptm_energy(
        CircuitSpec(*(jnp.asarray(x) for x in spec)), jnp.asarray(spec.angle), tables, h
    )
    assert e.dtype == jnp.float32
    assert to_dense(PauliSum(np.array([1.0]), np.array([[3, 3]], np.uint8))).shape == (4, 4)
