"""durable.py: locks, group commit and folders by descriptor; and what a refusal or a failure leaves of memory and descriptors."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import FORM, HISTOGRAMS, PROFILES, multipart, part, send
from faults import failing
from werkzeug.sansio.multipart import MultipartDecoder
from werkzeug.test import Client

import receiver
import receiver_command
from durable import Folder, FolderLock, GroupCommit, StorageUnavailable
from receipts import ReceiptLog
from receiver_requests import ReceiverRequest
from storage import Storage
from uploads import Upload


@pytest.fixture
def store(folder: Path) -> Storage:
    return Storage(folder, list, max_file_size=1 << 20, min_free_space=0, max_rejected=1 << 20)


# --- the lock ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_lock(folder: Path) -> Callable[[], FolderLock]:
    """Return a function that makes a lock as another process would."""
    folder.mkdir()
    return lambda: FolderLock(Folder(str(folder)))


@pytest.mark.parametrize(
    ("module", "call", "when"),
    [
        (os, "stat", lambda path, **_: path == ".lock"),
        (fcntl, "flock", lambda _, operation: operation == fcntl.LOCK_UN),
    ],
    ids=["its path is looked at", "it is unlocked"],
)
def test_lock_is_released_where_a_call_fails(
    make_lock: Callable[[], FolderLock], monkeypatch: pytest.MonkeyPatch, module: Any, call: str, when: Any
) -> None:
    monkeypatch.setattr(module, call, failing(errno.EIO, getattr(module, call), when))
    lock = make_lock()
    with pytest.raises(StorageUnavailable) as error, lock.hold(1):
        pass
    with make_lock().hold(0):  # while the exception still holds its frames
        assert error.value


def test_lock_that_is_always_removed_is_busy(
    make_lock: Callable[[], FolderLock], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def remove(fd: int, operation: int) -> None:
        flock(fd, operation)
        folder.joinpath(".lock").unlink(missing_ok=True)

    monkeypatch.setattr(fcntl, "flock", remove)
    with pytest.raises(StorageUnavailable), make_lock().hold(0.2):
        pass


# --- group commit ------------------------------------------------------------------------------------------------------


def results_of(commit: Callable[[Sequence[int]], Sequence[int | Exception]]) -> list[int | BaseException]:
    """Commit item 0 alone and items 1 to 5, which wait meanwhile, in one batch; return their results and exceptions."""
    entered, gate, batches = threading.Event(), threading.Event(), list[list[int]]()

    def commit_batch(items: Sequence[int]) -> Sequence[int | Exception]:
        batches.append(sorted(items))
        entered.set()
        gate.wait(30)
        return commit(items)

    group = GroupCommit(commit_batch)

    def call(item: int) -> int | BaseException:
        try:
            return group(item)
        except BaseException as error:  # noqa: BLE001  a result, too
            return error

    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(call, 0)]
        entered.wait(30)
        calls += [pool.submit(call, item) for item in range(1, 6)]
        while len(group._waiting) < 5:
            time.sleep(0.001)
        gate.set()
        results = [one.result(30) for one in calls]
    assert batches == [[0], [1, 2, 3, 4, 5]]
    return results


def test_group_commit_takes_all_that_wait() -> None:
    error = ValueError("of item 3 alone")
    results = results_of(lambda items: [error if item == 3 else 10 * item for item in items])
    assert results == [0, 10, 20, error, 40, 50]


def test_failed_group_commit_fails_for_all() -> None:
    assert [type(result) for result in results_of(failing(errno.EIO))] == [OSError] * 6


def test_interrupted_group_commit_acknowledges_nothing() -> None:
    def commit(items: Sequence[int]) -> Sequence[int]:
        if 1 in items:
            raise KeyboardInterrupt
        return items

    first, *others = results_of(commit)
    assert first == 0
    assert sorted(type(one).__name__ for one in others) == ["KeyboardInterrupt"] + ["StorageUnavailable"] * 4


# --- folders -----------------------------------------------------------------------------------------------------------


def test_folder_of_another_process_is_made_durable(folder: Path, synced: list[int]) -> None:
    (folder / ".receipts").mkdir(parents=True, mode=0o700)
    Folder(".receipts", Folder(str(folder))).open()
    assert synced == [folder.stat().st_ino]


@pytest.mark.parametrize("which", ["data", "receipts", "receipts' data"])
def test_child_opens_its_folders_anew(store: Storage, folder: Path, which: str) -> None:
    log = ReceiptLog(folder)
    log.folder.open()
    assert log.folder.parent is not None
    held = {"data": store._data, "receipts": log.folder, "receipts' data": log.folder.parent}[which]
    parent = held.open().fd
    child = os.fork()
    if not child:
        fcntl.fcntl(held.open().fd, fcntl.F_SETFL, os.O_NONBLOCK)  # which shows in all descriptors of one open file
        os._exit(0)
    os.waitpid(child, 0)
    assert not fcntl.fcntl(parent, fcntl.F_GETFL) & os.O_NONBLOCK


def test_child_closes_the_locks_of_its_parent(store: Storage) -> None:
    """Frames of the parent's other threads keep their variables in the child, so nothing there is freed by itself."""
    lock = store._lock
    with store.new_upload() as upload, lock.hold(1):
        file, writer = lock._file, upload._writer.lock
        assert file is not None and writer is not None
        child = os.fork()
        if not child:
            os._exit(0 if file.fd == writer.fd == -1 and store._incoming._writer is None else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_start_without_locks_names_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with pytest.raises(receiver.ConfigurationError, match="flock"):
        receiver.create_app({"DQM_RECEIVER_TOKEN": "t", "DQM_RECEIVER_DATA_FOLDER": str(folder)})
    assert list(folder.iterdir()) == []


# --- the receiver and its command --------------------------------------------------------------------------------------


def test_metrics_answer_without_the_data_folder(
    client: Client, folder: Path, pass_time: Callable[[float], None]
) -> None:
    folder.rename(folder.with_name("moved"))
    folder.mkdir()
    pass_time(1.1)
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert "dqm_receiver_rejections_total" in answer.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_check_config_as_root_makes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for name in ("DATA_FOLDER", "TOKEN"):
        monkeypatch.setenv(f"DQM_RECEIVER_{name}", str(folder))
    assert "65534" in str(receiver_command.check_config())
    assert list(folder.iterdir()) == []


# --- memory and descriptors --------------------------------------------------------------------------------------------


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(
    ("body", "content_type", "changes"),
    [
        (b"invalid", "", {}),
        (b"", "", {}),
        (b"x", "", {"token": "wrong"}),
        (b"x", "", {"sha256": "0" * 64}),
        (b"--limit\r\nmalformed", FORM, {}),
        (multipart(part(b"x"))[:-20], FORM, {}),
    ],
)
def test_refused_request_is_freed_at_once(
    client: Client, body: bytes, content_type: str, changes: dict[str, str]
) -> None:
    def count() -> int:
        return sum(type(one) in (ReceiverRequest, Upload, MultipartDecoder) for one in gc.get_objects())

    before = count()
    assert send(client, body, content_type, **changes).status_code == 400
    assert count() == before


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("call", ["rename", "write"])
def test_failed_upload_leaves_no_descriptor(client: Client, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    for body in (PROFILES, HISTOGRAMS):  # the second makes .replaced/, which stays open
        assert send(client, body).status_code == 200
    before = len(os.listdir("/proc/self/fd"))

    def is_telling(*arguments: Any, **_: Any) -> bool:  # the commit, or a receipt
        return call == "rename" or bytes(arguments[1]).startswith(b'{"outcome"')

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.EIO, getattr(os, call), is_telling))
        assert send(client, PROFILES).status_code == 503
    assert send(client, PROFILES).status_code == 200
    assert len(os.listdir("/proc/self/fd")) == before
