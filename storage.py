"""The data folder: names, uploads on their way, accepted files, receipts.

An upload is written to `.incoming/`, made durable and then given its name with `link`, which is atomic and never overwrites.
Nothing here waits for another process, but for an instant to append a receipt; whatever several processes and hosts do at once,
and whenever one of them dies, a visible name holds a whole file, and what was acknowledged is in the folder or in `.replaced/`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import threading
import time
import uuid
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from zoneinfo import ZoneInfo

logger = logging.getLogger("dqm_receiver")

INCOMING = ".incoming"
REPLACED = ".replaced"
REJECTED = ".rejected"
RECEIPTS = ".receipts"
SUBFOLDERS = (INCOMING, REPLACED, REJECTED, RECEIPTS)

MAX_RUN = 2**31 - 1
LAST_TIME_STAMP = 253402297199  # 9999-12-31 23:59:59 in Zurich: names have four digits for the year

DATA_START, DATA_END = 1, 2  # dataStatus: this file starts, or ends, a set of data

OUTCOMES = ("stored", "duplicate", "replaced", "rejected")

# Upper bounds, in seconds, of the classes in which durations are counted.
DURATIONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, float("inf"))

_ZONE = "Europe/Zurich"  # the names' time zone, whatever the host's
_CHUNK = 1 << 20  # bytes read at once
_ROOM_CHECK = 8 << 20  # bytes written between two looks at the free space
_SWEEP_INTERVAL = 600.0  # seconds
_BOUND_AGE = 60.0  # seconds after which an upload that is about to take a name is not going to
_FOREIGN_AGE = 3600.0  # seconds without a byte after which another host's upload may be taken for dead

_NO_RECEIPT = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # torn by a crash, or foreign
_RECEIPTS_NAME = re.compile(r"(0|[1-9][0-9]{0,9})\.jsonl")
_BOUND_FOR = ","  # between the name of an upload and the one it is about to take from another file
_NAME = re.compile(r"(?P<agent>[A-Za-z0-9-]{1,64})histos_(?P<run>[0-9]{1,10})_DQM_[0-9]{4}(?:_[0-9]{2}){5}\.root")


class StorageError(Exception):
    """What keeps the folder from doing what was asked."""


class FileTooLarge(StorageError):
    """More bytes than a file may have."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"The file is larger than the limit of {limit} bytes")
        self.limit = limit


class NoRoom(StorageError):
    """The disk is full, or will be."""


class Unavailable(StorageError):
    """The folder is gone, or may not be written; an operator can mend it."""


class NoSuchFile(StorageError):
    """No regular, visible file has this name."""


class NoSuchRun(StorageError):
    """No upload of this run has come."""


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG, errno.EACCES}
_UNAVAILABLE = {errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}
_UNAVAILABLE |= {errno.ESTALE, errno.EHOSTDOWN, errno.ENOTCONN}  # of NFS and FUSE


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Say what an OSError means for the folder; one that means nothing of the kind passes."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise NoRoom(f"There is no room for the file: {error.strerror}") from error
        if error.errno in _UNAVAILABLE:
            raise Unavailable(f"The data folder cannot be used: {error.strerror}") from error
        raise


def file_name(agent: str, run: int, time_stamp: int) -> str:
    """Return the name Overwatch knows the file by; the time stamp is in Unix seconds.

    Overwatch splits names on `_`, so that one in the agent is written `-`.
    """
    local = datetime.fromtimestamp(time_stamp, ZoneInfo(_ZONE))
    # Not strftime, whose %Y has no leading zeros on some hosts.
    when = f"{local.year:04}_{local.month:02}_{local.day:02}_{local.hour:02}_{local.minute:02}_{local.second:02}"
    return f"{agent.replace('_', '-')}histos_{run}_DQM_{when}.root"


