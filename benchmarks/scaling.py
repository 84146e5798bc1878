"""Uploads per second with more and more connections and workers: none may fail, and more must not make it slower.

Command: python benchmarks/scaling.py [--rounds 3] [--seconds 4] [--folder FOLDER]
Needs: wrk, PyPI's `root`.

A file of 100 TH1F is uploaded as by uploads.py. In brackets: 99 of 100 uploads are answered within that time. The load
generator runs on the same processors.
"""

from __future__ import annotations

import os
from statistics import median

import common

CONNECTIONS = (1, 2, 4, 8, 16, 64)
WORKERS = (1, 2, 3, 4)


def main() -> None:
    options = common.options(__doc__, rounds=3, seconds=4)
    path = common.file(options.folder, "h100")
    runs: dict[tuple[int, int], list[common.Load]] = {}
    for _ in range(options.rounds):
        for workers in WORKERS:
            with common.server(options.folder, "receiver", workers) as server:
                for connections in CONNECTIONS:
                    result = common.uploads(server, "receiver", path, options.seconds, connections)
                    runs.setdefault((workers, connections), []).append(result)
    rows = []
    for workers in WORKERS:
        row = ["1 worker" if workers == 1 else f"{workers} workers"]
        for connections in CONNECTIONS:
            one = runs[workers, connections]
            rate, slowest = median(run.per_second for run in one), median(run.slowest for run in one)
            row.append(f"{rate:.0f}/s ({slowest * 1e3:.0f} ms)")
        rows.append(row)
    head = [f"{connections} connection{'s' * (connections > 1)}" for connections in CONNECTIONS]
    print(common.table([f"on {len(os.sched_getaffinity(0))} processors", *head], rows), "\n")
    print(f"Uploads that failed: {sum(run.errors for one in runs.values() for run in one)}.")


if __name__ == "__main__":
    main()
