"""The wiring of the study: every arm on a tiny pool, what arms share, what seeds change, and the numbers by hand."""

import jax
import numpy as np
import pytest

from qlab.configs import qas as paper
from qlab.experiments import qas
from qlab.lab import config as configs
from qlab.lab.errors import UserError
from qlab.quantum import qas_study as study


@pytest.fixture(autouse=True)
def x32():
    with jax.enable_x64(False):
        yield


TINY = {
    "pool": 60, "queries": 25, "hidden": 8, "latent_dim": 4, "hops": 3, "vae.epochs": 1, "inner.steps": 3,
    "inner.vqe_steps": 3, "num_targets": 2, "runs": 2, "n_gates": (4, 4), "dngo.epochs": 3, "dngo.hidden": 8,
    "reinforce.hidden": 8, "reinforce.batches": (2, 4, 6, 8), "reinforce.first": 4, "dngo.start": 6,
    "evolution.start": 6, "predictor.start": 9, "predictor.hidden": 8, "predictor.epochs": 3,
}  # fmt: skip


def tiny(variant="", **values):
    c = paper.get_config(variant)
    for key, value in (TINY | values).items():
        configs.override(c, key, value)
    return c


def run(c, arm, seed=0):
    experiment = qas.build(configs.arm_config(c, arm))
    state = experiment.init(jax.random.key(seed))
    (phase,) = experiment.phases
    for _ in range(phase.num_steps):
        state, metrics = phase.step(state)
        assert 0 <= float(metrics["mean_score"]) <= 1
    return state, experiment.evaluate(state)


@pytest.fixture(scope="module")
def results():
    with jax.enable_x64(False):
        c = tiny()
        return c, {arm: run(c, arm) for arm in ("random", "bo_counts")}


def check(c, arm, out):
    assert {k.split("/")[-1] for k in out if "/" in k} <= set(qas.METRICS)
    values = configs.arm_config(c, arm)
    for task in (*values.tasks, *values.extra_tasks):
        assert {f"{task}/{m}" for m in ("hits", "lift", "base_rate", "first", "regret")} <= set(out)
    drawn = {f.y for f in qas.FIGURES} | {f.x for f in qas.FIGURES}
    assert {k for k in out if "/" not in k} - {"maxcut_hits_curve", "maxcut_regret_curve",
            "h2_hits_curve", "h2_regret_curve"} <= drawn  # fmt: skip
    assert all(np.isfinite(v).all() for k, v in out.items() if k != "vae/mask_acc")


def test_an_arm_reports_its_names_and_each_query_is_new(results):
    c, arms = results
    for arm, (state, out) in arms.items():
        check(c, arm, out)
        orders = np.asarray(state.order)
        values = configs.arm_config(c, arm)
        assert orders.shape == (3 + len(values.extra_tasks), values.runs, 25)
        assert all(len(set(row)) == 25 for task in orders for row in task)
        assert int(state.done) == len(orders)


def test_numbers_are_those_counted_by_hand(results):
    c, arms = results
    state, out = arms["random"]
    data, _ = qas.specs(configs.arm_config(c, "random"))
    labels = study.labels_of(jax.random.key(0), data)
    found = labels[2][np.asarray(state.order[2])]
    assert float(out["tfim/mean_score"]) == pytest.approx(found.mean(), rel=1e-5)
    assert float(out["tfim/regret"]) == pytest.approx(
        (labels[2].max() - found.max(1)).mean(), abs=1e-6
    )
    numbers = study.search_numbers(np.asarray(state.order[2]), labels[2], 0.5)
    good = labels[2] >= 0.5
    assert numbers["hits"] == pytest.approx((found >= 0.5).sum() / len(found))
    assert numbers["expected_hits"] == pytest.approx(25 * good.sum() / 60)
    assert numbers["most_hits"] == min(25, good.sum())
    first = [next((i + 1 for i, y in enumerate(row) if y >= 0.5), 26) for row in found]
    assert numbers["first"] == pytest.approx(np.mean(first))
    assert numbers["hits_curve"][-1] == numbers["hits"]
    assert study.search_numbers(np.asarray(state.order[2]), labels[2], 2.0)["first"] == 26
    none = study.pooled([study.search_numbers(np.asarray(state.order[2]), labels[2], 2.0)])
    assert none["lift"] == 1.0


