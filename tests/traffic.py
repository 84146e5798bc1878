"""Traffic for experiments: senders in threads that record their uploads, and a consumer that takes files away."""

from __future__ import annotations

import collections
import contextlib
import http.client
import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from client import post
from faults import Sent, headers_of, name_of, sha256, taken_files, variant
from history import History, outcome_of

LARGE = 3 << 20  # bytes


def upload(port: int, history: History, run: int, time_stamp: int, body: bytes, seconds: float = 120.0) -> int:
    """Upload a file, remember it, and return the status: 0 without an answer."""
    sent = history.send(name_of(time_stamp, run), sha256(body))
    try:
        status, answer = post(port, body, headers_of(time_stamp, run), seconds)
    except (OSError, http.client.HTTPException, ValueError):
        return 0  # it may take effect yet
    if status == 200:
        assert (answer["filename"], answer["sha256"]) == (sent.name, sent.sha256)
        history.end(sent, outcome_of(answer))
    elif status < 500:
        history.end(sent)
    return status


class Traffic:
    """Senders in threads, so many for each port: half of the uploads have new names, half contended ones.

    A port that refuses connections is tried again, as a sender does. `pause` is the mean time between the uploads of a
    thread, `large` the share of large files.
    """

    def __init__(
        self,
        ports: Sequence[int],
        history: History,
        seed: object,
        senders: int = 3,
        run: int = 100,
        *,
        pause: float = 0.0,
        large: float = 0.0,
    ) -> None:
        self.history, self.run, self.pause, self.large = history, run, pause, large
        self.statuses: collections.Counter[int] = collections.Counter()
        self.answered: dict[int, list[float]] = {port: [] for port in ports}  # when an upload was acknowledged
        self.failed: list[BaseException] = []
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._send, args=(port, run + number, random.Random(f"{seed} {number}")))
            for number, port in enumerate(list(ports) * senders)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self.failed:
            raise self.failed[0]

    def _send(self, port: int, run: int, chance: random.Random) -> None:
        time_stamp = 0
        try:
            while not self._over.is_set():
                time_stamp += 1
                name = (run, time_stamp) if chance.random() < 0.5 else (self.run, 90_000 + chance.randrange(5))
                body = variant(chance, LARGE if chance.random() < self.large else 0)
                status = upload(port, self.history, *name, body)
                self.statuses[status] += 1
                if status == 200:
                    self.answered[port].append(time.monotonic())
                else:
                    self._over.wait(0.2)
                if self.pause:
                    self._over.wait(chance.expovariate(1 / self.pause))
        except BaseException as error:
            self.failed.append(error)
            raise

    def count(self, port: int) -> int:
        return len(self.answered[port])

    def wait(self, port: int, more: int, seconds: float) -> None:
        """Wait until so many more uploads have been acknowledged at a port."""
        wanted, end = self.count(port) + more, time.monotonic() + seconds
        while self.count(port) < wanted:
            assert time.monotonic() < end, f"{self.count(port)} of {wanted} acknowledged within {seconds} s"
            assert not self.failed, self.failed
            time.sleep(0.05)

    def longest_wait(self, port: int, since: float) -> float:
        """Return the longest time without an acknowledgement at a port."""
        moments = [since, *(moment for moment in self.answered[port] if moment > since), time.monotonic()]
        return max(later - earlier for earlier, later in itertools.pairwise(moments))


class Consumer:
    """Takes visible files away, as Overwatch does, once they are some seconds old."""

    def __init__(self, folder: Path, away: Path, age: float = 0.0) -> None:
        self.folder, self.away, self.age = folder, away, age
        away.mkdir()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def taken(self) -> list[Sent]:
        return taken_files(self.away)

    def _run(self) -> None:
        number = itertools.count()
        while not self._over.wait(0.001 + self.age / 10):
            for path in self.folder.glob("*.root"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_ctime >= self.age:
                        path.rename(self.away / f"{next(number)}-{path.name}")


def at_once(calls: Sequence[Callable[[], object]]) -> None:
    """Make calls in threads of their own, as nearly at once as may be."""
    barrier = threading.Barrier(len(calls))

    def make(call: Callable[[], object]) -> None:
        barrier.wait(30)
        call()

    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(make, calls))
