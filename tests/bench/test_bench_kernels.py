"""The kernels bench: every operation is measured and tuned, on a CPU and for a GPU."""

import jax
import numpy as np
import pytest

from qlab.benches import kernel_cases, kernel_peers, kernel_tuning, kernels
from qlab.kernels.common import dispatch

OPS = {
    "weight_only_matmul",
    "int8_matmul",
    "quantize_pack",
    "hadamard_quantize",
    "log2_softmax_quantize",
    "group_sparse_matmul",
}
SMALL = dict(gpu=False, k=128, n=128, m=(1, 16), tune_m=(1,), bits=(4,), group=32, rows=8, heads=2)


@pytest.fixture(scope="module")
def cases():
    return [make() for make in kernel_cases.cases(SMALL)]


@pytest.mark.parametrize("gpu", [False, True])
def test_goals_are_of_cases_that_are_measured(gpu, cases):
    s = kernels.settings(False) | {"gpu": gpu, "m": (1, 16, 4096 if gpu else 1024)}
    labels = {c.label for c in cases}
    labels |= {f"{x} m{s['m'][2]}" for x in ("int8", "w4g128")}
    labels |= {x.replace("g32", "g128") for x in labels}
    goals = kernels.goals(s)
    assert {g.left[1].split("/")[0] for g in goals} <= labels
    assert len(goals) == (7 if gpu else 2)


def test_every_operation_is_measured_against_its_truth(cases):
    words = ("w4g32", "int8", "sparse", "quantize_pack", "hadamard", "log2_softmax", "log2_attend")
    assert {c.label.split(" ")[0] for c in cases} == set(words)
    for c in cases:
        assert c.num_bytes > 0
        assert {"copy", "f32"} & set(c.arms), c.label
    rates = dict.fromkeys(("copy", "f32", "bf16", "int8"), 1e9)
    numbers = [
        x for c in cases for x in kernels.one_case(c, rates, {"repetitions": 1, "budget_s": 0})
    ]
    failed = [x for x in numbers if x.status == "failed"]
    assert not failed
    checked = {x.name.split("/")[0] for x in numbers if x.name.endswith("max_error")}
    assert checked == {"w4g32 m1", "w4g32 m16", "int8 m1", "int8 m16", "sparse w4g16 m1", "sparse w4g16 m16",
                       "log2_attend w4"}  # fmt: skip


def test_tuning_looks_up_what_a_call_asks_for(monkeypatch):
    """A record is found only if the spec it was made for is the one that a user's call makes."""
    seen = []
    monkeypatch.setattr(dispatch, "run", lambda impls, spec, *a, **k: seen.append(spec) or 1 / 0)
    found = set()
    for make in kernel_tuning.jobs(SMALL):
        job = make()
        seen.clear()
        with pytest.raises(ZeroDivisionError):
            jax.eval_shape(job.call("xla"), *job.args)
        assert repr(seen[0]) == repr(job.spec)
        found.add(job.op)
    assert found == OPS


def test_products_of_xla_and_qwix_are_the_same_product(rng):
    codes, scale = rng.integers(0, 16, (8, 64)), rng.uniform(0.5, 1, (8, 2)).astype(np.float32)
    x = np.asarray(jax.numpy.asarray(rng.normal(size=(3, 64)), "bfloat16"), np.float32)
    truth = x @ ((codes - 8.0) * np.repeat(scale, 32, 1)).T
    arms, absent = {}, {}
    peers = {k: kernel_peers.WEIGHT_ONLY[k] for k in ("xla_int", "qwix")}
    kernel_cases._add(arms, absent, peers, x, codes, scale, 4, 32)
    for call in arms.values():
        np.testing.assert_allclose(call(), truth, rtol=2e-2, atol=2e-2)
    assert set(absent) <= {"qwix"}
    assert "not installed" in absent.get("qwix", "not installed")
