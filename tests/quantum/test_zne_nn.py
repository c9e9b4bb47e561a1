import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import zne_nn

LAMS = np.arange(1, 11) / 100
SMALL = zne_nn.Hyper(hidden=(8,), steps=50, ensemble=2)


def curves(num):
    rates = np.linspace(5, 25, num)[:, None]
    return jnp.asarray(0.8 * np.exp(-rates * LAMS))


def test_one_step_is_adam_on_the_written_loss():
    """Against a NumPy finite-difference gradient and Adam's first step (learning rate times the sign)."""
    hp = SMALL._replace(ensemble=1, l2=1e-2)
    y = curves(1)
    state = zne_nn.fit_init(jax.random.key(0), 1, hp)
    new, mse = zne_nn.fit_step(state, LAMS, y, hp)
    x = ((LAMS - LAMS.mean()) / LAMS.std())[:, None]
    z = np.asarray(((y - y.mean()) / y.std())[0])[:, None]
    (w1, b1), (w2, b2) = [
        (np.asarray(w[0], float), np.asarray(b[0], float)) for w, b in state.params
    ]

    def loss(w1, b1, w2, b2):
        error = np.tanh(x @ w1 + b1) @ w2 + b2 - z
        return (error**2).mean(), (error**2).mean() + hp.l2 * ((w1**2).sum() + (w2**2).sum())

    assert float(mse) == pytest.approx(loss(w1, b1, w2, b2)[0], rel=1e-5)
    params = [w1, b1, w2, b2]
    got = [np.asarray(a[0], float) for pair in new.params for a in pair]
    for i, p in enumerate(params):
        for index in np.ndindex(*p.shape):
            up = [q.copy() for q in params]
            down = [q.copy() for q in params]
            up[i][index] += 1e-5
            down[i][index] -= 1e-5
            slope = (loss(*up)[1] - loss(*down)[1]) / 2e-5
            if abs(slope) > 1e-4:
                assert got[i][index] - p[index] == pytest.approx(
                    -hp.learning_rate * np.sign(slope), rel=1e-2
                )


def test_nets_of_a_batch_do_not_see_one_another():
    """Changing one curve leaves the nets of the others bit for bit alone."""
    y = curves(3)
    fit = jax.jit(lambda e: zne_nn.nn_zne_fit(jax.random.key(0), LAMS, e, SMALL))
    a, b = fit(y), fit(y.at[2].multiply(-0.3))
    for x, z in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x[: 2 * SMALL.ensemble], z[: 2 * SMALL.ensemble])
        assert not np.array_equal(x[2 * SMALL.ensemble :], z[2 * SMALL.ensemble :])


def test_predictions_scale_with_the_curve():
    """Standardised targets: a + b E(lam) gives a + b times the prediction."""
    y = curves(2)
    params = zne_nn.nn_zne_fit(jax.random.key(1), LAMS, y, SMALL)
    mean, spread = zne_nn.nn_zne_predict(params, LAMS, y, 0.0, SMALL)
    params = zne_nn.nn_zne_fit(jax.random.key(1), LAMS, 3.0 - 2.0 * (3.0 - y), SMALL)
    mean2, spread2 = zne_nn.nn_zne_predict(params, LAMS, 3.0 - 2.0 * (3.0 - y), 0.0, SMALL)
    np.testing.assert_allclose(mean2, 3.0 - 2.0 * (3.0 - mean), atol=1e-4)
    np.testing.assert_allclose(spread2, 2 * spread, atol=1e-4)


def test_a_constant_curve_stays_finite():
    y = jnp.full((1, 10), 0.3)
    params = zne_nn.nn_zne_fit(jax.random.key(1), LAMS, y, SMALL)
    mean, _ = zne_nn.nn_zne_predict(params, LAMS, y, 0.0, SMALL)
    assert np.isfinite(mean).all()


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_papers_net_beats_the_raw_point_on_smooth_curves(activation):
    """Exact decays: error well below the raw point's, far above rounding (median of the paper's kind: 8e-3)."""
    hp = zne_nn.Hyper(activation=activation, steps=1500, ensemble=3)
    y = curves(4)
    fit = jax.jit(
        lambda e: zne_nn.nn_zne_predict(
            zne_nn.nn_zne_fit(jax.random.key(0), LAMS, e, hp), LAMS, e, 0.0, hp
        )
    )
    error = np.abs(np.asarray(fit(y)[0]) - 0.8)
    assert (error < np.abs(np.asarray(y[:, 0]) - 0.8)).all()
    assert np.median(error) > 1e-5


def test_float32_nets_under_float64_curves():
    state = zne_nn.fit_init(jax.random.key(0), 2, SMALL)
    new, _ = jax.jit(lambda s: zne_nn.fit_step(s, LAMS, curves(2), SMALL))(state)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(new.params))
    assert zne_nn.nn_predict(new.params, LAMS, curves(2), np.zeros(1), SMALL).dtype == jnp.float64


def test_unknown_activation_is_named():
    with pytest.raises(UserError, match="tanh, relu"):
        zne_nn.mlp_apply((), jnp.zeros((1, 1)), "gelu")


def test_amortised_net_learns_a_linear_rule_and_ignores_constant_features():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((512, 3)), np.full((512, 1), 2.0)], 1).astype(
        np.float32
    )
    raw = jnp.asarray(x[:, 0])
    target = jnp.asarray(x @ np.array([1.5, -0.5, 0.2, 0.0]))
    hp = zne_nn.AmortisedHyper(hidden=(32,), learning_rate=1e-2, batch=64, steps=800)
    model = zne_nn.amortised_init(jax.random.key(0), jnp.asarray(x), hp)

    @jax.jit
    def train(model):
        def step(_, m):
            return zne_nn.amortised_step(m, jax.random.key(1), jnp.asarray(x), raw, target, hp)[0]

        return jax.lax.fori_loop(0, 800, step, model)

    model = train(model)
    error = zne_nn.amortised_predict(model, jnp.asarray(x), raw, hp) - target
    assert float(jnp.sqrt((error**2).mean())) < 0.1 * float((target - raw).std())
    moved = x.copy()
    moved[:, 3] = -7.0
    same = zne_nn.amortised_predict(model, jnp.asarray(moved), raw, hp)
    np.testing.assert_array_equal(same, zne_nn.amortised_predict(model, jnp.asarray(x), raw, hp))
