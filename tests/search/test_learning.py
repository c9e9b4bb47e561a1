"""Targets, copies of the target net, nets that learn, and the study's own build."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.config import base
from qlab.lab.errors import UserError
from qlab.search import nets
from qlab.search.domains import domain, exact
from qlab.search.learning import learner, q_target, sample
from qlab.search.problem import EXHAUSTED, NODE_LIMIT, SOLVED


def linear_q(table):
    """A "net" without hidden layers whose Q-values are known in closed form."""
    table = jnp.asarray(table, jnp.float32)
    return {"dense": [], "blocks": [], "head": {"w": table, "b": jnp.zeros(table.shape[1])}}


def test_bootstrapped_target_by_hand(rng):
    """c + min Q over the next state; 0 for its minimum at a goal even where the net says else; 0 at goals."""
    d = domain("puzzle8")
    w = rng.normal(size=(81, 4))
    states = np.asarray(d.instances(0, 60)).copy()
    states[0] = [1, 2, 3, 4, 5, 6, 7, 8, 0]  # the goal
    states[1] = [1, 2, 3, 4, 5, 6, 7, 0, 8]  # one move right of it
    actions = rng.integers(0, 4, 60)
    actions[1] = 3
    got = q_target(d, linear_q(w), jnp.asarray(states), jnp.asarray(actions))
    for i, (s, a) in enumerate(zip(states, actions, strict=True)):
        after = np.asarray(d.problem.next_state(jnp.asarray(s), int(a)))
        want = 1 + (np.eye(9)[after].ravel() @ w).min()
        if i == 0:
            want = 0.0
        if i == 1:
            assert after.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0]
            want = 1.0
        np.testing.assert_allclose(float(got[i]), want, rtol=1e-5, atol=1e-5)


def test_exact_q_is_a_fixed_point_of_the_target():
    """With the exact Q in place of the net, the bootstrapped target is the exact Q (0 at the goal)."""
    d = domain("lightsout4", 1)
    problem, heuristic = exact(d, "q")
    s, a = sample(d, jax.random.key(1), 300, 12)
    y = jnp.take_along_axis(heuristic(s.astype(jnp.float32)), a[:, None], 1)[:, 0]
    after = jax.vmap(problem.next_state)(s, a)
    ahead = heuristic(after.astype(jnp.float32)).min(-1)
    np.testing.assert_array_equal(y, 1 + jnp.where(jax.vmap(problem.is_goal)(after), 0, ahead))


@pytest.mark.parametrize(("kind", "heads"), [("h", 1), ("q", 16), ("q_taken", 16)])
def test_labels_are_exact(kind, heads):
    """One step with a zero net: its loss is the mean square of the exact labels of the drawn states."""
    d = domain("lightsout4", 1)
    lr = learner(d, kind, widths=(8,), batch=64, k_max=10)
    state = lr.init(jax.random.key(0))
    assert state.params["head"]["w"].shape == (8, heads)
    state = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
    _, metrics = lr.step(state)
    s, a = sample(d, jax.random.fold_in(state.key, 0), 64, 10)
    q = np.asarray(exact(d, "q")[1](s.astype(jnp.float32)))
    want = {"h": np.asarray(d.distance(s)), "q": q, "q_taken": q[np.arange(64), np.asarray(a)]}[
        kind
    ]
    np.testing.assert_allclose(float(metrics["loss"]), np.square(want).mean(), rtol=1e-5)


@pytest.mark.parametrize(("sync", "copies"), [("every", [30, 60, 90]), ("loss", None)])
def test_target_net_is_copied_by_rule(sync, copies):
    d = domain("lightsout2", 1)
    lr = learner(
        d,
        "q_bootstrap",
        widths=(16,),
        batch=32,
        k_max=4,
        lr=1e-2,
        target_sync=sync,
        sync_every=30,
        sync_loss=0.2,
    )
    state, step, seen = lr.init(jax.random.key(0)), jax.jit(lr.step), []
    for i in range(1, 101):
        old = state
        state, _ = step(state)
        if int(state.since) == 0:
            seen.append(i)
            jax.tree.map(np.testing.assert_array_equal, state.target, state.params)
        else:
            jax.tree.map(np.testing.assert_array_equal, state.target, old.target)
            assert sync == "every" or int(state.since) < 20 or float(state.loss) >= 0.2
    assert seen == copies if copies else len(seen) >= 2 and min(np.diff([0, *seen])) >= 20


def test_bootstrapping_finds_the_exact_q():
    """On Lights Out 2 x 2 (16 states, all solvable) the bootstrapped net converges to the exact values."""
    d = domain("lightsout2", 1)
    lr = learner(
        d,
        "q_bootstrap",
        widths=(64, 64),
        batch=128,
        k_max=8,
        lr=3e-3,
        lr_decay=0.999,
        target_sync="every",
        sync_every=100,
    )
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: lr.step(s), s, None, length=2000)[0])
    state = run(lr.init(jax.random.key(0)))
    s = jnp.asarray(d.instances(0, 15))
    s = jnp.unique(s, axis=0)
    got = nets.q_values(state.params, jax.vmap(d.problem.encode)(s))
    want = exact(d, "q")[1](s.astype(jnp.float32))
    assert float(jnp.abs(got - want).max()) < 0.25


def test_net_shapes_blocks_and_gradients(rng):
    params = nets.net_init(jax.random.key(0), 12, 5, widths=(32, 16), blocks=2)
    x = jnp.asarray(rng.normal(size=(7, 12)), jnp.float32)
    assert nets.q_values(params, x).shape == (7, 5)
    np.testing.assert_array_equal(nets.min_q(params, x), nets.q_values(params, x).min(-1))
    grads = jax.grad(lambda p: jnp.square(nets.net_apply(p, x)).mean())(params)
    leaves = jax.tree.leaves(grads)
    assert len(leaves) == 2 * (2 + 4 + 1)
    assert all(np.isfinite(g).all() and np.abs(g).sum() > 0 for g in leaves)


def study(variant, **changes):
    config = importlib.import_module("qlab.configs.q_star").get_config(variant)
    config.update(changes)
    return importlib.import_module("qlab.experiments.q_star"), config


def arm(config, name):
    c = base("q_star")
    c.update(config)
    c.update(config.arms[name])
    c.arm = name
    return c


@pytest.mark.slow
def test_smoke_arms_are_optimal_and_count_deterministically():
    module, config = study("smoke", eval_states=20, block=10)
    costs = {}
    for name in config.arms:
        exp = module.build(arm(config, name))
        results = []
        for _ in range(2):
            state = exp.init(jax.random.key(0))
            for _ in range(exp.phases[-1].num_steps):
                state, _ = exp.phases[-1].step(state)
            results.append(exp.evaluate(state))
        a, b = results
        for key in a:
            if "time" not in key and "wall" not in key:
                np.testing.assert_array_equal(a[key], b[key])
        assert a["puzzle8_a4/cost_gap"] == 0
        assert a["puzzle8_a4/solved"] == 100
        assert a["puzzle8_a4/h_error"] == a["puzzle8_a4/h_over"] == 0
        costs[name] = a["puzzle8_a4/generated"]
    assert costs["qstar"] < costs["astar_deferred"] < costs["astar"]


def test_training_repeats_bit_for_bit_from_the_middle():
    """The draws of a step depend on the state alone."""
    module, config = study(
        "", domain=("lightsout4",), macro_depth=(1,), train_steps=6, eval_states=2, block=2
    )
    exp = module.build(arm(config, "qstar_bootstrap"))
    step = jax.jit(exp.phases[0].step)
    states = [exp.init(jax.random.key(3))]
    for _ in range(6):
        states.append(step(states[-1])[0])
    again = states[3]
    for _ in range(3):
        again = step(again)[0]
    for x, y in zip(jax.tree.leaves(states[6]), jax.tree.leaves(again), strict=True):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(x, y)
    first, last = (s["learn"]["lightsout4_a16"].params["head"]["w"] for s in (states[0], states[6]))
    assert np.abs(first - last).max() > 0


def test_seeds_give_the_same_names_however_their_searches_end():
    module, config = study("smoke", eval_states=4, block=2)
    exp = module.build(arm(config, "qstar"))
    state = exp.init(jax.random.key(0))
    found = []
    for ends in ([SOLVED] * 4, [SOLVED, NODE_LIMIT, EXHAUSTED, SOLVED]):
        state["result"]["puzzle8_a4"]["status"] = jnp.asarray(ends)
        found.append(exp.evaluate(state))
    assert set(found[0]) == set(found[1])
    shares = [[f[f"puzzle8_a4/{k}"] for k in ("solved", "node_limit", "failed")] for f in found]
    assert shares == [[100, 0, 0], [50, 25, 25]]


@pytest.mark.parametrize(
    ("name", "value"), [("astar", nets.h_value), ("qstar_bootstrap", nets.min_q)]
)
def test_the_study_compares_the_trained_heuristic_with_exact_costs(name, value):
    module, config = study(
        "", domain=("lightsout4",), macro_depth=(2,), train_steps=3, eval_states=2, block=2
    )
    exp = module.build(arm(config, name))
    state, step = exp.init(jax.random.key(3)), jax.jit(exp.phases[0].step)
    for _ in range(3):
        state, _ = step(state)
    out = exp.evaluate(state)
    d = domain("lightsout4", 2)
    h = value(state["learn"]["lightsout4_a136"].params, jax.vmap(d.problem.encode)(d.states))
    h, depth = np.asarray(h, np.float64), np.asarray(d.distance(d.states))
    want = [h[depth == k].mean() for k in range(1, 5)]
    np.testing.assert_array_equal(out["lightsout4_a136/exact"], np.arange(5))
    np.testing.assert_allclose(out["lightsout4_a136/learned"][1:], want, rtol=1e-4, atol=1e-5)
    error = np.abs(h - depth)[depth > 0].mean()
    np.testing.assert_allclose(out["lightsout4_a136/h_error"], error, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"net": "none"}, "needs a net"),
        ({"heuristic": "magic"}, "heuristic='magic'"),
        ({"net": "v"}, "net='v': expected h, q"),
        ({"block": 33}, "block=33"),
    ],
)
def test_bad_configs_say_so(changes, words):
    module, config = study("", **changes)
    with pytest.raises(Exception, match=words):
        module.build(arm(config, "astar"))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "depth"), [("full", 3), ("puzzle15", 1)])
def test_full_variants_build_and_take_a_step(variant, depth):
    """The cube and the 15-puzzle through the same code; sizes cut where they are only numbers."""
    module, config = study(
        variant, train_steps=2, train_batch=8, widths=(32, 16), eval_states=4, block=2
    )
    config.update(macro_depth=(depth,), B=16, node_limit=500, max_nodes=5000, max_entries=2_000_000)
    try:
        exp = module.build(arm(config, "qstar"))
    except UserError as e:
        pytest.skip(str(e))  # without DeepCubeA's states
    state = exp.init(jax.random.key(0))
    state, metrics = jax.jit(exp.phases[0].step)(state)
    assert np.isfinite(metrics["loss"])
    state, _ = exp.phases[-1].step(state)
    out = exp.evaluate(exp.phases[-1].step(state)[0])
    label = {"full": "cube3_a1884", "puzzle15": "puzzle15_a4"}[variant]
    assert 0 < out[f"{label}/generated"] < 600
    assert f"{label}/learned" not in out  # no exact costs
