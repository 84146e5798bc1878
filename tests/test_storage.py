"""The data folder: names, uploads, commit, recovery, health, quarantine, and what is given back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import PROJECT, hidden, incoming, visible, wait_until
from faults import failing
from hypothesis import given, settings
from hypothesis import strategies as st

import durable
import storage
import uploads
from durable import Folder, FolderLock, InsufficientStorage, StorageError, StorageUnavailable
from storage import FileNotStored, Storage, file_name
from uploads import FileTooLarge, Upload

MakeStore = Callable[..., Storage]
NAME = "EMChistos_123_DQM_2015_11_24_18_04_10.root"
OTHER = "TPChistos_123_DQM_2015_11_24_18_04_10.root"
LONG_NAME = file_name("A" * 64, storage.MAX_RUN, storage.LAST_TIME_STAMP)
OLD = b"the old bytes"
NEW = b"the new bytes, and more of them"
RIVAL = OLD.upper()


@pytest.fixture
def make_store(folder: Path) -> MakeStore:
    def make(where: Path = folder, **limits: int) -> Storage:
        return Storage(
            where, list, **{"max_file_size": 1 << 30, "min_free_space": 0, "max_rejected": 1 << 20, **limits}
        )

    return make


@pytest.fixture
def store(make_store: MakeStore) -> Storage:
    return make_store()


@contextlib.contextmanager
def begin(store: Storage, data: bytes, announced: int = 0) -> Iterator[Upload]:
    with store.new_upload(announced) as upload:
        upload.write(data)
        yield upload


def commit(store: Storage, data: bytes, name: str = NAME) -> str:
    """Do with a file what the receiver does, and return the outcome."""
    with begin(store, data) as upload:
        return store.commit(upload, name, str)


def quarantine(store: Storage, data: bytes, name: str = NAME) -> None:
    with begin(store, data) as upload:
        store.quarantine(upload, name)


def path_of(upload: Upload) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{upload.fd}"))


# --- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent", "run", "time_stamp", "name"),
    [
        ("EMC", 123456, 140844, "EMChistos_123456_DQM_1970_01_02_16_07_24.root"),
        ("EMC", 300005, 1448384650, "EMChistos_300005_DQM_2015_11_24_18_04_10.root"),
        ("testagent", 123, 234, "testagenthistos_123_DQM_1970_01_01_01_03_54.root"),
        ("EMC", 0, 0, "EMChistos_0_DQM_1970_01_01_01_00_00.root"),
        ("E_M_C", 1, 0, "E-M-Chistos_1_DQM_1970_01_01_01_00_00.root"),
        ("_", 1, 0, "-histos_1_DQM_1970_01_01_01_00_00.root"),
        ("histos_", 1, 0, "histos-histos_1_DQM_1970_01_01_01_00_00.root"),
        ("EMC", 2147483647, 253402297199, "EMChistos_2147483647_DQM_9999_12_31_23_59_59.root"),
        # Summer time begins and ends at 01:00 UTC.
        ("EMC", 1, 1427590799, "EMChistos_1_DQM_2015_03_29_01_59_59.root"),
        ("EMC", 1, 1427590800, "EMChistos_1_DQM_2015_03_29_03_00_00.root"),
        ("EMC", 1, 1445731199, "EMChistos_1_DQM_2015_10_25_01_59_59.root"),
        ("EMC", 1, 1445731200, "EMChistos_1_DQM_2015_10_25_02_00_00.root"),
        ("EMC", 1, 1445734800, "EMChistos_1_DQM_2015_10_25_02_00_00.root"),
        ("EMC", 1, 1445738400, "EMChistos_1_DQM_2015_10_25_03_00_00.root"),
        # Beyond what 32 bits and the tables of time zones hold.
        ("EMC", 1, 2147483648, "EMChistos_1_DQM_2038_01_19_04_14_08.root"),
        ("EMC", 1, 4118076000, "EMChistos_1_DQM_2100_07_01_00_00_00.root"),
    ],
)
def test_file_name_has_the_time_in_zurich(agent: str, run: int, time_stamp: int, name: str) -> None:
    assert file_name(agent, run, time_stamp) == name


@pytest.fixture
def host_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that sets the time zone of this process, as the host's TZ would."""

    def set_zone(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    yield set_zone
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("zone", ["UTC0", "America/New_York", "Asia/Kolkata", "Pacific/Auckland", "Europe/Zurich"])
def test_file_name_is_the_same_in_any_zone(host_zone: Callable[[str], None], zone: str) -> None:
    host_zone(zone)
    assert file_name("EMC", 1, 1427590800) == "EMChistos_1_DQM_2015_03_29_03_00_00.root"
    assert file_name("EMC", 1, 1448384650) == "EMChistos_1_DQM_2015_11_24_18_04_10.root"


def test_file_name_needs_no_zones_of_the_host() -> None:
    probe = "import storage, zoneinfo; print(zoneinfo.TZPATH, storage.file_name('EMC', 300005, 1448384650))"
    environ = {**os.environ, "PYTHONTZPATH": "", "PYTHONPATH": str(PROJECT)}
    run = subprocess.run([sys.executable, "-c", probe], env=environ, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["()", "EMChistos_300005_DQM_2015_11_24_18_04_10.root"]


@settings(deadline=None, derandomize=True)
@given(
    agent=st.text("ABCXYZabcxyz0189-_", min_size=1, max_size=64),
    run=st.integers(0, storage.MAX_RUN),
    time_stamp=st.integers(0, storage.LAST_TIME_STAMP),
)
def test_file_name_can_be_split_by_overwatch(agent: str, run: int, time_stamp: int) -> None:
    name = file_name(agent, run, time_stamp)
    assert re.fullmatch(r"[A-Za-z0-9-]+histos_[0-9]+_DQM_\d{4}(_\d\d){5}\.root", name, re.ASCII)
    subsystem, its_run, mode, *when = name.partition(".")[0].split("_")
    assert subsystem == agent.replace("_", "-") + "histos"
    assert (its_run, mode, len(when)) == (str(run), "DQM", 6)


# --- uploads -----------------------------------------------------------------------------------------------------------


def test_upload_knows_what_was_written(store: Storage) -> None:
    with store.new_upload() as upload:
        for piece in (b"one ", b"", b"two"):
            upload.write(piece)
        assert path_of(upload).parent.parent == store.folder / ".incoming"
        assert path_of(upload).read_bytes() == b"one two"
        assert (upload.size, upload.sha256) == (7, hashlib.sha256(b"one two").hexdigest())
        assert visible(store.folder) == {}
    assert incoming(store.folder) == []


@pytest.mark.parametrize("pieces", [[1001], [1000, 1], [1] * 1001])
def test_upload_beyond_the_limit_is_refused_unwritten(make_store: MakeStore, pieces: list[int]) -> None:
    store = make_store(max_file_size=1000)
    assert commit(store, bytes(1000)) == "stored"
    with store.new_upload() as upload:
        for piece in pieces[:-1]:
            upload.write(bytes(piece))
        with pytest.raises(FileTooLarge, match="1000 bytes"):
            upload.write(bytes(pieces[-1]))
        assert path_of(upload).stat().st_size <= 1000


def test_new_writer_waits_for_a_held_lock_once(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LOCK_TIMEOUT", 0.5)
    monkeypatch.setattr(uploads, "_RECOVERY_LOCK_TIMEOUT", 0.1)
    with FolderLock(Folder(str(store.folder))).hold(1), ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        begun = [pool.submit(store.new_upload) for _ in range(8)]
        assert {type(one.exception()) for one in begun} == {StorageUnavailable}
        assert time.monotonic() - began < 3  # one after the other they would need 8 times 0.5 s


def test_threads_of_a_process_share_a_writer(store: Storage) -> None:
    with ThreadPoolExecutor(4) as pool:
        with FolderLock(Folder(str(store.folder))).hold(1):
            begun = [pool.submit(store.new_upload) for _ in range(4)]
            time.sleep(0.2)  # now they wait for the lock, most likely
        for one in begun:
            one.result().__exit__()
    assert len(list((store.folder / ".incoming").iterdir())) == 1


def test_failure_after_the_commit_deletes_nothing(store: Storage) -> None:
    with pytest.raises(RuntimeError), begin(store, NEW) as upload:
        store.commit(upload, NAME, str)
        raise RuntimeError
    assert visible(store.folder) == {NAME: NEW}


def test_uploads_leave_no_open_files(store: Storage) -> None:
    for data in (OLD, NEW):
        commit(store, data)
        quarantine(store, data)
    before = len(os.listdir("/proc/self/fd"))
    for data in (OLD, OLD, NEW):
        commit(store, data)
    quarantine(store, NEW)
    with contextlib.suppress(FileNotStored):
        store.open(".receipts")
    store.open(NAME).close()
    store.check_health()
    store.recover()
    assert len(os.listdir("/proc/self/fd")) == before


# --- the reserve -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage on a disk of 2000 free bytes, of which 1000 must stay free."""
    store = make_store(min_free_space=1000)
    monkeypatch.setattr(uploads.Space, "ask", lambda self: 2000)
    return store


def test_announced_bytes_count_as_used(small_disk: Storage) -> None:
    with small_disk.new_upload(600), pytest.raises(InsufficientStorage, match="1000 bytes"):
        small_disk.new_upload(401)
    with small_disk.new_upload(600), small_disk.new_upload(400):
        pass
    with small_disk.new_upload(1000):  # what others announced and did not need is free again
        pass
    assert incoming(small_disk.folder) == []


def test_written_bytes_are_counted_once(small_disk: Storage) -> None:
    with begin(small_disk, bytes(600), announced=600):
        with pytest.raises(InsufficientStorage):
            small_disk.new_upload(401)
        with begin(small_disk, bytes(400), announced=400) as upload, pytest.raises(InsufficientStorage):
            upload.write(b"more than announced")
    assert incoming(small_disk.folder) == []


def test_unannounced_bytes_are_counted_as_they_come(small_disk: Storage) -> None:
    with small_disk.new_upload() as upload:
        upload.write(bytes(1000))
        with pytest.raises(InsufficientStorage):
            upload.write(b"x")
        assert path_of(upload).stat().st_size == 1000


def test_free_space_is_asked_once_a_second(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = make_store(min_free_space=1), list[int]()

    def ask(_: object) -> int:
        asked.append(1)
        return 1 << 40

    monkeypatch.setattr(uploads.Space, "ask", ask)
    monkeypatch.setattr(uploads, "_SPACE_AGE", 60.0)
    for _ in range(20):
        commit(store, NEW)
    assert len(asked) <= 1


def test_reserve_counts_what_the_receiver_may_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system keeps blocks for root: they are free, but not for the receiver."""
    disk = types.SimpleNamespace(f_bfree=100, f_bavail=10, f_frsize=1)
    monkeypatch.setattr(os, "fstatvfs", lambda fd: disk)
    with pytest.raises(InsufficientStorage):
        Storage(folder, list, max_file_size=1 << 20, min_free_space=50, max_rejected=0).new_upload()


def test_upload_that_cannot_begin_gives_its_room_back(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(store, b"")  # makes the writer
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(errno.EMFILE))
        with pytest.raises(StorageUnavailable):
            store.new_upload(1000)
    assert store._space._claimed == 0


# --- compare and commit ------------------------------------------------------------------------------------------------


def test_commit_stores_a_file_under_its_name(store: Storage) -> None:
    before = os.umask(0o027)
    try:
        assert commit(store, NEW) == "stored"
    finally:
        os.umask(before)
    assert visible(store.folder) == {NAME: NEW}
    assert (incoming(store.folder), hidden(store.folder, ".replaced")) == ([], [])
    status = (store.folder / NAME).stat()
    assert (status.st_nlink, stat.S_IMODE(status.st_mode)) == (1, 0o640)


def test_commit_of_the_same_bytes_changes_nothing(store: Storage) -> None:
    commit(store, OLD)
    before = (store.folder / NAME).stat()
    assert commit(store, OLD) == "duplicate"
    after = (store.folder / NAME).stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_nlink) == (before.st_ino, before.st_mtime_ns, 1)
    assert (incoming(store.folder), hidden(store.folder, ".replaced")) == ([], [])


@pytest.mark.parametrize(
    "new", [NEW, OLD[:-1] + b"S", OLD + b"\0", OLD[:-1]], ids=["other", "last", "longer", "shorter"]
)
def test_commit_of_different_bytes_preserves_the_old(store: Storage, new: bytes) -> None:
    commit(store, OLD)
    assert commit(store, new) == "replaced"
    assert visible(store.folder) == {NAME: new}
    assert visible(store.folder / ".replaced") == {f"{NAME}.{hashlib.sha256(OLD).hexdigest()}": OLD}
    assert (store.folder / NAME).stat().st_nlink == 1
    assert incoming(store.folder) == []


def test_difference_beyond_the_first_bytes_is_found(store: Storage) -> None:
    old = os.urandom(3 << 20)
    commit(store, old)
    assert commit(store, old[:-1] + bytes([old[-1] ^ 1])) == "replaced"
    assert [commit(store, old) for _ in range(2)] == ["replaced", "duplicate"]


@pytest.mark.parametrize("name", [NAME, LONG_NAME])
def test_everything_that_had_the_name_is_kept(store: Storage, name: str) -> None:
    versions = [f"version {number}".encode() for number in range(5)]
    assert [commit(store, data, name) for data in versions] == ["stored"] + ["replaced"] * 4
    assert commit(store, versions[0], name) == "replaced"  # back to an earlier one
    assert visible(store.folder) == {name: versions[0]}
    assert sorted(hidden(store.folder, ".replaced")) == versions


def test_commit_stores_again_what_overwatch_took(store: Storage) -> None:
    commit(store, OLD)
    (store.folder / NAME).unlink()
    assert commit(store, OLD) == "stored"
    assert visible(store.folder) == {NAME: OLD}


def test_comparing_changes_nothing(store: Storage) -> None:
    commit(store, OLD)
    for data, name, outcome in ((OLD, NAME, "duplicate"), (NEW, NAME, "replaced"), (NEW, OTHER, "stored")):
        with begin(store, data) as upload:
            assert store.compare(upload, name) == outcome
    assert visible(store.folder) == {NAME: OLD}
    assert hidden(store.folder, ".replaced") == []


@pytest.mark.parametrize("error", [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP], ids=errno.errorcode.__getitem__)
def test_old_bytes_are_copied_without_hard_links(
    store: Storage, monkeypatch: pytest.MonkeyPatch, synced: list[int], error: int
) -> None:
    commit(store, OLD)
    monkeypatch.setattr(os, "link", failing(error))
    assert commit(store, NEW) == "replaced"
    assert (visible(store.folder), hidden(store.folder, ".replaced")) == ({NAME: NEW}, [OLD])
    assert incoming(store.folder) == []
    (preserved,) = (store.folder / ".replaced").iterdir()
    assert synced.index(preserved.stat().st_ino) < synced.index(preserved.parent.stat().st_ino)


def test_duplicate_makes_the_first_file_durable(store: Storage, synced: list[int]) -> None:
    file = store.folder / NAME
    file.write_bytes(b"of another program, which has not synced it")
    assert commit(store, file.read_bytes()) == "duplicate"
    assert file.stat().st_ino in synced


def test_preserved_bytes_are_those_of_their_name(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is slow links another file by mistake; a second one must not rely on that link."""
    commit(store, OLD)
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
    commit(store, NEW)
    for preserved in (store.folder / ".replaced").iterdir():
        assert preserved.read_bytes() == OLD
    assert visible(store.folder) == {NAME: NEW}


def test_wrong_file_in_replaced_is_not_trusted(store: Storage) -> None:
    commit(store, OLD)
    commit(store, NEW)
    (preserved,) = (store.folder / ".replaced").iterdir()
    preserved.unlink()
    preserved.write_bytes(b"another")
    commit(store, OLD)
    commit(store, b"the newest")
    assert preserved.read_bytes() == OLD


@pytest.mark.parametrize("then", ["taken", "equal", "different"])
def test_name_that_changes_is_compared_again(store: Storage, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    commit(store, OLD)
    look, left = Storage._look, [1]

    def look_then_change(self: Storage, upload: Upload, name: str) -> Any:
        found = look(self, upload, name)
        if left.pop() if left else 0:
            file, status = store.folder / NAME, (store.folder / NAME).stat()
            file.unlink()
            if then != "taken":
                file.write_bytes(NEW if then == "equal" else RIVAL)
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # so the inode alone tells
        return found

    monkeypatch.setattr(Storage, "_look", look_then_change)
    assert commit(store, NEW) == {"taken": "stored", "equal": "duplicate", "different": "replaced"}[then]
    assert visible(store.folder) == {NAME: NEW}
    kept = hidden(store.folder, ".replaced")
    assert (RIVAL in kept) == (then == "different")


@pytest.mark.parametrize("content", [OLD.upper(), OLD + b", longer"])
def test_file_that_changes_in_place_is_compared_again(store: Storage, content: bytes) -> None:
    """Another program that writes into a file keeps its inode."""
    file, genuine = store.folder / NAME, store._commits
    commit(store, OLD)

    def change_first(pending: Any) -> Any:
        store._commits = genuine
        status = file.stat()
        with file.open("r+b") as opened:
            opened.write(content)
        os.utime(file, ns=(0, status.st_mtime_ns + (len(content) == len(OLD))))  # either the time or the size tells
        return genuine(pending)

    store._commits = change_first  # type: ignore[assignment]
    assert commit(store, OLD) == "replaced"  # it was a duplicate when it was compared
    assert visible(store.folder) == {NAME: OLD}


def test_name_that_changes_all_the_time_is_503(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Any] = []
    monkeypatch.setattr(store, "_commits", tries.append)  # None: the name has changed
    with pytest.raises(StorageUnavailable, match="changed 30 times"):
        commit(store, NEW)
    assert len(tries) == 30
    assert visible(store.folder) == {}


def test_each_upload_of_a_batch_gets_its_own_receipt(store: Storage, folder: Path) -> None:
    for name in ("same", "other"):
        commit(store, OLD, name)
    recorded = []

    def record(receipts: Sequence[str]) -> list[str | StorageUnavailable]:
        recorded.append(sorted(receipts))
        return [StorageUnavailable("no log") if "lost" in receipt else receipt for receipt in receipts]

    store._record = record

    def send(name: str, data: bytes) -> str:
        with begin(store, data) as upload:
            try:
                return store.commit(upload, name, lambda outcome: f"{name} is {outcome}")
            except StorageUnavailable as error:
                return str(error)

    contents = {"new": NEW, "same": OLD, "lost": NEW, "other": NEW, "newer": NEW}
    with ThreadPoolExecutor() as pool:
        with store._commits._lock:
            sent = [pool.submit(send, *item) for item in contents.items()]
            wait_until(lambda: len(store._commits._waiting) == len(sent), 30)
        results = [one.result() for one in sent]
    assert results == ["new is stored", "same is duplicate", "no log", "other is replaced", "newer is stored"]
    assert recorded == [
        ["lost is stored", "new is stored", "newer is stored", "other is replaced", "same is duplicate"]
    ]
    assert visible(folder) == contents


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("a device cannot be made here")


def make_socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:  # its address must be short
        listener.bind(path.name)


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "device": make_device,
    "folder": Path.mkdir,
    "link to a file": lambda path: path.symlink_to(path.parent.parent / "outside"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a folder": lambda path: path.symlink_to("/etc"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_left_alone(store: Storage, tmp_path: Path, kind: str) -> None:
    (tmp_path / "outside").write_bytes(NEW)
    KINDS[kind](store.folder / NAME)
    before = (store.folder / NAME).lstat()
    assert store.file_names() == []
    with pytest.raises(FileNotStored):
        store.open(NAME)
    with pytest.raises(StorageUnavailable, match=f"The name {NAME} is taken by something that is not a regular file"):
        commit(store, NEW)
    assert (store.folder / NAME).lstat() == before
    assert (tmp_path / "outside").read_bytes() == NEW
    assert incoming(store.folder) == []
    assert commit(store, NEW, OTHER) == "stored"


def test_many_uploads_at_once_share_the_sync(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(store, OLD, OTHER)
    fsync, folders = os.fsync, list[str]()

    def slow(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == str(store.folder):
            folders.append("")
            time.sleep(0.05)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    names = [file_name("EMC", number, 0) for number in range(30)]
    with ThreadPoolExecutor(30) as pool:
        assert set(pool.map(lambda name: commit(store, name.encode(), name), names)) == {"stored"}
    assert visible(store.folder) == {OTHER: OLD, **{name: name.encode() for name in names}}
    assert len(folders) <= 15


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, InsufficientStorage),
        (errno.EDQUOT, InsufficientStorage),
        *((one, StorageUnavailable) for one in (errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE)),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_failing_disk_is_told_by_its_kind(
    store: Storage, monkeypatch: pytest.MonkeyPatch, call: str, number: int, error: type[StorageError]
) -> None:
    commit(store, OLD)
    with monkeypatch.context() as patch, pytest.raises(error, match=os.strerror(number)) as raised:
        patch.setattr(os, call, failing(number))
        commit(store, NEW, OTHER)
    assert isinstance(raised.value.__cause__, OSError)
    assert (raised.value.status, str(store.folder) in str(raised.value)) == (error.status, False)
    assert (visible(store.folder), incoming(store.folder)) == ({NAME: OLD}, [])
    assert commit(store, NEW, OTHER) == "stored"


def test_upload_begun_before_a_failed_fsync_is_503(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(store, OLD)
    data = store.folder.stat().st_ino
    with begin(store, NEW) as upload:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(errno.EIO, os.fsync, lambda fd: os.fstat(fd).st_ino == data))
            with pytest.raises(StorageUnavailable):
                commit(store, NEW, OTHER)
        with pytest.raises(StorageUnavailable, match="restarted"):
            store.commit(upload, NAME, str)
    assert (store.folder / NAME).read_bytes() == OLD


# --- folders -----------------------------------------------------------------------------------------------------------


def test_hidden_folders_are_made_at_their_first_use(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(tmp_path / "a" / "b")
    assert list(store.folder.iterdir()) == []
    commit(store, OLD)
    assert sorted(path.name for path in store.folder.iterdir()) == [".incoming", ".lock", NAME]
    commit(store, NEW)
    quarantine(store, NEW)
    for name in (".incoming", ".replaced", ".rejected"):
        assert stat.S_IMODE((store.folder / name).stat().st_mode) == 0o700
    assert make_store(tmp_path / "a" / "b").file_names() == [NAME]


def test_data_folder_is_durable(tmp_path: Path, synced: list[int]) -> None:
    Storage(tmp_path / "a/b/data", list, max_file_size=0, min_free_space=0, max_rejected=0)
    assert {path.stat().st_ino for path in (tmp_path, tmp_path / "a", tmp_path / "a/b")} <= set(synced)


def test_relative_folder_stays_where_it_was(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = make_store(Path("relative"))
    monkeypatch.chdir("/")
    commit(store, NEW)
    assert visible(tmp_path / "relative") == {NAME: NEW}


def test_other_files_of_the_folder_are_left_alone(make_store: MakeStore, folder: Path) -> None:
    folder.mkdir()
    (folder / "from_zmq.root").write_bytes(OLD)
    (folder / ".hidden").write_bytes(OLD)
    store = make_store()
    commit(store, NEW)
    store.recover()
    assert visible(folder) == {"from_zmq.root": OLD, NAME: NEW}
    assert (folder / ".hidden").read_bytes() == OLD


@pytest.mark.parametrize("kind", ["link", "others may write", "another's", "file", "another file system"])
@pytest.mark.parametrize("name", [".incoming", ".replaced", ".rejected"])
def test_planted_hidden_folder_is_not_used(
    store: Storage, tmp_path: Path, make_tmpfs: Callable[[str], Path], name: str, kind: str
) -> None:
    (store.folder / NAME).write_bytes(OLD)
    elsewhere, planted = tmp_path / "elsewhere", store.folder / name
    elsewhere.mkdir()
    if kind == "link":
        planted.symlink_to(elsewhere)
    elif kind == "file":
        planted.touch()
    else:
        planted.mkdir()
        planted.chmod(0o777 if kind == "others may write" else 0o700)
    if kind == "another's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(planted, 65534, 65534)
    if kind == "another file system":
        elsewhere = make_tmpfs("size=1m,mode=700")
        subprocess.run(["mount", "--bind", elsewhere, planted], check=True)
    try:
        with pytest.raises(StorageUnavailable):
            quarantine(store, NEW) if name == ".rejected" else commit(store, NEW)
        with pytest.raises(StorageUnavailable):
            store.check_health()
    finally:
        if kind == "another file system":
            subprocess.run(["umount", "--lazy", planted], check=True)
    assert (list(elsewhere.iterdir()), visible(store.folder)) == ([], {NAME: OLD})


# --- recovery ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_lock", [True, False])
def test_start_deletes_what_dead_writers_left(make_store: MakeStore, store: Storage, has_lock: bool) -> None:
    commit(store, OLD)
    dead = store.folder / ".incoming" / "dead"
    dead.mkdir()
    (dead / "upload").write_bytes(NEW)
    if has_lock:
        (dead / "lock").touch()
    with begin(store, NEW) as upload:
        os.utime(path_of(upload), (0, 0))
        make_store()
        assert path_of(upload).read_bytes() == NEW  # however old
        assert store.commit(upload, OTHER, str) == "stored"
    assert not dead.exists()


def test_recovery_happens_every_ten_minutes(store: Storage, pass_time: Callable[[float], None]) -> None:
    commit(store, OLD)
    dead = store.folder / ".incoming" / "dead"
    dead.mkdir()
    commit(store, NEW)
    assert dead.exists()
    pass_time(601)
    commit(store, OLD)
    assert not dead.exists()


def test_recovery_bears_strange_things(store: Storage, tmp_path: Path) -> None:
    commit(store, OLD)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").write_bytes(OLD)
    for number, kind in enumerate(KINDS):
        KINDS[kind](store.folder / ".incoming" / str(number))
    (store.folder / ".incoming/link").symlink_to(tmp_path / "elsewhere")
    (store.folder / ".incoming/dead").mkdir()
    store.recover()
    assert not (store.folder / ".incoming/dead").exists()
    assert (tmp_path / "elsewhere/file").read_bytes() == OLD
    assert commit(store, NEW) == "replaced"


# --- health ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_health(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each question about health answered anew, and each path looked at."""
    monkeypatch.setattr(storage, "_HEALTH_AGE", 0.0)
    monkeypatch.setattr(durable, "_CHECK_INTERVAL", 0.0)


def test_health_leaves_nothing_and_touches_no_file(store: Storage) -> None:
    commit(store, OLD)
    store.check_health()
    assert (visible(store.folder), incoming(store.folder)) == ({NAME: OLD}, [])
    assert hidden(store.folder, ".replaced") == hidden(store.folder, ".rejected") == []


def test_health_may_be_a_second_old(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    store.check_health()
    monkeypatch.setattr(Storage, "_try_upload", lambda self: pytest.fail("looked again"))
    store.check_health()


@pytest.mark.usefixtures("fresh_health")
@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        ("write", errno.ENOSPC, InsufficientStorage),
        ("write", errno.EIO, StorageUnavailable),
        ("open", errno.EROFS, StorageUnavailable),
        ("pread", errno.EIO, StorageUnavailable),
    ],
)
def test_health_says_what_is_wrong_and_recovers(
    store: Storage, monkeypatch: pytest.MonkeyPatch, call: str, error: int, expected: type[StorageError]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(expected, match=os.strerror(error)):
        patch.setattr(os, call, failing(error))
        store.check_health()
    store.check_health()
    assert incoming(store.folder) == []


@pytest.mark.usefixtures("fresh_health")
def test_health_reads_what_it_has_written(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(StorageUnavailable, match="give back what was written"):
        store.check_health()


@pytest.mark.usefixtures("fresh_health")
def test_health_says_that_no_room_is_left(make_store: MakeStore) -> None:
    with pytest.raises(InsufficientStorage, match="no room"):
        make_store(min_free_space=1 << 60).check_health()


@pytest.mark.usefixtures("fresh_health")
def test_health_says_that_the_lock_is_held(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_HEALTH_LOCK_TIMEOUT", 0.1)
    store.check_health()
    with (store.folder / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StorageUnavailable, match="held its lock"):
            store.check_health()


@pytest.mark.parametrize("instead", ["nothing", "a file", "a folder"])
def test_folder_that_is_gone_is_noticed_at_once(store: Storage, monkeypatch: pytest.MonkeyPatch, instead: str) -> None:
    monkeypatch.setattr(storage, "_HEALTH_AGE", 0.0)
    commit(store, OLD)
    with begin(store, NEW) as upload:
        store.folder.rename(store.folder.with_name("away"))
        if instead == "a file":
            store.folder.touch()
        elif instead == "a folder":
            store.folder.mkdir()
        questions = (
            store.check_health,
            store.file_names,
            lambda: store.open(OTHER),
            lambda: store.commit(upload, NAME, str),
        )
        for question in questions:
            with pytest.raises(StorageUnavailable):
                question()
    assert not store.folder.is_dir() or list(store.folder.iterdir()) == []


# Root may write everywhere: it is told so without its capabilities only.
WITHOUT_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
@pytest.mark.parametrize("name", ["", ".incoming", ".replaced", ".rejected"])
def test_health_knows_a_folder_that_is_read_only(store: Storage, name: str) -> None:
    commit(store, OLD)
    commit(store, NEW)
    quarantine(store, OLD)
    program = [
        "import storage, sys, pathlib",
        "store = storage.Storage(pathlib.Path(sys.argv[1]), list, max_file_size=9, min_free_space=0, max_rejected=0)",
        "try: store.check_health()\nexcept storage.StorageError as error: print(error)",
    ]
    prefix = WITHOUT_CAPABILITIES if os.geteuid() == 0 else ()
    (store.folder / name).chmod(0o555)
    try:
        command = [*prefix, sys.executable, "-c", "\n".join(program), str(store.folder)]
        run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    finally:
        (store.folder / name).chmod(0o755)
    said = run.stdout + run.stderr.strip().rpartition("\n")[2]
    assert "Permission denied" in said or "may not be written" in said


# --- quarantine --------------------------------------------------------------------------------------------------------


def test_quarantine_keeps_invalid_bytes_out_of_sight(store: Storage) -> None:
    commit(store, OLD)
    quarantine(store, NEW)
    ((name, content),) = visible(store.folder / ".rejected").items()
    assert (NAME in name, content) == (True, NEW)
    assert (visible(store.folder), incoming(store.folder)) == ({NAME: OLD}, [])


@pytest.mark.parametrize(
    ("bound", "sizes", "kept"),
    [
        (1000, [300] * 10, [7, 8, 9]),
        (1000, [400, 600], [0, 1]),
        (1000, [400, 600, 1], [1, 2]),
        (1000, [400, 1001], [0]),
        (1000, [900, 1000], [1]),
        (0, [1], []),
    ],
)
def test_quarantine_is_bounded_in_bytes(make_store: MakeStore, bound: int, sizes: list[int], kept: list[int]) -> None:
    store = make_store(max_rejected=bound)
    contents = [bytes([number]) * size for number, size in enumerate(sizes)]
    for content in contents:
        quarantine(store, content)
    assert sorted(hidden(store.folder, ".rejected")) == [contents[number] for number in kept]
    assert incoming(store.folder) == []


def test_quarantine_is_bounded_in_files(store: Storage) -> None:
    quarantine(store, b"x")
    (first,) = (store.folder / ".rejected").iterdir()
    now = time.time_ns()
    for number in range(1100):  # as it would lie there
        (store.folder / ".rejected" / f"{now + number}.1.{NAME}.{number:08x}").write_bytes(b"y")
    quarantine(store, b"z")
    kept = hidden(store.folder, ".rejected")
    assert (len(kept), b"z" in kept, first.exists()) == (1000, True, False)


def test_quarantine_bears_other_things_in_its_folder(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(max_rejected=1000)
    quarantine(store, b"a" * 900)
    for number, kind in enumerate(KINDS):
        KINDS[kind](store.folder / ".rejected" / f"strange {number}")
    quarantine(store, b"b" * 900)
    assert [path.read_bytes() for path in (store.folder / ".rejected").glob("1*")] == [b"b" * 900]


def test_quarantine_bears_another_that_deletes(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store, unlink = make_store(max_rejected=1000), os.unlink
    quarantine(store, b"a" * 900)

    def unlink_twice(*arguments: Any, **more: Any) -> None:
        unlink(*arguments, **more)
        unlink(*arguments, **more)  # the other was faster: FileNotFoundError

    monkeypatch.setattr(os, "unlink", unlink_twice)
    quarantine(store, b"b" * 900)
    assert hidden(store.folder, ".rejected") == [b"b" * 900]


# --- giving back -------------------------------------------------------------------------------------------------------


def test_names_are_those_of_accepted_files(store: Storage) -> None:
    for name in (OTHER, NAME, LONG_NAME):
        commit(store, NEW, name)
    for name in (
        "EMChistos_123_C_2015_11_24_18_04_10.root",  # the ZMQ receiver's
        "EMChistos_123_DQM_2015_11_24_18_04_10.root.part",
        "xEMChistos_123_DQM_2015_11_24_18_04.root",
        "combined.root",
        "." + NAME,
        "EMC histos_123_DQM_2015_11_24_18_04_10.root",
        "EMChistos_١٢٣_DQM_2015_11_24_18_04_10.root",
        "EMChistos_123_DQM_2015_11_24_18_04_10.root\n",
    ):
        (store.folder / name).write_bytes(OLD)
    assert store.file_names() == sorted([NAME, OTHER, LONG_NAME])


def test_names_can_be_narrowed(store: Storage) -> None:
    names = [file_name(agent, run, 0) for agent in ("E_M", "EM", "histos") for run in (1, 11)]
    for name in names:
        commit(store, NEW, name)
    assert store.file_names(lambda agent, run: agent == "E-M") == sorted(names[:2])
    assert store.file_names(lambda agent, run: run == 1) == sorted(names[::2])
    assert store.file_names(lambda agent, run: (agent, run) == ("histos", 11)) == [names[5]]
    assert store.file_names(lambda agent, run: False) == []
    assert [storage.run_of(name) for name in (names[1], NAME, "combined.root")] == [11, 123, None]


def test_names_bear_a_file_that_vanishes(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (NAME, OTHER):
        commit(store, OLD, name)
    scandir = os.scandir

    @contextlib.contextmanager
    def scan_then_take(fd: int) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(fd) as entries:
            found = list(entries)
        (store.folder / NAME).unlink()  # as Overwatch does
        yield iter(found)

    monkeypatch.setattr(os, "scandir", scan_then_take)
    assert OTHER in store.file_names()


def test_list_looks_at_no_single_file(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [file_name("EMC", run, 0) for run in range(3_000)]
    for name in names:
        os.close(os.open(store.folder / name, os.O_WRONLY | os.O_CREAT))
    seen: list[str] = []

    def watch(call: str) -> None:
        genuine = getattr(os, call)

        def watched(*arguments: Any, **more: Any) -> Any:
            seen.append(call)
            return genuine(*arguments, **more)

        monkeypatch.setattr(os, call, watched)

    for call in ("stat", "lstat", "open", "fstat"):
        watch(call)
    assert store.file_names() == sorted(names)
    assert len(seen) < 20


def test_open_gives_any_visible_regular_file(store: Storage) -> None:
    commit(store, NEW)
    (store.folder / "from_zmq.root").write_bytes(OLD)
    with store.open(NAME) as file, store.open("from_zmq.root") as other:
        assert (file.read(), other.read()) == (NEW, OLD)


NOT_NAMES = [
    "", ".", "..", "...", "/", "absent.root", ".hidden", ".receipts", ".receipts/123.jsonl", "./" + NAME, "../outside.root",
    "sub/inside.root", "link_to_folder/" + NAME, NAME + "/", NAME + "\0", "\0", "\udcff", "x" * 256, "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_NAMES)
def test_open_gives_nothing_else(store: Storage, name: str, tmp_path: Path) -> None:
    commit(store, NEW)
    (store.folder / "sub").mkdir()
    for path in (tmp_path / "outside.root", store.folder / ".hidden", store.folder / "sub/inside.root"):
        path.write_bytes(OLD)
    (store.folder / "link_to_folder").symlink_to(store.folder)
    with pytest.raises(FileNotStored, match="There is no file"):
        store.open(name)


def test_vanished_file_can_be_read_on(store: Storage) -> None:
    commit(store, NEW)
    with store.open(NAME) as file:
        (store.folder / NAME).unlink()
        assert file.read() == NEW


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE], ids=errno.errorcode.__getitem__)
def test_open_takes_no_fault_for_absence(store: Storage, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    commit(store, NEW)
    with monkeypatch.context() as patch, pytest.raises(StorageUnavailable, match=os.strerror(number)):
        patch.setattr(os, "open", failing(number))
        store.open(NAME)
