"""Gradients by backprop, parameter shift and finite differences; shots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from qlab.lab.errors import UserError
from qlab.quantum import circuits, qaoa, qcae
from qlab.quantum import columns as col
from qlab.quantum.measure import measure, param_shift_grad, sample_bits, shift_jacobian

KEY = jax.random.key(0)
WEIGHTS = jnp.array([0.7, -1.1, 0.4])


def loss(name, grad, p=2, **options):
    """A scalar of (a, params) through the circuit."""
    c = circuits.circuit(name, 3, p)
    read = measure(c.columns, 3, grad=grad, **options)
    return c, lambda a, w: (read(c.angles(a, w), KEY) * WEIGHTS).sum() ** 2


def finite_difference(f, x, h=1e-5):
    flat, rebuild = ravel_pytree(x)
    eye = h * jnp.eye(flat.size)
    g = jax.vmap(lambda e: (f(rebuild(flat + e)) - f(rebuild(flat - e))) / (2 * h))(eye)
    return rebuild(g)


FAST = [("qaoa_tied", 0.0), ("qaoa_embed", 0.0), ("strong", 0.0), ("iqp", 0.0), ("qaoa_tied", 0.02)]
CASES = [(name, depol) for name in circuits.CIRCUITS for depol in (0.0, 0.02)]


@pytest.mark.parametrize(
    ("name", "depol"),
    [pytest.param(*c, marks=() if c in FAST else pytest.mark.slow) for c in CASES],
)
def test_backprop_is_parameter_shift_is_finite_difference(name, depol):
    """Property 4, for data angles and trained angles, tied ones and products of data among them."""
    p = 1 if depol else 2
    c, back = loss(name, "backprop", p, depol=depol)
    _, shift = loss(name, "parameter-shift", p, depol=depol)
    a, w = jnp.array([0.4, -1.3, 0.9]), c.init(jax.random.key(1))
    want = jax.jit(jax.grad(lambda z: back(*z)))((a, w))
    got = jax.jit(jax.grad(lambda z: shift(*z)))((a, w))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), got, want)
    if not depol:
        near = jax.jit(lambda z: finite_difference(lambda y: back(*y), z))((a, w))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), near, want)
    assert all(float(jnp.abs(x).max()) > 1e-3 for x in jax.tree.leaves(want))


@pytest.mark.slow
def test_against_pennylanes_parameter_shift():
    c, back = loss("qaoa_tied", "backprop", 1)
    node = circuits.qnode("qaoa_tied", 3, 1, diff_method="parameter-shift")
    a, w = jnp.array([0.4, -1.3, 0.9]), c.init(jax.random.key(1))
    want = jax.grad(lambda z: (node(*z) * WEIGHTS).sum() ** 2)((a, w))
    got = jax.grad(lambda z: back(*z))((a, w))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), got, want)


def test_a_shared_angle_must_not_be_shifted_itself():
    """The ring of four at p = 1: the joint shift of gamma is 0, whatever the angles; the truth is not."""
    ring, a = qaoa.graph("ring", 4), jnp.array([0.5, -1.0, 1.5, 2.0])
    gamma, beta = 0.35, jnp.array([0.6])

    @jax.jit
    def total(g):
        return qaoa.qaoa_latent(a, g[None], beta, ring).sum()

    derivative = jax.grad(total)(jnp.float64(gamma))
    # exp(-i gamma ZZ): the angle of each gate is 2 gamma, so pi/2 on the gates is pi/4 on gamma
    joint = total(jnp.float64(gamma + np.pi / 4)) - total(jnp.float64(gamma - np.pi / 4))
    columns = qaoa.qaoa_columns(4, 1, ring)
    phi = qaoa.qaoa_angles(a, jnp.array([gamma]), beta, ring)

    @jax.jit
    def each_gate(phi):
        return param_shift_grad(
            lambda x: col.mean_z(col.probabilities(columns, 4, x), 4).sum(), phi
        )

    each = each_gate(phi)
    assert float(2 * each[4:8].sum()) == pytest.approx(float(derivative), abs=1e-10)
    assert abs(float(joint - derivative)) > 0.1


def test_number_of_runs():
    c = circuits.circuit("qaoa_tied", 4, 2)
    calls = []

    def counted(phi, key):
        calls.append(phi.shape)
        return phi[:4]

    shift_jacobian(counted, jnp.zeros(col.num_gates(c.columns)), KEY)
    assert qcae.runs_per_sample(c) == 40 == 2 * (4 * 2 + 4 * 2 + 4)
    assert calls == [(20,)]  # one batched call, not a loop


def test_bits_have_the_right_mean_and_spread():
    """Means of S bits: unbiased, variance (1 - <Z>^2) / S, qubits of one run correlated."""
    c = circuits.circuit("qaoa_tied", 3, 2)
    phi = c.angles(jnp.array([0.4, -1.3, 0.9]), c.init(jax.random.key(1)))
    probs = col.probabilities(c.columns, 3, phi)
    exact = col.mean_z(probs, 3)
    shots, draws = 50, 4000
    q = jax.vmap(lambda k: sample_bits(k, probs, 3, shots))(jax.random.split(KEY, draws))
    sd = np.sqrt((1 - exact**2) / shots)
    assert np.all(np.abs(q.mean(0) - exact) < 5 * sd / np.sqrt(draws))
    np.testing.assert_allclose(q.std(0), sd, rtol=0.1)
    z = col.z_signs(3)
    want = ((z[:, None] * z[None]) @ np.asarray(probs) - np.outer(exact, exact)) / shots
    np.testing.assert_allclose(np.cov(q.T), want, atol=6 / shots / np.sqrt(draws))
    assert set(np.unique(np.round((1 + q) * shots / 2, 6) % 1)) <= {0.0, 1.0}


@pytest.mark.parametrize("p", [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
def test_impossible_outcomes_are_never_drawn(p):
    q = sample_bits(KEY, jnp.array(p), 2, 1000)
    np.testing.assert_allclose(q, col.z_signs(2) @ np.array(p), atol=1e-12)


def test_gradients_with_shots():
    """Backprop gives the exact gradient; sampled parameter shift scatters around it without bias."""
    c = circuits.circuit("qaoa_tied", 3, 1)
    a, w = jnp.array([0.4, -1.3, 0.9]), c.init(jax.random.key(1))

    def grad_of(grad, shots):
        read = measure(c.columns, 3, grad=grad, shots=shots)
        return jax.jit(jax.grad(lambda w, k: read(c.angles(a, w), k) @ WEIGHTS))

    exact = grad_of("backprop", 0)(w, KEY)
    jax.tree.map(np.testing.assert_array_equal, grad_of("backprop", 20)(w, KEY), exact)
    keys = jax.random.split(KEY, 2000)
    drawn = jax.vmap(grad_of("parameter-shift", 20), (None, 0))(w, keys)
    for name in w:
        g = drawn[name][:, 0]
        assert float(g.std()) > 0.01
        assert abs(float(g.mean() - exact[name][0])) < 5 * float(g.std()) / np.sqrt(2000)


def test_noise_shrinks_what_the_circuit_says():
    c = circuits.circuit("qaoa_tied", 2, 1)
    phi = c.angles(jnp.array([0.4, -1.3]), c.init(jax.random.key(1)))
    norms = [
        float(jnp.linalg.norm(measure(c.columns, 2, depol=d)(phi, KEY)))
        for d in (0.0, 0.01, 0.1, 0.75)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] == pytest.approx(0, abs=1e-12)  # 3/4 after one-qubit gates mixes fully


def test_it_batches_and_compiles_once():
    c, calls = circuits.circuit("qaoa_tied", 4, 2), []

    @jax.jit
    def batch(a, w):
        calls.append(0)
        read = measure(c.columns, 4)
        return jax.vmap(lambda x: read(c.angles(x, w), KEY))(a)

    a, w = jax.random.normal(KEY, (5, 4)), c.init(KEY)
    out = batch(a, w)
    batch(a + 1, w)
    assert len(calls) == 1
    one = qaoa.qaoa_latent(a[3], w["gamma"], w["beta"], c.edges)
    np.testing.assert_allclose(out[3], one, atol=1e-12)


def test_frozen_angles_get_no_gradient_but_pass_it_on():
    c = circuits.circuit("qaoa_tied", 3, 2)
    for frozen in (False, True):
        latent = qcae.latent_circuit(c, frozen=frozen)
        w, z = latent.init(KEY), jnp.array([0.1, -0.2, 0.3])
        gw, gz = jax.grad(lambda w, z: latent.apply(w, z, KEY) @ WEIGHTS, (0, 1))(w, z)
        assert all((float(jnp.abs(g).max()) == 0) == frozen for g in jax.tree.leaves(gw))
        assert float(jnp.abs(gz).min()) > 1e-6
        assert latent.num_params == (0 if frozen else 4)


def test_bad_options_are_one_line():
    columns = circuits.circuit("basic", 2, 1).columns
    with pytest.raises(UserError, match="parameter-shift"):
        measure(columns, 2, grad="parameter_shift")
    with pytest.raises(UserError, match="shots"):
        measure(columns, 2, shots=-1)
    with pytest.raises(UserError, match="probability"):
        measure(columns, 2, depol=1.5)
