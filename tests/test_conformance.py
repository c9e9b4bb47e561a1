"""Every registered method keeps the house's contract: it jits, vmaps, does not recompile on a second
call, has finite gradients where it is differentiable, and its state survives save and restore bit for
bit. And every packaged paper's smoke study finishes.
"""

import json
from functools import partial
from typing import Any, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab import checkpoint, registry
from qlab.lab import config as configs
from qlab.lab.experiment import as_experiment
from qlab.quantization import QUANTIZERS, ROUNDING_RULES, make_grid
from qlab.quantum import ESTIMATORS, noisy_expval, zn
from qlab.quantum.circuits import circuit
from qlab.quantum.measure import GRADS
from qlab.quantum.qcae import latent_circuit
from qlab.quantum.zne import estimator
from qlab.rl import AGENTS
from qlab.rl.agent import Transition
from qlab.rl.dqn import double_dqn, mlp_q
from qlab.run import main
from qlab.search import Problem, search
from qlab.search.driver import Mode


class Subject(NamedTuple):
    """A pure function under test.

    call: (state, x) -> pytree. state: what the method carries or learns. x: one input; a second of
    the same shape is x[1]. grad: whether call is differentiable in the floats of `state` (or of x
    where state has none).
    """

    name: str
    call: Any
    state: Any
    xs: tuple[Any, Any]
    grad: bool = True


def _quantizers():
    x = jax.random.normal(jax.random.key(0), (2, 4, 16))
    for name, make in QUANTIZERS.items():
        q = make(3) if name != "identity" else make()
        yield Subject(f"quantizer/{name}", q.fake, q.init(x[0]), (x[0], x[1]))


def _rounding_rules():
    w = jax.random.normal(jax.random.key(1), (2, 4, 16))
    for name, make in ROUNDING_RULES.items():
        rule = make(2) if name == "lrq" else make()
        grid = make_grid(w[0], 3)
        state = rule.init(w[0], grid, jax.random.key(2))
        yield Subject(
            f"rounding/{name}", lambda v, w, r=rule, g=grid: r.soft(v, w, g), state, (w[0], w[1])
        )


def _discrete_agents():
    """Agents on (features, legal) with actions i32[N]."""
    agent = double_dqn(mlp_q(3, (8,), 4), 4)
    state = agent.init(jax.random.key(3))

    def obs(key):
        features = jax.random.normal(key, (16, 3))
        return features, (jax.random.uniform(key, (16, 4)) < 0.7).at[:, 0].set(True)

    def batch(seed):
        k = jax.random.split(jax.random.key(seed), 4)
        action = jax.random.randint(k[1], (16,), 0, 4)
        reward = jax.random.normal(k[2], (16,))
        return Transition(obs(k[0]), action, reward, jnp.full((16,), 0.9), obs(k[3]))

    def learn(s, b):
        return agent.update(s, jax.random.key(0), b)

    def act(s, obs):
        return agent.act(s, jax.random.key(0), obs)

    yield Subject("agent/double_dqn/update", learn, state, (batch(0), batch(1)), grad=False)
    yield Subject("agent/double_dqn/act", act, state, (batch(0).obs, batch(1).obs), grad=False)


def _agents():
    yield from _discrete_agents()
    for name, make in AGENTS.items():
        if name == "double_dqn":
            continue
        sizes = {} if name == "sac" else {"num_bins": 3}
        agent = make(3, 2, hidden=(8,), **sizes)
        state = agent.init(jax.random.key(3))

        def batch(seed):
            k = jax.random.split(jax.random.key(seed), 4)
            return Transition(
                jax.random.normal(k[0], (16, 3)),
                jax.random.uniform(k[1], (16, 2), minval=-1.0),
                jax.random.normal(k[2], (16,)),
                jnp.full((16,), 0.9),
                jax.random.normal(k[3], (16, 3)),
                jnp.ones((16,)),
            )

        def learn(s, b, a=agent):
            return a.update(s, jax.random.key(0), b)

        def act(s, obs, a=agent):
            return a.act(s, jax.random.key(0), obs)

        yield Subject(f"agent/{name}/update", learn, state, (batch(0), batch(1)), grad=False)
        yield Subject(f"agent/{name}/act", act, state, (batch(0).obs, batch(1).obs), grad=False)


def _searches():
    moves = jnp.array([1, 2, -1])
    line = Problem(
        next_state=lambda s, a: (s + moves[a]) % 32,
        cost=lambda s, a: jnp.float32(1.0),
        is_goal=lambda s: s[0] == 9,
        encode=lambda s: s.astype(jnp.float32),
        num_actions=3,
    )
    starts = (jnp.array([1], jnp.int32), jnp.array([20], jnp.int32))
    for mode in get_args(Mode):
        width = (3,) if mode == "qstar" else ()
        heuristic = jax.tree_util.Partial(
            lambda p, enc, width=width: p + jnp.zeros((enc.shape[0], *width)), jnp.float32(1.0)
        )

        def call(h, s, mode=mode):
            return search(line, h, s, mode=mode, max_nodes=64)

        yield Subject(f"search/{mode}", call, heuristic, starts, grad=False)


