"""qlab.ptm under noise models and with shots, against closed forms; and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pennylane as qml
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import noise as nz
from qlab.quantum import noise_model as nm
from qlab.quantum import ptm as pt
from qlab.quantum.device import PTMDevice

MATRIX = np.array([[1, 0.3 - 0.2j], [0.3 + 0.2j, -0.5]])

# ---- Noise models -------------------------------------------------------------------------------


def test_noise_follows_every_gate():
    """The model against default.mixed with the channels written out; a Toffoli as PennyLane's gates."""
    p1, p2, gamma = 0.01, 0.04, 0.05
    model = {
        "default": {
            "1": [{"kind": "depolarizing", "p": p1}, {"kind": "phase_flip", "p": 0.02}],
            "2": [{"kind": "depolarizing", "p": p2}, {"kind": "amplitude_damping", "gamma": gamma}],
        },
        "gates": {"RZ": [], "H": [{"kind": "bit_flip", "p": 0.1}]},
    }
    gates = [qml.H(0), qml.RX(0.4, 1), qml.RZ(0.2, 0), qml.IsingXY(0.8, [0, 2])]
    gates += [qml.adjoint(qml.RZ(0.3, 0)), qml.Toffoli([0, 2, 1]), qml.Rot(0.1, 0.2, 0.3, 2)]

    parts = [d for g in gates for d in (g.decomposition() if g.name == "Toffoli" else [g])]

    def plain():
        for g in gates:
            qml.apply(g)
        return qml.state()

    def written_out():
        for g in parts:
            qml.apply(g)
            if g.name == "Hadamard":
                qml.BitFlip(0.1, g.wires)
            elif g.name in ("RZ", "Adjoint(RZ)"):
                continue
            elif len(g.wires) == 1:
                qml.DepolarizingChannel(p1, g.wires)
                qml.PhaseFlip(0.02, g.wires)
            else:
                lam = nz.p_to_lam(p2, 2)
                qml.QubitChannel(np.asarray(nz.depolarizing_kraus(lam, 2)), g.wires)
                for w in g.wires:
                    qml.AmplitudeDamping(gamma, w)
        return qml.state()

    got = qml.QNode(plain, PTMDevice(3, noise=model))()
    want = qml.QNode(written_out, qml.device("default.mixed", wires=3))()
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_bundled_models_say_what_the_paper_says():
    assert set(nm.bundled()) == {"ibm_like", "ourense", "zne_depol", "zne_device"}
    for name in nm.bundled():
        for k in (1, 2):
            ptm = nm.ptm_after(nm.read_noise(name), "?", k)
            np.testing.assert_allclose(ptm[0], np.eye(4**k)[0], atol=1e-15)
            assert abs(np.linalg.eigvals(ptm)).max() < 1 + 1e-12
            assert ptm[3, 3] < 1
    device, depol = nm.read_noise("zne_device"), nm.read_noise("zne_depol")
    for k, lam in ((1, 0.001), (2, 0.01)):
        np.testing.assert_allclose(
            nm.ptm_after(device, "?", k), nz.channel("device", 0.01, k), atol=1e-12
        )
        np.testing.assert_allclose(
            nm.ptm_after(depol, "?", k), nz.channel("depol", lam, k), atol=1e-12
        )
    assert device.readout == (0.01, 0.03)


def test_kraus_of_the_model_and_thermal_of_pennylane(tmp_path):
    """A JSON file with Kraus operators is the amplitude damping of the same strength; thermal is PennyLane's."""
    kraus = [{"re": np.real(k).tolist()} for k in np.asarray(nz.damping_kraus(0.2))]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"default": {"1": [{"kind": "kraus", "matrices": kraus}]}}))
    np.testing.assert_allclose(
        nm.ptm_after(nm.read_noise(file), "RX", 1), pt.ptm_damping(0.2), atol=1e-12
    )
    thermal = [{"kind": "thermal", "duration": 0.3, "t1": 1.0, "t2": 1.6, "excited": 0.2}]
    want = qml.ThermalRelaxationError(0.2, 1.0, 1.6, 0.3, wires=0).kraus_matrices()
    np.testing.assert_allclose(
        nm.ptm_after(nm.read_noise({"default": {"1": thermal}}), "RX", 1),
        pt.ptm_of_kraus(jnp.asarray(np.array(want, complex))),
        atol=1e-12,
    )


