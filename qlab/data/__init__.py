"""Named data sets as NumPy arrays, checked on the way in; importing this never imports JAX.

    python -m qlab.data             every name, and whether its files are here
    python -m qlab.data mnist       what it is, whence, under which licence
    python -m qlab.data mnist --get fetch and check its files now, for later work offline

>>> load("digits").x_train.shape
(1200, 8, 8, 1)
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from qlab.data import cifar, images, molecules, puzzles, text
from qlab.data.files import cache_dir, find
from qlab.data.images import Classification
from qlab.data.molecules import Molecule
from qlab.data.puzzles import Puzzles
from qlab.data.registry import DATASETS, File
from qlab.data.text import Text
from qlab.lab.errors import UserError, nearest

__all__ = [
    "Classification",
    "Molecule",
    "Puzzles",
    "Text",
    "cache_dir",
    "describe",
    "load",
    "names",
]


class _Entry(NamedTuple):
    """A name: what makes its arrays, and which registered files that reads."""

    make: Callable[..., Any]
    dataset: str | None = None  # None: embedded
    files: str = ""  # only the files whose path starts with this


def _entries() -> dict[str, _Entry]:
    table = {
        "digits": _Entry(images.digits),
        "mnist": _Entry(partial(images.idx_set, "mnist"), "mnist"),
        "fashion_mnist": _Entry(partial(images.idx_set, "fashion_mnist"), "fashion_mnist"),
        "cifar10": _Entry(cifar.cifar10, "cifar10", "cifar-10-binary"),
        "cifar10_subset": _Entry(cifar.cifar10_subset, "cifar10_subset"),
        "tiny_shakespeare": _Entry(text.tiny_shakespeare, "tiny_shakespeare"),
        "molecule": _Entry(molecules.molecule, "molecule"),
    }
    for puzzle in puzzles.PUZZLES:
        table[puzzle] = _Entry(partial(puzzles.puzzles, puzzle), "deepcubea", puzzle)
    for short, folder in molecules.MOLECULES.items():
        for e in molecules.ENCODINGS:
            make = partial(molecules.molecule, folder, e)
            table[f"{short}_{e}"] = _Entry(make, "molecule", folder)
    return table


_TABLE = _entries()


def names() -> list[str]:
    """Every name that `load` knows."""
    return sorted(_TABLE)


def _entry(name: str) -> _Entry:
    if name not in _TABLE:
        raise UserError(f"no data set is called {name!r}{nearest(str(name), names())}")
    return _TABLE[name]


def load(name: str, /, **options) -> Any:
    """The data set called `name`.

    Args:
      name: one of `names()`.
      options: only "molecule" has any: load("molecule", name="LiH_STO3g_12qubits", encoding="bk").
    Returns:
      Classification for images, Text, Molecule or Puzzles.
    Raises:
      UserError: an unknown name or option, or a file absent, truncated or altered (one line).
    """
    make = _entry(name).make
    known = [] if isinstance(make, partial) else list(inspect.signature(make).parameters)
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "; it has none"
            raise UserError(f"load({name!r}) has no option {option!r}{hint}")
    return make(**options)


def files(name: str) -> list[tuple[str, File]]:
    """The registered files that `load(name)` reads: (key in DATASETS, file)."""
    entry = _entry(name)
    if entry.dataset is None:
        return []
    return [
        (entry.dataset, f) for f in DATASETS[entry.dataset].files if f.path.startswith(entry.files)
    ]


def describe(name: str) -> str:
    """What the set is, whence, its licence, and where its files are on this machine."""
    entry = _entry(name)
    if entry.dataset is None:
        doc = (inspect.getdoc(entry.make) or "").splitlines()[0]
        return f"{name}\n  about    {doc}\n  files    none: comes with scikit-learn"
    d = DATASETS[entry.dataset]
    source = d.urls[0] if d.urls else "only from $QLAB_DATA (converted from its origin)"
    rows = [f"{name}", f"  about    {d.about}", f"  origin   {d.origin}"]
    rows += [f"  licence  {d.licence}", f"  source   {source}"]
    for _, f in files(name):
        rows.append(f"  file     {d.folder}/{f.path}  {f.size:,} bytes  {find(d, f) or 'not here'}")
    return "\n".join(rows)
