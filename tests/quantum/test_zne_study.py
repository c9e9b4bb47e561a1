import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import hamiltonians as hm
from qlab.quantum import pauli, vqe, zne_study
from qlab.quantum.ansatz import noisy_expval
from qlab.quantum.noise import FixedErrors, p_to_lam

SPEC = zne_study.StudySpec(
    problems=("zn_n2", "tfim_n2", "zn_n2_L2"),
    depth=1,
    shots=(0, 1000),
    curve_problem="zn_n2",
    curve_shots=(100, 1000),
    lams=(0.01, 0.02, 0.05),
    scales=(1, 3),
    num_random=3,
    num_vqe=2,
    vqe_steps=40,
)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def curves():
    with jax.enable_x64(True):
        return zne_study.make_curves(KEY, SPEC)


def thetas_of(name):
    """The circuits as make_curves draws them: its own key path, written out."""
    problem = zne_study.parse_problem(name, SPEC.depth)
    k_random, _ = jax.random.split(zne_study._named(KEY, name))
    return zne_study._angles(k_random, SPEC.num_random, problem.depth + 1, 2, problem.n)


def test_tasks_and_labels():
    rows = zne_study.tasks(SPEC)
    assert [(p.name, s) for p, s in rows] == [
        *[(p, s) for p in SPEC.problems for s in (0, 1000)],
        ("zn_n2", 100),
    ]
    assert [zne_study.shots_label(s) for s in (0, 10_000, 1500)] == ["inf", "1e4", "1500"]
    with pytest.raises(UserError, match="expected <hamiltonian>_n<qubits>"):
        zne_study.parse_problem("tfim", 2)


@pytest.mark.parametrize(
    ("row", "name", "obs"), [(0, "zn_n2", hm.zn(2)), (2, "tfim_n2", hm.tfim_ring(2))]
)
def test_curves_are_the_simulators(curves, row, name, obs):
    """Random circuits, exact values: energies, folded and ideal against noisy_expval, normalised."""
    theta = thetas_of(name)
    norm = pauli.weight_norm(obs)
    for c in range(SPEC.num_random):
        t = jnp.asarray(theta[c])
        want = [float(noisy_expval(t, l, l, obs)) / norm for l in SPEC.lams]
        np.testing.assert_allclose(curves.energies[row, c], want, atol=1e-12)
        folded = [float(noisy_expval(t, 0.01, 0.01, obs, scale=s)) / norm for s in SPEC.scales]
        np.testing.assert_allclose(curves.folded[row, c], folded, atol=1e-12)
        assert float(curves.ideal[row, c]) == pytest.approx(
            float(noisy_expval(t, 0.0, 0.0, obs)) / norm, abs=1e-12
        )


def test_vqe_circuits_are_near_the_ground_energy(curves):
    """Z^2 and the TFIM pair have ground energies -1 and -2 sqrt 2 (norm 4)."""
    np.testing.assert_allclose(curves.ideal[0, 3:], -1, atol=2e-2)
    assert (np.asarray(curves.ideal[2, 3:]) < -2.7 / 4).all()


def test_the_same_circuits_at_every_number_of_shots(curves):
    np.testing.assert_array_equal(curves.ideal[0], curves.ideal[1])
    np.testing.assert_array_equal(curves.exact[0], curves.energies[1 - 1])
    assert not np.array_equal(curves.energies[0], curves.energies[1])
    z = (curves.energies[1] - curves.exact[1]) / np.sqrt((1 - curves.exact[1] ** 2) / 1000)
    assert np.abs(z).max() < 5


def test_measured_variance():
    """Z^n: (1 - E^2) / S; J terms with S / J shots each: J sum w_j^2 (1 - e_j^2) / S."""
    terms, weights = np.array([0.3, -0.8]), np.array([0.7, 0.3])
    many = np.broadcast_to(terms, (20_000, 2))
    sampled = zne_study.measure(jax.random.key(0), many, weights, 1000)
    want = (weights**2 * (1 - terms**2)).sum() * 2 / 1000
    assert sampled.var() == pytest.approx(want, rel=0.04)
    assert sampled.mean() == pytest.approx(terms @ weights, abs=5 * np.sqrt(want / 20_000))
    one = zne_study.measure(jax.random.key(1), many[:, :1], np.ones(1), 100)
    assert one.var() == pytest.approx((1 - 0.3**2) / 100, rel=0.04)
    assert set(np.unique(np.round((one + 1) * 50, 9) % 1)) == {0.0}  # counts of 100 shots
    np.testing.assert_array_equal(zne_study.measure(KEY, many, weights, 0), many @ weights)


def test_fixed_errors_stay_out_of_the_target_but_in_the_points():
    plain = SPEC._replace(problems=("zn_n2",), shots=(0,), num_vqe=0, curve_problem="")
    biased = zne_study.make_curves(KEY, plain._replace(fixed=FixedErrors((0.02, 0.05), 0.03)))
    clean = zne_study.make_curves(KEY, plain)
    np.testing.assert_allclose(biased.ideal, clean.ideal, atol=1e-12)
    assert np.abs(biased.energies - clean.energies).max() > 1e-3


def test_conventions_change_the_levels_as_named():
    points = zne_study._points(SPEC._replace(lam1_over_lam2=0.1))
    np.testing.assert_allclose(points.lam1, points.lam2 / 10)
    as_p = zne_study._points(SPEC._replace(noise_convention="pauli_p"))
    np.testing.assert_allclose(as_p.lam1[1:4], p_to_lam(np.array(SPEC.lams), 1))
    np.testing.assert_allclose(as_p.lam2[1:4], np.array(SPEC.lams) * 16 / 15)
    folded = SPEC._replace(amplify="fold", scales=(1, 3, 5))
    assert zne_study.coordinates(folded) == pytest.approx((0.01, 0.03, 0.05))
    np.testing.assert_array_equal(zne_study._points(folded).folds, [0, 0, 1, 2, 0, 1, 2])


