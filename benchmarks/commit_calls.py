"""The calls that an upload needs of a file system, without a receiver: the measure for slow and shared file systems.

Command: python benchmarks/commit_calls.py FOLDER THREADS SECONDS   (prints uploads per second)

Each thread writes and fsyncs a file of 5 kB and finds its name free. Then, once for all threads that wait: take the lock,
look at each name again, rename, release the lock, fsync the folder. Then, once for all that wait: append the receipts and
fsync them. No HTTP, no validation; one such process stands for one host.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path

CONTENT = os.urandom(5462)
RECEIPT = b"x" * 399 + b"\n"


class Group:
    """The thread that gets the lock does the work of all that wait."""

    def __init__(self, work: Callable[[list[str]], None]) -> None:
        self._work = work
        self._waiting: deque[tuple[str, threading.Event]] = deque()
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        done = threading.Event()
        self._waiting.append((name, done))
        with self._lock:
            if done.is_set():
                return
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            self._work([one for one, _ in batch])
            for _, event in batch:
                event.set()


class Host:
    """One process that uses a shared folder."""

    def __init__(self, folder: Path) -> None:
        key = uuid.uuid4().hex
        self.folder, self.incoming = folder, folder / ".incoming" / key
        self.incoming.mkdir(parents=True)
        receipts = folder / ".receipts" / "1" / f"{key}.jsonl"
        receipts.parent.mkdir(parents=True, exist_ok=True)
        self.names = os.open(folder, os.O_RDONLY)
        self.receipts = os.open(receipts, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        self.commit, self.record = Group(self._commit), Group(self._record)

    def store(self, name: str) -> None:
        fd = os.open(self.incoming / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(fd, CONTENT)
        os.fsync(fd)
        os.close(fd)
        self._is_free(name)
        self.commit(name)
        self.record(name)

    def _is_free(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.stat(self.folder / name)
            raise FileExistsError(name)

    def _commit(self, names: list[str]) -> None:
        pause = 0.0002
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        for name in names:
            self._is_free(name)
            os.rename(self.incoming / name, self.folder / name)
        fcntl.flock(self.lock, fcntl.LOCK_UN)
        os.fsync(self.names)

    def _record(self, names: list[str]) -> None:
        os.write(self.receipts, RECEIPT * len(names))
        os.fsync(self.receipts)


def main() -> None:
    folder, threads, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    host = Host(folder)
    began = time.monotonic()
    first, end = began + 1, began + 1 + seconds  # after a second to warm up
    counts = [0] * threads

    def send(thread: int) -> None:
        while (now := time.monotonic()) < end:
            host.store(f"{thread}-{uuid.uuid4().hex}.root")
            counts[thread] += now >= first

    running = [threading.Thread(target=send, args=(thread,)) for thread in range(threads)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    print(sum(counts) / seconds)


if __name__ == "__main__":
    main()
