"""Oracles need float64; every test of this folder runs with it unless it asks for float32."""

import jax
import pytest


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield
