"""What the processor multiplies in hardware: without a bf16 unit XLA's bf16 product is slower than float32."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def features() -> frozenset[str]:
    """Feature names of the first core as Linux lists them; empty where it does not."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    rows = [row.partition(":")[2] for row in lines if row.startswith(("flags", "Features"))]
    return frozenset(rows[0].split()) if rows else frozenset()


@functools.cache
def kind() -> str:
    """The device kind: "cpu" and its bf16 unit, as in "cpu amx_bf16"; "cpu" where it has none.

    JAX calls every processor "cpu", but which product is fast, and whether low bits win, hangs on the unit.
    """
    units = [u for u in ("amx_bf16", "avx512_bf16", "bf16") if u in features()]
    return " ".join(["cpu", *units[:1]])
