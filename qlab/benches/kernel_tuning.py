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
    plain: tuple[Callable[[], Any], ...]


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


def tune(jobs: list[Callable[[], Job]], tell: Tell) -> None:
    """Searches every job on this device and merges what it found into the tables."""
    versions = {"jax": jax.__version__, "processor": processor()}
    date = datetime.date.today().isoformat()
    for make in jobs:
        job = make()
        tell(f"tuning {job.op}: {job.spec.dims} {job.spec.options}")
        dense = min((best_s(f) for f in job.plain), default=None)
        records = []
        for impl in job.impls:
            if impl.name == "reference" or impl.why_not(job.spec):
                continue
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
        try:
            tuned.save(job.op, records)
        except OSError as e:
            raise UserError(
                f"{tuned.path(job.op)} cannot be written ({e.strerror}); tune from a checkout"
            ) from None


def weight_only(m: int, bits: int, s: dict[str, Any]) -> Job:
    """bf16 x, one scale and zero point for each group."""
    from qlab.kernels.weight_only_matmul import api
    from qlab.quantization.qtensor import QTensor

    k, n, group = s["k"], s["n"], s["group"]
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 2**bits, (n, k)), jnp.uint8)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (n, k // group)), jnp.float32)
    zero = jnp.full(scale.shape, 2.0 ** (bits - 1))
    qt = ops.pack(QTensor(codes, scale, zero, None, bits, (1,), (n, k)))
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    w = ops.dequantize(qt)
    dot = jax.jit(lambda x, w: jnp.dot(x, w.T, preferred_element_type=jnp.float32))
    pairs = [(x.astype(t), w.astype(t)) for t in (jnp.bfloat16, jnp.float32)]
    return Job(
        "weight_only_matmul",
        api.spec_of(m, k, n, bits=bits, group=group, kind="zero"),
        api.IMPLS,
        lambda impl: lambda x, qt: ops.matmul(x, qt, impl=impl),
        (x, qt),
        tuple(lambda p=p: dot(*p) for p in pairs),
    )


def jobs(s: dict[str, Any]) -> list[Callable[[], Job]]:
    return [lambda m=m, b=b: weight_only(m, b, s) for b in s["bits"] for m in s["tune_m"]]
