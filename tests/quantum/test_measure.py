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


A = np.array([0.4, -1.3, 0.9])


def some_weights(c, seed=1):
    """Angles of the circuit's shapes, without compiling its init."""
    rng = np.random.default_rng(seed)
    return {k: rng.uniform(-3, 3, shape) for k, shape in c.shapes.items()}


def loss(name, grad, p=2, **options):
    """A scalar of (a, params) through the circuit."""
    c = circuits.circuit(name, 3, p)
    read = measure(c.columns, 3, grad=grad, **options)
    return c, lambda a, w: (read(c.angles(a, w), KEY) * WEIGHTS).sum() ** 2


def finite_difference(f, x, h=1e-5):
    flat, rebuild = ravel_pytree(x)
    flat = np.asarray(flat)
    steps = h * np.eye(flat.size)
    g = [(f(rebuild(flat + e)) - f(rebuild(flat - e))) / (2 * h) for e in steps]
    return rebuild(np.array(g))


FAST = [("qaoa_tied", 0.0), ("iqp", 0.0)]
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
    at = (A, some_weights(c))
    by_backprop = jax.jit(jax.value_and_grad(lambda z: back(*z)))
    want = by_backprop(at)[1]
    got = jax.jit(jax.grad(lambda z: shift(*z)))(at)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), got, want)
    if not depol:
        near = finite_difference(lambda z: by_backprop(z)[0], at)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), near, want)
    assert all(float(np.abs(x).max()) > 1e-3 for x in jax.tree.leaves(want))


@pytest.mark.slow
def test_against_pennylanes_parameter_shift():
    c, back = loss("qaoa_tied", "backprop", 1)
    node = circuits.qnode("qaoa_tied", 3, 1, diff_method="parameter-shift")
    a, w = jnp.array(A), some_weights(c)
    want = jax.grad(lambda z: (node(*z) * WEIGHTS).sum() ** 2)((a, w))
    got = jax.grad(lambda z: back(*z))((a, w))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), got, want)


def test_a_shared_angle_must_not_be_shifted_itself():
    """The ring of four at p = 1: the joint shift of gamma is 0, whatever the angles; the truth is not."""
    ring, a = qaoa.graph("ring", 4), np.array([0.5, -1.0, 1.5, 2.0])
    gamma, beta = 0.35, np.array([0.6])
    columns = qaoa.qaoa_columns(4, 1, ring)

    def total(g):
        return qaoa.qaoa_latent(a, g[None], beta, ring).sum()

    def total_of_gates(phi):
        return col.mean_z(col.probabilities(columns, 4, phi), 4).sum()

    @jax.jit
    def every_way(g):
        # exp(-i gamma ZZ): the angle of each gate is 2 gamma, so pi/2 on the gates is pi/4 on gamma
        joint = jax.vmap(total)(g + jnp.pi / 4 * jnp.array([1, -1]))
        each = param_shift_grad(total_of_gates, qaoa.qaoa_angles(a, g[None], beta, ring))
        return jax.grad(total)(g), joint[0] - joint[1], 2 * each[4:8].sum()

    derivative, joint, each = (float(v) for v in every_way(np.float64(gamma)))
    assert each == pytest.approx(derivative, abs=1e-10)
    assert joint == pytest.approx(0, abs=1e-10)
    assert abs(derivative) > 0.1


def test_number_of_runs():
    c = circuits.circuit("qaoa_tied", 4, 2)
    calls = []

    def counted(phi, key):
        calls.append(phi.shape)
        return phi[:4]

    phi = jax.ShapeDtypeStruct((col.num_gates(c.columns),), jnp.float64)
    jax.eval_shape(lambda x: shift_jacobian(counted, x, KEY), phi)
    assert qcae.runs_per_sample(c) == 40 == 2 * (4 * 2 + 4 * 2 + 4)
    assert calls == [(20,)]  # one batched call, not a loop


