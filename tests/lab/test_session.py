"""What a run turns on, it turns off again."""

import threading

import jax
import jax.numpy as jnp
import pytest

from qlab.lab.device import session


def dtypes():
    """Of a float here and in a fresh thread."""
    seen = [jnp.zeros(()).dtype.name]
    other = threading.Thread(target=lambda: seen.append(jnp.zeros(()).dtype.name))
    other.start()
    other.join()
    return seen


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("x64", [False, True])
def test_a_session_sets_the_precision_of_all_threads_and_puts_it_back(outer, x64):
    """A caller inside jax.enable_x64(True) does not leave float64 on for everybody."""
    with jax.enable_x64(outer):
        before = dtypes()
        with session("auto", x64):
            assert dtypes() == ["float64" if x64 else "float32"] * 2
        assert dtypes() == before
    assert dtypes() == ["float32"] * 2
