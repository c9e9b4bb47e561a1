"""Block sizes by search: from a kernel's own heuristic, each size halved or doubled while that is faster.

A candidate that cannot be traced or compiled is passed over. The time of the plain product of the same
operands is recorded beside, so that `ops.would_help` can tell from the table whether low bits win.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab import ops
from qlab.benches.kernel_cases import products, quantized
from qlab.benches.measure import Tell, processor, seconds_per_call
from qlab.kernels.common import dispatch, tuned
from qlab.lab.errors import UserError


class Job(NamedTuple):
    """call(impl): a fresh function of `args`, so that every trial is traced anew; plain: the rivals."""

    op: str
    spec: dispatch.Spec
    impls: tuple[dispatch.Impl, ...]
    call: Callable[[str], Callable[..., Any]]
    args: tuple[Any, ...]
    plain: tuple[Callable[[], Any], ...] = ()


def best_s(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    return min(seconds_per_call(call) for _ in range(3))


def search(job: Job, impl: str) -> tuple[dict[str, int], float] | None:
    """(blocks, seconds) of the fastest found; None if the implementation does not run."""

    def attempt(blocks: dict[str, int]) -> tuple[float, dict[str, int]]:
        with tuned.trial(blocks) as seen:
            compiled = jax.jit(job.call(impl))
            time = best_s(lambda: compiled(*job.args))
            return time, {**seen.get("default", {}), **blocks}

    try:
        fastest, blocks = attempt({})
    except Exception:  # whatever a compiler throws
        return None
    tried, improved = {tuple(sorted(blocks.items()))}, True
    while improved and blocks:
        improved = False
        for name, size in list(blocks.items()):
            for other in (size // 2, size * 2):
                candidate = {**blocks, name: other}
                if other < 1 or (key := tuple(sorted(candidate.items()))) in tried:
                    continue
                tried.add(key)
                try:
                    time, _ = attempt(candidate)
                except Exception:
                    continue
                if time < 0.98 * fastest:
                    fastest, blocks, improved = time, candidate, True
    return blocks, fastest


def searched(impl: dispatch.Impl, job: Job) -> bool:
    """XLA's forms have no blocks: their time says something only where a plain rival is timed beside."""
    return impl.name.startswith("pallas") or (impl.name == "xla" and bool(job.plain))


def tune(jobs: list[Callable[[], Job]], tell: Tell) -> None:
    """Searches every job on this device and merges what it found into the tables."""
    versions = {"jax": jax.__version__, "processor": processor()}
    date = datetime.date.today().isoformat()
    for make in jobs:
        job = make()
        runnable = [i for i in job.impls if searched(i, job) and not i.why_not(job.spec)]
        if not runnable:
            continue
        tell(f"tuning {job.op}: {job.spec.dims} {job.spec.options}")
        dense = min((best_s(f) for f in job.plain), default=None)
        records = []
        for impl in runnable:
            if (found := search(job, impl.name)) is None:
                tell(f"  {impl.name} does not run")
                continue
            blocks, seconds = found
            record = {
                "impl": impl.name,
                "device": job.spec.device,
                "bucket": tuned.bucket(job.spec.dims),
                "dtypes": job.spec.dtypes,
                "options": job.spec.options,
                "blocks": blocks,
                "us": round(1e6 * seconds, 2),
                "date": date,
                "versions": versions,
            }
            records.append(record | ({"dense_us": round(1e6 * dense, 2)} if dense else {}))
            tell(f"  {impl.name}: {1e6 * seconds:.4g} us with {blocks or 'no blocks'}")
        if not records:
            continue
        try:
            tuned.save(job.op, records)
        except OSError as e:
            raise UserError(
                f"{tuned.path(job.op)} cannot be written ({e.strerror}); tune from a checkout"
            ) from None


def weight_only(m: int, bits: int, s: dict[str, Any]) -> Job:
    """bf16 x, one scale and zero point for each group."""
    from qlab.kernels.weight_only_matmul import api

    k, n, group = s["k"], s["n"], s["group"]
    rng = np.random.default_rng(0)
    qt = ops.pack(quantized(rng, n, k, bits, group))
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    w = ops.dequantize(qt)
    plain = [products(x.astype(t), w.astype(t)) for t in (jnp.bfloat16, jnp.float32)]
    return Job(
        "weight_only_matmul",
        api.spec_of(m, k, n, bits=bits, group=group, kind="zero"),
        api.IMPLS,
        lambda impl: lambda x, qt: ops.matmul(x, qt, impl=impl),
        (x, qt),
        tuple(call for calls in plain for call in calls),
    )


def int8(m: int, s: dict[str, Any]) -> Job:
    """Static scales of tokens and channels, bf16 out."""
    from qlab.kernels.int8_matmul import api

    k, n = s["k"], s["n"]
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.integers(-127, 128, (rows, k)), jnp.int8) for rows in (m, n))
    scales = (jnp.ones((m, 1)), jnp.ones((n, 1)))
    return Job(
        "int8_matmul",
        api.spec_of(m, k, n),
        api.IMPLS,
        lambda impl: lambda *a: api.int8_matmul(*a, out_dtype=jnp.bfloat16, impl=impl),
        (x, w, *scales),
    )


def sparse(m: int, s: dict[str, Any]) -> Job:
    """4 bits, half of the groups of 16."""
    from qlab.kernels.group_sparse_matmul import api

    k, n, bits, group = s["k"], s["n"], 4, 16
    rng = np.random.default_rng(0)
    bsr = ops.group_sparse(
        quantized(rng, n, k, bits, group), jnp.asarray(rng.random((n, k // group)) < 0.5)
    )
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    return Job(
        "group_sparse_matmul",
        api.spec_of(m, k, n, bsr.col_idx.shape[0], bits=bits, group=group),
        api.IMPLS,
        lambda impl: lambda x, b: api.group_sparse_matmul(x, b, bits=bits, group=group, impl=impl),
        (x, bsr),
    )


def quantize_pack(s: dict[str, Any]) -> Job:
    from qlab.kernels.quantize_pack import api

    rows, k, options = s["rows"], s["k"], dict[str, Any](bits=4, group=s["group"])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, k)), jnp.bfloat16)
    return Job(
        "quantize_pack",
        api.spec_of(rows, k, **options),
        api.IMPLS,
        lambda impl: lambda x: api.quantize_pack(x, impl=impl, **options),
        (x,),
    )


def hadamard_quantize(s: dict[str, Any]) -> Job:
    from qlab.kernels.hadamard_quantize import api

    x = jnp.asarray(np.random.default_rng(0).normal(size=(s["rows"], s["k"])), jnp.bfloat16)
    return Job(
        "hadamard_quantize",
        api.spec_of(*x.shape),
        api.IMPLS,
        lambda impl: lambda x: api.hadamard_quantize(x, impl=impl),
        (x,),
    )


def log2_softmax(s: dict[str, Any]) -> Job:
    from qlab.kernels.log2_softmax_quantize import api

    c = s["k"] // 2
    z = jnp.asarray(np.random.default_rng(0).normal(size=(s["heads"], c, c)), jnp.bfloat16)
    return Job(
        "log2_softmax_quantize",
        api.spec_of(*z.shape, bits=4, dtype="bfloat16"),
        api.IMPLS,
        lambda impl: lambda z: api.log2_softmax_quantize(z, bits=4, impl=impl),
        (z,),
    )


def jobs(s: dict[str, Any]) -> list[Callable[[], Job]]:
    out = [lambda m=m, b=b: weight_only(m, b, s) for b in s["bits"] for m in s["tune_m"]]
    out += [lambda m=m: int8(m, s) for m in s["m"]]
    out += [lambda m=m: sparse(m, s) for m in s["m"] if m <= 16]
    memory = (quantize_pack, hadamard_quantize, log2_softmax)
    return [*out, *(lambda f=f: f(s) for f in memory)]
