"""The parts that storage and receipts share: folders held by descriptor, the lock, group commit, and the translation of OSErrors.

Every name in the data folder is used relative to a descriptor of its folder, and links in it are not followed. So an account that may write
to the data folder cannot lead the receiver elsewhere by planting a link, and the receiver notices a swapped folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import turns

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHECK_INTERVAL = 1.0  # seconds between two looks at whether a path still leads to its descriptor


class StorageError(Exception):
    """Base class: the data folder could not carry out an operation."""

    status = 503  # of HTTP
    reason_class = "unavailable"


class StorageUnavailable(StorageError):
    """The folder is missing, cannot be written or cannot be trusted; an operator must repair it."""


class InsufficientStorage(StorageError):
    """The disk has no room for the upload."""

    status = 507
    reason_class = "no_room"


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


class os_errors:
    """A context manager that translates an OSError of the data folder into a StorageError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise translate(error) from error


def translate(error: OSError) -> StorageError:
    """Return the StorageError that an OSError of the data folder means; the texts name no path."""
    if error.errno in _NO_ROOM:
        return InsufficientStorage(f"There is no room for the file: {error.strerror}")
    return StorageUnavailable(f"The data folder cannot be used: {error.strerror}")


# --- folders -----------------------------------------------------------------------------------------------------------


class Descriptor:
    """An open file or folder. It is closed with its last reference, so no thread meets a descriptor that was reused."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.status = os.fstat(fd)

    def has_path(self, path: str, parent: Descriptor | None = None) -> bool:
        """Return whether a path still leads to this file."""
        try:
            now = os.stat(path, dir_fd=parent.fd if parent else None, follow_symlinks=parent is None)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(now, self.status)

    def require_writable(self) -> None:
        """Raise StorageUnavailable if this process may not make names in the folder."""
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=self.fd, effective_ids=True):
            raise StorageUnavailable("The data folder cannot be used: it may not be written")

    def is_deleted(self) -> bool:
        """Return whether the file has no name any more."""
        return os.fstat(self.fd).st_nlink == 0

    def close(self) -> None:
        """Close the descriptor now, for all its references."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class Folder:
    """A folder of the receiver, held open by descriptor; a hidden one is made, durably, at its first use."""

    def __init__(self, path: str, parent: Folder | None = None) -> None:
        self.path = path
        self.parent = parent
        self._held: tuple[Descriptor, float] | None = None  # and the time when it was last compared with its path

    def open(self, *, check: bool = False) -> Descriptor:
        """Return the folder, compared with its path once a second or, with `check`, now; raises StorageUnavailable if it was moved away."""
        held, now = self._held, time.monotonic()
        if held and not check and now - held[1] < _CHECK_INTERVAL:
            return held[0]
        with os_errors():
            parent = self.parent.open() if self.parent else None
            if held and held[0].has_path(self.path, parent):
                folder = held[0]
            elif held and not held[0].is_deleted() and (parent is None or self._exists(parent)):
                raise StorageUnavailable(f"The data folder cannot be used: {self._description()} was moved away")
            else:
                folder = self._open(parent)
        self._held = folder, now
        return folder

    def reopen(self) -> None:
        """Open the folder again after a fork: the kernel reports a failed fsync once for each open file, and a fork shares it."""
        if self._held:
            self._held = open_folder(".", self._held[0]), self._held[1]
        if self.parent:
            self.parent.reopen()

    def exists(self) -> bool:
        """Return whether there is such a folder, without making it."""
        with os_errors():
            return self._exists(self.parent.open() if self.parent else None)

    def _exists(self, parent: Descriptor | None) -> bool:
        try:
            os.stat(self.path, dir_fd=parent.fd if parent else None, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _open(self, parent: Descriptor | None) -> Descriptor:
        if parent is None:
            return Descriptor(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        folder = make_folder(self.path, parent)
        if folder.status.st_uid != os.geteuid() or folder.status.st_mode & 0o022:
            raise StorageUnavailable(
                f"The data folder cannot be used: {self._description()} belongs to another account"
            )
        if folder.status.st_dev != parent.status.st_dev:
            raise StorageUnavailable(f"The data folder cannot be used: {self._description()} is on another file system")
        return folder

    def _description(self) -> str:
        return self.path if self.parent else "the folder"


def open_folder(name: str, parent: Descriptor) -> Descriptor:
    """Open a folder in another one, following no link."""
    return Descriptor(os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent.fd))


def make_folder(name: str, parent: Descriptor) -> Descriptor:
    """Open a folder in another one; make it if it is missing, and make its name durable."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent.fd)
    fsync(parent.fd)  # also if it exists: the process that made it may not have synced it yet
    return open_folder(name, parent)


def make_data_folder(path: Path) -> None:
    """Make the data folder and its parents durably, if they are missing."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fd = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fsync(fd)
        finally:
            os.close(fd)


def list_names(folder: Descriptor) -> list[str]:
    """Return the names in a folder."""
    listing = open_folder(".", folder)  # a descriptor of its own: readers that share one share its position, too
    return os.listdir(listing.fd)


def open_regular(name: str, flags: int, parent: Descriptor, mode: int = 0o666) -> Descriptor:
    """Open a regular file in a folder; a link raises OSError ELOOP, anything else ENXIO."""
    # O_NONBLOCK: opening a FIFO must not wait for its other end.
    file = Descriptor(os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=parent.fd))
    if not stat.S_ISREG(file.status.st_mode):
        raise OSError(errno.ENXIO, "not a regular file")
    return file


