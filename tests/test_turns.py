"""The order in which the threads of a worker compute."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from client import wait_until
from gunicorn.config import Config

import turns
from durable import Folder, FolderLock, GroupCommit, make_data_folder
from gunicorn_worker import AnswerSocket, BodyReader, Connection
from receipts import ReceiptLog
from receiver import FairSlots
from storage import Storage


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads
        turns.end()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads wait for the turn as long as they must."""
    monkeypatch.setattr(turns, "MAX_WAIT", 300.0)


def take_turn(then: Callable[[], object] = lambda: None) -> float:
    """Return when a thread got the turn; do something after it."""
    turns.begin()
    turns.end()
    got = time.monotonic()
    then()
    return got


@pytest.mark.usefixtures("patience")
def test_one_thread_has_the_turn(pool: ThreadPoolExecutor) -> None:
    running, most = [0], [0]

    def compute() -> None:
        for _ in range(50):
            turns.begin()
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.0005)
            running[0] -= 1
            turns.end()

    for thread in [pool.submit(compute) for _ in range(4)]:
        thread.result(30)
    assert most == [1]


def test_thread_goes_on_without_the_turn(pool: ThreadPoolExecutor) -> None:
    turns.begin()
    began = time.monotonic()
    assert pool.submit(take_turn).result(30) - began >= turns.MAX_WAIT
    assert not pool.submit(turns._turn.acquire, False).result(30)  # which is still this thread's


@pytest.mark.usefixtures("patience")
def test_thread_that_waits_gives_up_the_turn(pool: ThreadPoolExecutor) -> None:
    turns.begin()
    with turns.waiting():
        pool.submit(take_turn).result(30)
    assert not turns._turn.acquire(blocking=False)  # taken again


def test_thread_without_the_turn_takes_none() -> None:
    with turns.waiting():
        pass
    assert turns._turn.acquire(blocking=False)
    turns._turn.release()


def test_batch_is_committed_in_a_turn() -> None:
    commit = GroupCommit[str, bool](lambda items: [turns._thread.has_turn for _ in items])
    turns.begin()
    assert commit("item")
    turns.end()
    assert not commit("item")  # a thread that had no turn takes none


@pytest.mark.usefixtures("patience")
def test_thread_that_waits_for_its_turn_holds_up_no_batch(pool: ThreadPoolExecutor) -> None:
    commit = GroupCommit[str, str](lambda items: items)

    def in_a_turn() -> None:
        turns.begin()
        commit("one")
        turns.end()

    with commit._lock:
        one = pool.submit(in_a_turn)
        while not commit._waiting:
            time.sleep(0.001)
        commit._commit_all([commit._waiting.popleft()])
        turns.begin()
    assert pool.submit(commit, "other").result(30) == "other"
    assert not one.done()
    turns.end()
    one.result(30)


