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

MAX_WAIT = 0.1  # seconds
SLOW_CALL = 0.0005  # seconds: more than a local file system takes, less than a round trip of a network file system

_turn = threading.Lock()
_call_seconds = 0.0  # moving average of the time of short calls


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

    def __enter__(self) -> None:
        self._had_turn = _thread.has_turn
        end()

    def __exit__(self, *_: object) -> None:
        if self._had_turn:
            begin()


class short_calls(waiting):
    """A context manager around short calls to the data folder: the turn is given up if they have taken longer than SLOW_CALL."""

    def __enter__(self) -> None:
        self._had_turn = False
        if _call_seconds > SLOW_CALL:
            super().__enter__()
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        global _call_seconds
        _call_seconds += (time.monotonic() - self._began - _call_seconds) / 8
        super().__exit__()
