import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization import fp_target, gptq_round, hessian_init, hessian_update, make_grid
from qlab.quantization.gptq import LADDER, gptq_solve, inverse_factor
from qlab.quantization.grid import nearest_codes


def problem(rows, cols, seed=0, bits=2, samples=64):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    x = (rng.standard_normal((samples, 1)) + 0.5 * rng.standard_normal((samples, cols))).astype(
        np.float32
    )
    grid = make_grid(jnp.asarray(w), bits)
    return jnp.asarray(w), jnp.asarray(x), grid, -grid.scale * grid.zero


def loss(codes, w, x, grid, offset):
    error = np.float64(codes) * np.float64(grid.scale) + np.float64(offset) - np.float64(w)
    return ((error @ np.float64(x).T) ** 2).mean(1)


def numpy_gptq(w, h, scale, offset, q_max, damp):
    """The textbook form in float64: an explicit inverse Hessian, eliminated column after column."""
    w, h = np.float64(w).copy(), np.float64(h)
    h_inv = np.linalg.inv(h + damp * np.diag(h).mean() * np.eye(len(h)))
    codes = np.zeros(w.shape)
    for i in range(len(h)):
        q = np.clip(np.round((w[:, i] - offset[:, 0]) / scale[:, 0]), 0, q_max)
        codes[:, i] = q
        error = (w[:, i] - (q * scale[:, 0] + offset[:, 0])) / h_inv[i, i]
        w -= np.outer(error, h_inv[i])
        h_inv -= np.outer(h_inv[:, i], h_inv[i]) / h_inv[i, i]
    return codes


def test_hessian_is_the_masked_mean_in_any_split():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 50, 6)).astype(np.float32)
    mask = rng.random(50) < 0.7
    expected = x[mask].T.astype(np.float64) @ x[mask] / mask.sum()
    for cuts in ([50], [1, 20, 50], [13, 14, 50]):
        state, cross = hessian_init(6), hessian_init(6)
        for a, b in itertools.pairwise([0, *cuts]):
            state = hessian_update(state, jnp.asarray(x[a:b]), jnp.asarray(mask[a:b]))
            cross = hessian_update(cross, jnp.asarray(x[a:b]), left=jnp.asarray(y[a:b]))
        np.testing.assert_allclose(state.mean, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(cross.mean, y.T @ x / 50, rtol=1e-4, atol=1e-6)
        assert float(state.count) == mask.sum()


def test_inverse_factor_is_the_upper_factor_of_the_inverse():
    _, x, _, _ = problem(2, 7)
    h = x.T @ x / 64
    u, rung = inverse_factor(h, 0.01)
    damped = np.float64(h) + 0.01 * np.diag(np.float64(h)).mean() * np.eye(7)
    assert int(rung) == 0
    np.testing.assert_array_equal(np.tril(u, -1), np.zeros((7, 7)))
    np.testing.assert_allclose(u.T @ u, np.linalg.inv(damped), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 6), (8, 16)])
def test_codes_equal_the_textbook_elimination(shape):
    w, x, grid, offset = problem(*shape, seed=1, bits=3)
    h = x.T @ x / len(x)
    codes = gptq_round(w, h, grid.scale, offset, 0, 7)
    expected = numpy_gptq(w, h, np.float64(grid.scale), np.float64(offset), 7, 0.01)
    np.testing.assert_array_equal(codes, expected)


def test_a_diagonal_hessian_gives_rounding_to_nearest():
    w, _, grid, offset = problem(6, 9, bits=3)
    h = jnp.diag(jnp.arange(1.0, 10.0))
    for perm in (None, jnp.argsort(-jnp.diagonal(h))):
        codes = gptq_round(w, h, grid.scale, offset, 0, 7, perm=perm, damp=0.0)
        np.testing.assert_array_equal(codes, nearest_codes(w, grid))


