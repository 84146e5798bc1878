"""Run clients/dqm_send.py and report its peak memory, or kill it at a step: run_sender.py peak|kill=N PROGRAM ARGUMENT…"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

STEPS = ("os.rename", "os.mkdir", "os.rmdir", "os.utime", "socket.connect")


def kill_at(step: int) -> None:
    """End this process by SIGKILL just before it changes the spool or connects for the nth time."""
    left = step

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        written = event == "open" and str(arguments[0]).endswith((".lock", ".reason"))
        if written or event in STEPS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def main(mode: str) -> None:
    if mode.startswith("kill="):
        kill_at(int(mode.removeprefix("kill=")))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if mode == "peak":
            sys.stderr.write(Path("/proc/self/status").read_text())


if __name__ == "__main__":
    mode = sys.argv[1]
    sys.argv = sys.argv[2:]
    main(mode)