def test_thermal_relaxation_closed_form():
    """P(1) = e + (1 - e) exp(-t / T1) from |1>, and <X> = exp(-t / T2) from |+>; in place of a wait, on Identity."""
    t, t1, t2, excited = 0.7, 2.0, 3.1, 0.15
    wait = {"kind": "thermal", "duration": t, "t1": t1, "t2": t2, "excited": excited}
    dev = PTMDevice(2, noise={"gates": {"Identity": [wait]}})

    @qml.qnode(dev)
    def circuit():
        qml.X(0)
        qml.H(1)
        qml.Identity(0)
        qml.Identity(1)
        return qml.probs(wires=0), qml.expval(qml.X(1))

    probs, x = circuit()
    assert probs[1] == pytest.approx(excited + (1 - excited) * np.exp(-t / t1), abs=1e-12)
    assert x == pytest.approx(np.exp(-t / t2), abs=1e-12)


def test_readout_closed_form():
    """On RX(x)|0>|0>, wire 1 misread otherwise than wire 0."""
    x, (f0, f1), (g0, g1) = 0.9, (0.02, 0.07), (0.1, 0.3)
    dev = PTMDevice(2, noise={"readout": {"default": [f0, f1], "wires": {"1": [g0, g1]}}})

    @qml.qnode(dev)
    def circuit(x):
        qml.RX(x, 0)
        return (
            qml.probs(wires=[1, 0]),
            qml.expval(qml.Z(0) @ qml.Z(1)),
            qml.var(qml.Z(0)),
            qml.expval(qml.Projector([0], 0)),
            qml.expval(qml.Identity(1)),
        )

    p1 = np.sin(x / 2) ** 2
    read1 = (1 - p1) * f0 + p1 * (1 - f1)
    probs, zz, var, zero, one = circuit(x)
    want = np.outer([1 - g0, g0], [1 - read1, read1]).ravel()
    np.testing.assert_allclose(probs, want, atol=1e-12)
    assert zz == pytest.approx((1 - 2 * read1) * (1 - 2 * g0), abs=1e-12)
    assert var == pytest.approx(1 - (1 - 2 * read1) ** 2, abs=1e-12)
    assert zero == pytest.approx(1 - read1, abs=1e-12)
    assert one == pytest.approx(1, abs=1e-12)


def test_noise_can_be_learned():
    """<Z> = 1 - 4 p / 3 after a depolarized identity: its slope in p, through a model with a traced number."""

    def value(p):
        dev = PTMDevice(1, noise={"gates": {"RX": [{"kind": "depolarizing", "p": p}]}})

        @qml.qnode(dev)
        def circuit(x):
            qml.RX(x, 0)
            return qml.expval(qml.Z(0))

        return circuit(jnp.zeros(()))

    assert jax.jit(jax.grad(value))(0.1) == pytest.approx(-4 / 3, abs=1e-12)


# ---- Shots --------------------------------------------------------------------------------------


def test_shots_are_binomial():
    """Mean and variance of 400 estimates of a misread P(1) from 250 shots each, to five standard errors."""
    shots, repeats, x = 250, 400, 1.1
    dev = PTMDevice(1, noise={"readout": [0.05, 0.1]}, seed=7)

    @qml.set_shots((shots,) * repeats)
    @qml.qnode(dev)
    def circuit():
        qml.RX(x, 0)
        return qml.probs(wires=0)

    got = np.stack(circuit())[:, 1]
    p1 = np.sin(x / 2) ** 2
    p = 0.05 * (1 - p1) + 0.9 * p1
    var = p * (1 - p) / shots
    assert abs(got.mean() - p) < 5 * np.sqrt(var / repeats)
    assert abs(got.var() / var - 1) < 5 * np.sqrt(2 / repeats)


