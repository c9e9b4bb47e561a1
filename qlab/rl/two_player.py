"""Adversarial training as an experiment: two agents take turns, then a fresh adversary tests the result.

One step of "train" is one iteration: E episodes of fixed length in which only the adversary learns, then
as many in which only the protagonist does; each keeps its own replay, filled in its own turns. In every
iteration each environment draws a temperature; both players see it, where it varies, and the adversary's soft
critic uses it for the transitions of that episode. Without an adversary both turns are the protagonist's.
"best_response" then trains a new adversary against the frozen, greedy protagonist, which is told temperature 0:
the worst adversary.

What makes one kind of adversary differ from another is data in the state (`Plan`), not code: all arms with an
adversary share one compiled program.

An episode that ends early is followed by another at the same temperature, so that all arms take the
same number of steps; the returns that the teacher sees are those of the first ones.
Letters: E = environments side by side, H = steps of an episode, D, K = sizes of the two actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.errors import UserError, nearest
from qlab.lab.experiment import Experiment, Phase
from qlab.rl import teacher as tt
from qlab.rl.agent import Agent, Transition
from qlab.rl.envs.env import TwoPlayerEnv
from qlab.rl.replay import (
    Replay,
    check_fits,
    replay_add,
    replay_bytes,
    replay_init,
    replay_sample,
)

TEACHERS = ("gamma", "linear", "step", "none", "force")
ADVERSARIES = ("sac_adaptive", "constant_temp", "sac", "none")
LEARNED = -1.0  # a temperature that SAC reads as "the one I learn"


class DuelConfig(NamedTuple):
    """How two players train.

    Attributes:
      iterations, best_response: numbers of steps of the two phases (a step of the second is one turn).
      num_envs, horizon: E, H. steps_per_update: environment steps for one update.
      batch_size, capacity, learning_starts: of each replay, in rows; before the last nobody learns.
      discount: gamma. adversary: a key of ADVERSARIES. teacher: one of TEACHERS. conc0: its start.
      gamma: the Gamma's settings. visible: whether the players see the temperature.
      force0: share of the force with which the force curriculum begins.
    """

    iterations: int
    best_response: int
    num_envs: int
    horizon: int
    steps_per_update: int
    batch_size: int
    capacity: int
    learning_starts: int
    discount: float
    adversary: str = "sac_adaptive"
    teacher: str = "gamma"
    conc0: float = 50.0
    gamma: tt.TeacherConfig = tt.TeacherConfig()
    visible: bool = True
    force0: float = 0.1


class Plan(NamedTuple):
    """The curriculum as numbers.

    Attributes:
      high, low: f32[], the adversary's temperature first and last; LEARNED where it learns its own.
      gamma: bool[], the Gamma teacher draws the temperatures instead. sudden: bool[], low follows high at
        half time instead of by and by.
      visible: bool[], the players see the temperature. force0: f32[], share of the force at the start.
      span: f32[], iterations from first to last. rule: the Gamma teacher's numbers.
    """

    high: jax.Array
    low: jax.Array
    gamma: jax.Array
    sudden: jax.Array
    visible: jax.Array
    force0: jax.Array
    span: jax.Array
    rule: tt.TeacherConfig


class Learner(NamedTuple):
    """state: of the agent. replay: of its own turns."""

    state: Any
    replay: Replay


class DuelState(NamedTuple):
    """key: of the seed. step: i32[], turns so far. adversary is () where there is none."""

    key: jax.Array
    step: jax.Array
    protagonist: Learner
    adversary: Any
    fresh: Learner
    teacher: tt.TeacherState
    plan: Plan


# (key, obs with temperature f32[E, S+1]) -> action f32[E, .]
Policy = Callable[[jax.Array, jax.Array], jax.Array]


def see(obs: jax.Array, temps: jax.Array) -> jax.Array:
    """obs f32[E, S] and temperatures as the players see them, f32[E] -> f32[E, S+1]."""
    return jnp.concatenate([obs, temps[:, None]], -1)


def play(
    env: TwoPlayerEnv,
    key: jax.Array,
    policies: tuple[Policy, Policy],
    shown: jax.Array,
    num_steps: int,
    discount: float = 1.0,
) -> jax.Array:
    """Return of one episode (at most num_steps) in each of E environments, f32[E]; shown: f32[E]."""

    n = len(shown)

    def one(carry, keys):
        states, obs, weight, total = carry
        x = see(obs, shown)
        a, o = policies[0](keys[n], x), policies[1](keys[n + 1], x)
        states, ts = jax.vmap(env.step)(states, a, o, keys[:n])
        total += weight * ts.reward
        weight *= discount * ~(ts.terminated | ts.truncated)
        return (states, ts.obs, weight, total), None

    # One draw for all keys: each draw of its own would take longer to compile than to run.
    keys = jax.random.split(key, (num_steps + 1, n + 2))
    states, obs = jax.vmap(env.reset)(keys[-1, :n])
    carry = (states, obs, jnp.ones(n), jnp.zeros(n))
    return jax.lax.scan(one, carry, keys[:-1])[0][3]


def robustness_grid(
    key: jax.Array,
    policy: Policy,
    make_env: Callable[[Any], TwoPlayerEnv],
    physics: Any,
    num_episodes: int,
    num_steps: int,
) -> jax.Array:
    """Mean return f32[G1, G2] without adversary, in environments with the physics f32[G1, G2] on each leaf.

    All cells share their random numbers: what differs is the physics.
    """

    def cell(p):
        env = make_env(p)
        still = lambda k, x: jnp.zeros((num_episodes, env.adversary_dim))  # noqa: E731
        return play(env, key, (policy, still), jnp.zeros(num_episodes), num_steps).mean()

    return jax.vmap(jax.vmap(cell))(physics)


def make_plan(config: DuelConfig) -> Plan:
    """The numbers of a teacher and an adversary.

    linear: from conc0 / rate to conc_target / rate; step: the first for one half, then the second; none and
    force: the first throughout. A temperature that never varies is not shown: there is nothing to tell, and
    the tests' 0 would be new to a player that has met one number only.
    """
    c = config
    high, low = c.conc0 / c.gamma.rate, c.gamma.conc_target / c.gamma.rate
    varies = c.teacher in ("gamma", "linear", "step")
    if c.adversary not in ("sac_adaptive", "constant_temp"):
        high, varies = LEARNED, False
    return Plan(
        high=jnp.float32(high),
        low=jnp.float32(low if varies else high),
        gamma=jnp.bool_(varies and c.teacher == "gamma"),
        sudden=jnp.bool_(c.teacher == "step"),
        visible=jnp.bool_(varies and c.visible),
        force0=jnp.float32(c.force0 if c.teacher == "force" else 1.0),
        span=jnp.float32(max(c.iterations - 1, 1)),
        rule=jax.tree.map(jnp.asarray, c.gamma),
    )


def schedule(
    plan: Plan, iteration: jax.Array, key: jax.Array, conc: jax.Array, n: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Temperatures f32[n] of an iteration, as the players see them, and the share f32[] of the force."""
    progress = jnp.minimum(iteration / plan.span, 1.0)
    sloped = plan.high + (plan.low - plan.high) * progress
    planned = jnp.where(plan.sudden, jnp.where(progress < 0.5, plan.high, plan.low), sloped)
    temps = jnp.where(plan.gamma, tt.sample_gamma(key, conc, plan.rule.rate, n), planned)
    return temps, temps * plan.visible, plan.force0 + (1 - plan.force0) * progress


