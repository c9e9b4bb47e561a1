"""Integrated gradients against the loss change itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization.importance import ig_importance


@pytest.fixture
def quadratic():
    rng = np.random.default_rng(0)
    hessian = {k: rng.standard_normal((n, n)) for k, n in (("a", 6), ("b", 4))}
    hessian = {k: jnp.asarray(h @ h.T, jnp.float32) for k, h in hessian.items()}
    slope = {k: jnp.asarray(rng.standard_normal(len(h)), jnp.float32) for k, h in hessian.items()}
    w = {k: jnp.asarray(rng.standard_normal(len(h)), jnp.float32) for k, h in hessian.items()}
    w_q = {k: jnp.round(v) for k, v in w.items()}

    def loss(p, batch):
        return sum(0.5 * v @ hessian[k] @ v + batch * slope[k] @ v for k, v in p.items())

    return loss, w, w_q


@pytest.mark.parametrize("m", [1, 2, 8, 64])
def test_a_quadratic_loss_is_met_exactly(quadratic, m):
    loss, w, w_q = quadratic
    got = ig_importance(loss, w, w_q, [1.0], m)
    for k in w:
        want = loss(w | {k: w_q[k]}, 1.0) - loss(w, 1.0)  # the others stay float
        np.testing.assert_allclose(got[k], abs(float(want)), rtol=2e-4)


def test_the_mean_over_batches_comes_before_the_absolute_value(quadratic):
    loss, w, w_q = quadratic
    batches = [-8.0, 8.0]  # their slopes cancel
    got = ig_importance(loss, w, w_q, batches, 4)
    mean = ig_importance(loss, w, w_q, [0.0], 4)
    for k in w:
        np.testing.assert_allclose(got[k], mean[k], rtol=1e-3)
        parts = [float(ig_importance(loss, w, w_q, [b], 4)[k]) for b in batches]
        assert np.mean(parts) > 1.5 * float(got[k])


def test_more_midpoints_come_nearer_to_the_change_of_any_loss():
    w, w_q = {"a": jnp.array([0.3, -1.2])}, {"a": jnp.array([2.0, 1.0])}

    def loss(p, batch):
        return (jnp.exp(p["a"]) * jnp.array([1.0, 3.0])).sum()

    want = float(loss(w_q, None) - loss(w, None))
    errors = [abs(float(ig_importance(loss, w, w_q, [None], m)["a"]) - want) for m in (1, 4, 64)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3 * want


def test_rows_add_up_to_their_site():
    rng = np.random.default_rng(2)
    w = {"a": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)}
    w_q = {"a": jnp.round(w["a"])}

    def loss(p, x):
        return jax.nn.relu(p["a"] @ x).sum() ** 2

    x = jnp.asarray(rng.standard_normal(4), jnp.float32)
    rows = ig_importance(loss, w, w_q, [x], 8, per="row", signed=True)["a"]
    assert rows.shape == (3,)
    np.testing.assert_allclose(
        abs(float(rows.sum())), ig_importance(loss, w, w_q, [x], 8)["a"], rtol=1e-5
    )


@pytest.mark.parametrize(("change", "message"), [({"m": 0}, "m=0"), ({"per": "column"}, "per=")])
def test_bad_options_are_named(change, message):
    one = {"a": jnp.ones(2)}
    with pytest.raises(ValueError, match=message):
        ig_importance(lambda p, b: p["a"].sum(), one, one, [None], **change)
    with pytest.raises(ValueError, match="different sites"):
        ig_importance(lambda p, b: p["a"].sum(), one, {}, [None])
