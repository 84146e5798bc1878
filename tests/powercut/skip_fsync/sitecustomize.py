"""For controls: in a process with this folder in PYTHONPATH, os.fsync skips the kinds that SKIP_FSYNC names."""

from __future__ import annotations

import os
import stat

SKIPPED = set(os.environ.get("SKIP_FSYNC", "").split(","))


def kind(fd: int) -> str:
    """Return what a descriptor is open on: folder, receipts or file."""
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        return "folder"
    return "receipts" if "/.receipts/" in os.readlink(f"/proc/self/fd/{fd}") else "file"


_fsync, _fdatasync = os.fsync, os.fdatasync


def fsync(fd: int) -> None:
    if kind(fd) not in SKIPPED:
        _fsync(fd)


def fdatasync(fd: int) -> None:
    if kind(fd) not in SKIPPED:
        _fdatasync(fd)


os.fsync = fsync  # type: ignore[assignment]
os.fdatasync = fdatasync
