"""The order in which the threads of a worker compute."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import turns
from durable import GroupCommit
from gunicorn_worker import AnswerSocket, BodyReader
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
    monkeypatch.setattr(turns, "MAX_WAIT", 30.0)


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


@pytest.mark.usefixtures("patience")
def test_waiting_for_a_slot_gives_up_the_turn(pool: ThreadPoolExecutor) -> None:
    slots = FairSlots(1)
    is_taken, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with slots.take("other"):
            is_taken.set()
            is_over.wait(30)

    holder = pool.submit(hold)
    assert is_taken.wait(30)
    turns.begin()
    other = pool.submit(take_turn, is_over.set)
    with slots.take("sender"):
        pass
    other.result(30)
    holder.result(30)


@pytest.mark.usefixtures("patience")
def test_body_that_waits_gives_up_the_turn(pool: ThreadPoolExecutor) -> None:
    client, accepted = socket.socketpair()
    with client, contextlib.closing(AnswerSocket(accepted)) as connection:
        turns.begin()
        sending = pool.submit(take_turn, lambda: client.sendall(b"body"))
        assert BodyReader(connection).chunk() == b"body"
        sending.result(30)
