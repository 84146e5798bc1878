"""Downloads beside nginx's static files; lists and runs with many files and receipts.

Command: python benchmarks/downloads.py [--rounds 5] [--seconds 3] [--folder FOLDER]
Needs: wrk, nginx; strace, to count who copies the bytes.

wrk downloads over four kept connections; nginx has `sendfile on`. Two workers each.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from statistics import median

import common

NAME = "EMChistos_{run}_DQM_1970_01_01_01_{minute:02}_{second:02}.root"
SIZES = {"1 MB": 10**6, "100 MB": 10**8}
RANGE = "50000000-50999999"
PARTS = {"1 MB": None, "100 MB": None, "1 MB of 100 MB, by Range": RANGE}
NUMBERS = (1_000, 10_000, 100_000)
RECEIPTS = 20_000


def downloads(options: common.Options) -> list[list[str]]:
    runs: dict[tuple[str, str], list[common.Load]] = {}
    for _ in range(options.rounds):
        for kind in ("receiver", "nginx"):
            with common.server(options.folder, kind, 2) as server:
                for second, size in enumerate(SIZES.values()):
                    name = NAME.format(run=1, minute=0, second=second)
                    (server.data / name).write_bytes(os.urandom(size))
                os.sync()
                for what, span in PARTS.items():
                    name = NAME.format(run=1, minute=0, second=0 if what == "1 MB" else 1)
                    target = f"{common.FILES if kind == 'receiver' else ''}/{name}"
                    result = common.downloads(server, target, span, options.seconds, 4)
                    if result.errors:
                        raise RuntimeError(f"{kind}: {result.errors} of the downloads of {what} failed")
                    runs.setdefault((what, kind), []).append(result)
    rows = []
    for what in PARTS:
        megabytes = 100 if what == "100 MB" else 1
        ours, theirs = (median(run.per_second for run in runs[what, kind]) for kind in ("receiver", "nginx"))
        cpu = [median(run.cpu for run in runs[what, kind]) * 1e3 for kind in ("receiver", "nginx")]
        rates = f"{ours / theirs:.2f} ({ours * megabytes:.0f} MB/s of {theirs * megabytes:.0f} MB/s)"
        rows.append([what, rates, f"{cpu[0]:.2f} ms, nginx {cpu[1]:.2f} ms"])
    return rows


def copied(folder: Path) -> str:
    """Say which system calls send the bytes of a download of 100 MB, whole and by Range."""
    if shutil.which("strace") is None:
        return "strace is not installed, so the system calls were not counted."
    with common.server(folder, "receiver", 1) as server:
        name = NAME.format(run=1, minute=0, second=1)
        (server.data / name).write_bytes(os.urandom(SIZES["100 MB"]))
        log = folder / "strace.log"
        calls = "trace=sendfile,sendto,sendmsg,write,read,pread64"
        tracer = subprocess.Popen(["strace", "-f", "-qq", "-e", calls, "-o", str(log), "-p", str(server.workers()[0])])
        time.sleep(1)
        server.get(f"{common.FILES}/{name}")
        server.get(f"{common.FILES}/{name}", {**common.HEADERS, "Range": f"bytes={RANGE}"})
        tracer.terminate()
        tracer.wait()
    sums: dict[str, int] = {}
    for call, size in re.findall(r"(?:^|\s)(\w+)(?:\(| resumed).* = (\d+)$", log.read_text(), re.MULTILINE):
        sums[call] = sums.get(call, 0) + int(size)
    parts = ", ".join(f"{call} {size:,} bytes" for call, size in sorted(sums.items(), key=lambda item: -item[1]))
    return f"What moved the bytes of 100 MB and of 1 MB by Range: {parts}."


def milliseconds(server: common.Server, path: str, headers: dict[str, str], status: int, rounds: int) -> float:
    """Return the median time of an answer."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        if server.get(path, {**common.HEADERS, **headers})[0] != status:
            raise RuntimeError(f"{path}: not {status}")
        times.append(time.perf_counter() - began)
    return median(times) * 1e3


def answers(options: common.Options) -> list[list[str]]:
    rows = []
    with common.server(options.folder, "receiver", 1) as server:
        data, made = server.data, 0
        for number in NUMBERS:
            for index in range(made, number):
                (data / NAME.format(run=index // 1000, minute=index // 60 % 60, second=index % 60)).touch()
            made = number
            times = [
                milliseconds(server, common.FILES + query, {}, 200, options.rounds) for query in ("", "?runNumber=0")
            ]
            rows.append([f"list of {number:,} files; 1 run of them", *(f"{took:.1f} ms" for took in times)])
        receipt = {
            "id": "2015-11-24T18:04:12.104223Z-000001-00000000",
            "received_at": "2015-11-24T18:04:12.104223Z",
            "outcome": "stored",
            "filename": NAME.format(run=300005, minute=0, second=0),
            "run": 300005,
            "time_stamp": 234,
            "agent": "EMC",
            "data_status": 0,
            "sender": "default",
            "size": 3886,
            "sha256": "0" * 64,
            "objects": 10,
            "reason": None,
            "reason_class": None,
            "seconds": 0.004,
            "validation_seconds": 0.002,
        }
        run = data / ".receipts" / "300005"
        run.mkdir(mode=0o700, parents=True)
        run.parent.chmod(0o700)
        (run / "earlier.jsonl").write_text(f"{json.dumps(receipt)}\n" * RECEIPTS)
        path = "/rest/api/runs/300005"
        first = milliseconds(server, path, {}, 200, 1)
        later = milliseconds(server, path, {}, 200, 20 * options.rounds)
        unchanged = {"If-None-Match": server.get(path)[2]}
        polled = milliseconds(server, path, unchanged, 304, 20 * options.rounds)
        rows.append([f"run with {RECEIPTS:,} receipts: first, later", f"{first:.1f} ms", f"{later:.1f} ms"])
        rows.append(["the same, unchanged (304)", f"{polled:.1f} ms", ""])
        health = milliseconds(server, "/rest/api/health", {}, 200, 20 * options.rounds)
        metrics = milliseconds(server, "/metrics", {}, 200, options.rounds)
        rows.append(["health; metrics", f"{health:.1f} ms", f"{metrics:.1f} ms"])
    return rows


def main() -> None:
    options = common.options(__doc__, seconds=3)
    head = ["download", "of nginx's rate", "processor time of one"]
    print(common.table(head, downloads(options)), "\n")
    print(copied(options.folder), "\n")
    print(common.table(["answer", "", ""], answers(options)))


if __name__ == "__main__":
    main()
