"""Sums of Pauli strings on a state vector, against their dense matrices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import matrix_free as mf
from qlab.quantum.columns import Column, local, state
from qlab.quantum.hamiltonians import h2_4q, tfim_ring
from qlab.quantum.pauli import PauliSum, to_dense


def drawn(rng, n, terms):
    return PauliSum(rng.standard_normal(terms), rng.integers(0, 4, (terms, n)).astype(np.uint8))


def ket(rng, n):
    psi = rng.standard_normal(2**n) + 1j * rng.standard_normal(2**n)
    return psi / np.linalg.norm(psi)


@pytest.mark.parametrize(("n", "terms"), [(1, 4), (2, 9), (3, 1), (5, 24)])
def test_it_is_the_product_with_the_dense_matrix(rng, n, terms):
    obs, psi = drawn(rng, n, terms), ket(rng, n)
    dense = to_dense(obs)
    got = jax.jit(partial(mf.apply_pauli_sum, obs))(psi)
    np.testing.assert_allclose(got, dense @ psi, atol=1e-13)
    value = jax.jit(partial(mf.expval, obs))(psi)
    np.testing.assert_allclose(value, np.vdot(psi, dense @ psi).real, atol=1e-13)


def test_the_gradient_is_that_of_the_dense_form(rng):
    obs = drawn(rng, 4, 12)
    dense = jnp.asarray(to_dense(obs))
    columns = (local("ry", 4), local("rz", 4), Column("cx", ((0, 1), (1, 2))), local("ry", 4))
    phi = jnp.asarray(rng.standard_normal(12))

    def by_matrix(phi):
        psi = state(columns, 4, phi)
        return jnp.vdot(psi, dense @ psi).real

    want = jax.jit(jax.value_and_grad(by_matrix))(phi)
    run = jax.jit(jax.value_and_grad(lambda phi: mf.expval(obs, state(columns, 4, phi))))
    for a, b in zip(run(phi), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    batch = jnp.stack([phi, 2 * phi])
    np.testing.assert_allclose(jax.vmap(run)(batch)[0][0], want[0], atol=1e-12)


def test_strings_that_flip_the_same_qubits_share_a_pass():
    assert len(mf.strings(tfim_ring(6))) == 1 + 6
    assert len(mf.strings(h2_4q())) == 2  # the diagonal and the double excitation


def test_float32_stays_float32():
    psi = jnp.zeros(8, jnp.complex64).at[0].set(1)
    assert mf.apply_pauli_sum(tfim_ring(3), psi).dtype == jnp.complex64
    assert mf.expval(tfim_ring(3), psi).dtype == jnp.float32


def test_a_state_of_another_size_is_named():
    with pytest.raises(UserError, match=r"psi has shape \(4,\), but the observable is on 3 qubits"):
        mf.expval(tfim_ring(3), jnp.zeros(4, complex))