def test_latent_measures_are_those_of_numpy(rng):
    points, labels = rng.standard_normal((40, 3)).astype(np.float32), rng.random((1, 40))
    labels[0] += points[:, 0]  # a smooth part
    (got,) = study.latent_numbers(jax.random.key(0), points, labels)
    i, j = np.nonzero(~np.eye(40, dtype=bool))
    d = np.linalg.norm(points[i] - points[j], axis=1)
    assert got["corr"] == pytest.approx(
        np.corrcoef(d, abs(labels[0][i] - labels[0][j]))[0, 1], abs=0.02
    )
    gains = []
    for best in np.argsort(-labels[0])[:40]:  # TOP is more than the pool
        near = np.argsort(np.linalg.norm(points - points[best], axis=1), kind="stable")[1:11]
        gains.append(labels[0][near].mean())
    assert got["neighbour_gain"] == pytest.approx(np.mean(gains) - labels.mean(), abs=1e-6)


def test_pca_is_scikit_learns(rng):
    from sklearn.decomposition import PCA

    x = rng.standard_normal((50, 9)).astype(np.float32) * np.arange(1, 10)
    want = PCA(4).fit_transform(x)
    np.testing.assert_allclose(np.abs(study.pca(x, 4)), np.abs(want), atol=1e-4)


def test_arms_share_data_and_seeds_do_not(results):
    c, _ = results
    spec = {a: qas.specs(configs.arm_config(c, a))[0] for a in ("random", "bo_learnt", "evo")}
    assert spec["random"] == spec["bo_learnt"]
    assert spec["evo"] == spec["random"]._replace(tasks=("fidelity", "tfim"))
    shared = [study.labels_of(jax.random.key(0), spec[a]) for a in ("random", "evo")]
    np.testing.assert_array_equal(shared[0][:3], shared[1])
    one, two = (study.pool_of(jax.random.key(k), spec["evo"]) for k in (0, 1))
    assert study.pool_of(jax.random.key(0), spec["bo_learnt"]) is one
    assert not np.array_equal(one.specs.gate, two.specs.gate)
    a, b = (study.labels_of(jax.random.key(k), spec["evo"]) for k in (0, 1))
    assert not np.array_equal(a, b)
    e, f = (study.embedding_of(jax.random.key(k), "counts", spec["evo"]).points for k in (0, 1))
    assert not np.array_equal(e, f)


def test_a_search_stopped_between_tasks_goes_on_the_same_way(results):
    c, arms = results
    experiment = qas.build(configs.arm_config(c, "bo_counts"))
    state = experiment.init(jax.random.key(0))
    state, _ = experiment.phases[0].step(state)
    kept = jax.device_get(state._replace(key=jax.random.key_data(state.key)))
    state = qas.State(jax.random.wrap_key_data(kept.key), *(jax.numpy.asarray(x) for x in kept[1:]))
    for _ in range(2):
        state, _ = experiment.phases[0].step(state)
    np.testing.assert_array_equal(state.order, arms["bo_counts"][0].order)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "arm"), [(v, a) for v in ("", "ablation") for a in paper.get_config(v).arms]
)
def test_every_arm_runs(variant, arm):
    c = tiny(variant)
    if arm == "pool_2000":
        configs.override(c, "arms.pool_2000.pool", 70)
    check(c, arm, run(c, arm)[1])


def test_bad_settings_get_one_line():
    for values, text in [
        ({"search": "boo"}, "did you mean bo"),
        ({"embedding": "learned"}, "embedding="),
        ({"queries": 58}, r"use 1\.\."),
        ({"tasks": ("tfmi",)}, "did you mean tfim"),
        ({"mask": "sign"}, "mask="),
        ({"scale": "std"}, "use none or unit"),
        ({"num_targets": 0}, "num_targets=0"),
        ({"n_gates": (5, 3)}, "num_gates="),
        ({"hops": 1}, "hops"),
    ]:
        c = configs.arm_config(tiny(**values), "bo_learnt")
        if set(values) & {"search", "embedding"}:
            for k, v in values.items():
                c[k] = v
        with pytest.raises(UserError, match=text):
            qas.build(c)
