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
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO
from zoneinfo import ZoneInfo

INCOMING = ".incoming"
REPLACED = ".replaced"
REJECTED = ".rejected"
RECEIPTS = ".receipts"

MAX_RUN = 2**31 - 1
LAST_TIME_STAMP = 253402297199  # 9999-12-31 23:59:59 in Zurich: names have four digits for the year

_ZONE = "Europe/Zurich"  # the names' time zone, whatever the host's
_CHUNK = 1 << 20  # bytes read at once
_ROOM_CHECK = 64 << 20  # bytes written between two looks at the free space
_SWEEP_INTERVAL = 600.0  # seconds
_FOREIGN_AGE = 3600.0  # seconds without a byte after which another host's upload may be taken for dead

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


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_UNAVAILABLE = {errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EHOSTDOWN}


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Say what an OSError means for the folder; one that means nothing of the kind passes."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise NoRoom(f"There is no room for the file: {error.strerror}") from error
        if error.errno in _UNAVAILABLE:
            raise Unavailable(f"The data folder cannot be written: {error.strerror}") from error
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
        self.size = 0
        self.path, self._fd = storage._create_incoming()
        self._status = os.fstat(self._fd)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> int:
        """Append bytes; raises FileTooLarge or NoRoom before the limits are passed."""
        size = self.size + len(data)
        if size > self._storage.max_file_size:
            raise FileTooLarge(self._storage.max_file_size)
        if size - self._room_checked > _ROOM_CHECK:
            self._storage.check_room(len(data))
            self._room_checked = size
        view = memoryview(data)
        with _os_errors():
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
        with _os_errors():
            os.fsync(self._fd)

    def has_bytes_of(self, path: Path) -> bool | None:
        """Whether a file has the same bytes, which then are put on the disk; None where there is no such file."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError:  # a link, or nothing we may read
            return False
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != self.size:
                return False
            position = 0
            while piece := os.pread(fd, _CHUNK, position):
                if piece != os.pread(self._fd, len(piece), position):
                    return False
                position += len(piece)
            os.fsync(fd)
            return position == self.size
        finally:
            os.close(fd)

    def is_file(self, path: Path) -> bool:
        """Whether a path leads to this very file."""
        return os.path.samestat(self._status, os.lstat(path))

    def move(self, path: Path) -> None:
        os.rename(self.path, path)
        self.path = path

    def finish(self) -> None:
        """Leave `.incoming/`; the file lives on under its name."""
        os.unlink(self.path)
        self.close()

    def discard(self) -> None:
        """Remove the upload if it is still in `.incoming/`."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            with contextlib.suppress(OSError):
                self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)


