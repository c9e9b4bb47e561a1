"""Searches over a pool, against scipy's distributions, dense linear algebra, and what a search must never do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from qlab.lab.errors import UserError
from qlab.quantum import circuit_spec as cs
from qlab.quantum import qas_bo as bo
from qlab.quantum import qas_pool as qp
from qlab.quantum import qas_search as qs

P, Q = 120, 41
POOL = qp.PoolSpec(3, (4, 4), (0, 4), P)


def look_up(scores, index):
    return scores[index]


def table(scores):
    return jax.tree_util.Partial(look_up, jnp.asarray(scores, jnp.float32))


@pytest.fixture(autouse=True)
def x32():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def drawn():
    with jax.enable_x64(False):
        pool = jax.tree.map(jnp.asarray, qp.sample_circuits(jax.random.key(1), POOL))
        return pool, qp.encode_pool(pool, 3)


@pytest.fixture(scope="module")
def blobs():
    """Embeddings in which the ten good circuits lie together, 4 deviations from the rest."""
    r = np.random.default_rng(0)
    emb = r.standard_normal((P, 3)).astype(np.float32)
    good = np.sort(r.choice(P, 10, replace=False))
    emb[good] = np.array([4.0, 0, 0]) + 0.3 * r.standard_normal((10, 3))
    score = np.full(P, 0.2, np.float32) + 0.05 * r.random(P).astype(np.float32)
    score[good] = 1.0
    return jnp.asarray(emb), score


# ---- random -------------------------------------------------------------------------------------


def test_random_search_hits_are_hypergeometric():
    """Property 6 of the card: mean within 5 standard errors, and the variance."""
    scores = np.zeros(P)
    scores[:13] = 1
    keys = jax.random.split(jax.random.key(0), 4000)
    out = jax.vmap(lambda k: qs.random_search(k, P, table(scores), Q))(keys)
    hits = np.asarray((out.score > 0.5).sum(1))
    law = stats.hypergeom(P, 13, Q)
    assert law.mean() == pytest.approx(qs.expected_hits(13, P, Q))
    assert abs(hits.mean() - law.mean()) < 5 * law.std() / np.sqrt(4000)
    assert hits.var() == pytest.approx(law.var(), rel=0.12)


# ---- expected improvement and the regression ----------------------------------------------------


def test_expected_improvement_is_the_integral():
    for mean, sd, target in [(0.3, 0.2, 0.9), (1.2, 0.4, 0.9), (0.9, 1e-2, 0.9), (-2.0, 0.7, 0.9)]:
        law = stats.norm(mean, sd)
        want = integrate.quad(lambda y: (y - target) * law.pdf(y), target, target + 12 * sd + 3,
                              epsabs=1e-14, points=[max(mean, target)])[0]  # fmt: skip
        got = float(bo.expected_improvement(jnp.array(mean), jnp.array(sd), target))
        assert got == pytest.approx(want, rel=2e-4, abs=1e-9)


def test_expected_improvement_is_positive_rises_and_has_its_limit():
    """Property 7 of the card, in float32 far into the tail."""
    mean = jnp.linspace(-1, 2, 3001)
    for sd in (1e-6, 0.01, 0.05, 0.1, 1.0, 30.0):
        gain = np.asarray(bo.expected_improvement(mean, jnp.array(sd), 0.9), np.float64)
        assert (gain >= 0).all()
        assert (np.diff(gain) >= -2e-7 * np.abs(gain[1:])).all()
    sharp = bo.expected_improvement(mean, jnp.array(1e-9), 0.9)
    np.testing.assert_allclose(sharp, np.maximum(mean - 0.9, 0), atol=1e-6)
    np.testing.assert_allclose(bo.expected_improvement(mean, jnp.array(0.0), 0.9), sharp, atol=1e-6)
    far = bo.expected_improvement(jnp.array([0.9 - 0.05 * 10]), jnp.array(0.05), 0.9)
    u = -10.0  # the exact value there, from the scaled complementary error function
    want = 0.05 * stats.norm.pdf(u) * (1 + u * stats.norm.cdf(u) / stats.norm.pdf(u))
    assert float(far[0]) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("num", [9, 40])  # fewer and more pairs than features
def test_regression_is_dense_bayes_with_the_best_evidence(num, rng):
    m, padding = 12, 7
    phi = np.tanh(rng.standard_normal((num + padding, m)))
    y = phi @ (0.3 * rng.standard_normal(m)) + 0.1 * rng.standard_normal(num + padding)
    weight = (np.arange(num + padding) < num).astype(float)
    with jax.enable_x64(True):
        post = bo.blr_posterior(jnp.asarray(phi), jnp.asarray(y), jnp.asarray(weight), 500)
        alpha, beta = float(post.alpha), float(post.beta)
        real, t = phi[:num], y[:num]
        precision = alpha * np.eye(m) + beta * real.T @ real
        np.testing.assert_allclose(
            post.mean, beta * np.linalg.solve(precision, real.T @ t), atol=1e-8
        )
        mean, sd = bo.blr_predict(post, jnp.asarray(phi))
        var = np.einsum("pi,ij,pj->p", phi, np.linalg.inv(precision), phi) + 1 / beta
        np.testing.assert_allclose(sd, np.sqrt(var), rtol=1e-8)
        np.testing.assert_allclose(mean, phi @ np.asarray(post.mean), atol=1e-10)

        def dense(log_ab):
            cov = real @ real.T * np.exp(-log_ab[0]) + np.eye(num) * np.exp(-log_ab[1])
            return stats.multivariate_normal(np.zeros(num), cov, allow_singular=True).logpdf(t)

        eigen, basis = np.linalg.eigh(real.T @ real)
        args = (jnp.asarray(eigen), jnp.asarray(basis.T @ (real.T @ t)), t @ t, num)
        for log_ab in ([0.0, 1.0], [2.0, 4.0], [np.log(alpha), np.log(beta)]):
            got = float(bo.log_evidence(jnp.asarray(log_ab), *args))
            assert got == pytest.approx(dense(log_ab), abs=1e-6)
        best = optimize.minimize(lambda x: -dense(x), [0.0, 2.0], method="Nelder-Mead",
                                 options=dict(xatol=1e-6, fatol=1e-10, maxiter=2000))  # fmt: skip
        assert dense([np.log(alpha), np.log(beta)]) >= -best.fun - 1e-3


@pytest.mark.slow
def test_the_net_sees_only_its_pairs(rng):
    x = jnp.asarray(rng.standard_normal((20, 3)), jnp.float32)
    y = jnp.asarray(rng.random(20), jnp.float32)
    for batch in (0, 4):
        spec = bo.DngoSpec(hidden=8, epochs=5, batch=batch)
        fit = jax.jit(lambda x, y, n, spec=spec: bo.fit_net(jax.random.key(0), x, y, n, spec))
        net, other = fit(x, y, 11), fit(x.at[11:].set(50.0), y.at[11:].set(-3.0), 11)
        jax.tree.map(np.testing.assert_array_equal, net, other)
        more = fit(x, y, 20)
        assert not np.array_equal(net["w"], more["w"])


# ---- what every search must keep ----------------------------------------------------------------


def searches(drawn):
    pool, graphs = drawn
    raw = qp.flat_rows(graphs)
    dngo = bo.DngoSpec(Q, 8, 5, 16, 20, 0)
    walk = qs.ReinforceSpec(Q, 6, (2, 4, 6, 8), hidden=8)
    evolve = qs.EvolutionSpec(Q, 12, 4, 6)
    rate = qs.PredictorSpec(Q, 12, 3, 8, 3, 4)
    return {
        "bo": lambda k, emb, f: bo.dngo_search(k, emb, f, dngo),
        "reinforce": lambda k, emb, f: qs.reinforce_search(k, emb, f, walk),
        "evo": lambda k, emb, f: qs.evolution_search(k, raw, pool, f, evolve, num_qubits=3),
        "predictor": lambda k, emb, f: qs.predictor_search(k, graphs, f, rate),
    }


@pytest.mark.parametrize(
    "name",
    ["bo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("reinforce", "evo", "predictor"))],
)
def test_every_query_is_another_circuit_and_scores_are_the_tables(name, drawn, blobs):
    emb, score = blobs
    run = searches(drawn)[name]
    order, found = run(jax.random.key(3), emb, table(score))
    assert order.shape == found.shape == (Q,)
    assert len(set(np.asarray(order).tolist())) == Q
    assert 0 <= int(order.min()) <= int(order.max()) < P
    np.testing.assert_array_equal(found, score[np.asarray(order)])
    again = run(jax.random.key(3), emb, table(score))
    np.testing.assert_array_equal(again.order, order)
    # a score that is not looked up cannot matter
    unseen = np.setdiff1d(np.arange(P), order)
    hidden = score.copy()
    hidden[unseen] = 1.0 - hidden[unseen]
    np.testing.assert_array_equal(run(jax.random.key(3), emb, table(hidden)).order, order)


def test_bayesian_optimisation_finds_what_lies_together(drawn, blobs):
    emb, score = blobs
    run = searches(drawn)["bo"]
    keys = jax.random.split(jax.random.key(4), 4)
    hits = [int((run(k, emb, table(score)).score > 0.5).sum()) for k in keys]
    shuffled = jnp.asarray(np.random.default_rng(1).permutation(np.asarray(emb)))
    blind = [int((run(k, shuffled, table(score)).score > 0.5).sum()) for k in keys]
    assert np.mean(hits) > qs.expected_hits(10, P, Q) + 4
    assert np.mean(hits) > np.mean(blind) + 2


@pytest.mark.slow
def test_reinforce_climbs_a_slope():
    """Scores rise along one axis of the embedding; the other axis says nothing."""
    emb = jax.random.normal(jax.random.key(0), (1500, 2))
    spec = qs.ReinforceSpec(120, 6, (2, 4, 6, 8), hidden=8, learning_rate=0.03)
    keys = jax.random.split(jax.random.key(1), 6)
    run = jax.jit(lambda f: jax.lax.map(lambda k: qs.reinforce_search(k, emb, f, spec).order, keys))
    mean = [
        float(
            np.asarray(emb)[np.asarray(run(table(jax.nn.sigmoid(3 * emb[:, axis])))), axis].mean()
        )
        for axis in (0, 1)
    ]
    assert min(mean) > 0.4  # standard error of blind search: 0.04


@pytest.mark.slow
def test_bayesian_optimisation_evaluates_the_largest_expected_improvement(drawn, blobs):
    """The first round redone by hand from the same keys."""
    emb, score = blobs
    spec = bo.DngoSpec(Q, 8, 5, 16, 20, 0)
    order, _ = bo.dngo_search(jax.random.key(3), emb, table(score), spec)
    start = np.asarray(order[:8])
    k_run = jax.random.split(jax.random.key(3))[1]
    x, y = emb[order[:8]], jnp.asarray(score)[order[:8]]
    fit = jax.jit(lambda k: bo.fit_net(k, x, y, jnp.int32(8), spec))
    net = fit(jax.random.fold_in(k_run, 0))
    f = lambda x: np.tanh(np.asarray(x) @ np.asarray(net["w"]) + np.asarray(net["b"]))  # noqa: E731
    post = jax.jit(bo.blr_posterior)(jnp.asarray(f(x)), y, jnp.ones(8))
    mean, sd = bo.blr_predict(post, jnp.asarray(f(emb)))
    gain = np.array(bo.expected_improvement(mean, sd, 0.9))
    gain[start] = -1
    assert set(np.argsort(-gain)[:5].tolist()) == set(np.asarray(order[8:13]).tolist())


@pytest.mark.slow  # two compilations
def test_stages_change_the_padding_only(blobs, monkeypatch):
    emb, score = blobs
    orders = []
    for stage in (16, 2):  # of the 7 rounds: one stage, three
        monkeypatch.setattr(bo, "_STAGE", stage)
        run = jax.jit(bo.dngo_search.__wrapped__, static_argnames="spec")
        spec = bo.DngoSpec(Q, 8, 5, 16, 20, 0)
        orders.append(np.asarray(run(jax.random.key(3), emb, table(score), spec).order))
    np.testing.assert_array_equal(*orders)


@pytest.mark.slow
def test_batches_of_reinforce_grow_with_the_score(drawn):
    """A pool of one score fixes every width: first 6, then 2, 4, 6 or 8; the policy moves at batch ends only."""
    emb = jax.random.normal(jax.random.key(0), (P, 3))
    spec = qs.ReinforceSpec(Q, 6, (2, 4, 6, 8), hidden=8)
    same = {}
    for value in (0.1, 0.6, 0.8, 1.0):
        same[value] = np.asarray(
            qs.reinforce_search(jax.random.key(5), emb, table(np.full(P, value)), spec).order
        )
    # until the first batch ends (start + 6 steps) the scores cannot matter, then they do
    for value in (0.6, 0.8, 1.0):
        np.testing.assert_array_equal(same[value][:7], same[0.1][:7])
        assert not np.array_equal(same[value], same[0.1])


@pytest.mark.slow  # two compilations
def test_reinforce_learns_nothing_from_a_reward_at_its_baseline(drawn):
    """(r - b) = 0 gives no gradient: the policy of another learning rate walks the same way."""
    emb = jax.random.normal(jax.random.key(0), (P, 3))
    spec = qs.ReinforceSpec(Q, 6, (6, 6, 6, 6), hidden=8)
    flat = table(np.full(P, 0.5))
    a = qs.reinforce_search(jax.random.key(5), emb, flat, spec).order
    b = qs.reinforce_search(jax.random.key(5), emb, flat, spec._replace(learning_rate=0.0)).order
    np.testing.assert_array_equal(a, b)


def test_a_mutation_changes_one_slot_and_stays_a_circuit(drawn):
    pool, _ = drawn
    padded = jax.tree.map(lambda x: jnp.pad(x[0], ((0, 2),) + ((0, 0),) * (x.ndim - 2)), pool)
    keys = jax.random.split(jax.random.key(6), 200)
    born = jax.device_get(jax.jit(jax.vmap(lambda k: qs.mutate(k, padded, 3)))(keys))
    cs.check_spec(born, 3)
    changed = sum(np.asarray(a != b) for a, b in zip(born[:3], padded[:3], strict=True)) > 0
    assert set(changed.sum(1)) <= {0, 1}
    assert changed[:, :4].any(0).all()
    assert not changed[:, 4:].any()  # empty slots stay empty
    assert (born.q1 == (born.q0 + 1) % 3)[born.gate == cs.CNOT].all()


@pytest.mark.slow
def test_a_mutation_stays_in_the_gate_set(drawn):
    one = jax.tree.map(lambda x: x[0], drawn[0])
    keys = jax.random.split(jax.random.key(8), 100)
    born = jax.jit(jax.vmap(lambda k: qs.mutate(k, one, 3, ("H", "CZ"))))(keys)
    fresh = np.asarray(born.gate)[np.asarray(born.gate != one.gate)]
    assert set(fresh) == {cs.GATES.index("H"), cs.CZ}


def test_too_many_queries_get_one_line():
    with pytest.raises(UserError, match=r"use 1\.\.50"):
        qs.check_queries(51, 50)
