"""The latent circuits against closed forms, dense matrices and PennyLane's own templates."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import circuits, qaoa
from qlab.quantum import columns as col
from qlab.quantum.pauli import PAULIS


def data(n, p, seed=0):
    """Data angles f[n], gamma f[p], beta f[p]."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-3, 3, n), rng.standard_normal(p), rng.standard_normal(p)


def some_weights(c, seed=1):
    """Angles of the circuit's shapes, without compiling its init."""
    rng = np.random.default_rng(seed)
    return {k: rng.uniform(-3, 3, shape) for k, shape in c.shapes.items()}


latent = jax.jit(qaoa.qaoa_latent, static_argnums=(3, 4))


def dense_gates(columns, n, phi):
    """Every gate as a dense 2^n x 2^n matrix, by its definition."""

    def lift(factors):
        out = np.ones((1, 1))
        for q in range(n):
            out = np.kron(out, factors.get(q, np.eye(2)))
        return out

    at = 0
    for c in columns:
        for w in c.wires:
            if c.kind in ("rx", "ry", "rz", "zz"):
                axis = {"rx": 1, "ry": 2, "rz": 3, "zz": 3}[c.kind]
                generator = lift(dict.fromkeys(w, PAULIS[axis]))
                t = float(phi[at]) / 2
                at += 1
                yield np.cos(t) * np.eye(2**n) - 1j * np.sin(t) * generator, w
            elif c.kind == "h":
                yield lift({w[0]: (PAULIS[1] + PAULIS[3]) / np.sqrt(2)}), w
            else:
                target = PAULIS[1] if c.kind == "cx" else PAULIS[3]
                zero, one = np.diag([1.0, 0]), np.diag([0, 1.0])
                yield lift({w[0]: zero}) + lift({w[0]: one, w[1]: target}), w


def z_of(psi, n):
    return col.z_signs(n) @ np.abs(psi) ** 2


@pytest.mark.parametrize(
    ("kind", "p"), [("ring", 0), ("ring", 3), ("line", 1), ("complete", 1), ("complete", 3)]
)
def test_without_a_phase_it_is_a_cosine(kind, p):
    """Property 1: p = 0 or gamma = 0 gives q_i = cos(a_i + 2 sum beta)."""
    a, _, beta = data(5, p)
    got = latent(a, np.zeros(p), beta, qaoa.graph(kind, 5))
    np.testing.assert_allclose(got, np.cos(a + 2 * beta.sum()), atol=1e-12)


@pytest.mark.parametrize("n", [3, 4, 7])
def test_closed_form_of_one_layer_on_a_ring(n):
    """Property 2: each node has exactly the neighbours i - 1 and i + 1."""
    a, (g,), (b,) = data(n, 1, n)
    j, k = np.roll(a, 1), np.roll(a, -1)
    inner = np.cos(2 * g) ** 2 - np.sin(2 * g) ** 2 * np.cos(j) * np.cos(k)
    want = np.cos(2 * b) * np.cos(a) - np.sin(2 * b) * np.sin(a) * inner
    got = latent(a, g[None], b[None], qaoa.graph("ring", n))
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_closed_form_of_a_single_edge():
    a, (g,), (b,) = data(2, 1)
    want = np.cos(2 * b) * np.cos(a) - np.sin(2 * b) * np.sin(a) * np.cos(2 * g)
    got = latent(a, g[None], b[None], qaoa.graph("ring", 2))
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_weights_scale_the_phase():
    a, gamma, beta = data(4, 2)
    ring = qaoa.graph("ring", 4)
    scaled = latent(a, gamma / 2, beta, ring, (2.0,) * 4)
    np.testing.assert_allclose(scaled, latent(a, gamma, beta, ring), atol=1e-12)
    one = latent(a, gamma, beta, ring, (1.0, 0.0, 0.0, 0.0))
    cut = latent(a, gamma, beta, (ring[0],))
    np.testing.assert_allclose(one, cut, atol=1e-12)


def maxcut_closed_form(g, b, edges):
    """Wang, Hadfield, Jiang, Rieffel 2018, theorem 1: the sum over edges of <C_uv> at p = 1."""
    near = {}
    for u, v in edges:
        near.setdefault(u, set()).add(v)
        near.setdefault(v, set()).add(u)
    total = 0.0
    for u, v in edges:
        d, e, f = len(near[u]) - 1, len(near[v]) - 1, len(near[u] & near[v])
        total += 0.5 + 0.25 * np.sin(4 * b) * np.sin(g) * (np.cos(g) ** d + np.cos(g) ** e)
        last = np.cos(g) ** (d + e - 2 * f) * (1 - np.cos(2 * g) ** f)
        total -= 0.25 * np.sin(2 * b) ** 2 * last
    return total


