"""CIFAR-10: the binary and the python archive, and the npz of its first images.

Letters: N examples. Images are u8[N, 32, 32, 3] here; `from_uint8` scales them.
"""

import io
import pickle
import tarfile
import zipfile
import zlib

import numpy as np

from qlab.data.files import find, read
from qlab.data.images import Classification, check_labels, from_uint8
from qlab.data.registry import DATASETS
from qlab.lab.errors import UserError

_PIXELS = 3 * 32 * 32


def _as_images(rows: np.ndarray) -> np.ndarray:
    """u8[N, 3072], channel after channel, to u8[N, 32, 32, 3]."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def parse_binary_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """One data_batch_*.bin: records of a label byte and 3,072 pixel bytes.

    Returns:
      (x u8[N, 32, 32, 3], y u8[N]).
    """
    if not data or len(data) % (1 + _PIXELS):
        raise UserError(
            f"{where}: {len(data)} bytes, expected a multiple of {1 + _PIXELS} "
            "(a label and 3,072 pixels a record); the file is truncated or has trailing bytes"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS)
    check_labels(records[:, 0], 10, where)
    return _as_images(records[:, 1:]), records[:, 0].copy()


class _ArraysOnly(pickle.Unpickler):
    """Opens a pickle that holds only arrays, lists and strings; runs nothing else it names."""

    def find_class(self, module, name):
        # The published batches name the module as NumPy 1 did.
        if (module.replace("numpy._core", "numpy.core"), name) == (
            "numpy.core.multiarray",
            "_reconstruct",
        ):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def parse_python_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """One data_batch_* of the python version: a pickled dict with b"data" and b"labels".

    Returns:
      (x u8[N, 32, 32, 3], y u8[N]).
    """
    try:
        batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
        x, y = batch[b"data"], np.asarray(batch[b"labels"])
        good = x.dtype == np.uint8 and x.shape == (len(y), _PIXELS) and y.dtype.kind in "iu"
    except Exception as e:  # a damaged pickle can raise almost anything
        raise UserError(
            f"{where}: not a CIFAR-10 python batch ({type(e).__name__}: {' '.join(str(e).split())})"
        ) from e
    if not good:
        raise UserError(
            f"{where}: b'data' is {x.dtype}{x.shape} with {len(y)} labels, "
            f"expected uint8 (N, {_PIXELS}) with N integer labels"
        )
    if y.size and y.min() < 0:
        raise UserError(f"{where}: label {int(y.min())}, expected 0..9")
    check_labels(y, 10, where)
    return _as_images(x), y.astype(np.uint8)


def parse_archive(data: bytes, where: str) -> tuple[np.ndarray, ...]:
    """Either published archive, told apart by the names inside.

    Returns:
      (x_train, y_train, x_test, y_test), the training batches in order 1..5.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            # Members are read into memory by name; nothing is unpacked to disk.
            members = {m.name.rsplit("/", 1)[-1]: m for m in tar.getmembers() if m.isfile()}
            ending = ".bin" if "test_batch.bin" in members else ""
            names = [f"data_batch_{i}{ending}" for i in range(1, 6)] + [f"test_batch{ending}"]
            lacking = [n for n in names if n not in members]
            if lacking:
                raise UserError(f"{where}: the archive has no {lacking[0]}; it is not CIFAR-10")
            parse = parse_binary_batch if ending else parse_python_batch
            batches = []
            for n in names:
                member = tar.extractfile(members[n])
                assert member is not None  # isfile() above
                batches.append(parse(member.read(), f"{where}:{n}"))
    except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{where}: not a whole tar.gz ({reason}); the file is damaged") from e
    x_train = np.concatenate([x for x, _ in batches[:5]])
    y_train = np.concatenate([y for _, y in batches[:5]])
    return x_train, y_train, *batches[5]


def _full() -> tuple[np.ndarray, ...]:
    dataset = DATASETS["cifar10"]
    binary, python = dataset.files
    # The binary archive is the one that is downloaded; a python archive at hand saves that.
    use_python = find(dataset, binary) is None and find(dataset, python) is not None
    return parse_archive(*read(dataset, (python if use_python else binary).path))


def cifar10() -> Classification:
    """CIFAR-10: the last 5,000 of the 50,000 training images are validation."""
    return from_uint8(*_full(), num_val=5000)


def parse_npz(data: bytes, where: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays `names` of an .npz; a pickle inside is refused."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as z:
            return {n: z[n] for n in names}
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError, zlib.error) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{where}: not a good npz with {', '.join(names)} ({reason})") from e


def cifar10_subset() -> Classification:
    """The first 8,000 + 1,000 images of CIFAR-10: the last 800 training images are validation."""
    data, where = read(DATASETS["cifar10_subset"], "cifar10_subset.npz")
    z = parse_npz(data, where, ("x_train", "y_train", "x_test", "y_test"))
    for part, n in (("train", 8000), ("test", 1000)):
        x, y = z[f"x_{part}"], z[f"y_{part}"]
        if (x.dtype, x.shape) != (np.uint8, (n, 32, 32, 3)) or (y.dtype, y.shape) != (
            np.uint8,
            (n,),
        ):
            raise UserError(
                f"{where}: x_{part} is {x.dtype}{x.shape} and y_{part} {y.dtype}{y.shape}, "
                f"expected uint8 ({n}, 32, 32, 3) and uint8 ({n},)"
            )
        check_labels(y, 10, where)
    return from_uint8(z["x_train"], z["y_train"], z["x_test"], z["y_test"], num_val=800)
