"""Named data sets as NumPy arrays, checked on the way in; importing this never imports JAX.

>>> load("digits").x_train.shape
(1200, 8, 8, 1)
"""

from collections.abc import Callable
from typing import Any

from qlab.data import images
from qlab.data.images import Classification
from qlab.lab.errors import UserError, nearest

__all__ = ["Classification", "load", "names"]

_LOADERS: dict[str, Callable[..., Any]] = {"digits": images.digits}


def names() -> list[str]:
    """Every name that `load` knows."""
    return sorted(_LOADERS)


def load(name: str, **options) -> Any:
    """The data set called `name`."""
    if name not in _LOADERS:
        raise UserError(f"no data set is called {name!r}{nearest(name, names())}")
    return _LOADERS[name](**options)
