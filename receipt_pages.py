"""Pages of receipts: the newest ones of a run or of the recent runs, narrowed by agent and outcome.

A page is merged from the ends of the logs, and at most 20,000 lines are read for it. So its cost does not grow with the logs.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
from collections.abc import Iterator
from dataclasses import dataclass

from durable import Descriptor, open_regular, os_errors
from receipts import Receipt, ReceiptLog

_MAX_LINE = 64 << 10  # bytes
_MAX_SCANNED = 20_000  # receipts that are read for one page
_TAIL = 16 << 10  # bytes of a log that are read at once, from its end


@dataclass(frozen=True)
class Query:
    """A query for receipts: at most `limit`, older than the one with the id `before`, of an agent, with an outcome."""

    limit: int = 100
    before: str | None = None
    agent: str | None = None
    outcome: str | None = None

    def matches(self, receipt: Receipt) -> bool:
        return self.agent in (None, receipt.agent) and self.outcome in (None, receipt.outcome)


def newest(receipts: ReceiptLog, run: int | None, query: Query) -> tuple[list[Receipt], str | None]:
    """Return the newest receipts of a run, or of the 50 most recently active runs, and the `before` for older ones."""
    with os_errors():
        logs = [_read_backwards(*log, query.before) for log in receipts.logs_of(run)]
        found: list[Receipt] = []
        last = None
        for number, receipt in enumerate(heapq.merge(*logs, key=lambda receipt: receipt.id, reverse=True)):
            if number == _MAX_SCANNED or len(found) == query.limit:
                return found, last
            last = receipt.id
            if query.matches(receipt):
                found.append(receipt)
        return found, None


def etag_of(receipts: ReceiptLog, run: int | None) -> str:
    """Return a string that changes with each receipt of a run, or of the recent runs; raises RunNotFound."""
    digest = hashlib.sha256()
    with os_errors():
        for folder, name in receipts.logs_of(run):
            with contextlib.suppress(FileNotFoundError):
                size = os.stat(name, dir_fd=folder.fd, follow_symlinks=False).st_size
                digest.update(f"{name} {size}\n".encode())
    return digest.hexdigest()[:32]


def _read_backwards(folder: Descriptor, name: str, before: str | None) -> Iterator[Receipt]:
    """Yield the receipts of a log that are older than `before`, newest first.

    The log is opened for each read, because a page may be merged from hundreds of logs.
    """
    end, rest = -1, b""
    while end:
        try:
            log = open_regular(name, os.O_RDONLY, folder)
        except FileNotFoundError:  # archived just now
            return
        if end < 0:
            end = log.status.st_size if before is None else _end_of_older(log, before)
        start = max(0, end - _TAIL)
        lines = (os.pread(log.fd, end - start, start) + rest).split(b"\n")
        end, rest = start, lines[0][:_MAX_LINE]  # the line that begins before `start`
        for line in reversed(lines[1:] if start else lines):
            receipt = Receipt.from_line(line)
            if receipt and (before is None or receipt.id < before):
                yield receipt


def _end_of_older(log: Descriptor, before: str) -> int:
    """Return a position soon after the receipts that are older than `before`, by binary search in the ordered lines."""
    low, high = 0, log.status.st_size
    while high - low > _TAIL:
        middle = (low + high) // 2
        whole = os.pread(log.fd, _TAIL, middle).split(b"\n")[1:-1]
        receipt = next(filter(None, map(Receipt.from_line, whole)), None)
        if receipt and receipt.id >= before:
            high = middle
        else:
            low = middle
    return high + os.pread(log.fd, _MAX_LINE, high).find(b"\n") + 1  # with the rest of the line at that position
