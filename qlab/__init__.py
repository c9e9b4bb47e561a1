"""qlab: one JAX lab for quantization, reinforcement learning and search, and quantum ML.

`qlab.run`, `qlab.sweep` and `qlab.report` are modules that can be called: `qlab.run("q_star:smoke")`
does what `python -m qlab.run --config configs/q_star.py:smoke` does. Nothing heavy is imported
before it is used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = (
    "bench",
    "data",
    "lab",
    "nn",
    "ops",
    "quantization",
    "quantum",
    "report",
    "rl",
    "run",
    "search",
    "sweep",
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"qlab.{name}")
    raise AttributeError(f"module 'qlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*globals(), *_LAZY))
