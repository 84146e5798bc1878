"""A history of uploads, and the check that a data folder holds all that was acknowledged."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ACCEPTED = ("stored", "duplicate", "replaced")


# --- the contents of a data folder -------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The contents of a data folder."""

    visible: dict[str, str]  # file name: SHA-256
    replaced: list[list[str]]  # [file name, SHA-256] of each file in .replaced/
    receipts: list[list[str]]  # [file name, SHA-256, outcome] of each accepted upload
    leftovers: list[str]  # .incoming/<writer>/<upload>

    def without(self, name: str) -> Found:
        """Return the same without a file and its receipts."""
        visible = {other: sha256 for other, sha256 in self.visible.items() if other != name}
        return self._replace(visible=visible, receipts=[receipt for receipt in self.receipts if receipt[0] != name])


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def receipts_in(folder: Path) -> list[dict[str, Any]]:
    """Return the receipts of all runs; lines that a crash cut short are skipped."""
    found = []
    for path in sorted((folder / ".receipts").rglob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def look(folder: Path) -> Found:
    """Read a data folder without the receiver's code."""
    if not folder.is_dir():
        return Found({}, [], [], [])
    visible = {path.name: sha256_of(path) for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    replaced = [
        [path.name.partition(".root")[0] + ".root", sha256_of(path)]
        for path in folder.glob(".replaced/**/*")
        if path.is_file()
    ]
    receipts = [
        [receipt["filename"], receipt["sha256"], receipt["outcome"]]
        for receipt in receipts_in(folder)
        if receipt.get("outcome") in ACCEPTED
    ]
    incoming = [path for path in folder.glob(".incoming/*/*") if path.name != "lock"]
    return Found(visible, replaced, receipts, [str(path.relative_to(folder)) for path in incoming])


# --- the history of uploads --------------------------------------------------------------------------------------------


class Upload:
    """An upload. The times at which it was sent and ended are positions in its history."""

    def __init__(self, name: str, sha256: str, sent: int) -> None:
        self.name, self.sha256, self.sent = name, sha256, sent
        self.ended = sys.maxsize
        self.outcome = ""  # of an acknowledged upload; empty if it is unknown


class History:
    """All uploads in the order of their sending, and the acknowledged ones in the order of their answers."""

    def __init__(self) -> None:
        self.uploads: list[Upload] = []
        self.acknowledged: list[Upload] = []
        self._position = 0
        self._lock = threading.Lock()

    def send(self, name: str, sha256: str) -> Upload:
        with self._lock:
            self._position += 1
            self.uploads.append(Upload(name, sha256, self._position))
            return self.uploads[-1]

    def end(self, upload: Upload, outcome: str = "") -> None:
        """Record that an upload can no longer take effect; with an outcome, that it was acknowledged."""
        with self._lock:
            self._position += 1
            upload.ended, upload.outcome = self._position, outcome
            if outcome:
                self.acknowledged.append(upload)


def outcome_of(answer: dict[str, Any]) -> str:
    """Return the outcome in an answer of 200."""
    return next((outcome for outcome in ("duplicate", "replaced") if answer.get(outcome)), "stored")


def judge(
    found: Found, history: History, count: int | None = None, taken: Iterable[tuple[str, str]] = ()
) -> dict[str, list[str]]:
    """Return the broken promises by kind, at the time when the first `count` uploads had been acknowledged.

    `taken` are names and checksums of files that a consumer has moved away.
    """
    wrong = collections.defaultdict(list)
    promised = history.acknowledged[:count]
    last_sent: dict[str, int] = {}
    for upload in promised:
        last_sent[upload.name] = max(upload.sent, last_sent.get(upload.name, 0))
    possible = collections.defaultdict(set)  # every content that was ever sent for a name
    current = collections.defaultdict(set)  # those contents that no acknowledged upload has followed
    for upload in history.uploads:
        possible[upload.name].add(upload.sha256)
        if upload.ended >= last_sent.get(upload.name, 0):
            current[upload.name].add(upload.sha256)
    away = set(taken)
    names_away = {name for name, _ in away}
    kept = {*found.visible.items(), *((name, sha256) for name, sha256 in found.replaced), *away}
    for name, sha256 in found.visible.items():
        if sha256 not in possible[name]:
            wrong["torn"].append(name)
        elif sha256 not in current[name]:
            wrong["old bytes"].append(name)
    wrong["torn"] += [name for name, sha256 in found.replaced if sha256 not in possible[name]]
    for upload in promised:
        if (upload.name, upload.sha256) not in kept:
            wrong["lost"].append(f"{upload.name} {upload.sha256}")
        if upload.name not in found.visible and upload.name not in names_away:
            wrong["nameless"].append(upload.name)
    receipts = collections.Counter(
        (name, sha256, known) for name, sha256, outcome in found.receipts for known in (outcome, "")
    )
    expected = collections.Counter((upload.name, upload.sha256, upload.outcome) for upload in promised)
    wrong["no receipt"] += [" ".join(key) for key in expected - receipts]
    wrong["false receipt"] += [" ".join(key) for key in receipts if key[:2] not in kept]
    return {kind: sorted(set(problems)) for kind, problems in wrong.items() if problems}
