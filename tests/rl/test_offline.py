"""Training on logs: shared draws, repeatability, and the learned solution against the exact one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.rl import exact
from qlab.rl.arsq import arsq
from qlab.rl.c2f import action_grid
from qlab.rl.cqn import cqn
from qlab.rl.envs import coupled
from qlab.rl.envs.tabular import joint_index, policy_value, solve
from qlab.rl.loop import OfflineGroup, offline_rl
from qlab.rl.rollout import episode_returns

GRID = action_grid(2, 1, 3)


def group(names, agent, *, alpha=0.1, mix=(0.2, 0.4, 0.4), noise=0.1, num_logged=300):
    tasks = {"chain": coupled.chain(), "separable": coupled.separable()}
    context = [
        exact.exact_task(tasks[n], mix, noise=noise, discount=0.9, grid=GRID, alpha=alpha)
        for n in names
    ]
    task = tasks[names[0]]
    return OfflineGroup(
        names=names,
        agent=agent,
        context=jax.tree.map(lambda *x: np.stack(x), *context),
        dataset=lambda c, k: coupled.draw_log(task, c.logged, k, num_logged, 0.9, 1.0),
        score=partial(exact.exact_score, task, agent, 0.9),
        inspect=partial(exact.exact_inspect, task, agent, GRID, alpha),
    )


def small_arsq(**kwargs):
    defaults = dict(num_levels=1, num_bins=3, alpha=0.1, hidden=(32,), weight_decay=0.0)
    return arsq(5, 2, **(defaults | {"learning_rate": 3e-3, "tau": 0.05} | kwargs))


def assert_same(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_arms_and_subsets_of_tasks_share_logs_and_initial_nets():
    agent = small_arsq()
    other = cqn(5, 2, num_levels=1, num_bins=3, hidden=(32,))
    build = partial(offline_rl, num_updates=20, batch_size=8)
    key = jax.random.key(3)
    experiment = build([group(("chain", "separable"), agent)])
    both = experiment.init(key).groups[0]
    alone = build([group(("separable",), agent)]).init(key).groups[0]
    rival = build([group(("chain", "separable"), other)]).init(key).groups[0]
    last = partial(jax.tree.map, lambda x: x[1:])
    assert_same(last(both.data), alone.data)
    assert_same(last(both.agent), alone.agent)
    assert_same(both.data, rival.data)
    changed = experiment.init(jax.random.key(4)).groups[0]
    assert not np.array_equal(changed.data.action, both.data.action)
    assert not np.array_equal(both.data.action[0], both.data.action[1])


def test_steps_repeat_bit_for_bit_and_minibatches_differ():
    experiment = offline_rl([group(("chain",), small_arsq())], num_updates=40, batch_size=8)
    step = jax.jit(experiment.phases[0].step)
    state = experiment.init(jax.random.key(0))
    first, metrics = step(state)
    second, later = step(first)
    again, _ = step(step(state)[0])
    assert_same(jax.tree.leaves(second.groups), jax.tree.leaves(again.groups))
    assert int(second.step) == 2
    assert float(metrics["loss"]) != float(later["loss"])
    assert experiment.num_steps == 2


def test_every_update_draws_its_own_minibatch_from_the_log():
    """An agent that only remembers the actions of its last batch."""
    agent = small_arsq()._replace(
        init=lambda key: jnp.zeros((8, 2)),
        act=lambda state, key, obs, greedy=False: jnp.zeros((5, 2)),
        update=lambda state, key, batch: (batch.action, {"loss": jnp.float32(0)}),
    )
    build = partial(offline_rl, [group(("chain",), agent)], batch_size=8)
    one_by_one, in_pairs = (
        build(num_updates=4, updates_per_step=1),
        build(num_updates=4, updates_per_step=2),
    )
    state, seen = one_by_one.init(jax.random.key(0)), []
    log = {tuple(a) for a in np.asarray(state.groups[0].data.action[0]).tolist()}
    step = jax.jit(one_by_one.phases[0].step)
    for _ in range(4):
        state = step(state)[0]
        seen.append(np.asarray(state.groups[0].agent[0]))
        assert {tuple(a) for a in seen[-1].tolist()} <= log
    assert len({x.tobytes() for x in seen}) == 4
    pair = in_pairs.phases[0].step(in_pairs.init(jax.random.key(0)))[0]
    np.testing.assert_array_equal(pair.groups[0].agent[0], seen[1])


def test_updates_that_do_not_fill_a_step_are_refused():
    with pytest.raises(ValueError, match="num_updates=30"):
        offline_rl([group(("chain",), small_arsq())], num_updates=30, batch_size=8)


def train(experiment, seed=0):
    def run(state):
        def one(s, _):
            return experiment.phases[0].step(s)[0], None

        return jax.lax.scan(one, state, None, experiment.num_steps)[0]

    state = jax.jit(run)(experiment.init(jax.random.key(seed)))
    return {k: np.asarray(v) for k, v in jax.jit(experiment.evaluate)(state).items()}


def test_value_and_joint_policy_match_soft_value_iteration():
    """Uniform log of the coupled chain: every joint action seen, so V and pi are determined."""
    agent = small_arsq()
    chain = group(("chain",), agent, noise=1.0, num_logged=1000)
    out = train(offline_rl([chain], num_updates=3000, batch_size=64))
    assert out["chain/value_error"] < 0.02
    assert out["chain/q_error"] < 0.02
    assert out["chain/policy_tv"] < 0.08
    # At this temperature the soft optimum itself lingers for its entropy; the agent does the same.
    task = coupled.chain()
    policy = np.eye(9)[solve(task.mdp, 0.9, 0.1).q.argmax(-1)]
    value = task.mdp.start @ policy_value(task.mdp, policy, 0.9)
    context = jax.tree.map(lambda x: x[0], chain.context)
    want = 100 * (value - context.low) / (context.best - context.low)
    assert out["chain/score"] == pytest.approx(float(want), abs=1e-2)


@pytest.mark.slow
def test_critics_without_dimension_coupling_settle_for_the_safe_action():
    out = {}
    for name, agent in (
        ("level", small_arsq(conditioning="level", alpha=0.01)),
        ("cqn", cqn(5, 2, num_levels=1, num_bins=3, hidden=(32,), learning_rate=3e-3, tau=0.05)),
    ):
        chain = group(("chain",), agent, alpha=0.0, num_logged=1000)
        out[name] = train(offline_rl([chain], num_updates=1000, batch_size=64))
    for name in out:
        assert out[name]["chain/score"] < 80, name
        assert out[name]["chain/optimal_states"] < 0.5, name


def test_score_is_0_for_the_uniform_and_100_for_an_optimal_policy():
    context = exact.exact_task(
        coupled.chain(), (1.0, 0.0, 0.0), noise=0.1, discount=0.9, grid=GRID, alpha=0.0
    )
    fixed = small_arsq()._replace(act=lambda state, key, obs, greedy=False: state)
    score = partial(exact.exact_score, coupled.chain(), fixed, 0.9, context)
    best = score(jnp.full((5, 2), 0.9), jax.random.key(0))["score"]
    assert float(best) == pytest.approx(100, abs=1e-3)
    idle = score(jnp.asarray([[0.0, 0.9]] * 5), jax.random.key(0))["score"]
    low, high = float(context.low), float(context.best)
    assert float(idle) == pytest.approx(100 * (0 - low) / (high - low), abs=1e-3)


@pytest.mark.parametrize("mix", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.3, 0.3, 0.3)])
def test_a_mix_that_is_no_distribution_is_refused(mix):
    with pytest.raises(ValueError, match="mix="):
        exact.exact_task(coupled.chain(), mix, noise=0.1, discount=0.9, grid=GRID, alpha=0.0)


def test_errors_count_logged_pairs_only_and_read_bins_in_order():
    """Off by 0.25 on the one logged action (bins 2, 0), by 1 on its mirror image, which is not logged."""
    task = coupled.separable()
    context = exact.exact_task(
        task, (0.0, 1.0, 0.0), noise=0.0, discount=0.9, grid=GRID, alpha=0.05
    )
    draw = jax.jit(lambda k: coupled.draw_log(task, context.logged, k, 200, 0.9, 1.0))
    data = draw(jax.random.key(0))
    q = jnp.asarray(context.soft.q).at[:, 6].add(0.25).at[:, 2].add(1.0)
    agent = small_arsq()._replace(
        act=lambda state, key, obs, greedy=False: jnp.full((5, 2), 0.9),
        value=lambda state, obs: context.soft.v + jnp.asarray([0.0, 0, -0.5, 0, 0]),
        q_value=lambda state, obs, action: q[obs.argmax(-1), joint_index(action, 3)],
    )
    out = exact.exact_inspect(task, agent, GRID, 0.05, context, None, data, jax.random.key(0))
    assert float(out["q_error"]) == pytest.approx(0.25, abs=1e-5)
    assert float(out["value_error"]) == pytest.approx(0.5, abs=1e-5)
    assert float(out["optimal_states"]) == 1.0
    assert float(out["argmax_states"]) < 1.0
    want = np.exp(np.float64(q) / 0.05)
    want /= want.sum(-1, keepdims=True)
    tv = np.abs(want - context.soft.policy).sum(-1).max() / 2
    assert float(out["policy_tv"]) == pytest.approx(tv, abs=1e-4)
    np.testing.assert_allclose(out["joint_q"], q[0].reshape(3, 3))


def test_episode_returns_are_sums_inside_each_episode():
    rng = np.random.default_rng(0)
    reward, ends = rng.normal(size=60).astype(np.float32), rng.random(60) < 0.3
    got = episode_returns(jnp.asarray(reward), jnp.asarray(ends), 0.8)
    start = 0
    for stop in [*(np.flatnonzero(ends) + 1), 60]:
        total = sum(0.8**i * float(r) for i, r in enumerate(reward[start:stop]))
        np.testing.assert_allclose(got[start:stop], total, atol=1e-5)
        start = stop