def test_samples_counts_and_observables():
    """One run measures all: a Bell pair's halves agree shot by shot; other bases get runs of their own."""
    dev = PTMDevice(["x", "y"], seed=1)

    @qml.set_shots(2000)
    @qml.qnode(dev)
    def bell():
        qml.H("x")
        qml.CNOT(["x", "y"])
        return (
            qml.sample(wires="x"),
            qml.sample(wires="y"),
            qml.counts(wires=["x", "y"]),
            qml.expval(qml.X("x") @ qml.X("y")),
            qml.expval(0.5 * qml.Z("x") @ qml.Z("y") - 2 * qml.Y("x") @ qml.Y("y")),
            qml.var(qml.Hermitian(MATRIX, "x")),
            qml.expval(qml.Projector([1, 1], ["x", "y"])),
        )

    x, y, counts, xx, ham, var, both_one = bell()
    np.testing.assert_array_equal(np.ravel(x), np.ravel(y))
    assert set(counts) == {"00", "11"}
    assert sum(counts.values()) == 2000
    assert abs(counts["11"] - 1000) < 5 * np.sqrt(500)
    assert xx == 1
    assert ham == pytest.approx(2.5, abs=1e-12)
    want = np.trace(MATRIX @ MATRIX).real / 2 - (np.trace(MATRIX).real / 2) ** 2
    assert var == pytest.approx(want, rel=0.1)
    assert both_one == pytest.approx(0.5, abs=0.06)


def test_seeds():
    """A seed repeats, runs differ, and a traced key draws anew without a new trace."""

    def samples(dev):
        @qml.set_shots(60)
        @qml.qnode(dev)
        def circuit():
            qml.H(0)
            return qml.sample(wires=0)

        return circuit

    one, two = samples(PTMDevice(1, seed=3)), samples(PTMDevice(1, seed=3))
    first = one()
    np.testing.assert_array_equal(first, two())
    assert (np.asarray(first) != np.asarray(one())).any()
    traces = []

    @jax.jit
    def draw(key, x):
        traces.append(None)

        @qml.set_shots(60)
        @qml.qnode(PTMDevice(1, seed=key), interface="jax", diff_method=None)
        def circuit(x):
            qml.RX(x, 0)
            return qml.sample(wires=0), qml.expval(qml.X(0))

        return circuit(x)

    a, b = (draw(jax.random.key(i), jnp.asarray(1.5))[0] for i in (0, 1))
    assert len(traces) == 1
    assert (a != b).any()


def test_broadcast_shots():
    @qml.set_shots(3000)
    @qml.qnode(PTMDevice(1))
    def circuit(x):
        qml.RX(x, 0)
        return qml.expval(qml.Z(0)), qml.sample(wires=0)

    x = np.array([0.0, 1.0, np.pi])
    z, samples = circuit(x)
    assert samples.shape[:2] == (3, 3000)
    np.testing.assert_allclose(z, np.cos(x), atol=5 / np.sqrt(3000))
    assert z[0] == 1
    assert z[2] == -1


# ---- Errors -------------------------------------------------------------------------------------


def after_rx(**channel):
    return {"gates": {"RX": [channel]}}


def default2(**channel):
    return {"default": {"2": [channel]}}


LOSSY = [np.diag([1.0, 0.5]).tolist()]
BAD_MODELS = [
    (after_rx(kind="depolarizing", p=1.5), r"gates.RX\[0\]: p=1.5; it must be a probability"),
    (after_rx(kind="bit_flip", p=-0.1), "p=-0.1; it must be a probability"),
    (after_rx(kind="bit_flip", p="0.1"), "'0.1' is not a number"),
    (after_rx(kind="bit_flip", p=float("nan")), "p=nan; it must be"),
    (after_rx(kind="depolarising", p=0.1), "did you mean depolarizing"),
    (after_rx(kind="depolarizing", lam=0.1), "unknown key 'lam'"),
    (after_rx(kind="depolarizing"), "depolarizing needs p"),
    (after_rx(p=0.1), "names no kind"),
    (after_rx(kind="thermal", duration=1.0, t1=1.0, t2=2.5), "0 < t2 <= 2 t1"),
    (after_rx(kind="thermal", duration=-1.0, t1=1.0, t2=1.0), "finite and not negative"),
    (after_rx(kind="kraus", matrices=LOSSY), "off the identity by 0.75"),
    (after_rx(kind="kraus", matrices=[[1, 2]]), "2\\^q x 2\\^q"),
    (default2(kind="kraus", matrices=np.eye(8)[None].tolist()), "8 x 8 Kraus"),
    ({"gates": {"CNOTT": []}}, "unknown gate 'CNOTT'; did you mean CNOT"),
    ({"gates": {"CNOT": {}}}, "give a list of channels"),
    ({"default": {"3": []}}, "unknown key '3'"),
    ({"noise": []}, "unknown key 'noise'"),
    ({"readout": [0.1]}, "is not \\[P"),
    ({"readout": [0.1, 2.0]}, "readout.default=2; it must be a probability"),
    ({"readout": {"wires": {"9": [0.1, 0.1]}}}, "readout of wire 9, but the device has 0, 1"),
    ("ibm_lik", "did you mean ibm_like"),
]