def test_reoptimised_curves_lie_below_the_fixed_circuit(curves):
    """Each level's own optimum is no worse than another level's circuit run there."""
    spec = SPEC._replace(
        problems=("tfim_n2",),
        shots=(0,),
        theta_mode="reopt",
        num_random=0,
        curve_problem="",
        vqe_steps=150,
    )
    reopt = zne_study.make_curves(KEY, spec)
    fixed = zne_study.make_curves(KEY, spec._replace(theta_mode="fixed"))
    assert (np.asarray(reopt.energies) <= np.asarray(fixed.energies) + 1e-3).all()
    assert np.abs(reopt.energies - fixed.energies).max() > 1e-6


def test_scores_against_plain_numpy(curves):
    rng = np.random.default_rng(0)
    estimates = np.asarray(curves.ideal) + 0.1 * rng.standard_normal(curves.ideal.shape)
    got = zne_study.score(jnp.asarray(estimates), curves, SPEC)
    error, raw = (
        estimates - np.asarray(curves.ideal),
        np.asarray(curves.energies[..., 0] - curves.ideal),
    )
    row = 3  # tfim_n2 at 1000 shots
    assert got["tfim_n2_1e3/median_error"] == pytest.approx(np.median(np.abs(error[row])))
    assert got["tfim_n2_1e3/mse"] == pytest.approx((error[row] ** 2).mean())
    assert got["tfim_n2_1e3/bias"] == pytest.approx(np.sqrt((error[2] ** 2).mean()))
    assert got["tfim_n2_1e3/spread"] == pytest.approx(np.sqrt(((error[3] - error[2]) ** 2).mean()))
    pooled = np.abs(
        np.concatenate([error[1, 3:], error[3, 3:]])
    )  # VQE circuits; zn_n2_L2 is not pooled
    assert got["vqe_1e3/p90_error"] == pytest.approx(np.quantile(pooled, 0.9))
    pooled_raw = np.abs(np.concatenate([raw[1, 3:], raw[3, 3:]]))
    assert got["vqe_1e3/win_share"] == pytest.approx(100 * (pooled < pooled_raw).mean())
    assert got["vqe_1e3/p90_ratio"] == pytest.approx(np.quantile(pooled / pooled_raw, 0.9))
    np.testing.assert_array_equal(got["shots"], [100, 1000])
    assert got["error_by_shots"][1] == pytest.approx(np.median(np.abs(error[1])))


def test_training_set_is_disjoint_and_consistent(curves):
    data = zne_study.make_training(KEY, SPEC, 8, (1, 2))
    each = 8 // 2  # two depths, one size
    assert data.features.shape == (
        each * 2 * 2 * 3,
        2 * 3 + 3,
    )  # depths, problems, shots {0, 100, 1000}
    np.testing.assert_allclose(data.features[:, 0], data.raw, atol=1e-6)
    assert set(np.unique(np.asarray(data.features[:, -2]))) == {1.0, 2.0}
    test = zne_study.curve_features(curves, SPEC)
    assert test.shape == (curves.ideal.size, 9)
    exact = np.asarray(data.target)
    assert np.abs(exact[:, None] - np.asarray(curves.ideal[0, :3])[None]).min() > 1e-9


def test_curves_are_kept_between_arms_and_reproducible():
    spec = SPEC._replace(num_vqe=0, curve_problem="")
    a, b = zne_study.curves_of(KEY, spec), zne_study.curves_of(KEY, spec)
    assert a is b
    fresh = zne_study.make_curves(KEY, spec)
    jax.tree.map(np.testing.assert_array_equal, a, fresh)
    other = zne_study.curves_of(jax.random.key(4), spec)
    assert not np.array_equal(a.energies, other.energies)


def test_vqe_reaches_the_ground_energy_of_h2():
    obs = hm.h2_2q()
    starts = jax.random.uniform(jax.random.key(0), (1, 3, 3, 2, 2), minval=-np.pi, maxval=np.pi)
    theta, energy = vqe.optimise_ansatz(starts, pauli.to_coords(obs), 0.0, 0.0)
    assert float(energy[0]) == pytest.approx(-1.13727017, abs=1.6e-3)
    assert float(noisy_expval(theta[0], 0.0, 0.0, obs)) == pytest.approx(
        float(energy[0]), abs=1e-12
    )


def test_adam_spsa_slope_and_descent():
    """On a linear f in 1-D every estimate is the exact slope, so the first step is a * slope."""
    hp = vqe.SPSA(a=0.5, alpha=0.0, max_evals=3)
    x, best, evals = vqe.adam_spsa(lambda x, k: 3.0 * x[0], jnp.array([1.0]), jax.random.key(0), hp)
    assert float(x[0]) == pytest.approx(1.0 - 0.5 * 3.0, abs=1e-9)
    assert float(best) == pytest.approx(3 * float(x[0]))
    assert evals == 3

    def bowl(x, k):
        return ((x - 1.0) ** 2).sum() + 0.01 * jax.random.normal(k)

    x, best, evals = jax.jit(
        lambda k: vqe.adam_spsa(bowl, jnp.zeros(4), k, vqe.SPSA(a=0.3, alpha=0.6, max_evals=600))
    )(KEY)
    assert float(((x - 1) ** 2).sum()) < 0.1
    assert int(evals) == 600
