"""What a run leaves on disk, and the guards around writing it.

    <workdir>/command.txt  manifest.json  config.json  lock  results.jsonl  claims.json  report.html
    <workdir>/<arm>/metrics.jsonl  arrays.npz  results.jsonl  done.json  checkpoints/<step>/

Everything the report shows comes from these files. Imports no JAX.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from qlab.lab.errors import UserError

_DISK = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file size limit is reached; raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only; give another --workdir",
    errno.EACCES: "no permission to write there; give another --workdir",
    errno.EPERM: "no permission to write there; give another --workdir",
    errno.ENOENT: "no folder can be made there; give another --workdir",
    errno.ENOTDIR: "a part of the path is a file, not a folder; give another --workdir",
    errno.EEXIST: "a file of that name is in the way; give another --workdir",
    errno.EIO: "input/output error of the disk",
}


@contextlib.contextmanager
def guard(path: Path | str) -> Iterator[None]:
    """Turns a failed write into one line that names the place and the remedy."""
    try:
        yield
    except OSError as e:
        if e.errno in _DISK:
            raise UserError(
                f"cannot write {e.filename or path}: {_DISK[e.errno]}; the same command then resumes"
            ) from e
        raise
    except Exception as e:  # tensorstore reports a full disk as its own error type
        if "No space left" in str(e) or "Disk quota exceeded" in str(e):
            raise UserError(
                f"cannot write {path}: {_DISK[errno.ENOSPC]}; the same command then resumes"
            ) from e
        raise


def dumps(value: Any) -> str:
    """JSON with non-finite floats as null: a reader in any language can parse it."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_atomic(path: Path, text: str) -> None:
    """Writes all or nothing: a temporary file beside it, fsync, rename."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with guard(path):
        try:
            with tmp.open("w") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            tmp.replace(path)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError, one line, if the file is absent or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; is this a run folder?") from None
    except (ValueError, OSError) as e:
        raise UserError(
            f"{path} is damaged ({e}); remove the folder or give another --workdir"
        ) from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a cut last line (a killed writer) is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


class JsonLines:
    """An append-only JSON-lines file that can be cut back to a byte length on resume."""

    def __init__(self, path: Path, keep_bytes: int = 0):
        self.path = path
        with guard(path):
            path.touch()
            with path.open("r+b") as f:
                f.truncate(keep_bytes)
            self._file: TextIO = path.open("a")

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        with guard(self.path):
            self._file.write("".join(dumps(row) + "\n" for row in rows))
            self._file.flush()

    def sync(self) -> int:
        """Bytes safely on disk."""
        with guard(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()

    def close(self) -> None:
        with guard(self.path):
            self._file.close()


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds a run folder for this process.

    The lock is the kernel's (flock), so a killed process leaves nothing behind.

    Raises:
      UserError: the folder cannot be made or written, or another process holds it.
    """
    with guard(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        handle = (workdir / "lock").open("a+")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise UserError(
                f"{workdir} is in use by {holder}; wait for it or give another --workdir"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield


def commit() -> str:
    """Commit of the checkout this code runs from, "+dirty" with local changes, "" if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=5
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.stdout.strip() + ("+dirty" if dirty.stdout.strip() else "")
