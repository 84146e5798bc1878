"""Whole uploads per second over HTTP, beside what users had before, nginx, and the disk.

Command: python benchmarks/uploads.py [--rounds 5] [--seconds 5] [--folder FOLDER]
Needs: wrk, nginx, PyPI's `root` and flask.

wrk uploads a file as a form over four kept connections, with a new time stamp each, so that each is stored; two
workers. The rivals, run in turn with the receiver, round after round:

    Flask and ROOT  rival_flask.py under the same gunicorn: saves the file, opens it with CERN ROOT, reads every key, no
                    fsync; with sync workers and with four threads (gthread) each, of which the faster one counts
    nginx           PUT of the same bytes; neither validates nor syncs
    disk            four threads that do what a 200 needs of the disk and nothing else: write and fsync a file, link it,
                    fsync the folder, append a line to the receipts, fsync them
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from statistics import median

import common

CONTENTS = {
    "h10": "10 TH1F of 100 bins",
    "h100": "100 TH1F",
    "h1000": "1000 TH1F",
    "th2d": "20 TH2D of 250×250",
}
CONNECTIONS = 4
WORKERS = 2


def disk(folder: Path, path: Path, seconds: float) -> common.Load:
    """Return what the disk lets through."""
    data, content = common.new_data(folder), path.read_bytes()
    end = time.monotonic() + seconds
    taken: list[float] = []

    def store(worker: int) -> None:
        names = os.open(data, os.O_RDONLY)
        receipts = os.open(data / "receipts", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        began = time.monotonic()
        while began < end:
            upload = data / f"upload{worker}"
            fd = os.open(upload, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(fd, content)
            os.fsync(fd)
            os.link(upload, data / f"{worker}_{began}.root")
            os.fsync(names)
            os.unlink(upload)
            os.close(fd)
            os.write(receipts, bytes(400))
            os.fsync(receipts)
            before, began = began, time.monotonic()
            taken.append(began - before)

    threads = [threading.Thread(target=store, args=(number,)) for number in range(CONNECTIONS)]
    cpu = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cpu = time.process_time() - cpu
    taken.sort()
    slowest = taken[int(0.99 * len(taken))]
    return common.Load(len(taken) / seconds, median(taken), slowest, errors=0, cpu=cpu / len(taken))


def run(folder: Path, kind: str, path: Path, seconds: float) -> common.Load:
    if kind == "disk":
        return disk(folder, path, seconds)
    with common.server(folder, kind, WORKERS) as server:
        result = common.uploads(server, kind, path, seconds, CONNECTIONS)
    if result.errors:
        raise RuntimeError(f"{kind}: {result.errors} of the uploads of {path.name} failed")
    return result


def main() -> None:
    options = common.options(__doc__)
    kinds = ("receiver", "sync", "gthread", "nginx", "disk")
    rates, costs = [], []
    for name, content in CONTENTS.items():
        path = common.file(options.folder, name)
        runs: dict[str, list[common.Load]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind in kinds:
                runs[kind].append(run(options.folder, kind, path, options.seconds))
        rate, cpu, slowest = (
            {kind: median(getattr(one, field) for one in runs[kind]) for kind in kinds}
            for field in ("per_second", "cpu", "slowest")
        )
        flask = "sync" if rate["sync"] > rate["gthread"] else "gthread"
        content += f", {path.stat().st_size / 1e6:.2g} MB"
        ours, beside = rate["receiver"], (flask, "nginx", "disk")
        ratios = [
            f"{ours / rate[kind]:.2f} ({rate[kind]:.0f}/s{flask == kind and f', {kind}' or ''})" for kind in beside
        ]
        rates.append([content, f"{ours:.0f}/s", *ratios])
        costs.append([content, *(f"{cpu[kind] * 1e3:.1f} ms" for kind in ("receiver", *beside))])
        costs[-1] += [f"{slowest[kind] * 1e3:.0f} ms" for kind in ("receiver", flask)]
    print(common.table(["file", "receiver", "of Flask and ROOT's", "of nginx's", "of the disk's"], rates), "\n")
    head = ["receiver", "Flask and ROOT", "nginx", "disk", "99 of 100 within: receiver", "Flask and ROOT"]
    print(common.table(["processor time of an upload", *head], costs))


if __name__ == "__main__":
    main()
