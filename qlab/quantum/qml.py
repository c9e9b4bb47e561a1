"""PennyLane, imported when it is first needed (it takes seconds) and fit for the JAX at hand."""

from __future__ import annotations

import functools
from typing import Any

import jax


@functools.cache
def pennylane() -> Any:
    """The package. Up to 0.45 it asks `jax.core.is_concrete`, which jax 0.11 took away."""
    if not hasattr(jax.core, "is_concrete"):
        # A tracer's value was only ever known outside of transformations.
        jax.core.is_concrete = lambda x: not isinstance(x, jax.core.Tracer)  # type: ignore[attr-defined]
    import pennylane as qml

    return qml
