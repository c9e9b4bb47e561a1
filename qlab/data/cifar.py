"""CIFAR-10: the binary and the python archive, and the npz of its first images.

Letters: N examples. Images are u8[N, 32, 32, 3] here; `from_uint8` scales them.
"""

import hashlib
import io
import tarfile
import zipfile
import zlib

import numpy as np

from qlab.data.files import first_here, read
from qlab.data.images import Classification, check_labels, from_uint8
from qlab.data.pickles import open_pickle
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


def parse_python_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """One data_batch_* of the python version: a pickled dict with b"data" and b"labels".

    Returns:
      (x u8[N, 32, 32, 3], y u8[N]).
    """
    batch = open_pickle(data, where)
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= set(batch):
        raise UserError(f"{where}: no dict with b'data' and b'labels'; it is not CIFAR-10")
    x, y = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    good = x.dtype == np.uint8 and x.shape == (len(y), _PIXELS) and y.dtype.kind in "iu"
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


# The binary archive is the one that is downloaded; a python archive at hand saves that.
ARCHIVES = (("cifar10", "cifar-10-binary.tar.gz"), ("cifar10", "cifar-10-python.tar.gz"))


def _from_archive(data: bytes, where: str) -> tuple[np.ndarray, ...]:
    arrays = parse_archive(data, where)
    if (len(arrays[0]), len(arrays[2])) != (50_000, 10_000):
        raise UserError(
            f"{where}: {len(arrays[0])} + {len(arrays[2])} images, expected 50,000 + 10,000"
        )
    return arrays


def cifar10() -> Classification:
    """CIFAR-10: the last 5,000 of the 50,000 training images are validation."""
    return from_uint8(*_from_archive(*read(*first_here(*ARCHIVES))), num_val=5000)


def parse_npz(data: bytes, where: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays `names` of an .npz; a pickle inside is refused."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as z:
            return {n: z[n] for n in names}
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError, zlib.error) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{where}: not a good npz with {', '.join(names)} ({reason})") from e


SUBSET = (("cifar10_subset", "cifar10_subset.npz"), *ARCHIVES)
# Of the pixels and labels (x_train, y_train, x_test, y_test), whichever file they come from.
_SUBSET_SHA256 = "7321221f27344074d239a5311bba4efa8cd088fb5733eaeda5dde33a376d8884"


def cifar10_subset() -> Classification:
    """The first 8,000 + 1,000 images of CIFAR-10: the last 800 training images are validation.

    Read from the small npz where it is at hand, else cut out of the whole set.
    """
    dataset, path = first_here(*SUBSET)
    data, where = read(dataset, path)
    if path.endswith(".npz"):
        z = parse_npz(data, where, ("x_train", "y_train", "x_test", "y_test"))
        parts = z["x_train"], z["y_train"], z["x_test"], z["y_test"]
    else:
        x_train, y_train, x_test, y_test = _from_archive(data, where)
        parts = x_train[:8000], y_train[:8000], x_test[:1000], y_test[:1000]
    return from_uint8(*check_subset(parts, where), num_val=800)


def check_subset(parts: tuple[np.ndarray, ...], where: str) -> tuple[np.ndarray, ...]:
    """The same arrays if they are the 8,000 + 1,000 images, byte for byte."""
    digest = hashlib.sha256()
    for a in parts:
        digest.update(np.ascontiguousarray(a).data)
    if any(a.dtype != np.uint8 for a in parts) or digest.hexdigest() != _SUBSET_SHA256:
        raise UserError(
            f"{where}: its first images are not those of CIFAR-10's subset "
            f"(sha256 {digest.hexdigest()}, expected {_SUBSET_SHA256}); get the original file"
        )
    return parts
