"""Open a published pickle that holds arrays, and run nothing else that it names."""

import io
import pickle
from typing import Any

import numpy as np

from qlab.lab.errors import UserError

_NUMPY = {
    # What NumPy itself writes into a pickle to build an array or a number again.
    "_reconstruct": np.zeros(0).__reduce__()[0],
    "scalar": np.float64(0).__reduce__()[0],
    "ndarray": np.ndarray,
    "dtype": np.dtype,
}


class _State:
    """Stands in for an author's class of puzzle states: keeps the fields, does nothing."""

    def __setstate__(self, state):
        # (None, {slot: value}) as written for a class with __slots__
        self.fields = state[1]


class _Restricted(pickle.Unpickler):
    states: tuple[str, ...] = ()

    def find_class(self, module, name):
        # The published files name NumPy's module as NumPy 1 did.
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name in _NUMPY:
                return _NUMPY[name]
        elif name in self.states:
            return _State
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def open_pickle(data: bytes, where: str, states: tuple[str, ...] = ()) -> Any:
    """The object in `data`: containers, strings, numbers and arrays.

    Args:
      data: the pickle; Python 2 strings come out as bytes.
      where: its name, for the error line.
      states: class names that are opened as plain records (`.fields`).
    """
    reader = _Restricted(io.BytesIO(data), encoding="bytes")
    reader.states = states
    try:
        return reader.load()
    except Exception as e:  # a damaged pickle can raise almost anything
        reason = " ".join(str(e).split())
        raise UserError(f"{where}: not a good pickle of arrays ({reason})") from e