def _estimators():
    lams = jnp.linspace(0.01, 0.1, 10)
    curves = tuple(0.8 * (1 - lams) ** k + 0.01 * jnp.sin(40 * lams) for k in (7, 9))
    for name in ESTIMATORS:
        run = estimator(name)

        def call(x, e, run=run):
            return run(x, e, 0.0, jnp.zeros(1))

        yield Subject(f"zne/{name}", call, lams, curves)


def _circuits():
    theta = jax.random.normal(jax.random.key(4), (2, 2, 2, 2))
    for backend in ("ptm", "default.mixed"):
        yield Subject(
            f"circuit/{backend}",
            lambda lam, t, b=backend: noisy_expval(t, lam, lam, zn(2), backend=b),
            jnp.float32(0.05),
            (theta[0], theta[1]),
        )


def _latents():
    z = jax.random.normal(jax.random.key(5), (2, 2))
    # one of each kind of gate and of gradient: tests/quantum has all circuits against PennyLane
    for name, grad in zip(
        ("qaoa_tied", "qaoa_tied", "strong", "iqp"), (*GRADS, *GRADS), strict=True
    ):
        latent = latent_circuit(circuit(name, 2, 1), grad=grad)

        def call(w, z, latent=latent):
            return latent.apply(w, z, jax.random.key(0))

        state = latent.init(jax.random.key(6))
        yield Subject(f"latent/{name}/{grad}", call, state, (z[0], z[1]))


SUBJECTS = [
    *_quantizers(), *_rounding_rules(), *_agents(), *_searches(), *_estimators(), *_circuits(),
    *_latents(),
]  # fmt: skip
all_subjects = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)


def as_arrays(tree):
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _is_key(x):
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


@pytest.mark.rotates(2)
@all_subjects
def test_jits_and_does_not_compile_twice(subject):
    traces = []

    def counted(state, x):
        traces.append(1)
        return subject.call(state, x)

    jitted = jax.jit(counted)
    first = jitted(subject.state, subject.xs[0])
    second = jitted(jax.tree.map(lambda x: x, subject.state), subject.xs[1])
    assert len(traces) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(first, second)
    eager = subject.call(subject.state, subject.xs[0])
    chex.assert_trees_all_close(as_arrays(first), as_arrays(eager), rtol=2e-3, atol=1e-4)


@pytest.mark.rotates(2)
@all_subjects
def test_vmaps(subject):
    both = jax.tree.map(lambda *x: jnp.stack(x), *subject.xs)
    out = jax.jit(jax.vmap(subject.call, in_axes=(None, 0)))(subject.state, both)
    call = jax.jit(subject.call)  # of which the test above has compiled one
    for i in range(2):
        one = call(subject.state, subject.xs[i])
        chex.assert_trees_all_close(
            as_arrays(jax.tree.map(lambda x, i=i: x[i], out)), as_arrays(one), rtol=2e-3, atol=1e-4
        )


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.grad], ids=lambda s: s.name)
def test_gradients_are_finite(subject):
    def total(z):
        state, x = z
        out = [
            jnp.sum(v)
            for v in jax.tree.leaves(subject.call(state, x))
            if jnp.issubdtype(v.dtype, jnp.floating)
        ]
        return sum(out, jnp.float32(0.0))

    def floats(z):
        return [v for v in jax.tree.leaves(z) if jnp.issubdtype(jnp.asarray(v).dtype, jnp.inexact)]

    grad = jax.jit(jax.grad(total, allow_int=True))((subject.state, subject.xs[0]))
    values = floats(grad)
    assert values
    assert all(np.isfinite(v).all() for v in values)
    assert any(np.abs(v).max() > 0 for v in values)


@all_subjects
def test_state_survives_save_and_restore(subject, tmp_path):
    state = subject.state
    checkpoint.save(tmp_path, 0, state, {}, "c", 1)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype), state)
    back = checkpoint.restore(tmp_path, lambda _: like, "c").state
    assert checkpoint.digest(back) == checkpoint.digest(state)
    a, b = (
        as_arrays(jax.jit(subject.call)(s, subject.xs[0]))
        for s in (state, jax.tree.map(jnp.asarray, back))
    )
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("paper", registry.names())
def test_every_arm_builds(paper):
    """Between the days on which the smoke studies below run."""
    loaded = configs.load(f"{paper}:smoke")
    build = registry.experiment(loaded.config.experiment).build
    for arm in loaded.config.arms:
        assert as_experiment(build(configs.arm_config(loaded.config, arm))).init


@pytest.mark.slow
@pytest.mark.parametrize("paper", registry.names())
def test_smoke_finishes(paper, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--config", f"{paper}:smoke", "--workdir", "w"]) == 0
    manifest = json.loads((tmp_path / "w/manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["claims"], "a paper claims something"
    rows = [json.loads(line) for line in (tmp_path / "w/results.jsonl").read_text().splitlines()]
    assert {r["arm"] for r in rows} == set(manifest["arms"])
    assert "</html>" in (tmp_path / "w/report.html").read_text()
    unit = partial(dict.get, manifest["metrics"])
    assert not [r["metric"] for r in rows if unit(r["metric"]) is None], "every metric is declared"
