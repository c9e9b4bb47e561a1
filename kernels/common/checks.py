"""Arguments checked at trace time: one line that names the argument, what was given and what fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


def fail(op: str, text: str) -> None:
    raise ValueError(f"{op}: {text}")


def shape(op: str, name: str, a: Any, want: Sequence[int | None], why: str = "") -> None:
    """a.shape must be `want`, None standing for any size."""
    got = tuple(np.shape(a))
    if len(got) != len(want) or any(w not in (None, g) for g, w in zip(got, want, strict=True)):
        text = "(" + ", ".join("*" if w is None else str(w) for w in want) + ")"
        fail(op, f"{name} has shape {got}, expected {text}{'; ' + why if why else ''}")


def dtype(op: str, name: str, a: Any, allowed: Sequence[Any]) -> None:
    names = [jnp.dtype(d).name for d in allowed]
    if (got := jnp.result_type(a).name) not in names:
        fail(op, f"{name} has dtype {got}; use {' or '.join(names)}")


def one_of(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        fail(op, f"{name}={value!r}; use one of {', '.join(map(repr, allowed))}")


def group(op: str, value: Any, k: int) -> None:
    """A group is 0 (the whole row) or a multiple of 8 columns, so that every part of a code fills bytes."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or value % 8:
        fail(op, f"group={value!r}; use 0 for the whole row or a multiple of 8, e.g. 32, 64 or 128")
    if value and k % value:
        fits = [g for g in (128, 64, 32, 16, 8) if k % g == 0]
        hint = ", ".join(map(str, fits)) if fits else f"a K padded to a multiple of {value}"
        fail(op, f"group={value} does not divide K={k}; use {hint} or 0 (the whole row)")
