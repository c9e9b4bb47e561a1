"""PennyLane, imported when it is first needed (it takes seconds) and fit for the JAX at hand."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def pennylane() -> Any:
    """The package. Up to 0.45 it asks `jax.core.is_concrete`, which jax 0.11 took away."""
    core: Any = importlib.import_module("jax.core")
    if not hasattr(core, "is_concrete"):
        # A tracer's value was only ever known outside of transformations.
        core.is_concrete = lambda x: not isinstance(x, core.Tracer)
    import pennylane as qml

    return qml