def test_bits_have_the_right_mean_and_spread():
    """Means of S bits: unbiased, variance (1 - <Z>^2) / S, qubits of one run correlated."""
    c = circuits.circuit("qaoa_tied", 3, 2)
    shots, draws = 50, 4000

    @jax.jit
    def both(w):
        probs = col.probabilities(c.columns, 3, c.angles(A, w))
        keys = jax.random.split(KEY, draws)
        return probs, jax.vmap(lambda k: sample_bits(k, probs, 3, shots))(keys)

    probs, q = (np.asarray(v) for v in both(some_weights(c)))
    exact = col.z_signs(3) @ probs
    sd = np.sqrt((1 - exact**2) / shots)
    assert np.all(np.abs(q.mean(0) - exact) < 5 * sd / np.sqrt(draws))
    np.testing.assert_allclose(q.std(0), sd, rtol=0.1)
    z = col.z_signs(3)
    want = ((z[:, None] * z[None]) @ np.asarray(probs) - np.outer(exact, exact)) / shots
    np.testing.assert_allclose(np.cov(q.T), want, atol=6 / shots / np.sqrt(draws))
    assert set(np.unique(np.round((1 + q) * shots / 2, 6) % 1)) <= {0.0, 1.0}


def test_impossible_outcomes_are_never_drawn():
    sample = jax.jit(lambda p: sample_bits(KEY, p, 2, 1000))
    for p in np.eye(4)[[1, 3, 0]]:
        np.testing.assert_allclose(sample(p), col.z_signs(2) @ p, atol=1e-12)


def test_gradients_with_shots():
    """Backprop gives the exact gradient; sampled parameter shift scatters around it without bias."""
    c = circuits.circuit("qaoa_tied", 3, 1)
    w, draws = some_weights(c), 2000

    def grad_of(grad, shots):
        read = measure(c.columns, 3, grad=grad, shots=shots)
        return jax.grad(lambda w, k: read(c.angles(A, w), k) @ WEIGHTS)

    @jax.jit
    def each(w):
        keys = jax.random.split(KEY, draws)
        drawn = jax.vmap(grad_of("parameter-shift", 20), (None, 0))(w, keys)
        return grad_of("backprop", 0)(w, KEY), grad_of("backprop", 20)(w, KEY), drawn

    exact, back, drawn = each(w)
    for name in w:
        np.testing.assert_allclose(back[name], exact[name], atol=1e-12)
        g = np.asarray(drawn[name])[:, 0]
        assert g.std() > 0.01
        assert abs(g.mean() - float(exact[name][0])) < 5 * g.std() / np.sqrt(draws)


def test_noise_shrinks_what_the_circuit_says():
    c = circuits.circuit("qaoa_tied", 2, 1)

    @jax.jit
    def norm(w, depol):
        probs = col.noisy_probabilities(c.columns, 2, c.angles(A[:2], w), depol)
        return jnp.linalg.norm(col.mean_z(probs, 2))

    norms = [float(norm(some_weights(c), d)) for d in (0.0, 0.01, 0.1, 0.75)]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 0.1
    assert norms[-1] == pytest.approx(0, abs=1e-12)  # 3/4 after one-qubit gates mixes fully


def test_it_batches_and_compiles_once():
    c, calls = circuits.circuit("qaoa_tied", 4, 2), []

    @jax.jit
    def batch(a, w):
        calls.append(0)
        read = measure(c.columns, 4)
        return jax.vmap(lambda x: read(c.angles(x, w), KEY))(a)

    a, w = np.random.default_rng(0).standard_normal((5, 4)), some_weights(c)
    out = batch(a, w)
    batch(a + 1, w)
    assert len(calls) == 1
    one = jax.jit(qaoa.qaoa_latent, static_argnums=3)(a[3], w["gamma"], w["beta"], c.edges)
    np.testing.assert_allclose(out[3], one, atol=1e-12)


def test_frozen_angles_get_no_gradient_but_pass_it_on():
    c = circuits.circuit("qaoa_tied", 3, 1)
    for frozen in (False, True):
        latent = qcae.latent_circuit(c, frozen=frozen)
        pull = jax.jit(jax.grad(lambda w, z, f=latent.apply: f(w, z, KEY) @ WEIGHTS, (0, 1)))
        gw, gz = pull(some_weights(c), np.array([0.1, -0.2, 0.3]))
        assert all((float(np.abs(g).max()) == 0) == frozen for g in jax.tree.leaves(gw))
        assert float(np.abs(gz).min()) > 1e-6
        assert latent.num_params == (0 if frozen else 2)


def test_bad_options_are_one_line():
    columns = circuits.circuit("basic", 2, 1).columns
    with pytest.raises(UserError, match="parameter-shift"):
        measure(columns, 2, grad="parameter_shift")
    with pytest.raises(UserError, match="shots"):
        measure(columns, 2, shots=-1)
    with pytest.raises(UserError, match="probability"):
        measure(columns, 2, depol=1.5)
