"""Circuits as data, against PennyLane, dense products and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import circuit_spec as cs


def draw(rng, batch, slots, n):
    """Circuits over every gate and the empty slot, on any pair of qubits."""
    gate = rng.integers(0, 12, (batch, slots)).astype(np.int32)
    if n == 1:
        gate = np.where(cs.NUM_QUBITS[gate] == 2, cs.NOOP, gate)
    q0 = rng.integers(0, n, (batch, slots)).astype(np.int32)
    other = (q0 + rng.integers(1, max(n, 2), (batch, slots))) % n
    q1 = np.where(cs.NUM_QUBITS[gate] == 2, other, q0).astype(np.int32)
    angle = rng.uniform(0, 2 * np.pi, (batch, slots, 3)).astype(np.float32)
    return cs.CircuitSpec(gate, q0, q1, angle)


def one(spec, i):
    return cs.CircuitSpec(*(x[i] for x in spec))


def states(spec, n):
    return np.asarray(jax.jit(jax.vmap(lambda s: cs.apply_spec(s, s.angle, n)))(spec))


@pytest.mark.parametrize(("n", "slots"), [(4, 10), (3, 7), (2, 12), (1, 5), (5, 1)])
def test_fifty_random_circuits_are_pennylanes(n, slots, rng):
    spec = draw(rng, 50 if n == 4 else 8, slots, n)
    assert n == 1 or set(np.unique(spec.gate)) == set(range(12)) or slots < 10
    got = states(cs.check_spec(spec, n), n)
    for i, psi in enumerate(got):
        np.testing.assert_allclose(psi, cs.pennylane_state(one(spec, i), n), atol=3e-6)


def dense(spec, n):
    """The product of Kronecker products, in complex128."""
    psi = np.eye(2**n)[0].astype(complex)
    shapes = np.arange(2**n)
    bit = lambda q: (shapes >> (n - 1 - q)) & 1  # noqa: E731
    for g, a, b, t in zip(*spec, strict=True):
        x, y, z = t.astype(float)
        name = cs.GATES[g]
        if name == "CNOT":
            psi = psi[np.where(bit(a) == 1, shapes ^ (1 << (n - 1 - b)), shapes)]
        elif name == "CZ":
            psi = psi * (1 - 2 * bit(a) * bit(b))
        elif name == "SWAP":
            psi = psi.reshape((2,) * n).swapaxes(a, b).reshape(-1)
        elif name:
            paulis = dict(zip("IXYZ", cs.PAULIS, strict=True))
            rot = lambda p, t: np.cos(t / 2) * np.eye(2) - 1j * np.sin(t / 2) * paulis[p]  # noqa: E731
            u = {"H": (paulis["X"] + paulis["Z"]) / np.sqrt(2), **paulis}.get(name)
            if u is None:
                u = rot(name[1], x) if name[0] == "R" else (
                    np.exp(0.5j * (y + z)) * rot("Z", y) @ rot("Y", x) @ rot("Z", z)
                )  # fmt: skip
            psi = np.kron(np.kron(np.eye(2**a), u), np.eye(2 ** (n - 1 - a))) @ psi
    return psi


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_float64_is_the_product_of_kronecker_products(n, rng):
    with jax.enable_x64(True):
        spec = draw(rng, 20, 9, n)
        spec = spec._replace(angle=spec.angle.astype(np.float64))
        got = states(spec, n)
        assert got.dtype == np.complex128
        for i, psi in enumerate(got):
            np.testing.assert_allclose(psi, dense(one(spec, i), n), atol=1e-13)


def test_u3_is_the_cards_product_and_rotations_are_its_special_cases():
    t, p, d = 0.7, -1.1, 2.3
    rows = {
        "U3": [("U3", [0], [t, p, d])],
        "Z": [("RZ", [0], [d]), ("RY", [0], [t]), ("RZ", [0], [p])],
    }
    both = [cs.apply_spec(s := cs.circuit_spec(r, 3), s.angle, 1) for r in rows.values()]
    np.testing.assert_allclose(both[0], np.exp(0.5j * (p + d)) * both[1], atol=1e-6)


def test_empty_slots_and_unused_angles_change_nothing(rng):
    ops = [("H", [0]), ("CNOT", [0, 2]), ("RY", [1], [0.4]), ("SWAP", [1, 2])]
    short, long = cs.circuit_spec(ops), cs.circuit_spec(ops, 9)
    psi = cs.apply_spec(short, short.angle, 3)
    np.testing.assert_array_equal(psi, cs.apply_spec(long, long.angle, 3))
    noise = rng.uniform(0, 6, long.angle.shape).astype(np.float32) * (1 - cs.angle_mask(long))
    np.testing.assert_array_equal(psi, cs.apply_spec(long, long.angle + noise, 3))
    none = cs.circuit_spec([], 4)
    np.testing.assert_array_equal(cs.apply_spec(none, none.angle, 2), np.eye(4)[0])
    np.testing.assert_array_equal(
        cs.apply_spec(none, none.angle, 2, jnp.ones(4) / 2), np.ones(4) / 2
    )


def test_gradient_is_the_parameter_shift_and_zero_where_unused(rng):
    """RX, RY, RZ and each angle of U3 have generators with eigenvalues +-1/2 (up to a phase)."""
    n, slots = 3, 8
    with jax.enable_x64(True):
        spec = draw(rng, 12, slots, n)
        angles = jnp.asarray(spec.angle, jnp.float64)
        obs = jnp.asarray(rng.standard_normal((8, 8)) + 1j * rng.standard_normal((8, 8)))
        obs = obs + obs.conj().T

        def energy(s, a):
            psi = cs.apply_spec(s, a, n)
            return (psi.conj() @ obs @ psi).real

        grad = np.asarray(jax.jit(jax.vmap(jax.grad(energy, 1)))(spec, angles))
        both = jax.jit(jax.vmap(energy))
        mask = np.asarray(cs.angle_mask(spec))
        for g, k in np.ndindex(slots, 3):
            step = jnp.zeros_like(angles).at[:, g, k].set(jnp.pi / 2)
            shift = np.asarray(both(spec, angles + step) - both(spec, angles - step)) / 2
            np.testing.assert_allclose(grad[:, g, k], shift * mask[:, g, k], atol=1e-12)


def test_one_program_for_all_circuits_and_the_slots_can_be_shared(rng):
    n = 4
    traced = []

    @jax.jit
    def run(spec):
        traced.append(1)
        return cs.apply_spec(spec, spec.angle, n)

    spec = draw(rng, 6, 10, n)
    psi = [run(one(spec, i)) for i in range(6)]
    assert len(traced) == 1
    plan = jax.vmap(lambda s: cs.slots(s, n))(spec)
    again = jax.vmap(cs.run_slots)(spec.gate, spec.angle, plan)
    np.testing.assert_allclose(np.stack(psi), again, atol=1e-6)
    norms = np.linalg.norm(np.asarray(again), axis=-1)
    np.testing.assert_allclose(norms, 1, atol=3e-6)


@pytest.mark.parametrize(
    ("ops", "slots", "text"),
    [
        ([("RXX", [0, 1])], None, "not known; did you mean"),
        ([("CNOT", [0])], None, "it takes 2 qubits"),
        ([("RX", [0], [1.0, 2.0])], None, "1 angles"),
        ([("CNOT", [1, 1])], None, "must differ"),
        ([("X", [0])] * 3, 2, "raise num_slots"),
        ([("X", [-1])], None, "qubits are 0..0"),
    ],
)
def test_bad_circuits_get_one_line(ops, slots, text):
    with pytest.raises(UserError, match=text):
        cs.circuit_spec(ops, slots)


def test_bad_arrays_get_one_line():
    spec = cs.circuit_spec([("CNOT", [0, 3])])
    with pytest.raises(UserError, match=r"qubits are 0\.\.2"):
        cs.check_spec(spec, 3)
    with pytest.raises(UserError, match="gate codes"):
        cs.check_spec(spec._replace(gate=np.array([12])), 4)
    with pytest.raises(UserError, match=r"expected three of \[\.\.\., G\]"):
        cs.check_spec(spec._replace(angle=np.zeros(3)), 4)
