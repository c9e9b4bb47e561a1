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

from qlab.data import cifar, images, molecules, puzzles, sequences, text, vqa
from qlab.data.files import cache_dir, find
from qlab.data.images import Classification
from qlab.data.molecules import Molecule
from qlab.data.puzzles import Puzzles
from qlab.data.registry import DATASETS, File
from qlab.data.text import Text
from qlab.data.vqa import VQA
from qlab.lab.errors import UserError, nearest

__all__ = [
    "VQA",
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
    """A name: what makes its arrays, and the files that holds.

    sources: alternatives, the best first: (key in DATASETS, start of the paths it reads); none:
      embedded.
    """

    make: Callable[..., Any]
    sources: tuple[tuple[str, str], ...] = ()


def _entries() -> dict[str, _Entry]:
    def idx(name):
        return _Entry(partial(images.idx_set, name), ((name, ""),))

    table = {
        "digits": _Entry(images.digits),
        "digits16": _Entry(images.digits16),
        "digits_vqa": _Entry(vqa.digits_vqa),
        "selective_copy": _Entry(sequences.selective_copy),
        "mnist": idx("mnist"),
        "fashion_mnist": idx("fashion_mnist"),
        "cifar10": _Entry(cifar.cifar10, cifar.ARCHIVES),
        "cifar10_subset": _Entry(cifar.cifar10_subset, cifar.SUBSET),
        "tiny_shakespeare": _Entry(text.tiny_shakespeare, (("tiny_shakespeare", ""),)),
        "molecule": _Entry(molecules.molecule, (("molecule", ""),)),
    }
    for puzzle in puzzles.PUZZLES:
        table[puzzle] = _Entry(partial(puzzles.puzzles, puzzle), puzzles.sources(puzzle))
    for short, folder in molecules.MOLECULES.items():
        for e in molecules.ENCODINGS:
            make = partial(molecules.molecule, folder, e)
            table[f"{short}_{e}"] = _Entry(make, (("molecule", folder),))
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
      Classification for images, VQA, Text, Molecule or Puzzles.
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


def files(name: str) -> tuple[str, tuple[File, ...]] | None:
    """The registered files that `load(name)` reads on this machine.

    Returns:
      (key in DATASETS, files), or None for an embedded set.
    """
    groups = []
    for key, start in _entry(name).sources:
        group = tuple(f for f in DATASETS[key].files if f.path.startswith(start))
        if all(find(DATASETS[key], f) for f in group):
            return key, group
        groups.append((key, group))
    return next((g for g in groups if DATASETS[g[0]].urls), None)


def describe(name: str) -> str:
    """What the set is, whence, its licence, and where its files are on this machine."""
    entry, used = _entry(name), files(name)
    if used is None:
        doc = (inspect.getdoc(entry.make) or "").splitlines()[0]
        return f"{name}\n  about    {doc}\n  files    none: comes with scikit-learn or is generated"
    first, d = DATASETS[entry.sources[0][0]], DATASETS[used[0]]
    rows = [name, f"  about    {first.about}", f"  origin   {d.origin}"]
    rows += [f"  licence  {d.licence}", *(f"  source   {url}" for url in d.urls)]
    for f in used[1]:
        rows.append(f"  file     {d.folder}/{f.path}  {f.size:,} bytes  {find(d, f) or 'not here'}")
    return "\n".join(rows)
