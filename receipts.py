"""The log of uploads: a receipt for each.

A receipt is one JSON line of `.receipts/<run>/<writer>.jsonl`. Only one process appends to a log, so its lines are in order of time.
Receipts that acknowledge uploads are fsynced before the answers. Rejections promise nothing, so they are not fsynced.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import turns
from durable import (
    Descriptor,
    Folder,
    StorageError,
    StorageUnavailable,
    fsync,
    list_names,
    make_folder,
    open_folder,
    open_regular,
    os_errors,
    write_all,
)

OUTCOMES = ("stored", "duplicate", "replaced", "rejected")

_MAX_OPEN_LOGS = 100  # of this process
_RECENT_RUNS = 50
_TOUCH_INTERVAL = 60.0  # seconds
_LISTING_AGE = 1.0  # seconds for which the order of the runs is good

_RUN = re.compile(r"0|[1-9][0-9]{0,9}")


class RunNotFound(StorageError):
    """The data folder has no receipt of this run."""

    status = 404
    reason_class = "not_found"


@dataclass(frozen=True, slots=True)
class Receipt:
    """The record of an upload; `id` and `received_at` (UTC) are set when it is appended."""

    outcome: str  # one of OUTCOMES
    filename: str  # the name that the file has, or would have had
    run: int
    time_stamp: int  # Unix seconds
    agent: str
    data_status: int
    sender: str  # the name of the token
    seconds: float  # from the request's head to the outcome
    size: int = 0  # bytes; 0 if the body did not arrive whole
    sha256: str | None = None
    objects: int | None = None  # number of objects at the top level of the file
    reason: str | None = None  # of a rejection
    reason_class: str | None = None
    validation_seconds: float | None = None
    received_at: str = ""
    id: str = ""

    @property
    def content(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_line(cls, line: bytes) -> Receipt | None:
        """Return the receipt in a line of a log; None if the line is torn or holds something else."""
        try:
            receipt = cls(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            return None
        good = all(isinstance(getattr(receipt, name), types) for name, types in _FIELD_TYPES.items())
        return receipt if good and receipt.outcome in OUTCOMES and receipt.id > receipt.received_at > "" else None


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "outcome": str, "filename": str, "run": int, "time_stamp": int, "agent": str, "data_status": int, "size": int,
    "sha256": (str, type(None)), "received_at": str, "id": str,
}  # fmt: skip


# --- the log -----------------------------------------------------------------------------------------------------------


@dataclass
class _Log:
    """A log that this process appends to."""

    name: str
    folder: Descriptor  # of its run
    file: Descriptor
    touched: float = 0.0  # monotonic time at which the run's folder was touched last


class ReceiptLog:
    """The logs of all runs below a data folder."""

    def __init__(self, folder: Path) -> None:
        data = Folder(str(folder.absolute()))
        data.open()  # at the start: later its path may lead to an empty folder, the disk of which is not mounted
        self.folder = Folder(".receipts", data)
        self._begin_process()
        this = weakref.ref(self)

        def after_fork_in_child() -> None:
            if log := this():
                log._begin_process()
                log.folder.reopen()

        os.register_at_fork(after_in_child=after_fork_in_child)

    def _begin_process(self) -> None:
        """Make the objects that a process must not share with its parent."""
        self._logs: OrderedDict[int, _Log] = OrderedDict()
        self._lock = threading.Lock()
        self._listing: tuple[float, list[int]] = -_LISTING_AGE, []  # its time, and the runs, most recently active first
        self._received_at = ""  # of the batch appended last
        self._count = 0  # of receipts, so that ids of one batch are in order

    def append(self, batch: Sequence[Receipt]) -> list[Receipt | StorageError]:
        """Append receipts to this process's logs of their runs; return each, or its error. Receipts of accepted uploads are fsynced."""
        with turns.waiting() as wait, self._lock:
            wait.resume()
            return self._append(batch)

    def _append(self, batch: Sequence[Receipt]) -> list[Receipt | StorageError]:
        """Append receipts with one write and at most one fsync for each run."""
        received_at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        if received_at < self._received_at:  # the clock was set back, and readers rely on the order of a log's lines
            self._logs.clear()
        self._received_at = received_at
        runs: dict[int, list[Receipt]] = {}
        for receipt in batch:
            runs.setdefault(receipt.run, []).append(receipt)
        errors: dict[int, StorageError] = {}
        for run, receipts in runs.items():
            try:
                self._append_to_run(run, receipts)
            except (OSError, StorageError) as error:
                self._logs.pop(run, None)  # its last line may be torn, so the next receipt begins a new log
                # Never InsufficientStorage: an accepted upload has its name already.
                why = error.strerror if isinstance(error, OSError) else error
                errors[run] = StorageUnavailable(f"The receipt could not be written: {why}")
        return [errors.get(receipt.run, receipt) for receipt in batch]

    def _append_to_run(self, run: int, receipts: Sequence[Receipt]) -> None:
        log = self._open_log(run)
        write_all(log.file.fd, b"".join(self._line(receipt, log) for receipt in receipts))
        if any(receipt.outcome != "rejected" for receipt in receipts):
            fsync(log.file.fd)
        if time.monotonic() - log.touched > _TOUCH_INTERVAL:
            os.utime(log.folder.fd)
            log.touched = time.monotonic()

    def _open_log(self, run: int) -> _Log:
        """Return this process's log of a run; a new one if the run's folder was archived or removed."""
        receipts = self.folder.open()
        if (log := self._logs.get(run)) and log.file.has_path(f"{run}/{log.name}", receipts):
            self._logs.move_to_end(run)
            return log
        folder, name = make_folder(str(run), receipts), f"{uuid.uuid4().hex}.jsonl"
        file = open_regular(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, folder)
        fsync(folder.fd)
        self._logs[run] = log = _Log(name, folder, file)
        if len(self._logs) > _MAX_OPEN_LOGS:
            self._logs.popitem(last=False)
        return log

    def _line(self, receipt: Receipt, log: _Log) -> bytes:
        self._count += 1
        identity = f"{self._received_at}-{self._count % 1_000_000:06}-{log.name[:8]}"
        return json.dumps(receipt.content | {"received_at": self._received_at, "id": identity}).encode() + b"\n"

    # --- reading -------------------------------------------------------------------------------------------------------

    def runs(self) -> list[int]:
        """Return the runs that have receipts, sorted."""
        with os_errors():
            names = list_names(self.folder.open()) if self.folder.exists() else []
        return sorted(int(name) for name in names if _RUN.fullmatch(name))

    def recent_runs(self) -> list[int]:
        """Return the runs that have receipts, most recently active first; a new run may be a second late."""
        made, runs = self._listing
        if time.monotonic() - made >= _LISTING_AGE:
            with os_errors():
                runs = self._list_by_activity() if self.folder.exists() else []
            self._listing = time.monotonic(), runs
        return runs

    def _list_by_activity(self) -> list[int]:
        listing = open_folder(".", self.folder.open())
        active = []
        with os.scandir(listing.fd) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # archived just now
                    if _RUN.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                        active.append((entry.stat(follow_symlinks=False).st_mtime_ns, int(entry.name)))
        return [run for _, run in sorted(active, reverse=True)]

    def logs_of(self, run: int | None) -> Iterator[tuple[Descriptor, str]]:
        """Yield the logs of a run, or of the recent runs, each as its folder and name; raises RunNotFound."""
        for one in self.recent_runs()[:_RECENT_RUNS] if run is None else [run]:
            try:
                folder = self.open_run(one)
            except RunNotFound:
                if run is None:  # archived just now
                    continue
                raise
            for name in log_names(folder):
                yield folder, name

    def open_run(self, run: int) -> Descriptor:
        """Open the folder of a run; raises RunNotFound."""
        try:
            if not self.folder.exists():
                raise FileNotFoundError
            return open_folder(str(run), self.folder.open())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunNotFound(f"There is no run {run}") from error


def log_names(folder: Descriptor) -> list[str]:
    """Return the names of the logs in the folder of a run, sorted."""
    return sorted(name for name in list_names(folder) if name.endswith(".jsonl"))