def test_interrupted_wait_for_the_turn_leaves_no_lock(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = GroupCommit[str, str](lambda items: items)
    turns.begin()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(turns, "begin", lambda: os.kill(os.getpid(), signal.SIGINT))
        commit("one")
    assert pool.submit(commit, "other").result(30) == "other"


@pytest.mark.usefixtures("patience")
def test_fsync_of_an_upload_gives_up_the_turn(
    pool: ThreadPoolExecutor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(folder, list, max_file_size=100, min_free_space=0, max_rejected=0)
    turns.begin()
    with storage.new_upload() as upload:
        monkeypatch.setattr("os.fsync", lambda fd: pool.submit(take_turn).result(30))
        upload.sync()


@pytest.mark.usefixtures("patience")
def test_short_calls_keep_the_turn_until_all_take_long(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_least_seconds", 0.00001)
    turns.begin()
    kept = []
    for number in range(40):
        with turns.short_calls():
            kept.append(turns._thread.has_turn)
            time.sleep(0.005 * (number != 20))
    # One quick call is enough: the others may have waited for the interpreter lock.
    assert (kept[0], kept[19], kept[21], kept[39]) == (True, False, True, False)
    with turns.short_calls():
        pool.submit(take_turn).result(30)
    assert turns._thread.has_turn


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize(
    ("call", "when"),
    [
        ("open", lambda _, flags, *__: flags & os.O_EXCL),
        ("open", lambda name, *_: name == "second"),
        ("rename", lambda *_: True),
    ],
    ids=["begin", "compare", "commit"],
)
def test_slow_file_system_holds_up_no_thread(
    pool: ThreadPoolExecutor, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, when: Callable[..., bool]
) -> None:
    storage = Storage(folder, list, max_file_size=100, min_free_space=0, max_rejected=0)
    with storage.new_upload() as upload:
        storage.commit(upload, "first", str)  # makes the folders
    got: list[float] = []
    genuine = getattr(os, call)

    def slow(*arguments: Any, **more: Any) -> Any:
        if when(*arguments):
            got.append(pool.submit(take_turn).result(30))
        return genuine(*arguments, **more)

    monkeypatch.setattr(os, call, slow)
    monkeypatch.setattr(turns, "SLOW_CALL", -1.0)  # every call is slow
    turns.begin()
    with storage.new_upload() as upload:
        storage.commit(upload, "second", str)
    assert len(got) == 1


@pytest.mark.usefixtures("patience")
def test_lock_is_free_while_a_thread_waits_for_its_turn(
    pool: ThreadPoolExecutor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(folder, list, max_file_size=100, min_free_space=0, max_rejected=0)
    monkeypatch.setattr(turns, "SLOW_CALL", -1.0)
    gate, rename = Gate(), os.rename

    def keep_the_turn() -> None:
        turns.begin()
        gate.pass_through()
        turns.end()

    def slow(*arguments: Any, **more: Any) -> None:
        pool.submit(keep_the_turn)
        assert gate.is_reached.wait(30)
        rename(*arguments, **more)

    def send() -> None:
        turns.begin()
        with storage.new_upload() as upload:
            storage.commit(upload, "name", str)
        turns.end()

    monkeypatch.setattr(os, "rename", slow)
    sending = pool.submit(send)
    wait_until((folder / "name").exists, 30)
    with FolderLock(Folder(str(folder))).hold(10):
        assert not sending.done()
    gate.is_open.set()
    sending.result(30)


class Gate:
    """Where threads wait until it is open."""

    def __init__(self) -> None:
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.is_reached.set()
        assert self.is_open.wait(30)


def a_slot(_: Path, gate: Gate) -> list[Callable[[], object]]:
    slots = FairSlots(1)

    def take() -> None:
        with slots.take("one"):
            gate.pass_through()

    return [take, take]


def the_lock(folder: Path, gate: Gate) -> list[Callable[[], object]]:
    make_data_folder(folder)

    def hold(lock: FolderLock) -> None:
        with lock.hold(30):
            gate.pass_through()

    return [partial(hold, FolderLock(Folder(str(folder)))) for _ in range(2)]


def a_batch(_: Path, gate: Gate) -> list[Callable[[], object]]:
    def commit_batch(items: Sequence[str]) -> Sequence[str]:
        gate.pass_through()
        return items

    commit = GroupCommit(commit_batch)
    return [partial(commit, "one"), partial(commit, "other")]


def the_log(folder: Path, gate: Gate) -> list[Callable[[], object]]:
    make_data_folder(folder)
    log = ReceiptLog(folder)

    def hold() -> None:
        with log._lock:
            gate.pass_through()

    return [hold, partial(log.append, [])]


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("rivals", [a_slot, the_lock, a_batch, the_log])
def test_waiting_for_another_thread_gives_up_the_turn(
    pool: ThreadPoolExecutor, folder: Path, rivals: Callable[[Path, Gate], list[Callable[[], object]]]
) -> None:
    gate = Gate()
    one, other = rivals(folder, gate)
    holding = pool.submit(one)
    assert gate.is_reached.wait(30)
    turns.begin()
    computing = pool.submit(take_turn, gate.is_open.set)
    other()
    computing.result(30)
    holding.result(30)


@pytest.mark.usefixtures("patience")
def test_body_that_waits_gives_up_the_turn(pool: ThreadPoolExecutor) -> None:
    client, accepted = socket.socketpair()
    with client, contextlib.closing(AnswerSocket(accepted)) as connection:
        turns.begin()
        sending = pool.submit(take_turn, lambda: client.sendall(b"body"))
        assert BodyReader(connection).chunk() == b"body"
        sending.result(30)


@pytest.mark.usefixtures("patience")
def test_wait_for_next_request_gives_up_the_turn(pool: ThreadPoolExecutor) -> None:
    client, accepted = socket.socketpair()
    with client, contextlib.closing(Connection(Config(), accepted, "", "")) as connection:
        turns.begin()
        computing = pool.submit(take_turn)
        assert not connection.has_next_head()
        assert computing.result(30) < time.monotonic()


@pytest.mark.usefixtures("patience")
def test_sending_a_file_gives_up_the_turn(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    def sendfile(_peer: int, _file: int, _offset: int, count: int) -> int:
        pool.submit(take_turn).result(30)
        return count

    monkeypatch.setattr(os, "sendfile", sendfile)
    client, accepted = socket.socketpair()
    with client, contextlib.closing(AnswerSocket(accepted)) as connection, Path(__file__).open("rb") as file:
        turns.begin()
        connection.sendfile(file)
        assert connection.flush()
