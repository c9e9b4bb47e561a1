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


def multiplies_bf16() -> bool:
    """AMX, AVX-512 BF16 or Arm's BF16 extension."""
    return bool(features() & {"amx_bf16", "avx512_bf16", "bf16"})
