"""durable.py and the modules that use it: locks, group commit, folders by descriptor, and calls that fail between them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import shutil
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Self

import pytest
from client import AUTH, FILES, FORM, HISTOGRAMS, PROFILES, multipart, part, send, visible
from werkzeug.sansio.multipart import MultipartDecoder
from werkzeug.test import Client

import durable
import receipt_pages
import receipts
import receiver
import receiver_command
import uploads
from durable import Folder, FolderLock, GroupCommit, InsufficientStorage, StorageUnavailable
from receipts import Receipt, ReceiptLog
from receiver_requests import ReceiverRequest
from storage import Storage
from summaries import Summaries
from uploads import Upload

NAME = "EMChistos_123_DQM_2015_11_24_18_04_10.root"


@pytest.fixture
def store(folder: Path) -> Storage:
    return Storage(folder, max_file_size=1 << 20, min_free_space=0, max_rejected=1 << 20)


def begin(store: Storage, data: bytes) -> Upload:
    upload = store.new_upload()
    upload.write(data)
    return upload


def put(store: Storage, data: bytes) -> str:
    with begin(store, data) as upload:
        return store.commit(upload, NAME)


def failing(call: Callable[..., Any], number: int, when: Callable[..., bool]) -> Callable[..., Any]:
    """Return a function that raises an OSError the first time that `when` is true of its arguments."""
    done: list[bool] = []

    def wrapper(*arguments: Any, **more: Any) -> Any:
        if not done and when(*arguments, **more):
            done.append(True)
            raise OSError(number, os.strerror(number))
        return call(*arguments, **more)

    return wrapper


# --- durable.py --------------------------------------------------------------------------------------------------------


def test_lock_is_released_where_its_path_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    lock = FolderLock(Folder(str(folder)))
    monkeypatch.setattr(os, "stat", failing(os.stat, errno.EIO, lambda path, **_: path == ".lock"))
    with pytest.raises(StorageUnavailable), lock.hold(1):
        pass
    with FolderLock(Folder(str(folder))).hold(0):  # as another process would
        pass


def test_lock_is_released_where_unlocking_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    lock = FolderLock(Folder(str(folder)))
    monkeypatch.setattr(
        fcntl, "flock", failing(fcntl.flock, errno.EIO, lambda _, operation: operation == fcntl.LOCK_UN)
    )
    with pytest.raises(StorageUnavailable) as error, lock.hold(1):
        pass
    with FolderLock(Folder(str(folder))).hold(0):  # while the exception still holds its frames
        assert error.value


def test_lock_that_is_always_removed_is_busy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    flock = fcntl.flock

    def remove(fd: int, operation: int) -> None:
        flock(fd, operation)
        folder.joinpath(".lock").unlink(missing_ok=True)

    monkeypatch.setattr(fcntl, "flock", remove)
    with pytest.raises(StorageUnavailable), FolderLock(Folder(str(folder))).hold(0.2):
        pass


def test_interrupted_group_commit_acknowledges_nothing() -> None:
    entered, waiting = threading.Event(), threading.Event()
    failed: list[Exception] = []

    def commit(batch: Sequence[int]) -> list[int | Exception]:
        if 0 in batch:
            entered.set()
            waiting.wait(10)
        if 1 in batch:
            raise KeyboardInterrupt
        return list(batch)

    group = GroupCommit(commit)

    def call(item: int) -> None:
        try:
            with contextlib.suppress(KeyboardInterrupt):
                assert group(item) == item
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=call, args=(item,)) for item in range(3)]
    threads[0].start()
    entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    while len(group._waiting) < 2:
        time.sleep(0.001)
    waiting.set()
    for thread in threads:
        thread.join(10)
    assert [type(error) for error in failed] == [StorageUnavailable]


def test_failed_group_commit_fails_for_all() -> None:
    entered, waiting = threading.Event(), threading.Event()

    def commit(batch: Sequence[int]) -> list[int | Exception]:
        entered.set()
        waiting.wait(10)
        raise ZeroDivisionError

    group = GroupCommit(commit)

    def call(item: int) -> type[BaseException]:
        with pytest.raises(ZeroDivisionError) as error:
            group(item)
        return error.type

    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(call, 0)]
        entered.wait(10)
        calls += [pool.submit(call, item) for item in (1, 2)]
        while len(group._waiting) < 2:
            time.sleep(0.001)
        waiting.set()
        assert [one.result(10) for one in calls] == [ZeroDivisionError] * 3


def test_folder_of_another_process_is_made_durable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".receipts").mkdir(parents=True, mode=0o700)
    synced: list[str] = []
    fsync = os.fsync

    def record(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    Folder(".receipts", Folder(str(folder))).open()
    assert synced == [str(folder)]


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
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(receiver.ConfigurationError, match="flock"):
        receiver.create_app({"DQM_RECEIVER_TOKEN": "t", "DQM_RECEIVER_DATA_FOLDER": str(folder)})
    assert [path.name for path in folder.iterdir()] == []


def test_folder_that_another_process_has_made_anew_is_used(store: Storage) -> None:
    put(store, b"old")
    put(store, b"new")
    replaced = store.folder / ".replaced"
    shutil.rmtree(replaced)
    replaced.mkdir(mode=0o700)
    assert put(store, b"newest") == "replaced"
    assert [path.read_bytes() for path in replaced.iterdir()] == [b"new"]


@pytest.mark.parametrize("how", ["a link to it", "a folder of another account"])
def test_hidden_folder_is_not_led_elsewhere(store: Storage, tmp_path: Path, how: str) -> None:
    replaced = store.folder / ".replaced"
    put(store, b"old")
    if how == "a link to it":
        put(store, b"new")
        replaced.rename(tmp_path / "moved")
        replaced.symlink_to(tmp_path / "moved")
    else:
        replaced.mkdir(mode=0o700)
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(replaced, 65534, 65534)
    before = visible(store.folder)
    with pytest.raises(StorageUnavailable):
        put(store, b"newest")
    assert visible(store.folder) == before


# --- uploads.py and storage.py -----------------------------------------------------------------------------------------


def test_new_writer_waits_for_a_held_lock_once(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LOCK_TIMEOUT", 0.5)
    monkeypatch.setattr(uploads, "_RECOVERY_LOCK_TIMEOUT", 0.1, raising=False)
    failed: list[Exception] = []

    def new_upload() -> None:
        try:
            store.new_upload()
        except StorageUnavailable as error:
            failed.append(error)

    threads = [threading.Thread(target=new_upload) for _ in range(8)]
    with FolderLock(Folder(str(store.folder))).hold(1):
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
    assert len(failed) == 8
    assert seconds < 3  # one after the other they would need 8 times a second


def test_deleted_writer_is_replaced(store: Storage) -> None:
    put(store, b"old")
    for writer in (store.folder / ".incoming").iterdir():
        shutil.rmtree(writer)
    assert put(store, b"new") == "replaced"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inodes that were fsynced."""
    inodes: list[int] = []
    fsync = os.fsync

    def record(fd: int) -> None:
        inodes.append(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    return inodes


def test_duplicate_makes_the_first_file_durable(store: Storage, synced: list[int]) -> None:
    file = store.folder / NAME
    file.write_bytes(b"of another program, which has not synced it")
    assert put(store, file.read_bytes()) == "duplicate"
    assert file.stat().st_ino in synced


def test_preserved_copy_is_durable(store: Storage, synced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, b"old")
    monkeypatch.setattr(os, "link", failing(os.link, errno.EOPNOTSUPP, lambda *_, **__: True))
    put(store, b"new")
    (preserved,) = (store.folder / ".replaced").iterdir()
    assert synced.index(preserved.stat().st_ino) < synced.index(preserved.parent.stat().st_ino)


def test_data_folder_is_durable(tmp_path: Path, synced: list[int]) -> None:
    Storage(tmp_path / "a/b/data", max_file_size=0, min_free_space=0, max_rejected=0)
    assert {path.stat().st_ino for path in (tmp_path, tmp_path / "a", tmp_path / "a/b")} <= set(synced)


@pytest.mark.parametrize("content", [b"OLD", b"older"])
def test_file_that_changes_in_place_is_compared_again(store: Storage, content: bytes) -> None:
    """Another program that writes into a file keeps its inode."""
    file = store.folder / NAME
    put(store, b"old")
    commit = store._commits

    def change_first(pending: Any) -> bool:
        store._commits = commit
        status = file.stat()
        with file.open("r+b") as opened:
            opened.write(content)
        os.utime(file, ns=(0, status.st_mtime_ns + (content == b"OLD")))  # either the time or the size tells
        return commit(pending)

    store._commits = change_first  # type: ignore[assignment]
    assert put(store, b"old") == "replaced"  # it was a duplicate when it was compared
    assert visible(store.folder) == {NAME: b"old"}


def test_upload_begun_before_a_failed_fsync_is_503(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, b"old")
    data = store.folder.stat().st_ino
    with begin(store, b"new") as upload:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(os.fsync, errno.EIO, lambda fd: os.fstat(fd).st_ino == data))
            with pytest.raises(StorageUnavailable), begin(store, b"another") as another:
                store.commit(another, "another.root")
        with pytest.raises(StorageUnavailable, match="restarted"):
            store.commit(upload, NAME)
    assert store.folder.joinpath(NAME).read_bytes() == b"old"


