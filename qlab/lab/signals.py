"""SIGTERM and SIGINT: the first asks for a stop at the next safe point, the second exits at once.

A Python handler runs only between bytecodes, and one XLA compilation can be minutes of C++. So a
thread reads the wake-up file descriptor, which the C handler writes at once, and counts there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from qlab.lab.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """A flag that a signal or a time limit raises; `check()` raises Preempted once it is up."""

    def __init__(self, time_limit_s: float = 0.0):
        self._why = ""
        self._deadline = time.monotonic() + time_limit_s if time_limit_s else float("inf")

    @property
    def why(self) -> str:
        if not self._why and time.monotonic() > self._deadline:
            self._why = "time limit"
        return self._why

    def raise_flag(self, why: str) -> None:
        self._why = why

    def check(self) -> None:
        if self.why:
            raise Preempted(self.why)


@contextlib.contextmanager
def listen(time_limit_s: float = 0.0) -> Iterator[Stop]:
    """Installs the handlers (in the main thread only) and restores what was there."""
    stop = Stop(time_limit_s)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    read, write = os.pipe()
    os.set_blocking(write, False)

    def count() -> None:
        seen = 0
        with contextlib.suppress(OSError):
            while data := os.read(read, 64):
                for number in data:
                    seen += 1
                    stop.raise_flag(signal.Signals(number).name)
                    if seen > 1:
                        os.write(2, b"\nsecond signal: leaving at once\n")
                        os._exit(128 + number)

    old = {s: signal.signal(s, lambda *_: None) for s in SIGNALS}
    old_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=count, daemon=True, name="qlab-signals")
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(old_fd)
        for s, handler in old.items():
            signal.signal(s, handler)
        os.close(write)  # ends the thread: read returns b""
        thread.join(1.0)
        os.close(read)
