"""Exact gate sets, words, universality, OpenQASM and Solovay-Kitaev against closed forms and other simulators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import unitary_group

from qlab.lab.errors import UserError
from qlab.quantum import gatesets, unitaries, words
from qlab.quantum.gatesets import SETS, gate_set, word_matrix
from qlab.quantum.ptm import ptm_of_unitary
from qlab.quantum.solovay_kitaev import commutator, pennylane_words, solovay_kitaev

UNIVERSAL = [n for n in SETS if n not in ("clifford", "diagonal", "native3")]


def same(u, v, tol=1e-9):
    return abs(abs(np.trace(np.conj(u).T @ v)) / len(u) - 1) < tol


def draw(rng, gates, length):
    return rng.integers(0, len(gates.labels), length)


def test_distances_in_closed_form():
    t, h = np.diag([1, np.exp(0.25j * np.pi)]), np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    eye = jnp.eye(2, dtype=jnp.complex64)
    assert np.isclose(unitaries.hs_distance(jnp.asarray(t), eye), np.sqrt(1 - np.cos(np.pi / 8)), atol=1e-6)  # fmt: skip
    assert np.isclose(unitaries.hs_distance(jnp.asarray(h), eye), 1.0, atol=1e-6)
    small = jnp.asarray(np.diag(np.exp([0, 1e-5j])), jnp.complex64)  # sqrt(1 - cos(5e-6)) = 3.5e-6
    assert np.isclose(unitaries.hs_distance(1j * small, eye), np.sqrt(2) * 2.5e-6, rtol=0.02)


@pytest.mark.parametrize("dim", [2, 4])
def test_average_fidelity_is_the_mean_over_states(dim, rng):
    u, v = unitary_group.rvs(dim, 2, random_state=3)
    psi = unitary_group.rvs(dim, 20_000, random_state=4)[:, :, 0]
    overlap = np.abs(np.einsum("si,ij,sj->s", psi.conj(), u.conj().T @ v, psi)) ** 2
    got = float(unitaries.avg_fidelity(jnp.asarray(u), jnp.asarray(v)))
    assert abs(got - overlap.mean()) < 5 * overlap.std() / np.sqrt(20_000)


@pytest.mark.parametrize("dim", [2, 4])
def test_features_do_not_see_the_phase(dim):
    u, v = unitary_group.rvs(dim, 2, random_state=5)
    for f in unitaries.FEATURES.values():
        np.testing.assert_allclose(f(jnp.asarray(u)), f(jnp.asarray(np.exp(2.2j) * u)), atol=2e-6)
    product = ptm_of_unitary(jnp.asarray(u)) @ ptm_of_unitary(jnp.asarray(v))
    np.testing.assert_allclose(ptm_of_unitary(jnp.asarray(u @ v)), product, atol=2e-6)
    np.testing.assert_allclose(product @ product.T, np.eye(dim**2), atol=5e-6)


@pytest.mark.slow
def test_haar_moments_and_small_rotations():
    u = np.asarray(unitaries.haar(jax.random.key(0), 2, (20_000,)))
    np.testing.assert_allclose(u @ u.conj().transpose(0, 2, 1), np.eye(2)[None] + 0 * u, atol=1e-5)
    trace = np.abs(np.trace(u, axis1=1, axis2=2))
    assert abs((trace**2).mean() - 1) < 0.04
    assert abs((trace**4).mean() - 2) < 0.15  # a QR without the phases of R fails here
    keys = jax.random.split(jax.random.key(1), 50)
    for dim in (2, 4):
        r = jax.vmap(lambda k, dim=dim: unitaries.small_rotation(k, dim, jnp.float32(0.1)))(keys)
        d = jax.vmap(unitaries.hs_distance, (0, None))(r, jnp.eye(dim))
        assert 0.095 < float(d.min()) <= float(d.max()) < 0.1005


@pytest.mark.parametrize("name", SETS)
def test_integers_are_the_gates(name, rng):
    """Products of integers are products of matrices, in NumPy and in JAX, and the adjoint undoes them."""
    g = gate_set(name)
    step = jax.jit(gatesets.compose(g, jnp))
    for _ in range(2):
        word = draw(rng, g, 12)
        x = gatesets.word_element(word, g)
        assert same(gatesets.matrix(x), word_matrix(word, g))
        y = jnp.asarray(gatesets.identity(g))
        for a in word:
            y = step(y, int(a))
        np.testing.assert_array_equal(x, y)
        assert same(np.asarray(gatesets.matrix(y, jnp)), word_matrix(word, g), 1e-5)
        np.testing.assert_allclose(
            gatesets.matrix(gatesets.adjoint(x)), gatesets.matrix(x).conj().T
        )
    for a, b in enumerate(g.inverse):
        if b >= 0:
            np.testing.assert_array_equal(gatesets.word_element([a, b], g), gatesets.identity(g))


@pytest.mark.parametrize("name", ["ht_closed", "ht2_closed", "v_closed", "native2"])
def test_one_unitary_has_one_name(name, rng):
    """Integers agree exactly where the double-precision matrices agree up to a phase, and nowhere else."""
    g = gate_set(name)
    ws = [draw(rng, g, rng.integers(0, 7)) for _ in range(150)]
    mats = np.stack([word_matrix(w, g) for w in ws])
    keys = words.names(np.stack([gatesets.word_element(w, g) for w in ws]))
    close = np.abs(np.einsum("aij,bij->ab", mats.conj(), mats)) / g.dim > 1 - 1e-9
    np.testing.assert_array_equal(close, keys[:, None] == keys[None])
    assert close.sum() > len(ws)  # there were equal pairs


def test_phases_are_one_state():
    g = gate_set("ht_closed")
    eye = gatesets.identity(g)
    for word in ([1] * 8, [0, 0], [0, 1, 1, 1, 1, 0] * 2, [0, 1, 1] * 3):  # (HS)^3 = w
        np.testing.assert_array_equal(gatesets.word_element(word, g), eye)


def test_growth_in_closed_form():
    closed = words.enumerate_unitaries(gate_set("v_closed"), 5)
    free = words.enumerate_unitaries(gate_set("v_free"), 6)
    assert np.bincount(closed.lengths).tolist() == [1, *(6 * 5**k for k in range(5))]
    assert np.bincount(free.lengths).tolist() == [3**k for k in range(7)]
    clifford = words.enumerate_unitaries(gate_set("clifford"), 50)
    assert clifford.complete
    assert len(clifford.mats) == 24
    for row in (0, 17, 400):
        w = closed.words[row]
        assert same(word_matrix(w[w >= 0], gate_set("v_closed")), closed.mats[row])


@pytest.mark.parametrize("name", ["v_free", "ht_closed", "ht2_closed"])
def test_meeting_in_the_middle(name):
    """Half a table finds the lengths of the whole one, exactly."""
    g = gate_set(name)
    whole = words.enumerate_unitaries(g, 4)
    half = words.enumerate_unitaries(g, 2)
    at = np.random.default_rng(0).choice(len(whole.mats), 40)
    got = words.shortest_exact(half, g, whole.elements[at].astype(np.int64))
    np.testing.assert_array_equal(got, whole.lengths[at])
    if name == "v_free":  # longer than two halves
        long = gatesets.word_element([0, 1, 0, 1, 0], g)[None]
        assert np.isnan(words.shortest_exact(half, g, long)).all()


def test_shortest_within_by_brute_force(rng):
    g = gate_set("ht_closed")
    table = words.enumerate_unitaries(g, 8)
    us = unitary_group.rvs(2, 20, random_state=1)
    got, _ = words.shortest_within(table, us, 0.3)
    for u, length in zip(us, got, strict=True):
        d = np.array([words.word_distance(w[w >= 0], g, u) for w in table.words])
        want = table.lengths[d < 0.3].min() if (d < 0.3).any() else np.nan
        np.testing.assert_equal(length, want)


@pytest.mark.parametrize("name", UNIVERSAL)
def test_universal(name):
    assert words.why_not_universal(gate_set(name)) == ""


@pytest.mark.parametrize(
    ("name", "part"),
    [("clifford", "24 elements"), ("diagonal", "fixed"), ("H0,T0,H1,T1", "unentangled"),
     ("H0,S0,H1,S1,CX01", "11520 elements"), ("T,Tdg", "fixed")],
)  # fmt: skip
def test_not_universal_says_why(name, part):
    why = words.why_not_universal(gate_set(name))
    assert part in why
    assert "\n" not in why


@pytest.mark.parametrize(
    ("name", "part"), [("ht_close", "ht_closed"), ("H,Q", "'Q'"), ("H,VX", "denominators"), ("CX0", "2 different")]
)  # fmt: skip
def test_bad_gate_sets(name, part):
    with pytest.raises(UserError, match=part):
        gate_set(name)


@pytest.mark.parametrize(
    "name", ["v_closed", "ht_closed", "ht2_closed", "native3", "S0,Sdg1,CX10,H0"]
)
def test_qasm_by_pennylane(name, rng):
    g = gate_set(name)
    word = draw(rng, g, 15)
    assert same(words.simulate_qasm(words.to_qasm(word, g)), word_matrix(word, g))
    with pytest.raises(ValueError, match="foo"):
        words.simulate_qasm("foo q[0];")


@pytest.mark.parametrize("name", ["v_closed", "ht2_closed", "native3"])
def test_qasm_by_qiskit(name, rng):
    qasm2 = pytest.importorskip("qiskit.qasm2")
    from qiskit.quantum_info import Operator

    g = gate_set(name)
    word = draw(rng, g, 15)
    u = Operator(qasm2.loads(words.to_qasm(word, g)).reverse_bits()).data
    assert same(u, word_matrix(word, g))


def test_balanced_commutator():
    for u in unitary_group.rvs(2, 5, random_state=2):
        v, w = commutator(u)
        assert same(v @ w @ v.conj().T @ w.conj().T, u)
        assert np.isclose(np.trace(v), np.trace(w))


def test_solovay_kitaev_gains_digits():
    g = gate_set("v_closed")
    table = words.enumerate_unitaries(g, 5)

    def base(u):
        w = table.words[np.abs(np.einsum("eij,ij->e", table.mats.conj(), u)).argmax()]
        return w[w >= 0]

    us = unitary_group.rvs(2, 5, random_state=6)
    error = [np.mean([words.word_distance(solovay_kitaev(u, base, k, g), g, u) for u in us]) for k in (0, 1, 2, 3)]  # fmt: skip
    assert error[0] < 0.1
    assert error[3] < 0.004
    assert error == sorted(error, reverse=True)
    with pytest.raises(ValueError, match="inverse"):
        solovay_kitaev(us[0], base, 1, gate_set("v_free"))
    with pytest.raises(ValueError, match="qubits"):
        solovay_kitaev(np.eye(4), base, 1, gate_set("ht2_closed"))


def test_pennylane_baseline_fits():
    g = gate_set("ht_closed")
    for u in unitary_group.rvs(2, 4, random_state=7):
        word = pennylane_words(u, 0.1, g)
        assert word is not None
        assert words.word_distance(word, g, u) < 0.1
    with pytest.raises(UserError, match=r"'v_closed'.*use ht_closed"):
        pennylane_words(u, 0.1, gate_set("v_closed"))
