"""Memory and start-up of a worker.

Command: python benchmarks/memory.py [--rounds 5] [--folder FOLDER]
Needs: wrk, curl, PyPI's `root`.

Resident memory (VmRSS, with the shared libraries and what it shares with the other processes) of the one worker after its
start, after 1,000 uploads of 100 TH1F over 4 connections, after uploads of 7 MB over 64, and after a 1 GB file was uploaded and
downloaded; then how long it takes to import the application, what of that is uproot, and how long until the first answer.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import common

UPLOADS = 1000
NAME = "EMChistos_123_DQM_1970_01_01_01_03_54.root"  # what common.HEADERS call a file


def resident(pid: int, field: str = "VmRSS") -> float:
    """Return megabytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) * 1024 / 1e6


def curl(server: common.Server, *arguments: str) -> None:
    headers = [f"-H{name}: {value}" for name, value in common.HEADERS.items()]
    subprocess.run(["curl", "-sSf", "-o", "/dev/null", *headers, *arguments], check=True, cwd=server.log.parent)


def memory(options: common.Options) -> list[list[str]]:
    small, large = (common.file(options.folder, name) for name in ("h100", "tree1000"))
    rows = []
    with common.server(options.folder, "receiver", 1) as server:
        [pid] = server.workers()
        start = resident(pid)

        def note(what: str) -> None:
            now, most = resident(pid), resident(pid, "VmHWM")
            rows.append([what, f"{now:.0f} MB", f"{now - start:+.0f} MB", f"{most:.0f} MB"])

        note("started")
        done = 0.0
        while done < UPLOADS:
            done += 5 * common.uploads(server, "receiver", small, 5, 4).per_second
        note(f"{UPLOADS:,} uploads")
        common.uploads(server, "receiver", common.file(options.folder, "th2d"), 5, 64)
        note("then uploads of 7 MB over 64 connections")
        size = f"{large.stat().st_size / 1e9:.2g} GB"
        curl(server, "-F", f"file=@{large}", server.url + common.FILES)
        note(f"then {size} uploaded")
        curl(server, f"{server.url}{common.FILES}/{NAME}")
        note("and downloaded")
        if server.workers() != [pid]:
            raise RuntimeError("the worker has died")
    return rows


def import_seconds() -> tuple[float, float]:
    """Return the seconds in which the application is imported, and uproot's part of it."""
    command = [sys.executable, "-X", "importtime", "-c", "import receiver"]
    output = subprocess.run(command, cwd=common.PROJECT, check=True, capture_output=True, text=True).stderr
    seconds = {name: int(time) / 1e6 for time, name in re.findall(r"\|\s+(\d+) \|\s+(\S+)\n", output)}
    return seconds["receiver"], seconds["uproot"]


def start(folder: Path) -> tuple[float, float]:
    """Return the seconds from gunicorn's start to its first answer, and from the death of a worker to the next one's."""
    with common.server(folder, "receiver", 1) as server:
        [pid] = server.workers()
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        while True:
            try:
                if server.get("/")[0] == 400:
                    return server.seconds_to_answer, time.monotonic() - began
            except OSError:
                time.sleep(0.001)


def main() -> None:
    options = common.options(__doc__)
    print(common.table(["after", "resident", "growth", "at most"], memory(options)), "\n")
    imports = [import_seconds() for _ in range(options.rounds + 1)][1:]
    starts = [start(options.folder) for _ in range(options.rounds)]
    everything, uproot = (median(times) for times in zip(*imports, strict=True))
    first, next_worker = (median(times) for times in zip(*starts, strict=True))
    rows = [
        ["importing the application (-X importtime, which makes it slower)", f"{everything:.2f} s"],
        ["of that uproot and what it imports", f"{uproot:.2f} s ({uproot / everything:.0%})"],
        ["from `gunicorn` to the first answer", f"{first:.2f} s"],
        ["from the death of a worker to the answer of the next", f"{next_worker:.3f} s"],
    ]
    print(common.table(["start-up", ""], rows))


if __name__ == "__main__":
    main()
