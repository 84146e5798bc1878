"""Summaries of runs: the receipts of a run, added up by agent."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from durable import Descriptor, open_regular, os_errors
from receipts import Receipt, ReceiptLog, log_names

OTHER_AGENTS = "(other)"  # no agent can have this name
DATA_START, DATA_END = 1, 2  # dataStatus: this file starts, or ends, a set of data

_MAX_AGENTS = 200  # of a run that have a summary of their own
_MAX_NAMES = 100_000  # file names that the summary of a run remembers
_MAX_ALL_NAMES = 200_000  # file names that all summaries together remember
_MAX_RUNS = 200  # runs whose summaries are remembered
_CHUNK = 1 << 20  # bytes of a log that are read at once


class Summaries:
    """The summaries of the requested runs, updated at each request.

    The least recently requested are forgotten: at most 200 runs and 200,000 file names, about 50 MB, are remembered.
    """

    def __init__(self, receipts: ReceiptLog) -> None:
        self._receipts = receipts
        self._runs: OrderedDict[int, RunSummary] = OrderedDict()
        self._lock = threading.Lock()

    def agents(self, run: int) -> dict[str, dict[str, Any]]:
        """Return the summary of each agent of a run, with the fields of the API; raises RunNotFound."""
        with self._lock:
            return {agent: summary.content() for agent, summary in sorted(self._update(run).agents.items())}

    def has_accepted(self, run: int, name: str) -> bool:
        """Return whether a file of this name was acknowledged; raises RunNotFound."""
        with self._lock:
            return name in self._update(run).names

    def _update(self, run: int) -> RunSummary:
        with os_errors():
            folder = self._receipts.open_run(run)
            summary = self._runs.pop(run, None) or RunSummary()
            summary.update(folder)
        self._runs[run] = summary
        while len(self._runs) > _MAX_RUNS or sum(len(one.names) for one in self._runs.values()) > _MAX_ALL_NAMES:
            self._runs.popitem(last=False)
        return summary


@dataclass
class AgentSummary:
    """The receipts of one agent in a run, added up; time stamps in Unix seconds."""

    files: int = 0  # distinct names
    bytes: int = 0  # of the accepted files, without duplicates
    duplicates: int = 0
    rejected: int = 0
    reused: int = 0  # names that two different files have had
    first_time_stamp: int | None = None
    last_time_stamp: int | None = None
    last_arrival: str | None = None  # when the last accepted upload was received
    _last_start: int = -1  # time stamp of the last file that starts a set of data
    _last_end: int = -1  # of the last one that ends it

    def content(self) -> dict[str, Any]:
        """Return the fields of the API; `ended` means that the last set of data has ended and no later one has started."""
        content = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        ended = self._last_end >= max(self._last_start, 0)
        return content | {"started": self._last_start >= 0, "ended": ended}

    def add_accepted(self, receipt: Receipt) -> None:
        self.last_arrival = max(receipt.received_at, self.last_arrival or "")
        time_stamp = receipt.time_stamp
        self.first_time_stamp = min(time_stamp, time_stamp if self.first_time_stamp is None else self.first_time_stamp)
        self.last_time_stamp = max(time_stamp, self.last_time_stamp or 0)
        if receipt.data_status == DATA_START:
            self._last_start = max(time_stamp, self._last_start)
        elif receipt.data_status == DATA_END:
            self._last_end = max(time_stamp, self._last_end)


@dataclass
class _Name:
    """A file name: its last content, whether an upload that was no duplicate is recorded, and whether contents differed."""

    __slots__ = ("is_reused", "is_stored", "sha256")
    sha256: bytes  # its first 16 hexadecimal digits
    is_stored: bool  # else only duplicates are recorded: the process died before the receipt of the first upload
    is_reused: bool


class RunSummary:
    """The receipts of one run, added up by agent. The logs are read one after the other, so not in order of time."""

    def __init__(self) -> None:
        self.agents: dict[str, AgentSummary] = {}
        self.names: dict[str, _Name] = {}  # the first 100,000; a later name is counted each time that it is stored
        self._positions: dict[str, tuple[int, int]] = {}  # by log: its inode, and the bytes of it that were read

    def update(self, folder: Descriptor) -> None:
        """Read the lines that were added to the logs since the last time, or all lines if a log was taken away."""
        logs = dict(_stat_logs(folder))
        for name, (inode, position) in self._positions.items():
            if name not in logs or logs[name].st_ino != inode or logs[name].st_size < position:
                self.__init__()  # type: ignore[misc]
                break
        for name, status in logs.items():
            position = self._positions.get(name, (0, 0))[1]
            if status.st_size > position:
                self._positions[name] = status.st_ino, self._read(name, folder, position)

    def _read(self, name: str, folder: Descriptor, position: int) -> int:
        """Add the receipts of a log from a position on, and return the position after the last whole line."""
        with contextlib.suppress(FileNotFoundError):  # archived just now
            log = open_regular(name, os.O_RDONLY, folder)
            while chunk := os.pread(log.fd, _CHUNK, position):
                whole = chunk.rfind(b"\n") + 1
                if not whole:  # a line that is being written, or was cut short
                    break
                for line in chunk[:whole].splitlines():
                    if receipt := Receipt.from_line(line):
                        self._add(receipt)
                position += whole
        return position

    def _add(self, receipt: Receipt) -> None:
        agent = receipt.agent if receipt.agent in self.agents or len(self.agents) < _MAX_AGENTS else OTHER_AGENTS
        summary = self.agents.setdefault(agent, AgentSummary())
        if receipt.outcome == "rejected":
            summary.rejected += 1
            return
        summary.add_accepted(receipt)
        is_duplicate = receipt.outcome == "duplicate"
        sha256 = (receipt.sha256 or "")[:16].encode(errors="replace")
        name = self.names.get(receipt.filename)
        if name is None:
            if len(self.names) < _MAX_NAMES:
                self.names[receipt.filename] = _Name(sha256, not is_duplicate, False)
            summary.files += 1
            summary.bytes += receipt.size
            return
        if name.sha256 != sha256:
            summary.bytes += receipt.size
            summary.reused += not name.is_reused
            name.sha256, name.is_reused = sha256, True
        elif is_duplicate or not name.is_stored:
            summary.duplicates += 1
        name.is_stored = name.is_stored or not is_duplicate


def _stat_logs(folder: Descriptor) -> Iterator[tuple[str, os.stat_result]]:
    for name in log_names(folder):
        with contextlib.suppress(FileNotFoundError):  # archived just now
            yield name, os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