class Upload:
    """A file on its way, in `.incoming/`: what is written is hashed, counted and held against the limits.

    It holds a lock on its own file, which keeps nobody from anything: it is the sign of life that `Storage.sweep` looks for.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._hash = hashlib.sha256()
        self._room_checked = 0
        self._is_incoming = True
        self.size = 0
        self.path, self._fd, self._status = storage._create_incoming()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> int:
        """Append bytes; raises FileTooLarge before that limit is passed, NoRoom 8 MiB behind the other at the latest."""
        size = self.size + len(data)
        if size > self._storage.max_file_size:
            raise FileTooLarge(self._storage.max_file_size)
        if size - self._room_checked > _ROOM_CHECK:
            self._storage.check_room(len(data))
            self._room_checked = size
        view = memoryview(data)
        with os_errors():
            while view:
                view = view[os.write(self._fd, view) :]
        self._hash.update(data)
        self.size = size
        return len(data)

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """Do nothing: form parsers rewind a file they have written, and this one is never read through them."""
        return position

    def sync(self) -> None:
        """Put the bytes on the disk."""
        with os_errors():
            os.fsync(self._fd)

    def twin(self, path: Path) -> os.stat_result | None:
        """Return the status of a file if it has the same bytes, which then are put on the disk; None if it has others."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
                return None
            raise
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != self.size:
                return None
            position = 0
            while piece := os.pread(fd, _CHUNK, position):
                if piece != os.pread(self._fd, len(piece), position):
                    return None
                position += len(piece)
            os.fsync(fd)
            return status if position == self.size else None
        finally:
            os.close(fd)

    def is_file(self, status: os.stat_result) -> bool:
        """Whether this is the status of this very file."""
        return os.path.samestat(self._status, status)

    def move(self, path: Path) -> None:
        os.rename(self.path, path)
        self.path = path

    def finish(self) -> None:
        """Leave `.incoming/`; the file lives on under its name, and open, so that no other is given its inode meanwhile."""
        os.unlink(self.path)
        self._is_incoming = False
        os.close(os.dup(self._fd))  # NFS and FUSE tell at every close what they could not write

    def discard(self) -> None:
        """Close the upload, and remove it if it is still in `.incoming/`."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                if self._is_incoming:
                    os.unlink(self.path)
            with contextlib.suppress(OSError):
                self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)


@dataclass
class AgentRecord:
    """What the receipts of a run say of one agent; time stamps in Unix seconds, times of arrival as receipts have them."""

    outcomes: Counter[str] = field(default_factory=Counter)
    bytes: int = 0  # of the files that got a name
    first_time_stamp: int | None = None
    last_time_stamp: int | None = None
    first_arrival: str = ""
    last_arrival: str = ""
    last_accepted: str = ""
    last_start: int | None = None  # time stamp of the last file that starts a set of data
    last_end: int | None = None  # of the last one that ends it

    @property
    def files(self) -> int:
        """The number of files that got a name."""
        return self.outcomes["stored"] + self.outcomes["replaced"]

    @property
    def started(self) -> bool:
        return self.last_start is not None

    @property
    def ended(self) -> bool:
        """Whether the set of data has ended and not started anew."""
        return self.last_end is not None and (self.last_start is None or self.last_start <= self.last_end)

    def add(self, receipt: Mapping[str, Any]) -> None:
        # The time of arrival is that of the beginning, but receipts are written at the end of uploads.
        arrival = receipt["received_at"]
        self.outcomes[receipt["outcome"]] += 1
        self.last_arrival = max(arrival, self.last_arrival)
        self.first_arrival = min(arrival, self.first_arrival or arrival)
        if receipt["outcome"] == "rejected":
            return
        self.last_accepted = max(arrival, self.last_accepted)
        if receipt["outcome"] != "duplicate":
            self.bytes += receipt["size"]
        time_stamp = receipt["time_stamp"]
        first = time_stamp if self.first_time_stamp is None else self.first_time_stamp
        self.first_time_stamp = min(time_stamp, first)
        self.last_time_stamp = max(time_stamp, self.last_time_stamp or 0)
        if receipt["data_status"] == DATA_START:
            self.last_start = max(time_stamp, self.last_start or 0)
        elif receipt["data_status"] == DATA_END:
            self.last_end = max(time_stamp, self.last_end or 0)


class RunRecord:
    """The receipts of one run, added up; of those only that have come since are read, unless the last one read has gone."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lock = threading.Lock()  # to be held while the record is looked at
        self._clear()

    def _clear(self) -> None:
        self._read, self._last = 0, b""  # bytes read, and the last line of them
        self.agents: dict[str, AgentRecord] = {}
        self.reasons: Counter[str] = Counter()  # classes of reasons for rejections
        # By a receipt's field: the uploads by the first of DURATIONS that they did not pass, and the sum of their seconds.
        self.durations: dict[str, Counter[float]] = {"seconds": Counter(), "validation_seconds": Counter()}
        self.sums: dict[str, float] = dict.fromkeys(self.durations, 0.0)

    def update(self) -> None:
        """Read the receipts that have come since the last time; raises OSError."""
        with self.lock, open(self.path, "rb") as file:
            file.seek(self._read - len(self._last))
            if file.read(len(self._last)) != self._last:  # not the file it was: archived, restored, edited
                self._clear()
                file.seek(0)
            while (line := file.readline()).endswith(b"\n"):  # one that is being written is read the next time
                self._read, self._last = self._read + len(line), line
                with contextlib.suppress(*_NO_RECEIPT):
                    self._add(json.loads(line))

    def _add(self, receipt: Mapping[str, Any]) -> None:
        seconds = {name: receipt[name] for name in self.durations if receipt[name] is not None}
        kinds = {"agent": str, "outcome": str, "received_at": str, "size": int, "time_stamp": int, "data_status": int}
        if not all(isinstance(receipt[name], kind) for name, kind in kinds.items()):
            raise TypeError("not a receipt")
        if receipt["outcome"] not in OUTCOMES or min(seconds.values(), default=0) < 0:
            raise ValueError("not a receipt")
        seconds_of(receipt["received_at"])
        self.agents.setdefault(receipt["agent"], AgentRecord()).add(receipt)
        if receipt["outcome"] == "rejected":
            self.reasons[str(receipt["reason_class"])] += 1
        for name, number in seconds.items():
            self.durations[name][DURATIONS[bisect_left(DURATIONS, number)]] += 1
            self.sums[name] += number


