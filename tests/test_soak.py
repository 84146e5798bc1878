"""Mixed traffic for a quarter of an hour, with reloads and a consumer that takes files away.

DQM_SOAK_MINUTES is the length (15; 2 is enough for a first look), DQM_FAULT_SEED the seed. The receiver is reloaded every
minute but for the last third of the time, so that workers grow old enough to show a leak.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from client import HISTOGRAMS, SEED, curl
from faults import begin_upload, name_of, sha256, variant
from history import History, judge, look
from server import Server
from traffic import Consumer, Traffic, upload

pytestmark = pytest.mark.slow

MINUTES = float(os.environ.get("DQM_SOAK_MINUTES", "15"))
BASE_RUN = 500  # of the special senders; the ordinary ones have runs from 100
PAUSE = 0.3  # seconds between the uploads of one sender, on average


class Use:
    """What processes use: descriptors, threads, memory in kB."""

    def __init__(self, pids: list[int]) -> None:
        self.descriptors = max(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
        status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
        self.threads, self.memory = (
            max(int(re.search(rf"{field}:\s+(\d+)", text)[1]) for text in status)  # type: ignore[index]
            for field in ("Threads", "VmRSS")
        )

    def __str__(self) -> str:
        return f"{self.descriptors} descriptors, {self.threads} threads, {self.memory // 1024} MB"


class Senders:
    """Special senders beside the ordinary traffic, each a function that is called again and again in a thread."""

    def __init__(self, port: int, history: History) -> None:
        self.port, self.history = port, history
        self.statuses: collections.Counter[tuple[str, int]] = collections.Counter()
        self.failed: list[BaseException] = []
        self._over = threading.Event()
        kinds: list[Callable[[random.Random, int], int]] = [self.duplicate, self.invalid, self.cut_off, self.slow]
        self._threads = [threading.Thread(target=self._run, args=(kind,)) for kind in kinds]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        assert not self.failed

    def _run(self, kind: Callable[[random.Random, int], int]) -> None:
        chance, number = random.Random(f"{SEED} {kind.__name__}"), 0
        try:
            while not self._over.wait(chance.expovariate(1 / PAUSE)):
                number += 1
                self.statuses[kind.__name__, kind(chance, number)] += 1
        except BaseException as error:
            self.failed.append(error)
            raise

    def duplicate(self, chance: random.Random, number: int) -> int:
        """Send one file twice."""
        body = variant(chance)
        upload(self.port, self.history, BASE_RUN, number, body)
        return upload(self.port, self.history, BASE_RUN, number, body)

    def invalid(self, chance: random.Random, number: int) -> int:
        return upload(self.port, self.history, BASE_RUN + 1, number, HISTOGRAMS[: chance.randrange(100, 5000)])

    def cut_off(self, chance: random.Random, number: int) -> int:
        """Send a part of the body, then end or reset the connection."""
        with begin_upload(self.port, HISTOGRAMS, number, runNumber=str(BASE_RUN + 2)) as peer:
            peer.sendall(HISTOGRAMS[: chance.randrange(len(HISTOGRAMS) // 2)])
            if number % 2:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return 0

    def slow(self, chance: random.Random, number: int) -> int:
        """Send the second half of a body within ten seconds."""
        sent = self.history.send(name_of(number, BASE_RUN + 3), sha256(HISTOGRAMS))
        with (
            contextlib.suppress(OSError),
            begin_upload(self.port, HISTOGRAMS, number, runNumber=str(BASE_RUN + 3)) as peer,
        ):
            for start in range(len(HISTOGRAMS) // 2, len(HISTOGRAMS), 300):
                peer.sendall(HISTOGRAMS[start : start + 300])
                time.sleep(1)
            answer = peer.recv(100)
            status = int(answer.split()[1]) if answer else 0
            if status == 200:
                self.history.end(sent, "stored")
            return status
        return 0


def test_soak_loses_nothing_and_leaks_nothing(make_server: Callable[..., Server], folder: Path, tmp_path: Path) -> None:
    server, history = make_server("--workers", "2"), History()
    senders = Senders(server.port, history)
    uses: list[tuple[Use, Use]] = []  # of the master and of its workers, at the end of each minute
    began = time.monotonic()
    try:
        with (
            Consumer(folder, tmp_path / "away", age=3) as consumer,
            Traffic([server.port], history, SEED, senders=6, pause=PAUSE) as traffic,
        ):
            minute = 0
            while time.monotonic() < began + 60 * MINUTES:
                minute += 1
                time.sleep(max(0.0, min(began + 60 * minute, began + 60 * MINUTES) - time.monotonic()))
                uses.append((Use([server.process.pid]), Use(server.workers())))
                print(f"minute {minute}: master {uses[-1][0]}; workers {uses[-1][1]}")
                if minute <= MINUTES * 2 / 3:
                    os.kill(server.process.pid, signal.SIGHUP)
    finally:
        senders.stop()
    statuses = {"ordinary": traffic.statuses, "special": senders.statuses}
    print(f"{len(history.acknowledged)} acknowledged, {len(consumer.taken)} taken away, {statuses}")
    assert set(traffic.statuses) == {200}
    assert {status for (kind, status) in senders.statuses if kind in ("duplicate", "slow")} == {200}
    assert {status for (kind, status) in senders.statuses if kind == "invalid"} == {400}
    check_found_once(folder, history, consumer)
    for before, after in zip(uses[0], uses[-1], strict=True):
        assert after.descriptors <= before.descriptors + 10
        assert after.threads <= before.threads + 10
        assert after.memory <= before.memory * 1.2 + 10_000
    assert curl(server.url + "/rest/api/health").status == 200


def check_found_once(folder: Path, history: History, consumer: Consumer) -> None:
    """Check that each acknowledged file is found: once as a file that Overwatch sees or took, or else in .replaced/."""
    found = look(folder)
    assert judge(found, history, taken=consumer.taken) == {}
    copies = collections.Counter([*found.visible.items(), *consumer.taken])
    stored = collections.Counter(
        (upload.name, upload.sha256) for upload in history.acknowledged if upload.outcome != "duplicate"
    )
    assert not [key for key, count in copies.items() if count > stored[key]]
