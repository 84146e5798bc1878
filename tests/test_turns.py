"""The order in which the threads of a worker compute."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from gunicorn.config import Config

import turns
from durable import Folder, FolderLock, GroupCommit, make_data_folder
from gunicorn_worker import AnswerSocket, BodyReader, Connection
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


@pytest.mark.usefixtures("patience")
def test_group_commit_gives_up_the_turn(pool: ThreadPoolExecutor) -> None:
    commit = GroupCommit[str, float](lambda items: [pool.submit(take_turn).result(30) for _ in items])
    turns.begin()
    assert commit("item")


@pytest.mark.usefixtures("patience")
def test_fsync_of_an_upload_gives_up_the_turn(
    pool: ThreadPoolExecutor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(folder, max_file_size=100, min_free_space=0, max_rejected=0)
    turns.begin()
    with storage.new_upload() as upload:
        monkeypatch.setattr("os.fsync", lambda fd: pool.submit(take_turn).result(30))
        upload.sync()


def slots(_: Path) -> list[AbstractContextManager[None]]:
    slots = FairSlots(1)
    return [slots.take("one"), slots.take("other")]


def locks(folder: Path) -> list[AbstractContextManager[None]]:
    make_data_folder(folder)
    return [FolderLock(Folder(str(folder))).hold(30) for _ in range(2)]


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("rivals", [slots, locks])
def test_waiting_for_another_thread_gives_up_the_turn(
    pool: ThreadPoolExecutor, folder: Path, rivals: Callable[[Path], list[AbstractContextManager[None]]]
) -> None:
    one, other = rivals(folder)
    is_taken, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with one:
            is_taken.set()
            assert is_over.wait(30)

    holding = pool.submit(hold)
    assert is_taken.wait(30)
    turns.begin()
    computing = pool.submit(take_turn, is_over.set)
    with other:
        pass
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
