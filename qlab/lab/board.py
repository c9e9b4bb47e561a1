"""TensorBoard event files beside a run's own records, where the extra qlab[tensorboard] is installed.

Written in the caller's thread: a full disk must not end a run from another one. The numbers also stand
in metrics.jsonl, so what cannot be written here is dropped, once and without an error.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np

FLUSH_S = 20.0


def finite_mean(values: Any) -> float:
    """Mean of the finite ones, NaN (without a warning) if none is."""
    finite = np.asarray(values)[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


class Board:
    """Scalars of one arm, means over its seeds."""

    def __init__(self, folder: Path):
        self._writer: Any = None
        self._flushed = time.monotonic()
        try:
            event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
            summary_pb2: Any = importlib.import_module("tensorboardX.proto.summary_pb2")
            from tensorboardX.record_writer import RecordWriter
        except ImportError:
            return
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
            self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        except OSError:
            self._drop()

    def add(self, rows: list[dict[str, Any]], step: int) -> None:
        """rows: one a seed, {"phase", "metrics": {name: value}}."""
        if self._writer is None or not rows:
            return
        values = []
        for name in rows[0]["metrics"]:
            mean = finite_mean([r["metrics"][name] for r in rows])
            tag = f"{rows[0]['phase']}/{name}"
            values.append(self._summary.Value(tag=tag, simple_value=mean))
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        try:
            self._write(event)
        except OSError:
            self._drop()

    def close(self) -> None:
        self._drop()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_S:  # it waits for the disk
            self._writer.flush()
            self._flushed = time.monotonic()

    def _drop(self) -> None:
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except OSError:
            pass