def test_threads_of_a_process_share_a_writer(store: Storage) -> None:
    with ThreadPoolExecutor(4) as pool:
        with FolderLock(Folder(str(store.folder))).hold(1):
            begun = [pool.submit(store.new_upload) for _ in range(4)]
            time.sleep(0.2)  # now they wait for the lock, most likely
        for one in begun:
            one.result().__exit__()
    assert len(list((store.folder / ".incoming").iterdir())) == 1


def test_reserve_counts_what_the_receiver_may_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system keeps blocks for root: they are free, but not for the receiver."""
    disk = types.SimpleNamespace(f_bfree=100, f_bavail=10, f_frsize=1)
    monkeypatch.setattr(os, "fstatvfs", lambda fd: disk)
    with pytest.raises(InsufficientStorage):
        Storage(folder, max_file_size=1 << 20, min_free_space=50, max_rejected=0).new_upload()


def test_upload_that_cannot_begin_gives_its_room_back(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, b"")  # makes the writer
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(os.open, errno.EMFILE, lambda *_, **__: True))
        with pytest.raises(StorageUnavailable):
            store.new_upload(1000)
    assert store._space._claimed == 0


def test_preserved_bytes_are_those_of_their_name(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is slow links another file by mistake; a second one must not rely on that link."""
    put(store, b"old")
    old = store.folder / NAME
    link = os.link

    def link_another(source: str, target: str, **more: Any) -> None:
        monkeypatch.undo()
        kept = store.folder / "kept"
        old.rename(kept)
        old.write_bytes(b"another")
        link(source, target, **more)
        kept.rename(old)

    monkeypatch.setattr(os, "link", link_another)
    put(store, b"new")
    for preserved in (store.folder / ".replaced").iterdir():
        assert preserved.read_bytes() == b"old"
    assert visible(store.folder) == {NAME: b"new"}


