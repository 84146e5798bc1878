"""The data folder: file names, uploads, the commit, crash recovery.

How an upload becomes a file. The rename is the commit point, and nothing after it is undone:

1. Receive (uploads.py). The request's thread writes the body to `.incoming/<writer>/<id>` and hashes it. When the file has been validated,
   it is fsynced. No lock is held.
2. Compare (`Storage._compare`). The thread opens the file that has the name, if there is one, and fsyncs it. If its bytes are different,
   the thread preserves it as `.replaced/<name>.<its sha256>`, by hard link or copy, and fsyncs `.replaced/`. No lock is held.
3. Commit (`Storage._commit_batch`), once for all uploads that wait. Under `.lock`, each name must be as step 2 saw it, or the upload goes
   back to step 2. If the name is free, or its file preserved, the upload is renamed to it (`stored`, `replaced`). If its file has the same
   bytes, the upload is not needed (`duplicate`). After the lock is released, the folder is fsynced.
4. Record. The same thread appends the receipts of these uploads (receipts.py) and fsyncs them. Then each upload is answered 200.

So a visible name always holds a whole file that is on the disk, and a name never vanishes while its file is replaced. If a process dies
before the rename, crash recovery deletes its upload. If it dies after the rename, the sender gets no answer and sends again.

A writer is one process. It locks `.incoming/<writer>/lock` while it lives, so recovery can tell the folders of dead writers.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import datetime
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import turns
from durable import (
    Descriptor,
    Folder,
    FolderLock,
    GroupCommit,
    StorageError,
    StorageUnavailable,
    check_flock,
    fsync,
    make_data_folder,
    open_folder,
    open_regular,
    os_errors,
    translate,
)
from uploads import LOCK_TIMEOUT, Incoming, Space, Upload, move_to_quarantine

MAX_RUN = 2**31 - 1
LAST_TIME_STAMP = 253402297199  # 9999-12-31 23:59:59 in Zurich: names have four digits for the year

_ZONE = "Europe/Zurich"  # of the times in names; the host's own zone does not matter
_CHUNK = 1 << 20  # bytes read at once
_MAX_TRIES = 30  # times that an upload goes through steps 2 and 3; eight senders that replace two names need up to 15
_HEALTH_LOCK_TIMEOUT = 5.0  # seconds to wait for `.lock` when health is checked
_HEALTH_AGE = 1.0  # seconds for which an answer about health is good

_NOT_REGULAR = {errno.ELOOP, errno.ENXIO}  # errors of open_regular
_NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG, errno.EACCES}

_Receipt = TypeVar("_Receipt")  # whatever the caller makes for an upload
Recorder = Callable[[Sequence[Any]], Sequence[Any]]  # appends receipts to the log, and returns each or its exception

_NAME = re.compile(r"(?P<agent>[A-Za-z0-9-]{1,64})histos_(?P<run>[0-9]{1,10})_DQM_[0-9]{4}(?:_[0-9]{2}){5}\.root")


class FileNotStored(StorageError):
    """No regular, visible file has this name."""

    status = 404
    reason_class = "not_found"


def file_name(agent: str, run: int, time_stamp: int) -> str:
    """Return the name by which Overwatch knows a file; the time stamp is in Unix seconds.

    Overwatch splits names on `_`, so a `_` in the agent is written `-`.
    """
    local = datetime.fromtimestamp(time_stamp, ZoneInfo(_ZONE))
    # Not strftime, whose %Y has no leading zeros on some hosts.
    when = f"{local.year:04}_{local.month:02}_{local.day:02}_{local.hour:02}_{local.minute:02}_{local.second:02}"
    return f"{agent.replace('_', '-')}histos_{run}_DQM_{when}.root"


def run_of(name: str) -> int | None:
    """Return the run in the name of a file of this receiver, or None."""
    match = _NAME.fullmatch(name)
    return int(match["run"]) if match else None


class _Found(NamedTuple):
    """The file that step 2 found under a name, and the outcome that follows: "stored" if the name was free."""

    outcome: str
    file: Descriptor | None = None
    sha256: str = ""

    @property
    def identity(self) -> tuple[int, ...] | None:
        return _identity(self.file.status) if self.file else None


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Pending(NamedTuple):
    upload: Upload
    name: str
    found: _Found
    make_receipt: Callable[[str], Any]


class Storage:
    """A data folder that several processes and hosts may use at once."""

    def __init__(
        self, folder: Path, record: Recorder, *, max_file_size: int, min_free_space: int, max_rejected: int
    ) -> None:
        self.folder = folder.absolute()
        self._record = record
        self.max_file_size = max_file_size
        self.max_rejected = max_rejected
        self._min_free_space = min_free_space
        make_data_folder(self.folder)
        self._data = Folder(str(self.folder))
        self._begin_process()
        check_flock(self._data.open())
        self.recover()
        this = weakref.ref(self)

        def after_fork_in_child() -> None:
            if storage := this():
                storage._lock.close()
                storage._incoming.close()
                storage._begin_process()
                storage._data.reopen()

        os.register_at_fork(after_in_child=after_fork_in_child)

    def _begin_process(self) -> None:
        """Make the objects that a process must not share with its parent: locks, queue, writer, open folders."""
        self._replaced, self._rejected = Folder(".replaced", self._data), Folder(".rejected", self._data)
        self._lock = FolderLock(self._data)
        self._space = Space(self._data, self._min_free_space)
        self._incoming = Incoming(self._data, self._lock, self._space)
        self._commits = GroupCommit(self._commit_batch)
        self._health_lock = threading.Lock()
        self._health: tuple[float, StorageError | None] = -_HEALTH_AGE, None  # time of the check, and its error
        self._failure: str | None = None  # why this process can make no upload durable any more

    # --- step 1: receive -----------------------------------------------------------------------------------------------

    def new_upload(self, announced: int = 0) -> Upload:
        """Begin an upload and reserve its announced bytes; raises InsufficientStorage or StorageUnavailable."""
        if self._failure:
            raise StorageUnavailable(self._failure)
        with turns.short_calls():
            return self._incoming.new_upload(announced, self.max_file_size)

    def recover(self) -> None:
        """Delete the uploads of dead processes."""
        self._incoming.recover()

    def quarantine(self, upload: Upload, name: str) -> None:
        """Move an invalid upload to `.rejected/`, and delete the oldest files there beyond its bounds."""
        if upload.size <= self.max_rejected:
            with os_errors():
                move_to_quarantine(upload, name, self._rejected.open(check=True), self.max_rejected)

    # --- steps 2 to 4: compare, commit and record ----------------------------------------------------------------------

    def commit(self, upload: Upload, name: str, make_receipt: Callable[[str], _Receipt]) -> _Receipt:
        """Give an upload its name, record it, and return its receipt, made for the outcome: "stored", "duplicate" or "replaced".

        InsufficientStorage means that nothing visible has changed. StorageUnavailable means that the file may have its name.
        """
        upload.sync()
        for _ in range(_MAX_TRIES):
            with os_errors():
                found = self._compare(upload, name)
            # Without a receipt, the name has changed, or the batch was interrupted before it began.
            if found and (receipt := self._commits(_Pending(upload, name, found, make_receipt))):
                return receipt  # type: ignore[no-any-return]
        raise StorageUnavailable(f"The name {name} changed {_MAX_TRIES} times while it was compared")

    def compare(self, upload: Upload, name: str) -> str:
        """Return the outcome that a commit would have now; change nothing."""
        with os_errors():
            return self._look(upload, name).outcome

    def _compare(self, upload: Upload, name: str) -> _Found | None:
        """Step 2: fsync the file that has the name, and preserve it if its bytes differ; None if it has lost the name."""
        found = self._look(upload, name)
        if found.file:
            fsync(found.file.fd)
            if found.sha256 != upload.sha256 and not self._preserve(found.file, name, f"{name}.{found.sha256}"):
                return None
        return found

    def _look(self, upload: Upload, name: str) -> _Found:
        """Return the file that has the name, if there is one, and the outcome that follows from its bytes."""
        try:
            with turns.short_calls():
                file = open_regular(name, os.O_RDONLY, self._data.open())
        except FileNotFoundError:
            return _Found("stored")
        except OSError as error:
            if error.errno in _NOT_REGULAR:
                raise StorageUnavailable(f"The name {name} is taken by something that is not a regular file") from error
            raise
        sha256, position = hashlib.sha256(), 0
        while chunk := os.pread(file.fd, _CHUNK, position):
            sha256.update(chunk)
            position += len(chunk)
        outcome = "duplicate" if sha256.hexdigest() == upload.sha256 else "replaced"
        return _Found(outcome, file, sha256.hexdigest())

    def _preserve(self, file: Descriptor, name: str, preserved: str) -> bool:
        """Give a file a second, durable name in `.replaced/`; False if it has lost its first name."""
        data, replaced = self._data.open(), self._replaced.open(check=True)
        try:
            os.link(name, preserved, src_dir_fd=data.fd, dst_dir_fd=replaced.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError:
            pass  # preserved earlier, or no hard link is possible
        if not file.has_path(preserved, replaced):  # no link, or one to a file that has just taken the first name
            self._copy(file, preserved, replaced)
        self._sync(replaced)
        return True

    def _copy(self, file: Descriptor, name: str, folder: Descriptor) -> None:
        """Copy a file durably, through `.incoming/`, so that its new name never holds a partial file."""
        size = file.status.st_size
        with self._incoming.new_upload(size, size) as copy:
            position = 0
            while chunk := os.pread(file.fd, min(_CHUNK, size - position), position):
                copy.write(chunk)
                position += len(chunk)
            copy.sync()
            copy.move(name, folder)

    def _commit_batch(self, batch: Sequence[_Pending]) -> list[Any]:
        """Steps 3 and 4 for all uploads that wait: the receipt of each, its exception, or False if its name has changed since step 2."""
        if self._failure:
            raise StorageUnavailable(self._failure)
        with os_errors():
            data = self._data.open()
            with turns.short_calls(), self._lock.hold(LOCK_TIMEOUT):
                results = [self._take_name(pending, data) for pending in batch]
            self._sync(data)
            self._data.open(check=True)  # Overwatch does not see the files of a folder that was moved away
        committed = [pending for pending, result in zip(batch, results, strict=True) if result is True]
        recorded = iter(self._record([pending.make_receipt(pending.found.outcome) for pending in committed]))
        return [next(recorded) if result is True else result for result in results]

    def _sync(self, folder: Descriptor) -> None:
        """Fsync a folder. If that fails, this process takes no more uploads."""
        try:
            fsync(folder.fd)
        except OSError as error:
            # The kernel reports a write error once, so the next fsync could succeed without the data.
            self._failure = "The data folder cannot be used: its fsync failed, so this process must be restarted"
            raise StorageUnavailable(self._failure) from error

    def _take_name(self, pending: _Pending, data: Descriptor) -> bool | Exception:
        """Rename one upload of a batch to its name; False if the name has changed since step 2."""
        try:
            try:
                now = _identity(os.stat(pending.name, dir_fd=data.fd, follow_symlinks=False))
            except FileNotFoundError:
                now = None
            if now != pending.found.identity:
                return False
            if pending.found.outcome != "duplicate":
                pending.upload.move(pending.name, data)  # the commit point
            return True
        except OSError as error:  # it concerns this upload only
            return translate(error)

    def check_folder(self) -> None:
        """Raise StorageUnavailable if the folder is gone or another is in its place, as after an unmount."""
        self._data.open(check=True)

    def free_space(self) -> int:
        """Return the free bytes on the folder's disk."""
        return self._space.ask()

    def check_health(self) -> None:
        """Raise StorageError if the folder cannot take an upload; the answer may be a second old."""
        with self._health_lock:
            asked, error = self._health
            if time.monotonic() - asked >= _HEALTH_AGE:
                error = None
                try:
                    self._try_upload()
                except StorageError as failed:
                    error = failed
                self._health = time.monotonic(), error
        if error:
            raise error

    def _try_upload(self) -> None:
        """Take the lock, write and read back a small upload, and look at every folder."""
        with os_errors():
            with self._lock.hold(_HEALTH_LOCK_TIMEOUT):
                pass
            with self.new_upload() as upload:
                upload.write(b"health")
                if os.pread(upload.fd, 7, 0) != b"health":
                    raise StorageUnavailable("The data folder cannot be used: it does not give back what was written")
            for folder in (self._data, self._replaced, self._rejected):
                folder.open(check=True).require_writable()

    # --- accepted files ------------------------------------------------------------------------------------------------

    def file_names(self, wanted: Callable[[str, int], bool] = lambda agent, run: True) -> list[str]:
        """Return the names of the accepted files whose agent (as in names) and run are wanted, sorted."""
        names = []
        with os_errors():
            listing = open_folder(".", self._data.open(check=True))
            with os.scandir(listing.fd) as entries:
                for entry in entries:
                    match = _NAME.fullmatch(entry.name)
                    if match and wanted(match["agent"], int(match["run"])) and entry.is_file(follow_symlinks=False):
                        names.append(entry.name)
        return sorted(names)

    def open(self, name: str) -> BufferedReader:
        """Open a visible, regular file of the folder; raises FileNotStored for every other name, or StorageUnavailable."""
        with os_errors():
            try:
                if not name or name.startswith(".") or "/" in name or "\0" in name:
                    raise FileNotFoundError
                file = open_regular(name, os.O_RDONLY, self._data.open())
            except OSError as error:
                if error.errno and error.errno not in _NO_SUCH_FILE:
                    raise
                self._data.open(check=True)  # without the folder, nothing is known about its files
                raise FileNotStored(f"There is no file {name!r}") from error
            return os.fdopen(os.dup(file.fd), "rb")
