"""Uploads in progress: step 1 of the commit (storage.py), the folder `.incoming/` and its crash recovery; and the quarantine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import threading
import time
import uuid
from typing import NamedTuple, Self

from durable import (
    Descriptor,
    Folder,
    FolderLock,
    InsufficientStorage,
    StorageError,
    fsync,
    list_names,
    open_folder,
    open_regular,
    os_errors,
    write_all,
)

logger = logging.getLogger("dqm_receiver")

LOCK_TIMEOUT = 30.0  # seconds to wait for `.lock`

_RECOVERY_INTERVAL = 600.0  # seconds
_RECOVERY_LOCK_TIMEOUT = 5.0  # seconds to wait for `.lock` in crash recovery, which can be done later
_SPACE_AGE = 1.0  # seconds for which an answer of statvfs is good

_MAX_REJECTED_FILES = 1000

_ids = itertools.count()  # names of uploads, unique in a process


class FileTooLarge(StorageError):
    """The upload has more bytes than a file may have."""

    status = 413
    reason_class = "too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The file is larger than the limit of {limit} bytes")


class Upload:
    """An upload in progress: a file in `.incoming/<writer>/` whose bytes are hashed and counted while they are written.

    It is a context manager: at its end, an upload that was neither committed nor quarantined is deleted.
    """

    def __init__(self, writer: Writer, space: Space, max_size: int, announced: int) -> None:
        self._writer, self._space, self._max_size = writer, space, max_size
        self._hash = hashlib.sha256()
        self._claimed = 0  # bytes that are reserved on the disk and not yet written
        self._is_incoming = True
        self.size = 0
        self._claim(announced)
        self._id = str(next(_ids))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self.fd = os.open(self._id, flags, 0o666, dir_fd=writer.folder.fd)
        except BaseException:
            self._space.settle(unused=self._claimed)
            raise

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Append bytes; raises FileTooLarge or InsufficientStorage before a limit is passed."""
        size = len(data)
        if self.size + size > self._max_size:
            raise FileTooLarge(self._max_size)
        if size > self._claimed:
            self._claim(size - self._claimed)
        with os_errors():
            write_all(self.fd, data)
        self._hash.update(data)
        self.size += size
        self._claimed -= size
        self._space.settle(written=size)

    def _claim(self, size: int) -> None:
        self._space.claim(size)
        self._claimed += size

    def sync(self) -> None:
        """Fsync the file."""
        with os_errors():
            fsync(self.fd)

    def move(self, name: str, folder: Descriptor) -> None:
        """Rename the upload out of `.incoming/`."""
        os.rename(self._id, name, src_dir_fd=self._writer.folder.fd, dst_dir_fd=folder.fd)
        self._is_incoming = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Only the name in `.incoming/` is deleted, so a failure never costs a visible file.
        with contextlib.suppress(OSError):
            if self._is_incoming:
                os.unlink(self._id, dir_fd=self._writer.folder.fd)
        self._space.settle(unused=self._claimed)
        with contextlib.suppress(OSError):
            os.close(self.fd)


def move_to_quarantine(upload: Upload, name: str, rejected: Descriptor, max_bytes: int) -> None:
    """Move an invalid upload to the folder `.rejected/`, and delete the oldest files there beyond its bounds."""
    upload.move(f"{time.time_ns()}.{upload.size}.{name}.{uuid.uuid4().hex[:8]}", rejected)
    kept = 0
    # Names begin with the time, so the newest come first; the size in the name saves a stat.
    for number, kept_name in enumerate(sorted(list_names(rejected), reverse=True)):
        size = kept_name.split(".", 2)[1:2]
        kept += int(size[0]) if size and size[0].isdecimal() else 0
        if kept > max_bytes or number >= _MAX_REJECTED_FILES:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(kept_name, dir_fd=rejected.fd)


class Writer(NamedTuple):
    """This process's folder in `.incoming/`, and its lock, which tells recovery that the process lives."""

    folder: Descriptor
    lock: Descriptor | None  # None only of a dead writer