def test_wrong_file_in_replaced_is_not_trusted(store: Storage) -> None:
    put(store, b"old")
    put(store, b"new")
    (preserved,) = (store.folder / ".replaced").iterdir()
    preserved.unlink()
    preserved.write_bytes(b"another")
    put(store, b"old")
    put(store, b"newest")
    assert preserved.read_bytes() == b"old"


def test_failed_fsync_of_replaced_stops_the_process(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, b"old")
    put(store, b"new")  # makes .replaced/

    def is_replaced(fd: int) -> bool:
        return os.readlink(f"/proc/self/fd/{fd}").endswith("/.replaced")

    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO, is_replaced))
    for _ in range(2):  # the kernel would report the second fsync as good
        with pytest.raises(StorageUnavailable):
            put(store, b"newest")
    with pytest.raises(StorageUnavailable, match="restarted"):
        store.check_health()
    assert visible(store.folder) == {NAME: b"new"}


def test_folder_swapped_in_mid_commit_acknowledges_nothing(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, b"old")
    with begin(store, b"new") as upload:
        store.folder.rename(store.folder.with_name("swapped"))
        store.folder.mkdir()
        with pytest.raises(StorageUnavailable):
            store.commit(upload, NAME)


# --- receipts.py and summaries.py --------------------------------------------------------------------------------------


def make_receipt(**more: Any) -> Receipt:
    facts = {"outcome": "stored", "filename": NAME, "run": 123, "time_stamp": 1448384650, "agent": "EMC"}
    return Receipt(**{**facts, "data_status": 0, "sender": "default", "seconds": 0.1, "sha256": "ab" * 32, **more})


