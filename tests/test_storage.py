"""The data folder: names, uploads, what `accept` does with them, the sweep, receipts, and what is given back."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, receipts, visible
from hypothesis import given, settings
from hypothesis import strategies as st

import storage
from storage import FileTooLarge, NoRoom, NoSuchFile, Storage, Unavailable, Upload, file_name

NAME = "EMChistos_123_DQM_2015_11_24_18_04_10.root"
OTHER = "TPChistos_123_DQM_2015_11_24_18_04_10.root"
LONG_NAME = file_name("A" * 64, storage.MAX_RUN, storage.LAST_TIME_STAMP)
OLD = b"the old bytes"
NEW = b"the new bytes, and more of them"
HOUR = 3600


@pytest.fixture
def make_store(folder: Path) -> Callable[..., Storage]:
    def make(where: Path = folder, **limits: int) -> Storage:
        return Storage(where, **{"max_file_size": 1 << 30, "min_free_space": 0, "max_rejected": 1 << 20, **limits})

    return make


@pytest.fixture
def store(make_store: Callable[..., Storage]) -> Storage:
    return make_store()


def begin(store: Storage, data: bytes) -> Upload:
    upload = store.new_upload()
    upload.write(data)
    return upload


def finish(store: Storage, upload: Upload, name: str = NAME) -> str:
    """Have an upload accepted and return the outcome."""
    receipt: dict[str, Any] = {"run": 123, "outcome": "rejected", "filename": name}
    store.accept(upload, receipt, time.monotonic())
    return str(receipt["outcome"])


def accept(store: Storage, data: bytes, name: str = NAME) -> str:
    """Do with a file what the receiver does, and return the outcome."""
    upload = begin(store, data)
    try:
        return finish(store, upload, name)
    finally:
        upload.discard()


def note(store: Storage, number: int, run: int = 1, **more: str) -> None:
    store.append_receipt({"run": run, "number": number, **more}, time.monotonic())


def numbers(store: Storage, run: int = 1) -> list[int]:
    return [line["number"] for line in receipts(store.folder, run)]


def hidden(store: Storage, name: str) -> dict[str, bytes]:
    return visible(store.folder / name)


def incoming(store: Storage) -> list[str]:
    return sorted(path.name for path in (store.folder / ".incoming").iterdir())


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
def test_file_name_is_overwatchs_with_the_time_in_zurich(agent: str, run: int, time_stamp: int, name: str) -> None:
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
def test_file_name_does_not_depend_on_the_hosts_time_zone(host_zone: Callable[[str], None], zone: str) -> None:
    host_zone(zone)
    assert file_name("EMC", 1, 1427590800) == "EMChistos_1_DQM_2015_03_29_03_00_00.root"
    assert file_name("EMC", 1, 1448384650) == "EMChistos_1_DQM_2015_11_24_18_04_10.root"


def test_file_name_needs_no_time_zones_of_the_host() -> None:
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


def test_upload_lies_in_incoming_with_what_was_written_and_knows_size_and_sha256(store: Storage) -> None:
    upload = store.new_upload()
    assert (upload.write(b"one "), upload.write(b""), upload.write(b"two")) == (4, 0, 3)
    assert upload.path.parent == store.folder / ".incoming"
    assert upload.path.read_bytes() == b"one two"
    assert (upload.size, upload.sha256) == (7, hashlib.sha256(b"one two").hexdigest())
    assert visible(store.folder) == {}
    upload.discard()
    assert incoming(store) == []


def test_upload_writes_everything_where_the_system_takes_only_pieces(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, data = os.write, os.urandom(10_000)
    upload = store.new_upload()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, piece: write(fd, piece[:777]))
        assert upload.write(data) == len(data)
    assert upload.path.read_bytes() == data
    assert upload.sha256 == hashlib.sha256(data).hexdigest()
    upload.discard()


def test_upload_of_exactly_the_limit_is_taken(make_store: Callable[..., Storage]) -> None:
    store = make_store(max_file_size=1000)
    assert accept(store, bytes(1000)) == "stored"


@pytest.mark.parametrize("pieces", [[1001], [1000, 1], [1] * 1001])
def test_upload_beyond_the_limit_is_refused_before_it_is_written(
    make_store: Callable[..., Storage], pieces: list[int]
) -> None:
    upload = make_store(max_file_size=1000).new_upload()
    for piece in pieces[:-1]:
        upload.write(bytes(piece))
    with pytest.raises(FileTooLarge, match="1000 bytes") as error:
        upload.write(bytes(pieces[-1]))
    assert error.value.limit == 1000
    assert upload.path.stat().st_size <= 1000
    upload.discard()


def test_upload_is_refused_at_once_where_there_is_no_room(make_store: Callable[..., Storage]) -> None:
    store = make_store(min_free_space=1 << 60)
    with pytest.raises(NoRoom, match=str(1 << 60)):
        store.new_upload()
    assert incoming(store) == []


def test_upload_looks_again_for_room_while_it_grows(
    make_store: Callable[..., Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(min_free_space=1000)
    monkeypatch.setattr(storage, "_ROOM_CHECK", 100)
    upload = begin(store, bytes(100))
    monkeypatch.setattr(Storage, "free_space", lambda self: 1100)
    upload.write(bytes(100))
    with pytest.raises(NoRoom):
        upload.write(bytes(101))
    assert upload.path.stat().st_size == 200
    upload.discard()


def test_check_room_counts_the_bytes_to_come(make_store: Callable[..., Storage]) -> None:
    store = make_store()
    free = store.free_space()
    store.check_room(free // 2)
    with pytest.raises(NoRoom):
        store.check_room(free + (1 << 40))


def test_discard_removes_an_upload_and_may_be_repeated(store: Storage) -> None:
    upload = begin(store, NEW)
    upload.discard()
    assert incoming(store) == []
    upload.discard()


def test_discard_never_removes_what_was_accepted(store: Storage) -> None:
    upload = begin(store, NEW)
    finish(store, upload)
    upload.discard()
    assert visible(store.folder) == {NAME: NEW}


def test_uploads_leave_no_open_files(store: Storage) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for data in (OLD, OLD, NEW):
        accept(store, data)
    upload = begin(store, NEW)
    store.reject(upload, NAME)
    upload.discard()
    begin(store, NEW).discard()
    with pytest.raises(NoSuchFile):
        store.open(".receipts")
    store.sweep()
    assert len(os.listdir("/proc/self/fd")) == before


# --- accepting ---------------------------------------------------------------------------------------------------------


def test_accept_stores_a_file_under_its_name(store: Storage) -> None:
    assert accept(store, NEW) == "stored"
    assert visible(store.folder) == {NAME: NEW}
    assert incoming(store) == []
    assert hidden(store, ".replaced") == {}
    assert [line["outcome"] for line in receipts(store.folder)] == ["stored"]
    status = (store.folder / NAME).stat()
    assert (status.st_nlink, stat.S_IMODE(status.st_mode) & 0o400) == (1, 0o400)


def test_accept_gives_a_file_the_modes_that_the_umask_allows(store: Storage) -> None:
    before = os.umask(0o027)
    try:
        accept(store, NEW)
    finally:
        os.umask(before)
    assert stat.S_IMODE((store.folder / NAME).stat().st_mode) == 0o640


def test_accept_of_the_same_bytes_changes_nothing(store: Storage) -> None:
    accept(store, OLD)
    before = (store.folder / NAME).stat()
    assert accept(store, OLD) == "duplicate"
    after = (store.folder / NAME).stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_nlink) == (before.st_ino, before.st_mtime_ns, 1)
    assert hidden(store, ".replaced") == {}
    assert incoming(store) == []
    assert [line["outcome"] for line in receipts(store.folder)] == ["stored", "duplicate"]


@pytest.mark.parametrize(
    "new", [NEW, OLD[:-1] + b"S", OLD + b"\0", OLD[:-1]], ids=["other", "last", "longer", "shorter"]
)
def test_accept_of_different_bytes_keeps_the_old_ones_aside(store: Storage, new: bytes) -> None:
    accept(store, OLD)
    assert accept(store, new) == "replaced"
    assert visible(store.folder) == {NAME: new}
    ((aside, content),) = hidden(store, ".replaced").items()
    assert (aside.startswith(NAME), content) == (True, OLD)
    assert incoming(store) == []
    assert [line["outcome"] for line in receipts(store.folder)] == ["stored", "replaced"]


def test_accept_finds_a_difference_beyond_the_first_bytes(store: Storage) -> None:
    old = os.urandom(3 << 20)
    accept(store, old)
    assert accept(store, old[:-1] + bytes([old[-1] ^ 1])) == "replaced"
    assert accept(store, old) == "replaced"
    assert accept(store, old) == "duplicate"


def test_accept_keeps_everything_that_ever_had_the_name(store: Storage) -> None:
    versions = [f"version {number}".encode() for number in range(5)]
    assert [accept(store, data) for data in versions] == ["stored"] + ["replaced"] * 4
    assert visible(store.folder) == {NAME: versions[-1]}
    assert sorted(hidden(store, ".replaced").values()) == versions[:-1]


def test_files_an_hour_apart_in_autumn_both_stay(store: Storage) -> None:
    first, second = file_name("EMC", 123, 1445731200), file_name("EMC", 123, 1445734800)
    assert first == second
    assert (accept(store, OLD, first), accept(store, NEW, second)) == ("stored", "replaced")
    assert visible(store.folder) == {first: NEW}
    assert list(hidden(store, ".replaced").values()) == [OLD]


def test_accept_stores_again_what_overwatch_has_taken_away(store: Storage) -> None:
    accept(store, OLD)
    (store.folder / NAME).unlink()
    assert accept(store, OLD) == "stored"
    assert visible(store.folder) == {NAME: OLD}


def test_accept_sets_a_link_aside_and_leaves_alone_what_it_leads_to(store: Storage, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(NEW)
    (store.folder / NAME).symlink_to(elsewhere)
    assert accept(store, NEW) == "replaced"
    assert elsewhere.read_bytes() == NEW
    assert not (store.folder / NAME).is_symlink()
    assert visible(store.folder) == {NAME: NEW}


@pytest.mark.parametrize("name", [NAME, LONG_NAME])
@pytest.mark.parametrize("rivals", [1, 5])
def test_accept_tries_again_when_a_rival_takes_the_name(
    store: Storage, monkeypatch: pytest.MonkeyPatch, name: str, rivals: int
) -> None:
    accept(store, OLD, name)
    link, waiting = os.link, [f"rival {number}".encode() for number in range(rivals)]

    def link_after_a_rival(source: Any, target: Any) -> None:
        if waiting and not os.path.lexists(target):  # the name is free: the old file has just been set aside
            Path(target).write_bytes(waiting.pop())
        link(source, target)

    monkeypatch.setattr(os, "link", link_after_a_rival)
    assert accept(store, NEW, name) == "replaced"
    assert waiting == []
    assert visible(store.folder) == {name: NEW}
    assert len(hidden(store, ".replaced")) == rivals + 1
    assert incoming(store) == []


def test_accept_of_an_equal_file_after_a_rivals_is_a_duplicate(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    accept(store, OLD)
    link, waiting = os.link, [NEW]

    def link_after_a_rival(source: Any, target: Any) -> None:
        if waiting and not os.path.lexists(target):
            Path(target).write_bytes(waiting.pop())
        link(source, target)

    monkeypatch.setattr(os, "link", link_after_a_rival)
    assert accept(store, NEW) in ("duplicate", "replaced")
    assert visible(store.folder) == {NAME: NEW}
    assert list(hidden(store, ".replaced").values()) == [OLD]


def test_accept_when_overwatch_takes_the_file_that_is_in_the_way(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(store, OLD)
    link, in_the_way = os.link, list[str]()

    def link_before_overwatch(source: Any, target: Any) -> None:
        try:
            link(source, target)
        except FileExistsError:
            in_the_way.append(str(target))
            os.unlink(target)  # before anybody can look at it
            raise

    monkeypatch.setattr(os, "link", link_before_overwatch)
    assert accept(store, NEW) == "stored"
    assert in_the_way == [str(store.folder / NAME)]
    assert visible(store.folder) == {NAME: NEW}
    assert hidden(store, ".replaced") == {}


def test_accept_of_many_threads_keeps_every_file(make_store: Callable[..., Storage]) -> None:
    contents = [f"content {number}".encode() for number in range(8)]
    outcomes: list[str] = []
    stores = [make_store(), make_store()]

    def send(number: int) -> None:
        outcomes.append(accept(stores[number % 2], contents[number]))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Whoever finds the name free has stored, also where a third one has just set the file before aside.
    assert len(outcomes) == 8
    assert set(outcomes) <= {"stored", "replaced"}
    assert "stored" in outcomes
    (last,) = visible(stores[0].folder).values()
    assert sorted([last, *hidden(stores[0], ".replaced").values()]) == contents
    assert incoming(stores[0]) == []


@pytest.mark.parametrize("cleared", [".incoming", ".replaced", ".receipts", ".rejected"])
def test_hidden_folders_may_be_cleared_away_at_any_time(store: Storage, cleared: str) -> None:
    accept(store, OLD)
    for path in (store.folder / cleared).iterdir():
        path.unlink()
    (store.folder / cleared).rmdir()
    assert accept(store, NEW) == "replaced"
    upload = begin(store, b"invalid")
    store.reject(upload, NAME)
    upload.discard()
    assert visible(store.folder) == {NAME: NEW}
    assert list(hidden(store, ".rejected").values()) == [b"invalid"]
    assert receipts(store.folder)[-1]["outcome"] == "replaced"


# --- when the disk fails -----------------------------------------------------------------------------------------------

SCENARIOS: dict[str, bytes | None] = {"stored": None, "duplicate": NEW, "replaced": OLD}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("call", ["fsync", "link", "rename", "unlink", "open", "close", "write", "pread", "fstat"])
@pytest.mark.parametrize("outcome", SCENARIOS)
def test_accept_leaves_the_folder_as_it_was_whichever_system_call_fails(
    make_store: Callable[..., Storage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcome: str,
    call: str,
    error: int,
) -> None:
    """The first call fails, then in a new folder the second, and so on until all succeed."""
    genuine: Callable[..., Any] = getattr(os, call)
    calls = number = 0

    def fail(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != number:
            return genuine(*arguments, **more)
        if call == "close":  # Linux closes a file even where close() fails
            genuine(*arguments)
        raise OSError(error, os.strerror(error))

    while calls >= number:
        number += 1
        store = make_store(tmp_path / str(number))
        old = SCENARIOS[outcome]
        if old is not None:
            accept(store, old)
        before, noted = visible(store.folder), len(receipts(store.folder))
        upload = begin(store, NEW)
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                its_outcome = finish(store, upload)
            except (OSError, NoRoom):
                its_outcome = "failed"
        upload.discard()
        failed = its_outcome == "failed"
        what = f"{call} number {number}"
        if failed:
            assert calls >= number, what
            assert visible(store.folder) == before, what
            assert hidden(store, ".replaced") == {}, what
            lines = receipts(store.folder)
            assert [line["outcome"] for line in lines[noted:]] in ([], ["rejected"]), what
            # The folder is as good as new.
            assert accept(store, NEW) == outcome, what
        else:
            assert its_outcome in (outcome, "replaced"), what
            assert visible(store.folder) == {NAME: NEW}, what
            assert receipts(store.folder)[-1]["outcome"] == its_outcome, what
        assert incoming(store) == [], what
        assert number < 50
    unused = {("rename", "stored"), ("rename", "duplicate"), ("unlink", "duplicate"), ("pread", "stored")}
    assert (number > 1) == ((call, outcome) not in unused)


def test_accept_syncs_the_file_before_it_has_a_name_and_the_folder_before_it_returns(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def watch(fd: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{fd}"), (store.folder / NAME).exists()))
        fsync(fd)

    upload = begin(store, NEW)
    path = str(upload.path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watch)
        finish(store, upload)
    upload.discard()
    assert synced[0] == (path, False)
    assert (str(store.folder), True) in synced
    assert (str(store.folder / ".receipts" / "123.jsonl"), True) in synced
    assert (str(store.folder / ".receipts"), True) in synced


def test_accept_waits_for_nothing_while_a_name_is_free_on_its_way_to_another_file(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(store, OLD)
    upload = begin(store, NEW)
    calls: list[tuple[str, bool]] = []

    def watch(call: str) -> Callable[..., Any]:
        genuine = getattr(os, call)

        def watched(*arguments: Any, **more: Any) -> Any:
            calls.append((call, (store.folder / NAME).exists()))
            return genuine(*arguments, **more)

        return watched

    with monkeypatch.context() as patch:
        for call in ("fsync", "rename", "link", "unlink", "open", "pread"):
            patch.setattr(os, call, watch(call))
        assert finish(store, upload) == "replaced"
    assert [call for call, is_there in calls if not is_there] == ["link"]


def test_accept_of_a_duplicate_makes_sure_that_the_first_is_on_the_disk(
    store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store.folder / NAME).write_bytes(NEW)  # by somebody who syncs nothing
    synced: list[str] = []
    fsync = os.fsync

    def watch(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watch)
        assert accept(store, NEW) == "duplicate"
    assert {str(store.folder / NAME), str(store.folder)} <= set(synced)


def test_withdrawing_leaves_what_a_rival_has_stored_meanwhile(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_after_a_rival(*_: object) -> None:
        rival = store.folder / "rival"
        rival.write_bytes(b"the rival's")
        rival.rename(store.folder / NAME)
        raise NoRoom("no room for a receipt")

    accept(store, OLD)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "append_receipt", fail_after_a_rival)
        with pytest.raises(NoRoom):
            accept(store, NEW)
    assert visible(store.folder) == {NAME: b"the rival's"}
    assert incoming(store) == []


# --- errors of the system ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, NoRoom),
        (errno.EDQUOT, NoRoom),
        (errno.EROFS, Unavailable),
        (errno.EACCES, Unavailable),
        (errno.EPERM, Unavailable),
        (errno.ESTALE, Unavailable),
        (errno.ENOTDIR, Unavailable),
        (errno.EIO, OSError),
        (errno.EMFILE, Unavailable),
        (errno.ENOTCONN, Unavailable),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
@pytest.mark.parametrize("call", ["open", "write"])
def test_a_failing_disk_is_told_by_its_kind(
    store: Storage, monkeypatch: pytest.MonkeyPatch, call: str, number: int, error: type[Exception]
) -> None:
    upload = store.new_upload()

    def fail(*arguments: Any, **more: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(error) as raised:
            if call == "open":
                store.new_upload()
            else:
                upload.write(NEW)
    if error is not OSError:
        assert os.strerror(number) in str(raised.value)
        assert isinstance(raised.value.__cause__, OSError)
    upload.discard()
    assert incoming(store) == []


def test_a_folder_that_is_gone_is_unavailable(store: Storage) -> None:
    store.folder.rename(store.folder.with_name("away"))
    with pytest.raises(Unavailable):
        store.new_upload()
    with pytest.raises(Unavailable):
        store.names()
    with pytest.raises(Unavailable):
        store.open(NAME)
    with pytest.raises(Unavailable):
        store.receipts_tag(123)


# --- rejected uploads --------------------------------------------------------------------------------------------------


def reject(store: Storage, data: bytes) -> None:
    upload = begin(store, data)
    store.reject(upload, NAME)
    upload.discard()


def test_reject_keeps_the_bytes_out_of_sight(store: Storage) -> None:
    reject(store, NEW)
    ((name, content),) = hidden(store, ".rejected").items()
    assert (NAME in name, content) == (True, NEW)
    assert visible(store.folder) == {}
    assert incoming(store) == []


def test_reject_lets_the_oldest_go_first(make_store: Callable[..., Storage]) -> None:
    store = make_store(max_rejected=1000)
    contents = [bytes([number]) * 300 for number in range(10)]
    for number, content in enumerate(contents, 1):
        reject(store, content)
        assert sorted(hidden(store, ".rejected").values()) == contents[max(0, number - 3) : number]


def test_reject_fills_the_bound_to_the_last_byte(make_store: Callable[..., Storage]) -> None:
    store = make_store(max_rejected=1000)
    for content in (b"a" * 400, b"b" * 600):
        reject(store, content)
    assert sorted(hidden(store, ".rejected").values()) == [b"a" * 400, b"b" * 600]
    reject(store, b"c")
    assert sorted(hidden(store, ".rejected").values()) == [b"b" * 600, b"c"]


def test_reject_keeps_nothing_larger_than_the_bound_and_loses_nothing_for_it(
    make_store: Callable[..., Storage],
) -> None:
    store = make_store(max_rejected=1000)
    reject(store, b"a" * 400)
    reject(store, b"b" * 1001)
    assert list(hidden(store, ".rejected").values()) == [b"a" * 400]
    assert incoming(store) == []


def test_reject_with_a_bound_of_zero_keeps_nothing(make_store: Callable[..., Storage]) -> None:
    store = make_store(max_rejected=0)
    reject(store, NEW)
    assert hidden(store, ".rejected") == {}
    assert incoming(store) == []


def test_reject_never_touches_a_valid_file(store: Storage) -> None:
    accept(store, OLD)
    reject(store, NEW)
    assert visible(store.folder) == {NAME: OLD}


def test_reject_bears_that_somebody_else_clears_the_folder(
    make_store: Callable[..., Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(max_rejected=1000)
    reject(store, b"a" * 900)
    unlink = os.unlink

    def unlink_twice(path: Any, *arguments: Any, **more: Any) -> None:
        unlink(path)
        unlink(path, *arguments, **more)  # the other was faster: FileNotFoundError

    monkeypatch.setattr(Path, "unlink", lambda self: unlink_twice(self))
    reject(store, b"b" * 900)
    assert list(hidden(store, ".rejected").values()) == [b"b" * 900]


# --- the sweep ---------------------------------------------------------------------------------------------------------

LIVE = """
import os, signal, sys
from pathlib import Path
from storage import Storage
upload = Storage(Path(sys.argv[1]), max_file_size=1 << 30, min_free_space=0, max_rejected=0).new_upload()
upload.write(b"half of it")
print(upload.path, flush=True)
signal.pause()
"""


@pytest.fixture
def other_process(store: Storage) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process of this host with an upload under way."""
    environ = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(
        [sys.executable, "-c", LIVE, str(store.folder)], env=environ, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def leave(store: Storage, name: str, data: bytes = OLD, age: float = 0.0) -> Path:
    """Put a file into `.incoming/` that nobody holds."""
    path = store.folder / ".incoming" / name
    path.write_bytes(data)
    os.utime(path, (time.time() - age,) * 2)
    return path


def of_this_host(store: Storage) -> str:
    """Return the beginning of the names that uploads of this host have."""
    upload = store.new_upload()
    upload.discard()
    return upload.path.name.partition("-")[0]


def test_sweep_removes_what_a_dead_process_left(
    store: Storage, other_process: tuple[subprocess.Popen[str], Path]
) -> None:
    process, path = other_process
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.exists()
    store.sweep()
    assert incoming(store) == []
    assert visible(store.folder) == {}


def test_sweep_leaves_a_live_upload_of_another_process_however_old(
    store: Storage, other_process: tuple[subprocess.Popen[str], Path]
) -> None:
    _, path = other_process
    os.utime(path, (0, 0))
    store.sweep()
    assert path.read_bytes() == b"half of it"


def test_sweep_leaves_a_live_upload_of_this_process_however_old(make_store: Callable[..., Storage]) -> None:
    store = make_store()
    upload = begin(store, NEW)
    os.utime(upload.path, (0, 0))
    for sweeper in (store, make_store()):
        sweeper.sweep()
    assert upload.path.read_bytes() == NEW
    assert finish(store, upload) == "stored"
    upload.discard()


def test_sweep_happens_at_the_start(make_store: Callable[..., Storage]) -> None:
    store = make_store()
    leave(store, f"{of_this_host(store)}-dead")
    make_store()
    assert incoming(store) == []


def test_sweep_happens_now_and_then(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    left = leave(store, f"{of_this_host(store)}-dead")
    store.new_upload().discard()
    assert left.exists()
    later = time.monotonic() + HOUR
    monkeypatch.setattr(time, "monotonic", lambda: later)
    store.new_upload().discard()
    assert incoming(store) == []


def test_sweep_works_in_a_folder_with_a_comma_in_its_path(make_store: Callable[..., Storage], tmp_path: Path) -> None:
    store = make_store(tmp_path / "data,2015" / "of,all")
    leave(store, f"{of_this_host(store)}-dead")
    store.sweep()
    assert incoming(store) == []


def test_sweep_tells_other_hosts_uploads_by_their_age(store: Storage) -> None:
    young = leave(store, "0f0f0f0f-young", age=HOUR / 2)
    old = leave(store, "0f0f0f0f-old", age=HOUR * 2)
    store.sweep()
    assert (young.exists(), old.exists()) == (True, False)


def test_sweep_leaves_another_hosts_old_upload_that_is_locked(store: Storage) -> None:
    path = leave(store, "0f0f0f0f-old", age=HOUR * 2)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store.sweep()
        assert path.exists()
    store.sweep()
    assert not path.exists()


def test_sweep_goes_by_age_alone_on_file_systems_without_locks(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    host = of_this_host(store)

    def no_locks(fd: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    young, old = leave(store, f"{host}-young"), leave(store, f"{host}-old", age=HOUR * 2)
    upload = begin(store, NEW)
    store.sweep()
    assert (young.exists(), old.exists(), upload.path.exists()) == (True, False, True)
    assert finish(store, upload) == "stored"
    upload.discard()


def die_between_set_aside_and_link(store: Storage, name: str, data: bytes) -> None:
    """Do what a process does that is killed when the old file is set aside and the new one has no name yet."""
    environ = {**os.environ, "PYTHONPATH": str(PROJECT)}
    program = """
import os, sys
from pathlib import Path
from storage import Storage
store = Storage(Path(sys.argv[1]), max_file_size=1 << 30, min_free_space=0, max_rejected=0)
upload = store.new_upload()
upload.write(sys.argv[3].encode())
link = os.link
def die_if_free(source, target):
    if not os.path.lexists(target):
        os._exit(9)
    link(source, target)
os.link = die_if_free
store.accept(upload, {"run": 123, "filename": sys.argv[2]}, 0.0)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(store.folder), name, data.decode()], env=environ, check=False
    )
    assert run.returncode == 9


@pytest.mark.parametrize("name", [NAME, LONG_NAME])
def test_sweep_completes_a_replacement_that_was_cut_short(store: Storage, name: str) -> None:
    accept(store, OLD, name)
    die_between_set_aside_and_link(store, name, NEW)
    assert visible(store.folder) == {}
    store.sweep()
    assert visible(store.folder) == {name: NEW}
    assert list(hidden(store, ".replaced").values()) == [OLD]
    assert incoming(store) == []


def test_sweep_never_overwrites_what_has_taken_the_name_since(store: Storage) -> None:
    accept(store, OLD)
    die_between_set_aside_and_link(store, NAME, NEW)
    accept(store, b"somebody else's")
    store.sweep()
    assert visible(store.folder) == {NAME: b"somebody else's"}
    assert incoming(store) == []


def test_sweep_bears_whatever_lies_in_incoming(store: Storage, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(OLD)
    folder = store.folder / ".incoming"
    (folder / "0a-folder").mkdir()
    (folder / "0b-link").symlink_to(elsewhere)
    os.mkfifo(folder / "0c-pipe")
    left = leave(store, f"{of_this_host(store)}-dead")
    store.sweep()
    assert not left.exists()
    assert elsewhere.read_bytes() == OLD
    assert visible(store.folder) == {}


def test_upload_that_is_swept_before_its_lock_is_begun_anew(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, swept = fcntl.flock, list[str]()

    def flock_after_a_sweep(fd: Any, operation: int) -> None:
        if not swept:
            swept.append(os.readlink(f"/proc/self/fd/{fd}"))
            os.unlink(swept[0])
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_a_sweep)
    upload = begin(store, NEW)
    assert str(upload.path) != swept[0]
    assert finish(store, upload) == "stored"
    upload.discard()
    assert visible(store.folder) == {NAME: NEW}


# --- receipts ----------------------------------------------------------------------------------------------------------


def test_receipts_are_a_line_each_and_a_file_per_run(store: Storage) -> None:
    for number, run in enumerate([1, 2, 1]):
        note(store, number, run, text="Ä\n")
    assert (numbers(store, 1), numbers(store, 2)) == ([0, 2], [1])
    assert receipts(store.folder, 2)[0]["text"] == "Ä\n"
    assert sorted(hidden(store, ".receipts")) == ["1.jsonl", "2.jsonl"]


@pytest.mark.parametrize("torn", [b'{"run": 1, "file', b"{", b"\0" * 100])
def test_a_line_that_a_crash_has_torn_spoils_no_other(store: Storage, torn: bytes) -> None:
    path = store.folder / ".receipts" / "1.jsonl"
    note(store, 1)
    with path.open("ab") as file:
        file.write(torn)
    for number in (2, 3):
        note(store, number)
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(line)["number"] for line in lines if line.endswith(b"}")] == [1, 2, 3]
    assert lines[-1] == b""


@pytest.mark.parametrize("written", [0, 1, 10])
def test_a_receipt_that_finds_no_room_is_taken_back(
    store: Storage, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    path = store.folder / ".receipts" / "1.jsonl"
    note(store, 1)
    before, write = path.read_bytes(), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:written]))
        with pytest.raises(NoRoom):
            note(store, 2)
    assert path.read_bytes() == before


def test_receipts_of_many_threads_do_not_mix(make_store: Callable[..., Storage]) -> None:
    stores = [make_store() for _ in range(4)]

    def work(number: int) -> None:
        for _ in range(20):
            note(stores[number], number, filler="x" * 5000)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers(stores[0])) == sorted(list(range(4)) * 20)


def test_now_is_utc_and_sorts_as_text() -> None:
    first = storage.now()
    second = storage.now()
    assert first <= second
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first)
    moment = datetime.fromisoformat(first.replace("Z", "+00:00"))
    assert abs((datetime.now(timezone.utc) - moment).total_seconds()) < 60


# --- giving back -------------------------------------------------------------------------------------------------------


def test_names_are_those_of_accepted_files_sorted(store: Storage, tmp_path: Path) -> None:
    for name in (OTHER, NAME, LONG_NAME):
        accept(store, NEW, name)
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
    (store.folder / "AAAhistos_1_DQM_2015_11_24_18_04_10.root").mkdir()
    (store.folder / "BBBhistos_1_DQM_2015_11_24_18_04_10.root").symlink_to(store.folder / NAME)
    os.mkfifo(store.folder / "CCChistos_1_DQM_2015_11_24_18_04_10.root")
    assert store.names() == sorted([NAME, OTHER, LONG_NAME])


def test_names_can_be_narrowed_to_agents_and_runs(store: Storage) -> None:
    names = [file_name(agent, run, 0) for agent in ("E_M", "EM", "histos") for run in (1, 11)]
    for name in names:
        accept(store, NEW, name)
    assert store.names(lambda agent, run: agent == "E-M") == sorted(names[:2])
    assert store.names(lambda agent, run: run == 1) == sorted(names[::2])
    assert store.names(lambda agent, run: (agent, run) == ("histos", 11)) == [names[5]]
    assert store.names(lambda agent, run: False) == []


def test_names_bear_files_that_vanish(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    accept(store, OLD, NAME)
    accept(store, NEW, OTHER)
    scandir = os.scandir

    class Entries:
        """What a file system is like whose entries do not tell the kind of file, and Overwatch at work in between."""

        def __init__(self, path: Any) -> None:
            self.entries = scandir(path)

        def __enter__(self) -> Iterator[Any]:
            return (Entry(entry) for entry in self.entries)

        def __exit__(self, *_: object) -> None:
            self.entries.close()

    class Entry:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.path = entry.name, entry.path

        def is_file(self, *, follow_symlinks: bool = True) -> bool:
            if self.name == NAME:
                os.unlink(self.path)
            try:
                return stat.S_ISREG(os.stat(self.path, follow_symlinks=follow_symlinks).st_mode)
            except FileNotFoundError:
                return False

    monkeypatch.setattr(os, "scandir", Entries)
    assert store.names() == [OTHER]


def test_open_gives_any_visible_regular_file(store: Storage) -> None:
    accept(store, NEW)
    (store.folder / "from_zmq.root").write_bytes(OLD)
    with store.open(NAME) as file, store.open("from_zmq.root") as other:
        assert (file.read(), other.read()) == (NEW, OLD)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "...",
        "/",
        "absent.root",
        ".hidden",
        ".receipts",
        ".receipts/123.jsonl",
        "./" + NAME,
        "../outside.root",
        "sub/inside.root",
        "sub",
        "link",
        "dangling",
        "link_to_folder/" + NAME,
        "pipe",
        "socket",
        NAME + "/",
        NAME + "\0",
        "\0",
        "x" * 256,
        "x" * 5000,
        "\udcff\ud800",
    ],
)
def test_open_gives_nothing_else(store: Storage, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept(store, NEW)
    (tmp_path / "outside.root").write_bytes(OLD)
    (store.folder / ".hidden").write_bytes(OLD)
    (store.folder / "sub").mkdir()
    (store.folder / "sub" / "inside.root").write_bytes(OLD)
    (store.folder / "link").symlink_to(tmp_path / "outside.root")
    (store.folder / "dangling").symlink_to(tmp_path / "nowhere")
    (store.folder / "link_to_folder").symlink_to(store.folder)
    os.mkfifo(store.folder / "pipe")
    monkeypatch.chdir(store.folder)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(NoSuchFile, match="There is no file"):
            store.open(name)


def test_open_follows_no_link_put_in_place_of_a_file(store: Storage, tmp_path: Path) -> None:
    accept(store, NEW)
    (tmp_path / "outside.root").write_bytes(OLD)
    (store.folder / NAME).unlink()
    (store.folder / NAME).symlink_to(tmp_path / "outside.root")
    with pytest.raises(NoSuchFile):
        store.open(NAME)


def test_a_file_that_vanishes_can_be_read_to_its_end(store: Storage) -> None:
    accept(store, NEW)
    with store.open(NAME) as file:
        (store.folder / NAME).unlink()
        assert file.read() == NEW


@pytest.mark.parametrize(("number", "raised"), [(errno.EIO, OSError), (errno.EMFILE, Unavailable)])
def test_open_does_not_take_a_fault_for_an_absent_file(
    store: Storage, monkeypatch: pytest.MonkeyPatch, number: int, raised: type[Exception]
) -> None:
    accept(store, NEW)

    def fail(*arguments: Any, **more: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(raised, match=os.strerror(number)):
            store.open(NAME)


# --- the folder itself -------------------------------------------------------------------------------------------------


def test_the_folder_and_its_hidden_ones_are_made(make_store: Callable[..., Storage], tmp_path: Path) -> None:
    store = make_store(tmp_path / "a" / "b")
    assert sorted(path.name for path in store.folder.iterdir()) == [".incoming", ".receipts", ".rejected", ".replaced"]
    make_store(tmp_path / "a" / "b")


def test_a_relative_folder_stays_where_it_was_when_the_process_moves(
    make_store: Callable[..., Storage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = make_store(Path("relative"))
    monkeypatch.chdir("/")
    accept(store, NEW)
    assert visible(tmp_path / "relative") == {NAME: NEW}


def test_what_lies_in_the_folder_already_is_left_alone(make_store: Callable[..., Storage], folder: Path) -> None:
    folder.mkdir()
    (folder / "from_zmq.root").write_bytes(OLD)
    (folder / ".hidden").write_bytes(OLD)
    store = make_store()
    accept(store, NEW)
    store.sweep()
    assert visible(folder) == {"from_zmq.root": OLD, NAME: NEW}
    assert (folder / ".hidden").read_bytes() == OLD