class Space:
    """The free space on the disk, asked for once a second. Bytes that uploads have announced and not yet written count as used."""

    def __init__(self, data: Folder, to_leave: int) -> None:
        self._data, self._to_leave = data, to_leave
        self._lock = threading.Lock()
        self._asked = -_SPACE_AGE
        self._free = self._claimed = 0

    def claim(self, size: int) -> None:
        """Reserve space; raises InsufficientStorage if less than the configured minimum would stay free."""
        with self._lock:
            if self._to_leave and time.monotonic() - self._asked >= _SPACE_AGE:
                self._free, self._asked = self.ask(), time.monotonic()
            if self._to_leave and self._free - self._claimed - size < self._to_leave:
                raise InsufficientStorage(
                    f"There is no room for the file: {self._to_leave} bytes of the disk are to stay free"
                )
            self._claimed += size

    def settle(self, *, written: int = 0, unused: int = 0) -> None:
        """Release reserved space that has been written or is not needed."""
        with self._lock:
            self._claimed -= written + unused
            self._free -= written

    def ask(self) -> int:
        """Return the free bytes of the disk."""
        with os_errors():
            disk = os.fstatvfs(self._data.open().fd)
        return disk.f_bavail * disk.f_frsize


class Incoming:
    """The folder `.incoming/` with the uploads of all writers. A writer is one process, whose folder is made at its first upload."""

    def __init__(self, data: Folder, lock: FolderLock, space: Space) -> None:
        self.folder = Folder(".incoming", data)
        self._lock, self._space = lock, space
        self._writer: Writer | None = None
        self._recovered = -_RECOVERY_INTERVAL  # so the first upload of a process does recovery

    def new_upload(self, announced: int, max_size: int) -> Upload:
        """Begin an upload of at most `max_size` bytes and reserve the announced ones; raises StorageError."""
        if time.monotonic() - self._recovered >= _RECOVERY_INTERVAL:
            self.recover()
        with os_errors():
            self.folder.open()
            try:
                return Upload(self._get_writer(), self._space, max_size, announced)
            except FileNotFoundError:  # the writer's folder has been deleted
                self._writer = None
                return Upload(self._get_writer(), self._space, max_size, announced)

    def _get_writer(self) -> Writer:
        """Return this process's writer, which is made under `.lock` so that recovery never meets a half-made one."""
        if writer := self._writer:
            return writer
        incoming = self.folder.open(check=True)
        with self._lock.hold(LOCK_TIMEOUT):
            if self._writer is None:  # else another thread was quicker
                self._writer = _make_writer(incoming)
            return self._writer

    def close(self) -> None:
        """Close the writer's lock: a child of a fork must not keep its parent's writer alive."""
        if self._writer and self._writer.lock:
            self._writer.lock.close()

    def recover(self) -> None:
        """Delete the uploads of dead writers: none of them was acknowledged."""
        self._recovered = time.monotonic()
        try:
            with os_errors():
                if not self.folder.exists():
                    return
                incoming = self.folder.open()
                with self._lock.hold(_RECOVERY_LOCK_TIMEOUT):
                    dead = [(name, _dead_writer(name, incoming)) for name in list_names(incoming)]
                for name, writer in dead:
                    if writer:
                        _delete(name, writer.folder, incoming)
        except StorageError as error:
            logger.warning("crash recovery of .incoming/ has to wait: %s", error)


def _make_writer(incoming: Descriptor) -> Writer:
    name = uuid.uuid4().hex
    os.mkdir(name, 0o700, dir_fd=incoming.fd)
    folder = open_folder(name, incoming)
    lock = open_regular("lock", os.O_RDWR | os.O_CREAT | os.O_EXCL, folder)
    fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return Writer(folder, lock)


def _dead_writer(name: str, incoming: Descriptor) -> Writer | None:
    """Return the writer if its process is dead, with its lock taken; else None."""
    try:
        folder = open_folder(name, incoming)
    except (FileNotFoundError, NotADirectoryError):  # another process has just deleted it, or it is not a writer's
        return None
    try:
        lock = open_regular("lock", os.O_RDWR, folder)
        fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:  # its process died before it made its lock
        return Writer(folder, None)
    except BlockingIOError:
        return None
    return Writer(folder, lock)


def _delete(name: str, folder: Descriptor, parent: Descriptor) -> None:
    """Delete a dead writer's folder, as another host may do at the same time."""
    with contextlib.suppress(FileNotFoundError):
        for upload in list_names(folder):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(upload, dir_fd=folder.fd)
        os.rmdir(name, dir_fd=parent.fd)