def _check(c: DuelConfig, env: TwoPlayerEnv, num_seeds: int) -> int:
    """Updates a vector step."""
    if c.adversary not in ADVERSARIES:
        raise UserError(
            f"adversary_algo={c.adversary!r} is not known{nearest(c.adversary, ADVERSARIES)}"
        )
    if c.teacher not in TEACHERS:
        raise UserError(f"teacher={c.teacher!r} is not known{nearest(c.teacher, TEACHERS)}")
    if c.num_envs % c.steps_per_update:
        raise UserError(
            f"steps_per_update={c.steps_per_update} does not divide num_envs={c.num_envs}; an update "
            "follows every so many of the environments' steps"
        )
    if c.capacity < max(c.num_envs, c.learning_starts):
        raise UserError(
            f"replay_size={c.capacity}: learning_starts={c.learning_starts} rows must fit"
        )
    widths = [(env.action_dim, 1), (env.adversary_dim, 1 + (c.adversary != "none"))]
    rows = sum(n * replay_bytes(_row(env, d), c.capacity) for d, n in widths)
    check_fits(num_seeds * rows, "replay_size")
    return c.num_envs // c.steps_per_update


def _row(env: TwoPlayerEnv, action_dim: int) -> Transition:
    def f32(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    s = env.obs_dim + 1
    return Transition(f32(s), f32(action_dim), f32(), f32(), f32(s), None, f32())


def duel(
    env: TwoPlayerEnv,
    make_agent: Callable[[int, int, Any], Agent],
    config: DuelConfig,
    evaluate: Callable[[jax.Array, Policy, Policy | None, Policy], dict[str, jax.Array]],
    num_seeds: int = 1,
) -> Experiment[DuelState]:
    """Train, best_response, evaluate.

    Args:
      make_agent: (observation size, action size, "learned" | "batch") -> Agent.
      evaluate: (key, greedy protagonist, greedy own adversary or None, greedy fresh adversary) -> metrics.
      num_seeds: trained side by side, for the check of the memory.

    What a seed varies: networks, exploration, starts, temperatures and minibatches, each with its own key;
    arms share those of the networks.
    Raises:
      UserError: see the settings; a replay that does not fit the memory.
    """
    c = config
    updates_per_step = _check(c, env, num_seeds)
    size = env.obs_dim + 1
    protagonist = make_agent(size, env.action_dim, "learned")
    adversary = make_agent(size, env.adversary_dim, "batch")
    opposed = c.adversary != "none"
    fresh = make_agent(size, env.adversary_dim, "learned")

    def learner(agent: Agent, key: jax.Array, action_dim: int) -> Learner:
        return Learner(agent.init(key), replay_init(_row(env, action_dim), c.capacity))

    def init_all(key: jax.Array, teacher: tt.TeacherState, plan: Plan) -> DuelState:
        k = [jax.random.fold_in(key, 100 + i) for i in range(3)]
        return DuelState(
            key=key,
            step=jnp.int32(0),
            protagonist=learner(protagonist, k[0], env.action_dim),
            adversary=learner(adversary, k[1], env.adversary_dim) if opposed else (),
            fresh=learner(fresh, k[2], env.adversary_dim),
            teacher=teacher,
            plan=plan,
        )

    n, zeros, full = c.num_envs, jnp.zeros(c.num_envs), jnp.float32(1)

    def turn(key, agent: Agent, me: Learner, other: Policy, sign: float, temps, shown, share):
        """H steps in which `me` learns: sign 1 the protagonist, -1 the adversary."""

        def one(carry, keys):
            me, states, obs, weight, gain = carry
            x = see(obs, shown)
            mine, theirs = agent.act(me.state, keys[n], x), other(keys[n + 1], x)
            a, o = (mine, theirs) if sign > 0 else (theirs, mine)
            states, ts = jax.vmap(env.step)(states, a, share * o, keys[:n])
            rows = Transition(
                obs=x,
                action=mine,
                reward=sign * ts.reward,
                discount=c.discount * (1.0 - ts.terminated),
                next_obs=see(ts.final_obs, shown),
                temperature=temps,
            )
            me = me._replace(replay=replay_add(me.replay, rows))
            me, metrics = learn(me, keys[n + 2 :].reshape(updates_per_step, 2))
            gain += weight * ts.reward
            weight *= c.discount * ~(ts.terminated | ts.truncated)
            return (me, states, ts.obs, weight, gain), metrics

        def learn(me: Learner, keys):
            def update(state, k):
                batch = replay_sample(me.replay, k[0], c.batch_size)
                new, metrics = agent.update(state, k[1], batch)
                ready = me.replay.size >= c.learning_starts
                new = jax.tree.map(lambda a, b: jnp.where(ready, a, b), new, state)
                return new, {k: metrics[k] for k in ("loss", "entropy", "alpha")}

            state, metrics = jax.lax.scan(update, me.state, keys)
            return me._replace(state=state), metrics

        keys = jax.random.split(key, (c.horizon + 1, n + 2 + 2 * updates_per_step))
        states, obs = jax.vmap(env.reset)(keys[-1, :n])
        carry = (me, states, obs, jnp.ones(n), jnp.zeros(n))
        (me, *_, gain), metrics = jax.lax.scan(one, carry, keys[:-1])
        return me, gain, jax.tree.map(jnp.mean, metrics)

    def nothing(key, x):
        return jnp.zeros((x.shape[0], env.adversary_dim))

    def exploring(agent: Agent, state: Any) -> Policy:
        return lambda key, x: agent.act(state, key, x)

    def greedy(agent: Agent, state: Any) -> Policy:
        return lambda key, x: agent.act(state, key, x, greedy=True)

    def alone(state: DuelState):
        def one(me, key):
            me, gain, m = turn(key, protagonist, me, nothing, 1.0, zeros, zeros, full)
            return me, {**m, "discounted_return": gain.mean()}

        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        me, m = jax.lax.scan(one, state.protagonist, jax.random.split(key))
        return state._replace(step=state.step + 1, protagonist=me), jax.tree.map(jnp.mean, m)

    def together(state: DuelState):
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        k_temps, k_first, k_second = jax.random.split(key, 3)
        old = state.teacher
        told = schedule(state.plan, state.step, k_temps, old.conc, n)
        temps, _, share = told
        other = exploring(protagonist, state.protagonist.state)
        foe, gain, f = turn(k_first, adversary, state.adversary, other, -1.0, *told)
        push = exploring(adversary, foe.state)
        me, gain_2, m = turn(k_second, protagonist, state.protagonist, push, 1.0, *told)
        both = jnp.concatenate([temps, temps]), jnp.concatenate([gain, gain_2])
        # Whether it explores is code, the rest numbers.
        rule = state.plan.rule._replace(explore=c.gamma.explore)
        taught = tt.teacher_update(old, *both, rule)
        taught = jax.tree.map(lambda a, b: jnp.where(state.plan.gamma, a, b), taught, old)
        out = {**m, "discounted_return": gain_2.mean(), "force": share, "conc": taught.conc}
        out |= {f"adversary_{k}": f[k] for k in ("entropy", "loss")}
        out["temperature"] = jnp.where(state.plan.high < 0, f["alpha"], temps.mean())
        out["loss"] = m["loss"] + f["loss"]  # either player's NaN stops the seed
        names = ("waited", "moved", "frozen", "explored", "arrived")
        out |= {f"teacher_{n}": taught.branch == i for i, n in enumerate(names)}
        after = state._replace(step=state.step + 1, protagonist=me, adversary=foe, teacher=taught)
        return after, out

    def respond(state: DuelState):
        key = jax.random.fold_in(jax.random.fold_in(state.key, 2), state.step)
        other = greedy(protagonist, state.protagonist.state)
        foe, gain, m = turn(key, fresh, state.fresh, other, -1.0, zeros, zeros, full)
        after = state._replace(step=state.step + 1, fresh=foe)
        return after, {**m, "discounted_return": gain.mean()}

    def score(state: DuelState):
        own = greedy(adversary, state.adversary.state) if opposed else None
        out = evaluate(
            jax.random.fold_in(state.key, 3),
            greedy(protagonist, state.protagonist.state),
            own,
            greedy(fresh, state.fresh.state),
        )
        out["protagonist_updates"] = state.protagonist.state.updates
        if opposed:
            learned = jnp.exp(state.adversary.state.params["log_alpha"])
            last = jnp.where(state.plan.low < 0, learned, state.plan.low)
            mean = state.teacher.conc / state.plan.rule.rate
            out["final_temperature"] = jnp.where(state.plan.gamma, mean, last)
        return out

    phases: Sequence[Phase] = (
        Phase("train", c.iterations, together if opposed else alone),
        Phase("best_response", c.best_response, respond),
    )
    init = jax.jit(init_all)
    return Experiment(
        lambda key: init(key, tt.teacher_init(c.conc0, c.gamma), make_plan(c)),
        score,
        tuple(p for p in phases if p.num_steps),
    )
