"""Cuts the power of a receiver in User-Mode Linux, and judges the disk by what had been acknowledged."""

from __future__ import annotations

import collections
import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self
from zoneinfo import ZoneInfo

from history import Found, History, Upload, judge
from powercut import guest

SIZE = 1 << 30  # of a disk, bytes; sparse
LOG_SIZE = 16 << 30
DISKS = 12  # that one guest looks at
OWN = "EMChistos_999_DQM_1970_01_01_01_16_39.root"  # what a receiver that inspects a disk uploads
PAGE = 4096  # what a disk writes whole
PROGRAMS = ("linux.uml", "dmsetup", "ip", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs")
MAKE = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q"), "btrfs": ("mkfs.btrfs", "-q")}


def missing() -> list[str]:
    """Return the programs that are not installed."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    programs = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    return programs if any(guest.MODULES.glob("*/kernel/drivers/md/dm-log-writes.ko")) else [*programs, "dm-log-writes"]


def read_events(path: Path, history: History) -> None:
    """Add the uploads of one life of a receiver to a history; the power cut ended those that were under way."""
    uploads: dict[str, Upload] = {}
    for line in path.read_bytes().split(b"\n")[:-1]:
        kind, key, *rest = json.loads(line)
        if kind == "sent":
            uploads[key] = history.send(*rest)
            continue
        upload = uploads.pop(key)
        if kind == "acknowledged":
            name, sha256, outcome = rest
            assert (name, sha256) == (upload.name, upload.sha256)
            history.end(upload, outcome)
        else:
            history.end(upload)
    for upload in uploads.values():
        history.end(upload)


def run_and_time(name: str) -> tuple[int, int]:
    """Return run and time stamp of a file name."""
    _, run, _, *fields = name.removesuffix(".root").split("_")
    local = datetime(*map(int, fields), tzinfo=ZoneInfo("Europe/Zurich"))  # type: ignore[arg-type,misc]
    return int(run), int(local.timestamp())


# --- the guest ---------------------------------------------------------------------------------------------------------


class GuestFailed(Exception):
    """The guest ended or did not get anywhere; the text is the end of its console."""


class Guest:
    """A User-Mode Linux: a kernel as processes of one process group. Its page cache goes when they are killed."""

    def __init__(self, shared: Path, disks: list[Path], config: dict[str, Any]) -> None:
        (shared / "config").write_text(json.dumps(config | {"disks": len(disks)}))
        command = [
            "linux.uml",
            "mem=512M",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            "quiet",
            "noreboot",
        ]
        command += [f"uml_dir={shared}/uml", "con=null", "con0=null,fd:1", f"init={sys.executable}"]
        command += [f"ubd{chr(ord('b') + number)}={disk}" for number, disk in enumerate(disks)]
        command += [f"POWERCUT_SHARED={shared}", "--", guest.__file__]
        self.shared, self.log = shared, shared / "console"
        with self.log.open("ab") as console:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                env=os.environ | {"TMPDIR": str(shared)},
            )

    def wait(self, condition: Callable[[], bool], seconds: float = 300.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise GuestFailed(self.log.read_text(errors="replace").partition("Kernel panic")[0][-3000:])
            time.sleep(0.01)

    def read(self, name: str) -> Any:
        """Wait until the guest has told something, and return it."""
        self.wait((self.shared / name).exists)
        return json.loads((self.shared / name).read_text())

    def cut(self) -> None:
        """Kill all processes of the guest at once, and wait until they have gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while any(_living(self.process.pid)):
            time.sleep(0.005)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()


def _living(group: int) -> Iterator[bool]:
    """Yield True for each process of a group that is no zombie."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                yield True


# --- two ways to cut the power -----------------------------------------------------------------------------------------


@dataclass
class Result:
    """The result of the power cuts of one file system."""

    cuts: int = 0
    acknowledged: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    judged: int = 0  # pairs of a cut and an upload acknowledged before it
    wrong: set[tuple[str, str, str]] = field(default_factory=set)  # (cut, kind, what)

    def add(self, cut: str, wrong: dict[str, list[str]]) -> None:
        self.wrong |= {(cut, kind, item) for kind, what in wrong.items() for item in what}

    def kinds(self) -> collections.Counter[str]:
        """Return how much was wrong, by kind, in all cuts."""
        return collections.Counter(kind for _, kind, _ in self.wrong)

    def cuts_with(self, kind: str) -> int:
        return len({cut for cut, found, _ in self.wrong if found == kind})


class Experiment:
    """Power cuts of one file system, in a folder of their own, with the chance of one seed."""

    def __init__(self, fs: str, seed: int, skip: str = "", again: float = 0.4, threads: int = 4) -> None:
        self.fs, self.chance = fs, random.Random(f"{fs} {seed} {skip}")
        self.base = Path(tempfile.mkdtemp(prefix="powercut-", dir=_room()))
        self.result = Result()
        self.config = {
            "fs": fs,
            "size": SIZE,
            "seed": seed,
            "skip": skip,
            "again": again,
            "threads": threads,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.base)

    def kill(self, cuts: int, uploads: int) -> None:
        """Kill the guest at random moments, each time after at most so many uploads, and start it on the same disk again."""
        shared = self._shared("kill")
        disk = self._make_disk(shared / "disk")
        history = History()
        for boot in range(cuts + 1):
            names = sorted({upload.name for upload in history.acknowledged})
            names = self.chance.sample(names, min(20, len(names)))
            config = self.config | {"role": "serve", "boot": boot, "logged": False}
            config["names"] = [run_and_time(name) for name in names]
            events = shared / f"events{boot}"
            with Guest(shared, [disk], config) as guest:
                self._judge(Found(*guest.read(f"before{boot}")), history, None, f"kill {boot}", False)
                after = Found(*guest.read(f"after{boot}"))
                for name in set(after.visible) - {upload.name for upload in history.uploads}:
                    after = after.without(name)  # the first files of this life, whose events are not read yet
                self._judge(after, history, None, f"kill {boot}", True)
                if boot < cuts:
                    wanted = self.chance.randint(5, uploads)
                    guest.wait(lambda events=events, wanted=wanted: _acknowledged(events) >= wanted)  # type: ignore[misc]
                    time.sleep(self.chance.random() * 0.1)
            if boot < cuts:
                read_events(events, history)
        self._count(cuts, history)

    def lose_cache(self, cuts: int, uploads: int) -> None:
        """Log what one life writes, and rebuild the disk as it is at random moments when its write cache is lost, too.

        A disk keeps what it was told to flush, what was written with FUA, and a random part of what came since.
        """
        shared = self._shared("cache")
        base = self._make_disk(shared / "base")
        disk, log = shared / "disk", shared / "log"
        _copy(base, disk)
        with log.open("wb") as file:
            file.truncate(LOG_SIZE)
        config = self.config | {"role": "serve", "boot": 0, "logged": True, "names": []}
        with Guest(shared, [disk, log], config) as guest:
            guest.wait(lambda: _acknowledged(shared / "events0") >= uploads, 600)
        history = History()
        read_events(shared / "events0", history)
        entries = list(read_log(log))
        marks = [number for number, entry in enumerate(entries) if entry.flags & MARK]
        moments = sorted(self.chance.sample(range(marks[0], len(entries)), min(cuts, len(entries) - marks[0])))
        with base.open("r+b") as image, log.open("rb") as source:
            replay = Replay(entries, source, image, self.chance)
            for first in range(0, len(moments), DISKS):
                some = moments[first : first + DISKS]
                disks = [shared / f"cut{number}" for number in range(len(some))]
                for moment, path in zip(some, disks, strict=True):
                    replay.build(moment, base, path)
                counts = [sum(mark <= moment for mark in marks) for moment in some]
                self._inspect(shared, disks, history, counts, [f"cache {moment}" for moment in some])
        self._count(len(moments), history)

    def _inspect(self, shared: Path, disks: list[Path], history: History, counts: list[int], names: list[str]) -> None:
        with Guest(shared, disks, self.config | {"role": "inspect"}) as guest:
            for number, path in enumerate(disks):
                seen = guest.read(f"disk{number}")
                if "error" in seen:
                    self.result.add(names[number], {"unusable": [seen["error"]]})
                else:
                    self._judge(Found(*seen["before"]), history, counts[number], names[number], False)
                    after = Found(*seen["after"]).without(OWN)
                    self._judge(after, history, counts[number], names[number], True)
                (shared / f"disk{number}").unlink()
        for path in disks:
            path.unlink()

    def _judge(self, found: Found, history: History, count: int | None, cut: str, started: bool) -> None:
        """Judge a disk before or after a receiver has started on it."""
        if not started:
            self.result.judged += len(history.acknowledged[:count])
        elif found.leftovers:
            self.result.add(cut, {"leftover": found.leftovers})
        self.result.add(cut, judge(found, history, count))

    def _count(self, cuts: int, history: History) -> None:
        self.result.cuts += cuts
        self.result.acknowledged += len(history.acknowledged)
        self.result.outcomes.update(upload.outcome for upload in history.acknowledged)

    def _shared(self, name: str) -> Path:
        folder = self.base / name
        (folder / "bodies").mkdir(parents=True)
        make_bodies(folder / "bodies")
        return folder

    def _make_disk(self, path: Path) -> Path:
        with path.open("wb") as file:
            file.truncate(SIZE)
        environ = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
        subprocess.run([*MAKE[self.fs], path], check=True, env=environ, capture_output=True)
        return path


def _room() -> str | None:
    """Return a folder in memory where there is one with room: the guest flushes its disk often."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 4 << 30 else None


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


def _acknowledged(events: Path) -> int:
    return events.read_bytes().count(b'["acknowledged"') if events.exists() else 0


def make_bodies(folder: Path, count: int = 60) -> None:
    """Make valid ROOT files of 1 kB to 400 kB."""
    import numpy
    import uproot

    chance = numpy.random.default_rng(1)
    for number in range(count):
        with uproot.recreate(folder / f"{number:03}.root") as file:
            bins = int(10 ** chance.uniform(1, 4.6))
            file["h"] = (chance.normal(size=bins), numpy.linspace(0, 1, bins + 1))


# --- the block log (dm-log-writes) -------------------------------------------------------------------------------------

FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8  # drivers/md/dm-log-writes.c
MAGIC = 0x6A736677736872


class Entry(NamedTuple):
    """One write to the disk, in bytes; or a mark."""

    flags: int
    offset: int
    size: int
    position: int  # of the data in the log


def read_log(path: Path) -> Iterator[Entry]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as log:
        magic, _, count, sector = struct.unpack_from("<QQQI", log)
        if magic != MAGIC:
            raise ValueError(f"not a log of dm-log-writes: {magic:#x}")
        position = sector
        for _ in range(count):
            offset, size, flags, _ = struct.unpack_from("<QQQQ", log, position)
            position += sector
            yield Entry(flags, offset * sector, size * sector, position)
            if not flags & DISCARD:
                position += size * sector


class Replay:
    """Builds disks from a block log, for moments that only grow."""

    def __init__(self, entries: list[Entry], log: BinaryIO, image: BinaryIO, chance: random.Random) -> None:
        self.entries, self.log, self.image, self.chance = entries, log, image, chance
        self.done = 0  # entries before this one are in the image for good

    def build(self, moment: int, image: Path, disk: Path) -> None:
        """Make the disk as it may be when the power is cut just after the entry `moment`."""
        entries = range(self.done, moment + 1)
        flushed = max((number for number in entries if self.entries[number].flags & FLUSH), default=self.done - 1)
        for number in range(self.done, flushed + 1):
            self._write(self.image, self.entries[number])
        self.image.flush()
        self.done = flushed + 1
        _copy(image, disk)
        kept = self.chance.choice((0.0, 0.5, 0.9, 1.0))
        with disk.open("r+b") as target:
            for number in range(self.done, moment + 1):
                entry = self.entries[number]
                self._write(target, entry, 1.0 if entry.flags & FUA else kept)

    def _write(self, target: BinaryIO, entry: Entry, kept: float = 1.0) -> None:
        if entry.flags & (DISCARD | MARK):
            return
        self.log.seek(entry.position)
        data = self.log.read(entry.size)
        for start in range(0, entry.size, PAGE):
            if self.chance.random() < kept:  # below 1.0 always
                target.seek(entry.offset + start)
                target.write(data[start : start + PAGE])
