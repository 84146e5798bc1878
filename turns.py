"""Threads take turns: one thread of the process computes at a time, and the others wait until it has to wait itself.

Python runs one thread at a time anyway, but its interpreter lock changes hands at every system call, however short. A thread that
has the turn keeps it until it really waits: for an fsync, a lock or the network. docs/performance.md has the gain.

The turn orders threads and excludes none: a thread that has waited MAX_WAIT for it goes on without it, so a long validation holds
up no other request. Only gunicorn_worker.py begins turns. Under another server, no thread has the turn, and nothing here waits.
"""

from __future__ import annotations

import threading

MAX_WAIT = 0.1  # seconds

_turn = threading.Lock()


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
