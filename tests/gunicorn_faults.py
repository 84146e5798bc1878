"""gunicorn.conf.py with faults: worker number $SLOW_WORKER begins slowly, and the disk fails while $BROKEN_DISK is there."""

from __future__ import annotations

import errno
import os
import runpy
import time
from pathlib import Path
from typing import Any

globals().update(runpy.run_path(str(Path(__file__).parent.parent / "gunicorn.conf.py")))

_statvfs = os.statvfs


def _failing_statvfs(path: Any) -> os.statvfs_result:
    if os.path.exists(os.environ.get("BROKEN_DISK", "")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return _statvfs(path)


os.statvfs = _failing_statvfs


def post_fork(server: Any, worker: Any) -> None:
    time.sleep(2 if str(worker.age) == os.environ.get("SLOW_WORKER") else 0)