class Storage:
    """A data folder that several processes and hosts may use at once."""

    def __init__(self, folder: Path, *, max_file_size: int, min_free_space: int, max_rejected: int) -> None:
        self.folder = folder.absolute()
        self.max_file_size = max_file_size
        self.min_free_space = min_free_space
        self.max_rejected = max_rejected
        self._swept = 0.0
        self._runs: dict[int, RunRecord] = {}
        self._host = _host_id()
        self._incoming = self.folder / INCOMING
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in made:
            _sync_folder(path.parent)
        self._disk = os.statvfs(self.folder).f_fsid
        self._make_subfolders()
        self.sweep()

    def _make_subfolders(self) -> None:
        for name in SUBFOLDERS:
            (self.folder / name).mkdir(exist_ok=True)

    # --- uploads -------------------------------------------------------------------------------------------------------

    def new_upload(self) -> Upload:
        """Begin an upload; raises NoRoom or Unavailable."""
        if time.monotonic() - self._swept > _SWEEP_INTERVAL:
            self.sweep()
        self.check_room(0)
        with os_errors():
            return Upload(self)

    def check_room(self, size: int) -> None:
        """Raise NoRoom unless so many more bytes leave the free space that is to be left."""
        if self.free_space() - size < self.min_free_space:
            raise NoRoom(f"There is no room for the file: {self.min_free_space} bytes of the disk are to stay free")

    def free_space(self) -> int:
        """Return the bytes that are free on the folder's disk."""
        disk = self.check_disk()
        return disk.f_bavail * disk.f_frsize

    def check_disk(self) -> os.statvfs_result:
        """Return the state of the disk; raises Unavailable without the folder, or if its disk is not the one of the start."""
        with os_errors():
            disk = os.statvfs(f"{self.folder}/.")
        if disk.f_fsid != self._disk:
            raise Unavailable("The data folder cannot be used: its disk is not the one of the start; is it mounted?")
        return disk

    def _create_incoming(self) -> tuple[Path, int, os.stat_result]:
        while True:
            path = self._incoming / f"{self._host}-{uuid.uuid4().hex}"
            fd = self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            _lock(fd)
            try:
                status = os.fstat(fd)
            except OSError:
                os.close(fd)
                raise
            if status.st_nlink:
                return path, fd, status
            os.close(fd)  # swept between its creation and the lock

    def _open(self, path: str | Path, flags: int) -> int:
        """Open a file in a subfolder, which is made if somebody has removed it."""
        try:
            return os.open(path, flags | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            self._make_subfolders()
            _sync_folder(self.folder)
            return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def accept(self, upload: Upload, receipt: dict[str, Any], began: float) -> None:
        """Give a valid upload the name in its receipt, and the receipt the outcome: "stored", "duplicate" or "replaced".

        When this returns, file, name and receipt are on the disk. When it raises, the folder is as it was, as far as the disk
        allows and nobody else was promised the file meanwhile.
        """
        target = self.folder / receipt["filename"]
        named, set_aside, noted = False, list[Path](), 0
        upload.sync()
        with os_errors():
            # Before there is something to withdraw, which may have to be done when nothing can be opened any more.
            receipts = self._open_receipts(receipt["run"])
            try:
                noted = os.fstat(receipts).st_size
                while not named:
                    twin = self._give_name(upload, target, set_aside)
                    named = twin is None
                    if set_aside:
                        _sync_folder(self.folder / REPLACED)
                    _sync_folder(self.folder)
                    if twin is None:
                        upload.finish()
                        receipt["outcome"] = "replaced" if set_aside else "stored"
                        self.append_receipt(receipt, began)
                        return
                    # The twin's own receipt may fail and the twin be withdrawn; who has the receipts' lock first decides.
                    receipt["outcome"] = "duplicate"
                    if self.append_receipt(receipt, began, partial(_is_at, target, twin)):
                        return
            except BaseException:
                if named:
                    with contextlib.suppress(OSError):
                        upload.finish()
                else:
                    upload.discard()
                self._withdraw(upload, target, named, set_aside, receipt, receipts, noted)
                raise
            finally:
                with contextlib.suppress(OSError):
                    os.close(receipts)

    def _give_name(self, upload: Upload, target: Path, set_aside: list[Path]) -> os.stat_result | None:
        """Link the upload to its name, having set aside what had it, or return the status of what has the same bytes."""
        while True:
            try:
                os.link(upload.path, target)
                return None
            except FileExistsError:
                pass
            try:
                twin = upload.twin(target)
            except FileNotFoundError:  # Overwatch has just taken it
                continue
            if twin is not None:  # the upload itself, if NFS has repeated a link that it had made
                return None if upload.is_file(twin) else twin
            # Between the next renaming and the link nothing has the name. Should this process die there, `sweep` finds the
            # name behind that of the upload and finishes the work.
            self._make_subfolders()
            if _BOUND_FOR not in upload.path.name:
                upload.move(upload.path.with_name(f"{upload.path.name}{_BOUND_FOR}{target.name}"))
                _sync_folder(self._incoming)
            aside = self._path_aside(target)
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, aside)
                set_aside.append(aside)

    def _withdraw(
        self,
        upload: Upload,
        target: Path,
        named: bool,
        set_aside: list[Path],
        receipt: Mapping[str, Any],
        receipts: int,
        noted: int,
    ) -> None:
        """Undo what `accept` has done, as far as the disk allows, but nothing of what others have done since.

        `noted` is the number of bytes that the run's receipts, which are open, had before the upload had its name.
        """
        try:
            _lock(receipts)  # so that nobody appends meanwhile, and one is withdrawn after the other
            if named and _has_duplicate(receipts, noted, receipt):  # whose sender was promised this very file
                return
            self._make_subfolders()
            before = None
            for aside in reversed(set_aside):
                with contextlib.suppress(FileNotFoundError):  # withdrawn itself
                    before = self._claim(aside, target)
                    break
            place = target
            if named and not self._take(upload, target, target):
                # If a later upload has set this one aside and fails, too, it is to find there what was before both.
                others = (self.folder / REPLACED).glob(f"{target.name}.*")
                place = next((path for path in others if self._take(upload, path, target)), target)
            if before:
                _rename_unless_taken(before, place)
            _sync_folder(self.folder)
        except OSError:
            logger.exception("the upload of %s failed and could not be undone altogether", target.name)

    def _take(self, upload: Upload, path: Path, target: Path) -> bool:
        """Remove an upload that failed from a path; return whether it was there. Whatever else is there stays."""
        with contextlib.suppress(FileNotFoundError):
            if upload.is_file(os.lstat(path)):
                claimed = self._claim(path, target)
                if upload.is_file(os.lstat(claimed)):
                    os.unlink(claimed)
                    return True
                _rename_unless_taken(claimed, path)  # somebody was quicker
        return False

    def _claim(self, path: Path, target: Path) -> Path:
        """Give a file a name in `.replaced/` that nobody else knows, and return that; where it has no room, the file's own."""
        claimed = self._path_aside(target)
        try:
            os.rename(path, claimed)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            return path
        return claimed

    def _path_aside(self, target: Path) -> Path:
        return self.folder / REPLACED / f"{target.name}.{uuid.uuid4().hex}"

    def reject(self, upload: Upload, name: str) -> None:
        """Keep an invalid upload in `.rejected/` for a look, the newest of them within the bound."""
        if upload.size > self.max_rejected:
            return
        folder = self.folder / REJECTED
        with os_errors():
            self._make_subfolders()
            upload.move(folder / f"{time.time_ns()}.{name}.{uuid.uuid4().hex[:8]}")
            upload.close()
        kept = 0
        # The names begin with the time of arrival, so that they sort by it.
        for path in sorted(folder.iterdir(), key=lambda path: path.name, reverse=True):
            with contextlib.suppress(FileNotFoundError):
                kept += path.stat().st_size
                if kept > self.max_rejected:
                    path.unlink()

    def sweep(self) -> None:
        """Clear `.incoming/` of what dead processes left."""
        self._swept = time.monotonic()
        with contextlib.suppress(OSError), os.scandir(self._incoming) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    self._sweep(entry.path)

    def _sweep(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not self._is_dead(path, fd):
                return
            _, bound, name = os.path.basename(path).partition(_BOUND_FOR)
            if bound:
                with contextlib.suppress(FileExistsError):
                    os.link(path, self.folder / name)
                    _sync_folder(self.folder)
            os.unlink(path)
        finally:
            os.close(fd)

    def _is_dead(self, path: str, fd: int) -> bool:
        """Whether nobody holds the lock of an upload, or, where locks do not tell, nothing has come for long."""
        status = os.fstat(fd)
        # On its way to a name: that takes an instant, after which nothing but this file may have what is to be visible.
        stuck = _BOUND_FOR in os.path.basename(path) and time.time() - status.st_ctime > _BOUND_AGE
        old = stuck or time.time() - status.st_mtime > _FOREIGN_AGE
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks on this file system
            return old
        # Some file systems keep locks within a host.
        return old or os.path.basename(path).startswith(self._host)

    # --- receipts ------------------------------------------------------------------------------------------------------

    def append_receipt(
        self, receipt: dict[str, Any], began: float, while_true: Callable[[], bool] = lambda: True
    ) -> bool:
        """Append one JSON line to the receipts of the run, with the seconds since `began`, and put it on the disk.

        `while_true` is asked while nobody else can append; if it says no, nothing is done and False returned.
        """
        receipt["seconds"] = round(time.monotonic() - began, 6)
        line = json.dumps(receipt).encode() + b"\n"
        run = receipt["run"]
        written = False
        try:
            with os_errors(), self._locked_receipts(run) as fd:
                if not while_true():
                    return False
                size = os.fstat(fd).st_size
                if not size:  # whoever finds a receipt here takes the name of the file to be on the disk
                    _sync_folder(self.folder / RECEIPTS)
                elif os.pread(fd, 1, size - 1) != b"\n":  # a crash has torn the line before
                    line = b"\n" + line
                try:
                    if os.write(fd, line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(fd)
                except BaseException:
                    os.ftruncate(fd, size)
                    raise
                written = True
        except BaseException:
            if written:  # and not closed without an error
                self._take_back_receipt(run, line)
            raise
        return True

    def _take_back_receipt(self, run: int, line: bytes) -> None:
        """Remove a line from the end of the receipts, if it is still there."""
        with contextlib.suppress(OSError), self._locked_receipts(run) as fd:
            size = os.fstat(fd).st_size - len(line)
            if size >= 0 and os.pread(fd, len(line), size) == line:
                os.ftruncate(fd, size)

    def _open_receipts(self, run: int) -> int:
        return self._open(self._receipts_path(run), os.O_RDWR | os.O_CREAT | os.O_APPEND)

    @contextlib.contextmanager
    def _locked_receipts(self, run: int) -> Iterator[int]:
        """Open the receipts of a run, locked against other appends where the file system has locks."""
        fd = self._open_receipts(run)
        try:
            _lock(fd)
            yield fd
        finally:
            os.close(fd)

    def runs(self) -> list[int]:
        """Return the runs that have receipts, sorted."""
        found = (_RECEIPTS_NAME.fullmatch(name) for name in self._hidden_names(RECEIPTS))
        return sorted(int(match[1]) for match in found if match)

    def run(self, run: int) -> RunRecord:
        """Return what the receipts of a run say so far; raises NoSuchRun or Unavailable."""
        record = self._runs.setdefault(run, RunRecord(self._receipts_path(run)))
        with os_errors():
            try:
                record.update()
            except (FileNotFoundError, IsADirectoryError) as error:
                self._runs.pop(run, None)
                raise NoSuchRun(f"There is no run {run}") from error
        return record

    def receipts_tag(self, run: int) -> str:
        """Return what changes whenever the receipts of a run do; raises NoSuchRun or Unavailable."""
        with os_errors():
            try:
                # Opened, not asked for its status only: NFS asks its server when a file is opened.
                with open(self._receipts_path(run), "rb") as file:
                    status = os.fstat(file.fileno())
            except (FileNotFoundError, IsADirectoryError) as error:
                self.check_disk()  # without the disk, nobody knows
                raise NoSuchRun(f"There is no run {run}") from error
        return f"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"

    def _receipts_path(self, run: int) -> str:
        return f"{self.folder}/{RECEIPTS}/{run}.jsonl"

    def uploads_in_progress(self) -> int:
        """Return how many uploads are under way, through whatever process and host."""
        return len(self._hidden_names(INCOMING))

    def _hidden_names(self, subfolder: str) -> list[str]:
        """Return the names of the regular files in a hidden folder; there are none where somebody has removed it."""
        with os_errors():
            try:
                with os.scandir(self.folder / subfolder) as entries:
                    return [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
            except FileNotFoundError:
                self.check_disk()
                return []

    def check_health(self) -> None:
        """Write, read and remove a small hidden file; raises NoRoom or Unavailable."""
        probe = self.new_upload()
        try:
            probe.write(b"health")
            if probe.twin(probe.path) is None:
                raise Unavailable("The data folder cannot be used: it does not give back what was written")
        finally:
            probe.discard()
        for path in (self.folder, *map(self.folder.joinpath, SUBFOLDERS)):
            if path.exists() and not os.access(path, os.W_OK | os.X_OK):
                raise Unavailable(f"The data folder cannot be used: {os.strerror(errno.EACCES)}")

    # --- accepted files ------------------------------------------------------------------------------------------------

    def names(self, wanted: Callable[[str, int], bool] = lambda agent, run: True) -> list[str]:
        """Return the names of the accepted files whose agent (as in names) and run are wanted, sorted."""
        names = []
        self.check_disk()
        with os_errors(), os.scandir(self.folder) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match and wanted(match["agent"], int(match["run"])) and entry.is_file(follow_symlinks=False):
                    names.append(entry.name)
        return sorted(names)

    def open(self, name: str) -> BinaryIO:
        """Open a visible, regular file of the folder; raises NoSuchFile for every other name, or Unavailable."""
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise NoSuchFile(f"There is no file {name!r}")
        with os_errors():
            try:
                # O_NONBLOCK: opening a pipe must not wait for its other end.
                fd = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno not in _NO_FILE:
                    raise
                self.check_disk()  # without the disk, nobody knows
                raise NoSuchFile(f"There is no file {name!r}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise NoSuchFile(f"There is no file {name!r}")
        return os.fdopen(fd, "rb")


def _rename_unless_taken(path: Path, name: Path) -> None:
    """Give a file another name, but for one that another file has."""
    with contextlib.suppress(FileExistsError):
        os.link(path, name)
        os.unlink(path)


def _lock(fd: int) -> None:
    """Take the lock of a file, until it is closed; on a file system without locks, do nothing (see also `_is_dead`)."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX)


def _is_at(path: Path, status: os.stat_result) -> bool:
    """Whether a path still leads to the file with this status, and not to one that was given its inode."""
    with contextlib.suppress(FileNotFoundError):
        now = os.lstat(path)
        same_inode = os.path.samestat(now, status)
        return same_inode and (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    return False


def _has_duplicate(receipts: int, start: int, receipt: Mapping[str, Any]) -> bool:
    """Whether there is a receipt for a duplicate of the same file from byte `start` on."""
    with open(receipts, "rb", closefd=False) as lines:
        lines.seek(start)
        for line in lines:
            with contextlib.suppress(*_NO_RECEIPT):
                other = json.loads(line)
                same = all(other[key] == receipt[key] for key in ("filename", "sha256"))
                if same and other["outcome"] == "duplicate":
                    return True
    return False


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _host_id() -> str:
    """Return what tells the running system of this host from every other; containers on it share its locks and this."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return f"{uuid.getnode():012x}"


def now() -> str:
    """Return the time in UTC as receipts have it."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


def seconds_of(received_at: str) -> float:
    """Return the Unix seconds of such a time."""
    return datetime.fromisoformat(received_at.replace("Z", "+00:00")).timestamp()