@pytest.mark.parametrize(("model", "message"), BAD_MODELS)
def test_bad_noise_models_are_named(model, message):
    with pytest.raises(UserError, match=message) as e:
        PTMDevice(2, noise=model)
    assert "\n" not in str(e.value)


def test_a_broken_file_is_named(tmp_path):
    file = tmp_path / "broken.json"
    file.write_text("{")
    with pytest.raises(UserError, match=r"broken\.json: not JSON"):
        nm.read_noise(file)


def test_kraus_operators_on_other_qubits_than_the_gate():
    dev = PTMDevice(2, noise=after_rx(kind="kraus", matrices=np.eye(4)[None].tolist()))
    with pytest.raises(UserError, match="RX acts on 1 qubits, its Kraus operators on 2"):
        qml.QNode(lambda: (qml.RX(0.1, 0), qml.expval(qml.Z(0)))[1], dev)()


def test_too_many_wires():
    with pytest.raises(UserError, match=r"30 wires need .* GiB .* use at most \d+ wires"):
        PTMDevice(30)


def sparse():
    return qml.expval(qml.SparseHamiltonian(qml.Z(0).sparse_matrix(), [0]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: qml.expval(qml.Hermitian([[0, 1], [0, 0]], 0)), UserError, "not Hermitian"),
        (lambda: qml.expval(1j * qml.Z(0)), UserError, "not Hermitian"),
        (lambda: qml.expval(qml.Z(5)), qml.exceptions.WireError, r"not found on the device: \{5\}"),
        (lambda: qml.sample(wires=0), qml.exceptions.DeviceError, "not accepted for analytic"),
        (lambda: qml.classical_shadow([0]), qml.exceptions.DeviceError, "not accepted"),
        (lambda: qml.expval(qml.measure(0)), UserError, "no mid-circuit measurements"),
        (sparse, qml.exceptions.DeviceError, r"not supported on qlab\.ptm"),
    ],
)
def test_what_is_not_supported_says_so(make, error, message):
    def circuit():
        qml.RX(0.3, 0)
        return make()

    with pytest.raises(error, match=message):
        qml.QNode(circuit, PTMDevice(2, noise="zne_device"))()


def test_counts_under_jit_state_with_shots_and_other_mcm_methods_are_refused():
    @qml.set_shots(5)
    @qml.qnode(PTMDevice(2), interface="jax", diff_method=None)
    def counts(x):
        qml.RX(x, 0)
        qml.CNOT([1, 0])
        return qml.counts()

    assert counts(jnp.asarray(np.pi)) == {"10": 5}  # the first wire is the left digit
    with pytest.raises(UserError, match="use sample or probs"):
        jax.jit(counts)(0.0)

    @qml.set_shots(5)
    @qml.qnode(PTMDevice(1))
    def circuit():
        return qml.density_matrix(0)

    with pytest.raises(qml.exceptions.DeviceError, match="not accepted with finite shots"):
        circuit()
    with pytest.raises(UserError, match="only 'deferred'"):
        qml.QNode(lambda: qml.probs(wires=0), PTMDevice(1), mcm_method="tree-traversal")()
