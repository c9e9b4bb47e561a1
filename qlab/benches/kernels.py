"""The low-bit operations beside plain matrix products and other libraries, and beside the bound.

The ceilings of the device are measured first: bytes copied a second, and the rates of f32, bf16 and int8
products. A case's bound is the slower of its bytes at the copy rate and its arithmetic at the best rate of
its dtypes (kernels/<op>/cost.py). Contestants of a product y[M, N] = x[M, K] @ w[N, K].T:
    qlab         the operation, by the implementation that impl=None takes (named in the note)
    f32, bf16    XLA's own product of plain weights (cuBLAS on a GPU), in the faster of two ways to write it
    xla_int      XLA's own product with weights held as jnp.int4 or int8, their scales applied after it
    qwix         its dot_general with the weights as a QArray, where installed
    onnxruntime  MatMulNBits or MatMulInteger on a CPU, where installed
    torch        its int4 weight-only product, or _int_mm, where installed
The group-sparse product (4 bits, half of the groups of 16) also stands beside the dense one of 2 bits.
Memory-bound operations (quantize_pack, hadamard_quantize, log2_softmax_quantize) stand beside a copy of
their input and the plain operation that they replace.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.benches import kernel_cases, kernel_tuning
from qlab.benches.kernel_cases import Case
from qlab.benches.measure import Number, Tell, bind, find, interleave, ratio, seconds_per_call
from qlab.kernels.common import dispatch
from qlab.lab.experiment import Claim, Figure, Metric

METRICS = {
    "us": Metric("us", "lower", "one call, steady"),
    "bound_us": Metric("us", "none", "bytes at the copy rate or arithmetic at the product rate"),
    "of_bound": Metric("%", "higher", "bound_us over us"),
    "to_f32": Metric("times", "higher", "f32 product's time over this one's"),
    "to_bf16": Metric("times", "higher", "bf16 product's time over this one's"),
    "to_w2": Metric("times", "higher", "dense 2-bit product's time over this one's"),
    "to_plain": Metric("times", "higher", "plain operation's time over this one's"),
    "to_copy": Metric("times", "lower", "time over that of copying the input"),
    "max_error": Metric(
        "", "none", "largest difference from the dequantized product, of its scale"
    ),
    "gb_per_s": Metric("GB/s", "higher", "bytes that must move, a second"),
    "tflops": Metric("TFLOP/s", "higher", "multiply-adds count twice"),
}
FIGURES = (Figure("One call", "bars", "us", ylabel="us", logy=True),)


RIVALS = {  # arm -> the metric "its time over ours"
    "f32": "to_f32",
    "bf16": "to_bf16",
    "w2": "to_w2",
    "plain": "to_plain",
}


def goals(s: dict[str, Any]) -> tuple[Claim, ...]:
    """What is asked of this device: products on a CPU, products and bandwidth on an H200."""
    most = max(s["m"])
    gemm, int8 = f"w4g128 m{most}", f"int8 m{most}"
    if not s["gpu"]:
        return (
            _goal("W8A8 at 1024^3 is 8 times XLA's f32 product", int8, "to_f32", 8.0),
            _goal("W4A16 at 1024^3 is 4 times XLA's f32 product", gemm, "to_f32", 4.0),
        )
    few = [m for m in s["m"] if m <= 16]
    return (
        *(
            _goal(f"W4A16, M={m}: 85 % of the copy rate", f"w4g128 m{m}", "of_bound", 85.0)
            for m in few
        ),
        _goal(f"W4A16, M={most}: 0.9 of cuBLAS bf16", gemm, "to_bf16", 0.9),
        _goal(f"W8A8, M={most}: 1.6 times cuBLAS bf16", int8, "to_bf16", 1.6),
        _goal("quantize_pack: 85 % of the copy rate", "quantize_pack w4", "of_bound", 85.0),
        _goal("hadamard_quantize: 85 % of the copy rate", "hadamard w8", "of_bound", 85.0),
        _goal(
            "half of the groups, M=1: 1.26 times the W2 product", "sparse w4g16 m1", "to_w2", 1.26
        ),
    )


def _goal(text: str, task: str, metric: str, target: float) -> Claim:
    return Claim(text, "goal", ("qlab", f"{task}/{metric}"), ">=", target)


def settings(quick: bool) -> dict[str, Any]:
    gpu = dispatch.here()[0] == "gpu"
    size = 8192 if gpu else 1024
    return {
        "gpu": gpu,
        "k": size,
        "n": size,
        "m": (1, 1024) if quick else (1, 16, 4096 if gpu else 1024),
        "tune_m": tuple(2**i for i in range(13 if gpu else 11)),
        "bits": (4,) if quick else (2, 3, 4, 8),
        "group": 128,
        "rows": size,
        "heads": 16,
        "repetitions": 5 if quick else 21,
        "budget_s": 1.0 if quick else 6.0,
    }


def ceilings(s: dict[str, Any], tell: Tell) -> dict[str, float]:
    """Measured on this device: bytes a second of a copy, FLOP/s of f32, bf16 and int8 products."""
    tell("kernels: ceilings of this device")
    gpu = dispatch.here()[0] != "cpu"
    big = jnp.ones(1 << (28 if gpu else 24), jnp.float32)  # far beyond the last cache
    side = 8192 if gpu else 1024
    rng = np.random.default_rng(0)
    # Two operands: XLA takes a slow path for the product of an array with itself.
    x, w = (jnp.asarray(rng.normal(size=(side, side)), jnp.float32) for _ in range(2))
    q, p = (jnp.asarray(rng.integers(-127, 128, (side, side)), jnp.int8) for _ in range(2))

    def best(f, *args):
        call = bind(f, *args)
        jax.block_until_ready(call())
        return min(seconds_per_call(call) for _ in range(5))

    def product(a, b):
        call = kernel_cases.fastest(kernel_cases.products(a, b))
        return min(seconds_per_call(call) for _ in range(5))

    narrow = (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    return {
        "copy": 2 * big.nbytes / best(lambda a: a + 1, big),
        "f32": 2 * side**3 / product(x, w),
        "bf16": 2 * side**3 / product(*narrow),
        "int8": 2 * side**3 / product(q, p),
    }


def one_case(case: Case, rates: dict[str, float], s: dict[str, Any]) -> list[Number]:
    bound = max(case.num_bytes / rates["copy"], case.flops / rates[case.rate])
    numbers = [Number("qlab", "bound_us", (1e6 * bound,), note=case.note)]
    numbers += [Number(arm, "us", status="absent", note=why) for arm, why in case.absent.items()]
    ready = {}
    for arm, call in case.arms.items():
        y = jax.block_until_ready(call())
        if case.truth is not None and arm not in case.unchecked:
            y = y.float().cpu().numpy() if hasattr(y, "cpu") else np.asarray(y)  # of torch
            error = np.abs(y.astype(np.float64) - case.truth).max() / np.abs(case.truth).max()
            numbers.append(Number(arm, "max_error", (float(error),)))
            if not error < 0.03:  # bf16 and dynamic 8-bit inputs stay below
                note = f"differs by {error:.2g} of the largest value"
                numbers.append(Number(arm, "us", status="failed", note=note))
                continue
        ready[arm] = lambda call=call: {"us": 1e6 * seconds_per_call(call)}
    numbers += interleave(ready, s["repetitions"], s["budget_s"])
    times = find(numbers, "qlab", "us").values
    numbers.append(Number("qlab", "of_bound", tuple(100 * 1e6 * bound / t for t in times)))
    for rival, metric in RIVALS.items():
        if rival in case.arms:
            numbers += [
                ratio(numbers, rival, arm, "us", metric)._replace(arm=arm)
                for arm in case.arms
                if arm != rival
            ]
    if "copy" in case.arms:
        numbers.append(ratio(numbers, "qlab", "copy", "us", "to_copy"))
        numbers.append(Number("qlab", "gb_per_s", tuple(case.num_bytes / t / 1e3 for t in times)))
    return [x._replace(name=f"{case.label}/{x.name}") for x in numbers]


def measure(s: dict[str, Any], tell: Tell) -> list[Number]:
    rates = ceilings(s, tell)
    numbers = [Number("device", "gb_per_s", (rates["copy"] / 1e9,), note="copy")]
    numbers += [
        Number(f"{name} product", "tflops", (rates[name] / 1e12,))
        for name in ("f32", "bf16", "int8")
    ]
    for make in kernel_cases.cases(s):
        case = make()
        tell(f"kernels: {case.label}")
        numbers += one_case(case, rates, s)
    return numbers


def tune(s: dict[str, Any], tell: Tell) -> None:
    kernel_tuning.tune(kernel_tuning.jobs(s), tell)


def summary(numbers: list[Number]) -> str:
    texts = []
    for n in numbers:
        if n.arm == "qlab" and n.name.endswith("/us") and n.status == "ok":
            task = n.name.split("/")[0]
            share = find(numbers, "qlab", f"{task}/of_bound").median
            speed = find(numbers, "qlab", f"{task}/to_f32")
            times = f", {speed.median:.2g} x f32" if speed.values else ""
            texts.append(f"{task} {n.median:.3g} us ({share:.0f} % of bound{times})")
    return "; ".join(texts)
