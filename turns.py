"""Threads take turns: one thread of the process computes at a time, and the others wait until it has to wait itself.

Python runs one thread at a time anyway, but its interpreter lock changes hands at every system call, however short. A thread that
has the turn keeps it until it really waits: for an fsync, a lock or the network. docs/performance.md has the gain. Whether short calls
to the data folder wait depends on its file system, so the time that they took decides (`short_calls`).

The turn orders threads and excludes none: a thread that has waited MAX_WAIT for it goes on without it, so a long validation holds
up no other request. Only gunicorn_worker.py begins turns. Under another server, no thread has the turn, and nothing here waits.
"""

from __future__ import annotations

import threading
import time
from typing import Self

MAX_WAIT = 0.1  # seconds
SLOW_CALL = 0.0002  # seconds: more than a local file system takes, less than a round trip in a network

_turn = threading.Lock()
_least_seconds = 0.00001  # that short calls have taken of late


class _Thread(threading.local):
    has_turn = False


_thread = _Thread()


def begin() -> None:
    """Wait for the turn, unless this thread has it."""
    if not _thread.has_turn:
        _thread.has_turn = _turn.acquire(timeout=MAX_WAIT)


def end() -> None:
    """Give up the turn, if this thread has it."""
    if _thread.has_turn:
        _thread.has_turn = False
        _turn.release()


class waiting:
    """A context manager around a call that waits: the thread gives up the turn, and takes it again afterwards."""

    def __enter__(self) -> Self:
        self._had_turn = _thread.has_turn
        end()
        return self

    def resume(self) -> None:
        """Take the turn again before the end."""
        if self._had_turn:
            begin()

    def __exit__(self, *_: object) -> None:
        self.resume()


class short_calls(waiting):
    """A context manager around short calls to the data folder: the turn is given up where even the quickest are slow."""

    def __enter__(self) -> Self:
        self._had_turn = False
        self._began = time.monotonic()
        return super().__enter__() if _least_seconds > SLOW_CALL else self

    def __exit__(self, *_: object) -> None:
        global _least_seconds
        # The least of late, because a local file system, too, makes a thread wait at times.
        _least_seconds = min(time.monotonic() - self._began, 1.2 * _least_seconds)
        super().__exit__()
