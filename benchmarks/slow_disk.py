"""Uploads to a disk whose fsync takes 10 ms, beside the same calls without a receiver.

Command: python benchmarks/slow_disk.py [--rounds 3] [--seconds 5] [--folder FOLDER] [--other CHECKOUT]
Needs: wrk, gcc.

A library that is loaded before the C library lets each fsync and fdatasync sleep before the real one. The file is one of
ROOT with six TH1 (5 kB); two workers. `calls` is commit_calls.py with as many threads as there are connections. With
--other, another checkout of the receiver is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from pathlib import Path
from statistics import median

import common

CONNECTIONS = (4, 16, 64)
FILE = common.PROJECT / "tests" / "data" / "h1_all.root"
MILLISECONDS = 10
SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
int fsync(int fd) { usleep(%(us)d); return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }
int fdatasync(int fd) { usleep(%(us)d); return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd); }
"""


def slow_fsync(folder: Path) -> dict[str, str]:
    """Return the environment of a process whose fsync is slow."""
    source, library = folder / "slow_fsync.c", folder / "slow_fsync.so"
    source.write_text(SOURCE % {"us": MILLISECONDS * 1000})
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def receiver(checkout: Path, folder: Path, environ: dict[str, str], seconds: float, connections: int) -> float:
    """Return the uploads per second of a receiver; it is started in a checkout."""
    data = common.new_data(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"DATA_FOLDER": str(data), "TOKEN": common.TOKEN, "MIN_FREE_SPACE": "0"}
    command = [sys.executable, "-m", "gunicorn", "--chdir", str(checkout), "--config", f"{checkout}/gunicorn.conf.py"]
    command += ["--bind", f"127.0.0.1:{port}", "--workers", "2"]
    environ = {
        **environ,
        "PYTHONPATH": str(checkout),
        **{f"DQM_RECEIVER_{name}": value for name, value in settings.items()},
    }
    running = common.Server(data, command, port, environ)
    try:
        result = common.uploads(running, "receiver", FILE, seconds, connections)
    finally:
        running.stop()
    if result.errors:
        raise RuntimeError(f"{result.errors} uploads failed, see {running.log}")
    return result.per_second


def calls(folder: Path, environ: dict[str, str], seconds: float, threads: int) -> float:
    """Return how many uploads per second the disk lets through."""
    data = common.new_data(folder)
    command = [sys.executable, str(common.HERE / "commit_calls.py"), str(data), str(threads), str(seconds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--other", type=Path)
    other, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    options = common.options(__doc__, rounds=3)
    slow = slow_fsync(options.folder)
    checkouts = {"receiver": common.PROJECT} | ({"other": other.other.resolve()} if other.other else {})
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for connections in CONNECTIONS:
            for name, checkout in checkouts.items():
                rate = receiver(checkout, options.folder, slow, options.seconds, connections)
                found.setdefault((name, connections), []).append(rate)
            rate = calls(options.folder, slow, options.seconds, connections)
            found.setdefault(("calls", connections), []).append(rate)
    rows = []
    for connections in CONNECTIONS:
        rates = {name: median(found[name, connections]) for name in (*checkouts, "calls")}
        row = [f"{connections} connections", *(f"{rate:.0f}" for rate in rates.values())]
        rows.append([*row, f"{rates['receiver'] / rates['calls']:.2f}"])
    print(f"Uploads per second, each fsync {MILLISECONDS} ms longer.\n")
    print(common.table(["", *checkouts, "calls alone", "receiver / calls"], rows))


if __name__ == "__main__":
    main()
