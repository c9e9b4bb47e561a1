"""JAX as a run needs it: the device asked for, precision, determinism, the compilation cache."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qlab.lab.errors import UserError

PLATFORMS = {"cpu": "cpu", "gpu": "cuda,rocm", "tpu": "tpu"}
DETERMINISTIC_FLAGS = ("--xla_gpu_deterministic_ops=true",)


def cache_folder(sub: str) -> Path:
    """The user's own cache folder, mode 0700: what is in it can be run as code or taken for data."""
    import pooch

    root = Path(os.environ.get("QLAB_CACHE") or pooch.os_cache("qlab"))
    path = root / sub
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    root.chmod(0o700)
    return path


def set_flags(deterministic: bool, autotune_file: Path | None = None) -> None:
    """XLA's flags are read once, when its first back end starts: call this before JAX is used."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if deterministic:
        flags += [f for f in DETERMINISTIC_FLAGS if f not in flags]
        if autotune_file is not None:
            known = autotune_file.is_file()
            verb = "load" if known else "dump"
            extra = "from" if known else "to"
            flags.append(f"--xla_gpu_{verb}_autotune_results_{extra}={autotune_file.resolve()}")
    os.environ["XLA_FLAGS"] = " ".join(flags)


@contextlib.contextmanager
def session(device: str = "auto", x64: bool = False) -> Iterator[str]:
    """Sets JAX up and yields the device's name; what it changed is put back at the end.

    Raises:
      UserError: the device asked for is not there.
    """
    import jax

    if device != "auto":
        if device not in PLATFORMS:
            raise UserError(f"unknown device {device!r}; one of auto, {', '.join(PLATFORMS)}")
        jax.config.update("jax_platforms", _platform(device))
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as e:  # asserted where JAX_PLATFORMS leaves nothing
        why = (str(e).splitlines() or ["JAX has no such backend"])[0]
        raise UserError(
            f"device {device!r} is not there ({why}); use --device cpu, or install qlab[cuda13] or qlab[tpu]"
        ) from None
    if device != "auto" and devices[0].platform != device:
        raise UserError(
            f"device {device!r} is not there, JAX already runs on {devices[0].platform}; start a new process"
        )
    # A caller's jax.enable_x64(...) holds for its thread alone: what all threads see is read in another one.
    with ThreadPoolExecutor(1) as other:
        old_x64 = other.submit(lambda: jax.config.values["jax_enable_x64"]).result()
    jax.config.update("jax_enable_x64", x64)  # for threads of callbacks too
    _compilation_cache()
    try:
        with jax.enable_x64(x64):
            yield f"{devices[0].device_kind}" + (f" x {len(devices)}" if len(devices) > 1 else "")
    finally:
        jax.config.update("jax_enable_x64", old_x64)


def _platform(device: str) -> str:
    if device != "gpu":
        return PLATFORMS[device]
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return "rocm" if any("rocm" in n and n.startswith("jax") for n in names) else "cuda"


def _compilation_cache() -> None:
    """JAX's persistent cache, on by default: first calls are what people wait for.

    Who can write there can run code as this user, so a folder that others could write is refused.
    QLAB_COMPILATION_CACHE=off turns it off; a cache folder the user set for JAX is left alone.
    """
    import jax

    chosen = jax.config.values["jax_compilation_cache_dir"]
    if chosen or os.environ.get("QLAB_COMPILATION_CACHE") == "off":
        return
    try:
        folder = cache_folder("jax")
        mode = folder.stat()
    except OSError:
        return
    if mode.st_uid != os.getuid() or stat.S_IMODE(mode.st_mode) & 0o022:
        print(f"compilation cache off: {folder} belongs to or can be written by others (chmod 700)")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    out = {}
    for name in ("qlab", "jax", "jaxlib", "flax", "optax", "pennylane", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    return out


def peak_memory_mb() -> float:
    """Peak memory in MB: of the device where it tells, else of this process."""
    import resource

    import jax

    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return round(stats["peak_bytes_in_use"] / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