@pytest.mark.parametrize(
    "edges", [qaoa.graph("ring", 5), qaoa.graph("complete", 4), ((0, 1), (1, 2), (0, 2), (2, 3))]
)
def test_maxcut_energy_against_the_closed_form(edges):
    """Property 3, with triangles among the graphs."""
    n = 1 + max(max(e) for e in edges)
    energy = jax.jit(lambda g, b: qaoa.qaoa_maxcut_energy(g[None], b[None], edges, n))
    for g, b in itertools.product((0.3, 1.1, -0.7), (0.2, 0.9)):
        got = float(energy(jnp.float64(g), jnp.float64(b)))
        assert got == pytest.approx(maxcut_closed_form(g, b, edges), abs=1e-12)


def test_maxcut_on_the_ring_of_four():
    """Three quarters of the cut at p = 1 and no more (grid of the plane); all of it at p = 2."""
    ring = qaoa.graph("ring", 4)

    @jax.jit
    def energy(angles):  # f[2, p, N]
        return jax.vmap(lambda g, b: qaoa.qaoa_maxcut_energy(g, b, ring, 4), 1)(*angles)

    angles = np.linspace(0, np.pi, 65)
    plane = np.stack([m.reshape(1, -1) for m in np.meshgrid(angles, angles)])
    assert float(energy(plane).max()) == pytest.approx(3.0, abs=1e-9)
    point = np.array([np.pi / 4, np.pi / 8]).reshape(2, 1, 1)
    assert float(energy(point)[0]) == pytest.approx(3.0, abs=1e-12)

    rng = np.random.default_rng(0)
    x = rng.uniform(0, np.pi, (2, 2, 64))
    climb = jax.jit(lambda x: x + 0.05 * jax.grad(lambda y: energy(y).sum())(x))
    for _ in range(300):
        x = climb(x)
    assert float(energy(x).max()) == pytest.approx(4.0, abs=1e-6)


def some_slow(cases, fast):
    return [pytest.param(*c, marks=() if c in fast else pytest.mark.slow) for c in cases]


state = jax.jit(col.state, static_argnums=(0, 1))
NAMES = list(circuits.CIRCUITS)
SIZES = [(name, *size) for name in NAMES for size in ((2, 1), (3, 2), (4, 3))]


@pytest.mark.parametrize(
    ("name", "n", "p"), some_slow(SIZES, [(name, 3, 2) for name in NAMES] + [("strong", 2, 1)])
)
def test_against_dense_matrices(name, n, p):
    """Every circuit, gate by gate."""
    c = circuits.circuit(name, n, p)
    phi = np.asarray(c.angles(np.linspace(-1.0, 2.0, n), some_weights(c, n)))
    assert phi.shape == (col.num_gates(c.columns),)
    psi = np.eye(2**n)[0]
    for gate, _ in dense_gates(c.columns, n, phi):
        psi = gate @ psi
    np.testing.assert_allclose(state(c.columns, n, phi), psi, atol=1e-12)


def test_the_norm_is_one_after_every_column():
    """Property 6."""
    c = circuits.circuit("strong", 3, 1)
    phi = np.linspace(-1.0, 2.0, col.num_gates(c.columns))
    for k in range(1, len(c.columns) + 1):
        part = c.columns[:k]
        psi = state(part, 3, phi[: col.num_gates(part)])
        assert float(np.linalg.norm(psi)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "tied"),
    some_slow(
        itertools.product(NAMES, (False, True)),
        [("qaoa_tied", True), ("strong", False)],
    ),
)
def test_against_pennylane(name, tied):
    """The templates of PennyLane, with the same parameters: values and gradients."""
    c = circuits.circuit(name, 3, 2, tied=tied)
    a, w = np.array([0.4, -1.3, 2.2]), some_weights(c)
    node = circuits.qnode(name, 3, 2, tied=tied)

    def ours(a, w):
        return col.mean_z(col.probabilities(c.columns, 3, c.angles(a, w)), 3)

    weights = jnp.array([1.0, -2.0, 0.5])

    def both(f):  # values, and the gradient of a weighted sum of them
        value, pull = jax.vjp(f, a, w)
        return value, pull(weights)

    want, got = jax.jit(lambda: (both(node), both(ours)))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), got, want)


def test_our_embedding_is_no_private_convention():
    """qaoa_untied is not PennyLane's QAOAEmbedding: it differs by the field and by re-uploading."""
    a, values = np.array([0.4, -1.3, 2.2]), []
    for name in ("qaoa_untied", "qaoa_embed"):
        c = circuits.circuit(name, 3, 1)
        phi = np.asarray(c.angles(a, jax.tree.map(lambda x: 0 * x + 0.7, some_weights(c))))
        values.append(col.z_signs(3) @ np.abs(state(c.columns, 3, phi)) ** 2)
    assert np.abs(values[0] - values[1]).max() > 0.1