def write_all(fd: int, data: bytes) -> None:
    """Write all of the data, in as many calls as that takes: a full disk first takes a part, and then raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def fsync(fd: int) -> None:
    """Make a file or folder durable; other threads have the turn meanwhile (turns.py)."""
    with turns.waiting():
        os.fsync(fd)


# --- the lock ----------------------------------------------------------------------------------------------------------


class FolderLock:
    """The lock `.lock`, held while names change. Each process opens it after the fork: an flock belongs to the open file."""

    def __init__(self, data: Folder) -> None:
        self._data = data
        self._threads = threading.Lock()  # two threads that share an open file do not exclude each other by flock
        self._file: Descriptor | None = None

    def close(self) -> None:
        """Close the file, as a child must after a fork."""
        if self._file:
            self._file.close()

    @contextlib.contextmanager
    def hold(self, seconds: float) -> Iterator[None]:
        """Hold the lock; raises StorageUnavailable if it is not free in time."""
        end = time.monotonic() + seconds
        with turns.waiting():
            if not self._threads.acquire(timeout=seconds):
                raise _lock_is_busy(seconds)
        try:
            with os_errors():
                self._acquire(end, seconds)
            yield
        finally:
            try:
                self._release()
            finally:
                self._threads.release()

    def _release(self) -> None:
        if file := self._file:
            try:
                fcntl.flock(file.fd, fcntl.LOCK_UN)
            except OSError as error:
                file.close()  # which releases the lock, too
                self._file = None
                raise translate(error) from error

    def _acquire(self, end: float, seconds: float) -> None:
        data = self._data.open()
        pause = 0.0002
        while True:
            file = self._file = self._file or open_regular(".lock", os.O_RDWR | os.O_CREAT, data, mode=0o600)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if file.has_path(".lock", data):
                    return
                self._file = None  # `.lock` was removed: this file excludes only processes that opened it earlier, too
            if time.monotonic() > end:
                raise _lock_is_busy(seconds)
            with turns.waiting():
                time.sleep(pause)
            pause = min(2 * pause, 0.02)


def _lock_is_busy(seconds: float) -> StorageUnavailable:
    return StorageUnavailable(f"The data folder cannot be used: another process has held its lock for {seconds:.0f} s")


def check_flock(folder: Descriptor) -> None:
    """Raise OSError if the file system has no locks. One host cannot see whether they reach the others."""
    name = f".{uuid.uuid4().hex}"
    try:
        file = open_regular(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, folder)
    except OSError as error:
        if error.errno in (errno.EROFS, *_NO_ROOM):
            return  # start all the same, to serve the files; uploads and health report the error
        raise
    try:
        fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OSError(error.errno, f"its file system has no locks (flock): {error.strerror}") from error
    finally:
        os.unlink(name, dir_fd=folder.fd)


# --- group commit ------------------------------------------------------------------------------------------------------


class _Waiting(Generic[Item, Result]):
    def __init__(self, item: Item) -> None:
        self.item = item
        self.done = False
        self.outcome: Result | Exception | None = None


class GroupCommit(Generic[Item, Result]):
    """Commits all items that wait in one batch, in the thread of one of them, as databases do (group commit).

    `commit` gets the items and returns, in their order, the result of each, or its exception.
    """

    def __init__(self, commit: Callable[[Sequence[Item]], Sequence[Result | Exception]]) -> None:
        self._commit = commit
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._lock = threading.Lock()

    def __call__(self, item: Item) -> Result:
        """Return the result of an item, or raise its exception."""
        mine = _Waiting[Item, Result](item)
        self._waiting.append(mine)
        with turns.waiting() as wait, self._lock:
            if not mine.done:  # else it was in the batch of another thread
                wait.resume()
                self._commit_all([self._waiting.popleft() for _ in range(len(self._waiting))])
        outcome = mine.outcome
        if isinstance(outcome, Exception):
            try:
                raise outcome
            finally:
                # The exception refers to this frame. If the frame referred to it, too, only the garbage collector would free them.
                del outcome, mine
        return outcome  # type: ignore[return-value]  # set when it is done

    def _commit_all(self, batch: Sequence[_Waiting[Item, Result]]) -> None:
        # If this thread is interrupted (KeyboardInterrupt, a time-out of gevent), no other thread may take that for success.
        outcomes: Sequence[Result | Exception] = [StorageUnavailable("The commit was interrupted")] * len(batch)
        try:
            outcomes = self._commit([waiting.item for waiting in batch])
        except Exception as error:  # noqa: BLE001  each thread raises it for itself
            outcomes = [error] * len(batch)
        finally:
            for waiting, outcome in zip(batch, outcomes, strict=True):
                waiting.outcome, waiting.done = outcome, True
