"""The learning parts of the quantum bench at small sizes; latents by hand against NumPy in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.benches import quantum
from qlab.benches import quantum_learning as ql
from qlab.quantum.circuits import circuit
from qlab.quantum.qcae import embed

SMALL = {
    "zne": (2,), "latent": (2,), "latents": 3, "grow": 2, "label": 32, "qubits": (), "states": (),
    "repetitions": 2, "budget_s": 1.0,
}  # fmt: skip


def by_numpy(params, z):
    """<Z_i> of RX(a), then twice [exp(-i gamma ZZ), RX(2 beta)] on two qubits, with whole matrices."""
    x, ident, zz = np.array([[0, 1], [1, 0]]), np.eye(2), np.array([1, -1, -1, 1])

    def rx(a, b):
        one = [np.cos(t / 2) * ident - 1j * np.sin(t / 2) * x for t in (a, b)]
        return np.kron(*one)

    a = np.asarray(embed(z), np.float64)
    psi = rx(*a) @ np.array([1, 0, 0, 0], complex)
    for gamma, beta in zip(params["gamma"], params["beta"], strict=True):
        psi = rx(2 * beta, 2 * beta) @ (np.exp(-1j * gamma * zz) * psi)
    p = np.abs(psi) ** 2
    return np.array([p[0] + p[1] - p[2] - p[3], p[0] - p[1] + p[2] - p[3]])


@pytest.mark.parametrize("make", [ql.library_latents, ql.hand_written_latents])
def test_latents_are_those_of_numpy(make):
    rng = np.random.default_rng(0)
    params = {k: rng.uniform(-3, 3, 2) for k in ("gamma", "beta")}
    z, out = rng.standard_normal((3, 2)), rng.standard_normal((3, 2))
    with jax.enable_x64(True):
        got = make(circuit("qaoa_tied", 2, 2))(jax.tree.map(jnp.asarray, params), z, out)
        want = np.mean([by_numpy(params, a) @ o for a, o in zip(z, out, strict=True)])
    np.testing.assert_allclose(float(got), want, atol=1e-10)


@pytest.mark.slow
def test_every_part_is_measured_and_meets_its_goals_names():
    told = []
    with jax.enable_x64(True):
        numbers = ql.measure(SMALL, told.append)
    assert len(told) == 4
    found = {(n.arm, n.name): n for n in numbers}
    assert all(n.status == "ok" for n in numbers)
    assert found["raw", "latent2/max_error"].median < 1e-8
    for name, n in found.items():
        assert np.isfinite(n.median) and (n.median > 0 or "error" in name[1])  # noqa: PT018
    for claim in ql.goals(SMALL):
        assert claim.left in found
    text = quantum.summary(numbers)
    for part in ("ZNE gradient, 2 qubits", "latents of 2 qubits", "gates/s", "circuits/s labelled"):
        assert part in text


def test_the_gradient_of_a_mitigated_energy_is_that_of_differences():
    f = ql.mitigated(2)
    theta = np.random.default_rng(1).uniform(-1, 1, (3, 2, 2))
    with jax.enable_x64(True):
        value, grad = f(jnp.asarray(theta))
        step = np.zeros_like(theta)
        step[1, 0, 1] = 1e-5
        around = [float(f(jnp.asarray(theta + s * step))[0]) for s in (1, -1)]
    assert np.isfinite(float(value))
    np.testing.assert_allclose(grad[1, 0, 1], (around[0] - around[1]) / 2e-5, rtol=1e-5, atol=1e-8)
