"""Which implementation of an operation runs: named by the caller, by QLAB_IMPL, or the first that can.

An operation is described before it runs by a Spec (shapes, dtypes, static options, device), so that
`explain` answers for a device that is not at hand and every refusal comes at trace time, in one line.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlab.kernels.common import cpu

ORDER = {
    "cpu": ("xla", "reference"),
    "gpu": ("pallas_gpu", "xla", "reference"),
    "tpu": ("pallas_tpu", "xla", "reference"),
}


class Spec(NamedTuple):
    """What a call looks like.

    Attributes:
      op: its name. dims: sizes by letter, e.g. {"m": 1, "k": 4096, "n": 4096}.
      dtypes: dtype names by argument. options: static options of the call (bits, group, ...).
      platform: "cpu", "gpu" or "tpu". device: device kind, e.g. "NVIDIA H200", "TPU v5e", "cpu amx_bf16".
      interpret: run Pallas kernels in the interpreter (tests): the platform then does not matter.
    """

    op: str
    dims: dict[str, int]
    dtypes: dict[str, str]
    options: dict[str, Any]
    platform: str
    device: str
    interpret: bool = False


class Impl(NamedTuple):
    """why_not: spec -> "" or why this cannot run it; run: (spec, *arrays) -> the result."""

    name: str
    why_not: Callable[[Spec], str]
    run: Callable[..., Any]


def here(platform: str | None = None, device: str | None = None) -> tuple[str, str]:
    """(platform, device kind): those given, or of the default device; a CPU's kind names its bf16 unit."""
    if platform is not None:
        return platform, device or platform
    chosen = jax.config.jax_default_device
    device = chosen if isinstance(chosen, jax.Device) else jax.devices()[0]
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    return platform, cpu.kind() if platform == "cpu" else device.device_kind


class Choice(NamedTuple):
    """name: of what runs, None if nothing can. refused: (name, why) of those asked before it."""

    name: str | None
    refused: tuple[tuple[str, str], ...]


def candidates(impls: Sequence[Impl], spec: Spec, impl: str | None) -> tuple[list[Impl], bool]:
    """What is asked, in order, and whether the caller (or QLAB_IMPL) named it."""
    by_name = {i.name: i for i in impls}
    name = impl or os.environ.get("QLAB_IMPL") or None
    if name:
        if name not in by_name:
            where = "impl" if impl else "QLAB_IMPL"
            raise ValueError(f"{where}={name!r}: {spec.op} has {', '.join(by_name)}")
        return [by_name[name]], True
    order = ORDER.get(spec.platform, ORDER["cpu"])
    return [by_name[n] for n in order if n in by_name], False


def choose(impls: Sequence[Impl], spec: Spec, impl: str | None = None) -> Choice:
    """Which implementation would run, and why those before it would not."""
    refused = []
    for i in candidates(impls, spec, impl)[0]:
        why = i.why_not(spec)
        if not why:
            return Choice(i.name, tuple(refused))
        refused.append((i.name, why))
    return Choice(None, tuple(refused))


def run(impls: Sequence[Impl], spec: Spec, *arrays: Any, impl: str | None = None) -> Any:
    """Runs the operation.

    Raises:
      NotImplementedError: a named implementation cannot run it (with the reason), or none can.
      ValueError: no implementation of that name.

    Without a name, one that cannot be traced or compiled (eagerly) gives way to the next.
    """
    asked, named = candidates(impls, spec, impl)
    refused, last = [], None
    for i in asked:
        why = i.why_not(spec)
        if not why:
            if named:
                return i.run(spec, *arrays)
            try:
                return i.run(spec, *arrays)
            except Exception as e:  # whatever a compiler throws
                if i.name == "reference":
                    raise
                last, why = e, f"failed with {type(e).__name__}: {str(e).splitlines()[0][:200]}"
        refused.append(f"{i.name}: {why}")
    raise NotImplementedError(f"{spec.op}: {'; '.join(refused)}") from last


def needs(spec: Spec, platform: str) -> str:
    """ "" if Pallas kernels for `platform` can run here, else the reason."""
    if spec.interpret or spec.platform == platform:
        return ""
    return f"needs a {platform.upper()}, the device is {spec.device} ({spec.platform})"


class _Static:
    """A Spec and the name asked for, hashable by their text: what custom_vjp takes as static."""

    def __init__(self, spec: Spec, impl: str | None):
        self.spec, self.impl, self.text = spec, impl, repr((spec, impl))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


def differentiable(impls: Sequence[Impl], gradient: Impl) -> Callable[..., Any]:
    """`call(spec, impl, *arrays)`: `run` with the gradient of `gradient.run` in every float array.

    An array may be None. Integer arrays (codes) have no gradient: theirs is JAX's float0.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def call(static, arrays):
        return run(impls, static.spec, *arrays, impl=static.impl)

    def forward(static, arrays):
        return call(static, arrays), arrays

    def backward(static, arrays, dy):
        is_float = [a is not None and jnp.issubdtype(a.dtype, jnp.floating) for a in arrays]
        floats = [a for a, f in zip(arrays, is_float, strict=True) if f]

        def plain(*floats):
            rest = iter(floats)
            full = [next(rest) if f else a for a, f in zip(arrays, is_float, strict=True)]
            return gradient.run(static.spec, *full)

        grads = iter(jax.vjp(plain, *floats)[1](dy))

        def cotangent(a, f):
            if a is None:
                return None
            return next(grads) if f else np.zeros(a.shape, jax.dtypes.float0)

        return (tuple(cotangent(a, f) for a, f in zip(arrays, is_float, strict=True)),)

    call.defvjp(forward, backward)
    return lambda spec, impl, *arrays: call(_Static(spec, impl), arrays)
