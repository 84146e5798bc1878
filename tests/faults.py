"""The promise of the receiver as one assertion, and what the fault tests share."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from client import HEADERS, HISTOGRAMS, visible

import storage

# Until the commit by rename: a crash or a consumer between two renames leaves a name missing until the next start, and a
# receipt whose withdrawal fails names a file that has been withdrawn. To be deleted with every line that mentions it.
OLD_COMMIT = not hasattr(storage, "LOCK_TIMEOUT")

INVALID = HISTOGRAMS[:3000] + bytes(2000) + HISTOGRAMS[5000:]
ACCEPTED = ("stored", "duplicate", "replaced")

Sent = tuple[str, str]  # the name and the SHA-256 of an upload


class BrokenPromise(AssertionError):
    """The data folder does not hold what was promised."""


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def name_of(time_stamp: int, run: int = 123, agent: str = "testagent") -> str:
    """Return the name of a file, worked out without the receiver's code."""
    local = datetime.fromtimestamp(time_stamp, ZoneInfo("Europe/Zurich"))
    return f"{agent}histos_{run}_DQM_{local:%Y_%m_%d_%H_%M_%S}.root"


def headers_of(time_stamp: int, run: int = 123, agent: str = "testagent") -> dict[str, str]:
    return {**HEADERS, "timeStamp": str(time_stamp), "runNumber": str(run), "amoreAgent": agent}


def variant(chance: random.Random, size: int = 0) -> bytes:
    """Return a valid file that no other equals: ROOT reads nothing behind the end of its data."""
    return HISTOGRAMS + chance.randbytes(size or chance.randrange(16, 4000))


def replaced(folder: Path, name: str = "") -> list[bytes]:
    """Return the contents that were preserved when a different file took a name."""
    return [path.read_bytes() for path in (folder / ".replaced").glob(f"{name}*") if path.is_file()]


def uploads_in_progress(folder: Path) -> list[str]:
    """Return the files in `.incoming/` but for the locks of writers."""
    paths = sorted((folder / ".incoming").rglob("*"))
    return [str(path.relative_to(folder)) for path in paths if path.is_file() and path.name != "lock"]


def all_receipts(folder: Path) -> list[dict[str, Any]]:
    """Return the receipts of all runs; a line that a crash has torn is none."""
    found = []
    for path in sorted((folder / ".receipts").rglob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                receipt = json.loads(line)
            except ValueError:
                continue
            if isinstance(receipt, dict) and "outcome" in receipt:
                found.append(receipt)
    return found


def outcomes(folder: Path) -> Counter[str]:
    return Counter(receipt["outcome"] for receipt in all_receipts(folder))


def assert_promise(
    folder: Path,
    acknowledged: Iterable[Sent],
    *,
    unsure: Iterable[Sent] = (),
    taken: Path | None = None,
    crashed: bool = False,
) -> None:
    """Raise BrokenPromise unless the folder holds all that was acknowledged, and shows nothing that was not sent whole.

    `unsure` uploads may have happened: they were answered 500, 503 or not at all. `taken` is the folder to which a consumer
    moves visible files as `<name>.<anything>`. `crashed` says that a process has died and none has started since.
    """
    acknowledged = Counter(acknowledged)
    sent = acknowledged.keys() | set(unsure)
    shown = {(name, sha256(content)) for name, content in visible(folder).items()}
    kept = {(path.name.partition(".root")[0] + ".root", sha256(path.read_bytes())) for path in _files(folder, taken)}
    problems = [f"{name} shows bytes that were not sent ({digest[:8]})" for name, digest in sorted(shown - sent)]
    problems += [f"the upload of {name} ({digest[:8]}) is lost" for name, digest in acknowledged.keys() - shown - kept]
    if taken is None and not (OLD_COMMIT and crashed):
        names = {name for name, _ in acknowledged} - {name for name, _ in shown}
        problems += [f"the name {name} has vanished" for name in sorted(names)]
    lines = Counter(
        (receipt["filename"], receipt["sha256"]) for receipt in all_receipts(folder) if receipt["outcome"] in ACCEPTED
    )
    problems += [
        f"{number} uploads of {upload[0]} ({upload[1][:8]}) were acknowledged, {lines[upload]} have a receipt"
        for upload, number in acknowledged.items()
        if lines[upload] < number
    ]
    if not OLD_COMMIT:
        problems += [f"a receipt tells of {name} ({digest[:8]}), which is nowhere" for name, digest in lines.keys() - kept - shown]
    if problems:
        raise BrokenPromise("\n".join(problems))


def _files(folder: Path, taken: Path | None) -> Iterable[Path]:
    for place in (folder / ".replaced", taken):
        if place is not None and place.is_dir():
            yield from (path for path in place.iterdir() if path.is_file())


def assert_nothing_left(folder: Path) -> None:
    """Raise BrokenPromise if `.incoming/` holds an upload; to be asked when none is in progress."""
    left = uploads_in_progress(folder)
    if left:
        raise BrokenPromise(f"left behind: {', '.join(left)}")

