"""Uploads to CephFS and GlusterFS from one and two hosts, beside the same calls without a receiver.

Command: python benchmarks/cluster.py [--rounds 3] [--seconds 10] [--folder FOLDER] [--systems cephfs glusterfs]
Needs: root, wrk, and what tests/clusters.py needs of a file system.

All daemons run on this machine. A host is one mount with one receiver of two workers, and 16 connections of its own; the
file is one of ROOT with six TH1 (5 kB). `calls` is commit_calls.py, a process of 16 threads for each host. Both in turn,
round after round, each time in a new folder.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import common

sys.path.append(str(common.PROJECT / "tests"))

import clusters

CONNECTIONS = 16
FILE = common.PROJECT / "tests" / "data" / "h1_all.root"
SYSTEMS: dict[str, Callable[[Path], clusters.Running]] = {"cephfs": clusters.cephfs, "glusterfs": clusters.glusterfs}


def start(data: Path, folder: Path, number: int) -> common.Server:
    """Start a receiver on a mount; its log is in the local folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"DATA_FOLDER": str(data), "TOKEN": common.TOKEN, "MIN_FREE_SPACE": "0"}
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "2"]
    local = folder / f"host-{number}"
    local.mkdir(exist_ok=True)
    environ = {f"DQM_RECEIVER_{name}": value for name, value in settings.items()}
    return common.Server(local / "data", command, port, environ)


def receivers(data: list[Path], folder: Path, seconds: float) -> float:
    """Return the uploads per second through all hosts together."""
    with ExitStack() as stack, ThreadPoolExecutor(len(data)) as pool:
        servers = [start(path, folder, number) for number, path in enumerate(data)]
        for server in servers:
            stack.callback(server.stop)

        def send(number: int) -> common.Load:
            return common.uploads(servers[number], "receiver", FILE, seconds, CONNECTIONS)

        loads = list(pool.map(send, range(len(data))))
    if errors := sum(load.errors for load in loads):
        raise RuntimeError(f"{errors} uploads failed, see {folder}")
    return sum(load.per_second for load in loads)


def calls(data: list[Path], seconds: float) -> float:
    """Return how many uploads per second the file system lets through."""
    script = str(common.HERE / "commit_calls.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(path), str(CONNECTIONS), str(seconds)], stdout=subprocess.PIPE, text=True
        )
        for path in data
    ]
    return sum(float(process.communicate()[0]) for process in processes)


def measure(cluster: clusters.Cluster, options: common.Options) -> list[list[str]]:
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(options.rounds):
        for hosts in (1, 2):
            for kind in ("receiver", "calls"):
                name = f"{kind}-{hosts}-{number}"
                (cluster.paths[0] / name).mkdir()
                data = [path / name for path in cluster.paths[:hosts]]
                rate = (
                    calls(data, options.seconds)
                    if kind == "calls"
                    else receivers(data, options.folder, options.seconds)
                )
                found.setdefault((kind, hosts), []).append(rate)
                print(f"{cluster.name}: {name}: {rate:.0f}", file=sys.stderr, flush=True)
    rows = []
    for hosts, title in ((1, "one host"), (2, "two hosts")):
        receiver, alone = (median(found[kind, hosts]) for kind in ("receiver", "calls"))
        rows.append([f"{cluster.name}, {title}", f"{receiver:.0f}", f"{alone:.0f}", f"{receiver / alone:.2f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--systems", nargs="*", choices=sorted(SYSTEMS), default=sorted(SYSTEMS))
    chosen, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    options = common.options(__doc__, rounds=3, seconds=10)
    rows = []
    for name in chosen.systems:
        try:
            with SYSTEMS[name](Path(tempfile.mkdtemp(dir=options.folder)) / "c") as cluster:
                rows += measure(cluster, options)
        except clusters.NotHere as error:
            print(f"{name} cannot run here: {error}", file=sys.stderr)
    print("Uploads per second, 16 connections for each host.\n")
    print(common.table(["", "receiver", "calls alone", "receiver / calls"], rows))


if __name__ == "__main__":
    main()