@pytest.mark.parametrize(
    "name", some_slow([(n,) for n in ("qaoa_tied", "basic", "ry_cz", "strong", "iqp")], [("iqp",)])
)
def test_noise_against_density_matrices(name):
    """Every gate followed by a depolarizing channel: Pauli coordinates against sums over Pauli errors."""
    n, p_err = 3, 0.03
    c = circuits.circuit(name, n, 1)
    phi = np.asarray(c.angles(np.array([0.4, -1.3, 2.2]), some_weights(c)))
    rho = np.zeros((8, 8), complex)
    rho[0, 0] = 1
    for gate, wires in dense_gates(c.columns, n, phi):
        rho = gate @ rho @ gate.conj().T
        errors = []
        for which in itertools.product(range(4), repeat=len(wires)):
            on = dict(zip(wires, which, strict=True))
            e = functools.reduce(np.kron, [PAULIS[on.get(q, 0)] for q in range(n)])
            errors.append(e @ rho @ e.conj().T)
        rho = (1 - p_err) * rho + p_err * np.mean(errors[1:], 0)  # errors[0]: the identity
    r = jax.jit(col.noisy_coordinates, static_argnums=(0, 1))(c.columns, n, phi, p_err)
    basis = [
        functools.reduce(np.kron, [PAULIS[i] for i in which])
        for which in itertools.product(range(4), repeat=n)
    ]
    np.testing.assert_allclose(r, [np.trace(b @ rho).real for b in basis], atol=1e-12)
    run = jax.jit(col.noisy_probabilities, static_argnums=(0, 1))
    np.testing.assert_allclose(run(c.columns, n, phi, p_err), np.diag(rho).real, atol=1e-12)
    clean = np.abs(state(c.columns, n, phi)) ** 2
    np.testing.assert_allclose(run(c.columns, n, phi, 0.0), clean, atol=1e-12)


@pytest.mark.parametrize("name", some_slow([("qaoa_tied",), ("strong",), ("qaoa_embed",)], []))
def test_noise_against_default_mixed(name):
    c = circuits.circuit(name, 2, 1)
    a, w = jnp.array([0.4, -1.3]), c.init(jax.random.key(2))
    got = col.mean_z(col.noisy_probabilities(c.columns, 2, c.angles(a, w), 0.04), 2)
    node = circuits.qnode(name, 2, 1, depol=0.04)
    np.testing.assert_allclose(node(a, w), got, atol=1e-9)


def test_depth_of_a_rival_with_as_many_parameters():
    for name in circuits.RIVALS:
        for n, p in itertools.product((4, 6, 8), (1, 2, 3)):
            for tied in (True, False):
                depth = circuits.match_depth(name, n, p, tied=tied)
                count = circuits.circuit(name, n, depth, tied=tied).num_params
                kind = "qaoa_tied" if tied else "qaoa_untied"
                target = circuits.circuit(kind, n, p).num_params
                less = count - circuits.circuit(name, n, 1, tied=tied).num_params
                assert less < target <= count


def test_single_precision_stays_single():
    c = circuits.circuit("strong", 4, 2)
    phi = jax.ShapeDtypeStruct((col.num_gates(c.columns),), jnp.float32)
    assert jax.eval_shape(lambda x: col.state(c.columns, 4, x), phi).dtype == jnp.complex64
    noisy = jax.eval_shape(lambda x: col.noisy_probabilities(c.columns, 4, x, 0.1), phi)
    assert noisy.dtype == jnp.float32
    single = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in c.shapes.items()}
    a = jax.ShapeDtypeStruct((4,), jnp.float32)
    assert jax.eval_shape(c.angles, a, single).dtype == jnp.float32


def test_bad_input_is_one_line():
    with pytest.raises(UserError, match="did you mean"):
        circuits.circuit("qaoa_tide", 4, 1)
    with pytest.raises(UserError, match="2 to 16"):
        circuits.circuit("basic", 1, 1)
    with pytest.raises(UserError, match="at least 1 layer"):
        circuits.circuit("basic", 4, 0)
    with pytest.raises(UserError, match="edges"):
        qaoa.graph("rings", 4)
    with pytest.raises(UserError, match="distinct pairs"):
        qaoa.qaoa_latent(jnp.zeros(3), jnp.zeros(1), jnp.zeros(1), ((0, 1), (1, 0)))
    with pytest.raises(UserError, match="p layers"):
        qaoa.qaoa_latent(jnp.zeros(3), jnp.zeros(1), jnp.zeros(2), ((0, 1),))