class Storage:
    """A data folder that several processes and hosts may use at once."""

    def __init__(self, folder: Path, *, max_file_size: int, min_free_space: int, max_rejected: int) -> None:
        self.folder = folder.absolute()
        self.max_file_size = max_file_size
        self.min_free_space = min_free_space
        self.max_rejected = max_rejected
        self._swept = 0.0
        self._host = _host_id()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_subfolders()
        self.sweep()

    def _make_subfolders(self) -> None:
        for name in (INCOMING, REPLACED, REJECTED, RECEIPTS):
            (self.folder / name).mkdir(exist_ok=True)

    # --- uploads -------------------------------------------------------------------------------------------------------

    def new_upload(self) -> Upload:
        """Begin an upload; raises NoRoom or Unavailable."""
        if time.monotonic() - self._swept > _SWEEP_INTERVAL:
            self.sweep()
        self.check_room(0)
        with _os_errors():
            return Upload(self)

    def check_room(self, size: int) -> None:
        """Raise NoRoom unless so many more bytes leave the free space that is to be left."""
        if self.free_space() - size < self.min_free_space:
            raise NoRoom(f"There is no room for the file: {self.min_free_space} bytes of the disk are to stay free")

    def free_space(self) -> int:
        """Return the bytes that are free on the folder's disk."""
        with _os_errors():
            disk = os.statvfs(self.folder)
        return disk.f_bavail * disk.f_frsize

    def _create_incoming(self) -> tuple[Path, int]:
        while True:
            path = self.folder / INCOMING / f"{self._host}-{uuid.uuid4().hex}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            try:
                fd = os.open(path, flags, 0o666)
            except FileNotFoundError:  # somebody cleared the folder
                self._make_subfolders()
                fd = os.open(path, flags, 0o666)
            with contextlib.suppress(OSError):  # a file system without locks: see _is_dead
                fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return path, fd
            os.close(fd)  # swept between its creation and the lock

    def accept(self, upload: Upload, name: str, receipt: dict[str, Any]) -> str:
        """Give a valid upload its name and return the outcome: "stored", "duplicate" or "replaced".

        When this returns, file, name and receipt (which is given the outcome) are on the disk. When it raises, the folder
        is as it was.
        """
        upload.sync()
        named, set_aside = False, list[Path]()
        try:
            with _os_errors():
                named = self._give_name(upload, name, set_aside)
                _sync_folder(self.folder)
                upload.finish()
            receipt["outcome"] = "duplicate" if not named else "replaced" if set_aside else "stored"
            self.append_receipt(receipt)
        except BaseException:
            if named:
                self._withdraw(upload, name, set_aside)
            raise
        return str(receipt["outcome"])

    def _give_name(self, upload: Upload, name: str, set_aside: list[Path]) -> bool:
        """Link the upload to its name, having set aside what had it; return False where that had the same bytes."""
        target = self.folder / name
        while True:
            try:
                os.link(upload.path, target)
                return True
            except FileExistsError:
                same = upload.has_bytes_of(target)
            if same is None:  # Overwatch has just taken it
                continue
            if same:
                return upload.is_file(target)  # itself: NFS may repeat a link that it has made
            # Between the next renaming and the link nothing has the name. Should this process die there, `sweep` finds the
            # name behind that of the upload and finishes the work.
            upload.move(upload.path.with_name(f"{upload.path.name}{_BOUND_FOR}{name}"))
            aside = self.folder / REPLACED / f"{name}.{uuid.uuid4().hex}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, aside)
                set_aside.append(aside)
                _sync_folder(aside.parent)

    def _withdraw(self, upload: Upload, name: str, set_aside: list[Path]) -> None:
        """Undo `_give_name` as far as the disk allows, without touching what others have done since."""
        target = self.folder / name
        taken = self.folder / REPLACED / f"{name}.{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            os.rename(target, taken)
            if not upload.is_file(taken):  # somebody has replaced it meanwhile
                os.link(taken, target)
            os.unlink(taken)
        for aside in reversed(set_aside):
            with contextlib.suppress(OSError):
                os.link(aside, target)
                os.unlink(aside)
        with contextlib.suppress(OSError):
            _sync_folder(self.folder)

    def reject(self, upload: Upload, name: str) -> None:
        """Keep an invalid upload in `.rejected/` for a look, the newest of them within the bound."""
        if upload.size > self.max_rejected:
            return
        folder = self.folder / REJECTED
        with _os_errors():
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
        with contextlib.suppress(OSError), os.scandir(self.folder / INCOMING) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    self._sweep(entry.path)

    def _sweep(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not self._is_dead(path, fd):
                return
            _, bound, name = path.rpartition(_BOUND_FOR)
            if bound:
                with contextlib.suppress(FileExistsError):
                    os.link(path, self.folder / name)
                    _sync_folder(self.folder)
            os.unlink(path)
        finally:
            os.close(fd)

    def _is_dead(self, path: str, fd: int) -> bool:
        """Whether nobody holds the lock of an upload, or, where locks do not tell, nothing has come for long."""
        old = time.time() - os.fstat(fd).st_mtime > _FOREIGN_AGE
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks on this file system
            return old
        # Some file systems keep locks within a host.
        return old or os.path.basename(path).startswith(self._host)

    # --- receipts ------------------------------------------------------------------------------------------------------

    def append_receipt(self, receipt: dict[str, Any]) -> None:
        """Append one JSON line to the receipts of the run and put it on the disk."""
        path = self.folder / RECEIPTS / f"{receipt['run']}.jsonl"
        line = json.dumps(receipt).encode() + b"\n"
        with _os_errors():
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                with contextlib.suppress(OSError):  # a file system without locks has its appends
                    fcntl.flock(fd, fcntl.LOCK_EX)
                size = os.fstat(fd).st_size
                if size and os.pread(fd, 1, size - 1) != b"\n":  # a crash has torn the line before
                    line = b"\n" + line
                try:
                    if os.write(fd, line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(fd)
                except BaseException:
                    os.ftruncate(fd, size)
                    raise
            finally:
                os.close(fd)
            if not size:
                _sync_folder(path.parent)

    # --- accepted files ------------------------------------------------------------------------------------------------

    def names(self, wanted: Callable[[str, int], bool] = lambda agent, run: True) -> list[str]:
        """Return the names of the accepted files whose agent (as in names) and run are wanted, sorted."""
        names = []
        with _os_errors(), os.scandir(self.folder) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match and wanted(match["agent"], int(match["run"])) and entry.is_file(follow_symlinks=False):
                    names.append(entry.name)
        return sorted(names)

    def open(self, name: str) -> BinaryIO:
        """Open a visible, regular file of the folder; raises NoSuchFile for every other name."""
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise NoSuchFile(f"There is no file {name!r}")
        try:
            # O_NONBLOCK: opening a pipe must not wait for its other end.
            fd = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise NoSuchFile(f"There is no file {name!r}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise NoSuchFile(f"There is no file {name!r}")
        return os.fdopen(fd, "rb")


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
