"""Whole uploads over HTTP beside rivals: uploads a second, and processor seconds of the workers for 1,000 of them.

Command: python benchmarks/uploads.py [--rounds 5] [--seconds 3] [--folder FOLDER]
Needs: wrk, nginx, PyPI's `root` and flask.

wrk uploads a file as a form over 16 kept connections, each time with a new time stamp, so that each upload is stored. All servers have two
workers and are loaded in turn, round after round; medians are compared. The rivals, and what each has done before it answers 200:

    Flask and ROOT  rival_flask.py under gunicorn: the file is written and ROOT has read each key; nothing is synced. With sync workers and
                    with 16 threads (gthread) each, of which the faster one counts.
    with fsync      the same, which fsyncs the file and the folder, too.
    before          this receiver at the commit that common.BEFORE names.
    nginx           PUT of the same bytes: the file is written and renamed; nothing is validated or synced.
    disk            16 threads that do what a 200 needs of the disk and nothing else: write and fsync a file, rename it, fsync the folder,
                    append a line to a log, fsync that; each on its own, without groups.
"""

from __future__ import annotations

import contextlib
import os
import random
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
CONNECTIONS = 16
WORKERS = 2
KINDS = ("receiver", "sync", "gthread", "sync+fsync", "gthread+fsync", "before", "nginx", "disk")


def disk(folder: Path, path: Path, seconds: float) -> common.Load:
    """Return how often the disk can do what a 200 needs of it."""
    data, content = common.new_data(folder), path.read_bytes()
    end = time.monotonic() + seconds
    taken: list[float] = []

    def store(worker: int) -> None:
        names = os.open(data, os.O_RDONLY)
        log = os.open(data / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        began = time.monotonic()
        while began < end:
            upload = data / f"upload{worker}"
            fd = os.open(upload, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(fd, content)
            os.fsync(fd)
            os.rename(upload, data / f"{worker}_{began}.root")
            os.fsync(names)
            os.close(fd)
            os.write(log, bytes(400))
            os.fsync(log)
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


def measure(options: common.Options, path: Path) -> dict[str, list[common.Load]]:
    """Run all servers at once, and load one of them at a time, round after round."""
    runs: dict[str, list[common.Load]] = {kind: [] for kind in KINDS}
    with contextlib.ExitStack() as running:
        kinds = [kind for kind in KINDS if kind != "disk"]
        servers = {kind: running.enter_context(common.server(options.folder, kind, WORKERS)) for kind in kinds}
        for kind, server in servers.items():
            common.uploads(server, kind, path, 1, CONNECTIONS, warm_up=0)
        for number in range(options.rounds):
            for kind in random.Random(number).sample(KINDS, len(KINDS)):
                # In a random order, because nginx and disk leave the file system busy for the one that comes next.
                os.sync()
                if kind == "disk":
                    runs[kind].append(disk(options.folder, path, options.seconds))
                    continue
                result = common.uploads(servers[kind], kind, path, options.seconds, CONNECTIONS, warm_up=0)
                if result.errors:
                    raise RuntimeError(f"{kind}: {result.errors} of the uploads of {path.name} failed")
                runs[kind].append(result)
    return runs


def main() -> None:
    options = common.options(__doc__, seconds=3)
    rates, costs = [], []
    for name, content in CONTENTS.items():
        path = common.file(options.folder, name)
        runs = measure(options, path)
        rate, cpu = (
            {kind: median(getattr(one, field) for one in runs[kind]) for kind in KINDS}
            for field in ("per_second", "cpu")
        )
        flask, synced = (max((f"sync{fsync}", f"gthread{fsync}"), key=rate.__getitem__) for fsync in ("", "+fsync"))
        content += f", {path.stat().st_size / 1e6:.2g} MB"
        beside = (flask, synced, "before", "nginx", "disk")
        ratios = [f"{rate['receiver'] / rate[kind]:.2f} ({rate[kind]:.0f}/s)" for kind in beside]
        rates.append([content, f"{rate['receiver']:.0f}/s", *ratios])
        ratios = [f"{cpu['receiver'] / cpu[kind]:.2f} ({cpu[kind] * 1e3:.2f} s)" for kind in beside]
        costs.append([content, f"{cpu['receiver'] * 1e3:.2f} s", *ratios])
    head = ["receiver", "Flask and ROOT", "with fsync", "before", "nginx", "disk"]
    print(common.table(["uploads a second, of those of", *head], rates), "\n")
    print(common.table(["processor time of 1,000 uploads, of that of", *head], costs))


if __name__ == "__main__":
    main()