@pytest.fixture
def log(folder: Path) -> ReceiptLog:
    folder.mkdir()
    return ReceiptLog(folder)


def test_clock_that_steps_back_begins_a_new_log(log: ReceiptLog, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = iter((12, 13, 11, 12))

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls(2026, 11, 22, next(hours), tzinfo=tz)

    monkeypatch.setattr(receipts, "datetime", Clock)
    for size in range(4):
        log.append(make_receipt(size=size))
    assert len(list(folder.glob(".receipts/123/*.jsonl"))) == 2
    newest, _ = receipt_pages.newest(log, 123, receipt_pages.Query())
    assert [receipt.received_at[11:13] for receipt in newest] == ["13", "12", "12", "11"]


def test_missing_folder_is_not_a_missing_file(store: Storage) -> None:
    store.folder.rename(store.folder.with_name("moved"))
    with pytest.raises(StorageUnavailable):
        store.open(NAME)


def test_new_log_and_a_mixed_batch_are_durable(log: ReceiptLog, folder: Path, synced: list[int]) -> None:
    log._append_batch([make_receipt(), make_receipt(outcome="rejected")])
    (path,) = folder.glob(".receipts/123/*.jsonl")
    assert {path.stat().st_ino, path.parent.stat().st_ino} <= set(synced)


def test_least_recently_used_log_is_closed(log: ReceiptLog, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "_MAX_OPEN_LOGS", 2)
    for run in (1, 2, 1, 3, 1, 2):
        log.append(make_receipt(run=run))
    assert [len(list(folder.glob(f".receipts/{run}/*"))) for run in (1, 2, 3)] == [1, 2, 1]


def test_run_is_touched_once_a_minute(log: ReceiptLog, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder / ".receipts/123"
    log.append(make_receipt())
    os.utime(run, (0, 0))
    log.append(make_receipt())
    assert run.stat().st_mtime == 0
    monkeypatch.setattr(receipts, "_TOUCH_INTERVAL", 0.0)
    log.append(make_receipt())
    assert run.stat().st_mtime > 0


def test_request_for_receipts_looks_at_so_many(log: ReceiptLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipt_pages, "_MAX_SCANNED", 2)
    for number in range(3):
        log.append(make_receipt(agent="TPC" if number else "EMC"))
    found, before = receipt_pages.newest(log, 123, receipt_pages.Query(agent="EMC"))
    assert found == []
    found, before = receipt_pages.newest(log, 123, receipt_pages.Query(agent="EMC", before=before))
    assert [one.agent for one in found] == ["EMC"]
    assert before is None


def test_summary_opens_one_log_at_a_time(log: ReceiptLog, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        log.append(make_receipt(outcome="duplicate" if number else "stored"))
        log._logs.clear()
    opened = len(os.listdir("/proc/self/fd"))
    most = 0
    from_line = Receipt.from_line

    def count(line: bytes) -> Any:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")) - opened)
        return from_line(line)

    monkeypatch.setattr(Receipt, "from_line", count)
    assert Summaries(log).agents(123)["EMC"]["duplicates"] == 4
    assert most <= 2  # the run's folder and a log


def test_damaged_digest_spoils_no_summary(log: ReceiptLog, folder: Path) -> None:
    log.append(make_receipt(sha256="\ud800 not hexadecimal"))
    assert Summaries(log).agents(123)["EMC"]["files"] == 1


# --- receiver.py and its command ---------------------------------------------------------------------------------------


def test_metrics_answer_without_the_data_folder(client: Client, folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.mkdir()
    time.sleep(durable._CHECK_INTERVAL)
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert "dqm_receiver_rejections_total" in answer.text


def test_list_of_runs_has_an_etag(client: Client) -> None:
    for path in ("/rest/api/runs", "/rest/api/runs?limit=5"):
        etag = client.get(path, headers=AUTH).headers["ETag"]
        assert client.get(path, headers={**AUTH, "If-None-Match": etag}).status_code == 304


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
    assert send(client, body, content_type, FILES, **changes).status_code == 400
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
        patch.setattr(os, call, failing(getattr(os, call), errno.EIO, is_telling))
        assert send(client, PROFILES).status_code == 503
    assert send(client, PROFILES).status_code == 200
    assert len(os.listdir("/proc/self/fd")) == before
