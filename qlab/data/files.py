"""Find a registered file or fetch it, and check every byte before anyone reads it.

Order: $QLAB_DATA/<folder>/<file>, the user's cache, the canonical source. Each failure is one
line that names the file, what is wrong and the remedy.
"""

import gzip
import hashlib
import io
import os
import sys
import zlib
from pathlib import Path

from qlab.data.registry import DATASETS, DataSet, File
from qlab.lab.errors import UserError


def _cache_root() -> Path:
    root = os.environ.get("QLAB_CACHE")
    if not root:
        import pooch

        root = pooch.os_cache("qlab")
    return Path(root).expanduser().absolute()


def cache_dir(sub: str = "") -> Path:
    """The user's own folder for things qlab can make or fetch again, created with mode 0700.

    Args:
      sub: a relative path below it, e.g. "zoo".
    Returns:
      $QLAB_CACHE/sub if QLAB_CACHE is set, else <the platform's user cache>/qlab/sub.
    """
    if Path(sub).is_absolute() or ".." in Path(sub).parts:
        raise UserError(f"cache_dir({sub!r}): give a relative path without '..', like 'zoo'")
    path = _cache_root() / sub
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        # One by one: mkdir(parents=True) would give the parents the default mode.
        for p in reversed(missing):
            p.mkdir(mode=0o700, exist_ok=True)
        if not path.is_dir():
            raise NotADirectoryError(20, "not a folder")
    except OSError as e:
        raise UserError(
            f"cannot create the cache folder {path} ({e.strerror}); set QLAB_CACHE to a folder you can write"
        ) from e
    return path


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def find(dataset: DataSet, file: File) -> Path | None:
    """The file on this machine: under $QLAB_DATA first, then in the cache; None if absent."""
    places = []
    if os.environ.get("QLAB_DATA"):
        places.append(Path(os.environ["QLAB_DATA"]).expanduser())
    places.append(_cache_root() / "data")
    for place in places:
        path = place / dataset.folder / file.path
        unpacked = path.with_suffix("") if file.content_size else path
        for p in (path, unpacked):
            if p.exists():
                return p
    return None


def first_here(*sources: tuple[str, str]) -> tuple[DataSet, str]:
    """Which of several files with the same data to read.

    Args:
      sources: (key in DATASETS, file), the best first.
    Returns:
      The first that is on this machine, else the first that can be downloaded.
    """
    rows = [(DATASETS[key], path) for key, path in sources]
    here = (row for row in rows if find(row[0], row[0].file(row[1])))
    return next(here, None) or next(row for row in rows if row[0].urls)


def _absent(dataset: DataSet, file: File, reason: str) -> UserError:
    have = os.environ.get("QLAB_DATA")
    state = f"now {have}" if have else "now not set"
    line = (
        f"{dataset.folder}/{file.path} is not on this machine: "
        f"set QLAB_DATA ({state}) to a folder that holds {dataset.folder}/{file.path}"
    )
    if dataset.urls:
        return UserError(f"{line}, or run once with network to download it ({reason})")
    return UserError(f"{line}; it cannot be downloaded")


def download(dataset: DataSet, file: File) -> Path:
    """Fetch the file into the cache; it appears under its name only whole and checked."""
    if not dataset.urls:
        raise _absent(dataset, file, "")
    import pooch

    target = cache_dir("data") / dataset.folder / file.path
    cache_dir(str(Path("data") / dataset.folder / Path(file.path).parent))
    pooch.get_logger().setLevel("WARNING")
    if file.size > 5_000_000:  # long enough to wonder what happens
        print(f"downloading {file.path}, {file.size / 1e6:.0f} MB", file=sys.stderr, flush=True)
    reasons = []
    for prefix in dataset.urls:
        try:
            # pooch writes to a temporary name, compares the hash, then renames.
            pooch.retrieve(
                prefix + file.path,
                known_hash=f"sha256:{file.sha256}",
                fname=target.name,
                path=target.parent,
                downloader=pooch.HTTPDownloader(timeout=30),  # pyright: ignore[reportArgumentType]
            )
            return target
        except ValueError:  # pooch's word for another hash
            reasons.append(f"{prefix} sent other bytes than the registered sha256")
        except OSError as e:
            status = getattr(getattr(e, "response", None), "status_code", None)
            reasons.append(f"{prefix} {f'status {status}' if status else type(e).__name__}")
    raise _absent(dataset, file, "tried " + ", ".join(reasons))


def check(data: bytes, size: int, sha256: str, where: str, remedy: str) -> bytes:
    """`data` itself if it has this size and sha256, else one line that says which differs.

    >>> check(b"ab", 3, "", "x.bin", "fetch it again")
    Traceback (most recent call last):
    qlab.lab.errors.UserError: x.bin has 2 bytes, expected 3 (truncated or altered): fetch it again
    """
    if len(data) != size:
        raise UserError(
            f"{where} has {len(data):,} bytes, expected {size:,} (truncated or altered): {remedy}"
        )
    got = hashlib.sha256(data).hexdigest()
    if got != sha256:
        raise UserError(f"{where} is altered: sha256 {got}, expected {sha256}: {remedy}")
    return data


def gunzip(data: bytes, max_size: int, where: str, remedy: str) -> bytes:
    """The contents of a .gz, at most max_size + 1 bytes of them, so that none can fill the memory."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as f:
            return f.read(max_size + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{where} is not a whole gzip file ({_one_line(e)}): {remedy}") from e


def read(dataset: DataSet, path: str) -> tuple[bytes, str]:
    """The checked contents of one registered file, gunzipped if the registry says so.

    Returns:
      (contents, where they were found).
    """
    file = dataset.file(path)
    place = find(dataset, file) or download(dataset, file)
    remedy = (
        "remove it and run once with network"
        if dataset.urls
        else f"put a good copy of {dataset.folder}/{file.path} there"
    )
    try:
        data = place.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {place} ({e.strerror}): {remedy}") from e
    where = str(place)
    if not file.content_size:
        return check(data, file.size, file.sha256, where, remedy), where
    if place.suffix == ".gz":
        data = gunzip(data, file.content_size, where, remedy)
        where += " (gunzipped)"
    return check(data, file.content_size, file.content_sha256, where, remedy), where