@pytest.mark.parametrize("seed", range(5))
def test_loss_lies_between_brute_force_and_nearest(seed):
    w, x, grid, offset = problem(40, 5, seed)
    h = x.T @ x / len(x)
    codes = np.array(list(itertools.product(range(4), repeat=5)))
    s, o = np.float64(grid.scale), np.float64(offset)
    best = [
        (((codes * s[r] + o[r] - np.float64(w[r])) @ np.float64(x).T) ** 2).mean(1).min()
        for r in range(40)
    ]
    got = loss(gptq_round(w, h, grid.scale, offset, 0, 3), w, x, grid, offset)
    near = loss(nearest_codes(w, grid), w, x, grid, offset)
    assert np.all(got >= np.array(best) * (1 - 1e-6))
    assert got.sum() < 0.9 * near.sum()


def test_a_permutation_of_the_inputs_permutes_the_codes():
    w, x, grid, offset = problem(4, 8, 2)
    h = x.T @ x / len(x)
    perm = jnp.asarray(np.random.default_rng(0).permutation(8))
    inside = gptq_round(w, h, grid.scale, offset, 0, 3, perm=perm)
    outside = gptq_round(w[:, perm], h[perm][:, perm], grid.scale, offset, 0, 3)
    np.testing.assert_array_equal(inside[:, perm], outside)


def test_weights_on_the_grid_stay_there():
    w, x, grid, offset = problem(4, 8, 3)
    codes = nearest_codes(w, grid)
    on_grid = codes * grid.scale + offset
    np.testing.assert_array_equal(
        gptq_round(on_grid, x.T @ x / len(x), grid.scale, offset, 0, 3), codes
    )


def test_group_scales_and_vmap():
    w, x, _, _ = problem(4, 8, 4)
    grid = make_grid(w, 2, "group:4")
    h = x.T @ x / len(x)
    offset = -grid.scale * grid.zero
    one = gptq_round(w, h, grid.scale, offset, 0, 3)
    wide = [jnp.repeat(a, 4, 1) for a in (grid.scale, offset)]
    np.testing.assert_array_equal(one, gptq_round(w, h, *wide, 0, 3))
    hs = jnp.stack([h, jnp.diag(jnp.diagonal(h))])
    both = jax.jit(jax.vmap(lambda h: gptq_round(w, h, grid.scale, offset, 0, 3)))(hs)
    np.testing.assert_array_equal(both[0], one)
    np.testing.assert_array_equal(both[1], nearest_codes(w, grid))


def test_a_singular_hessian_is_an_error_without_damping_and_a_counted_rung_with_it():
    w, _, grid, offset = problem(3, 4)
    flat = jnp.ones((4, 4))  # rank one
    with pytest.raises(ValueError, match=r"singular with damp=0; use a larger damp"):
        gptq_round(w, flat, grid.scale, offset, 0, 3, damp=0)
    worse = flat - 0.05 * jnp.eye(4)  # one per cent on the diagonal does not repair it, ten do
    codes, rung = gptq_solve(w, worse, grid.scale, offset, 0, 3, damp=0.01)
    assert int(rung) == 1
    assert bool(((codes >= 0) & (codes <= 3)).all())
    hopeless = flat - 200 * jnp.eye(4)
    _, rung = gptq_solve(w, hopeless, grid.scale, offset, 0, 3, damp=0.01)
    assert int(rung) == LADDER


def test_fp_target_of_a_dead_prefix_is_the_weight_itself():
    w, zero = jnp.ones((2, 3)), jnp.zeros((3, 3))
    np.testing.assert_array_equal(fp_target(w, zero, zero), w)


def test_fp_target_is_the_least_squares_solution():
    rng = np.random.default_rng(5)
    w = rng.standard_normal((3, 6))
    x_fp = rng.standard_normal((80, 6))
    x_q = x_fp + 0.3 * rng.standard_normal((80, 6))
    c, h = x_fp.T @ x_q / 80, x_q.T @ x_q / 80
    expected = np.linalg.lstsq(x_q, x_fp @ w.T, rcond=None)[0].T
    got = fp_target(*(jnp.asarray(a, jnp.float32) for a in (w, c, h)), damp=1e-7)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    # an exact prefix leaves the weights, whatever the damping
    same = fp_target(*(jnp.asarray(a, jnp.float32) for a in (w, h, h)), damp=0.1)
    np.testing.assert_allclose(same, w, rtol=1e-4, atol=1e-5)
