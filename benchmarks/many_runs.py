"""What 10,000 runs of 100 receipts each cost, beside an empty folder: start, first scrape, lists, one run, an upload, memory.

Command: python benchmarks/many_runs.py [--rounds 5] [--folder FOLDER]
Needs: PyPI's `root`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import common
from memory import resident

RUNS, RECEIPTS = 10_000, 100
ADDRESSES = {
    "first scrape": "/metrics",
    "list of runs": "/rest/api/runs",
    "newest runs": "/rest/api/runs?limit=50",
    "list of files": "/rest/api/files",
    "newest receipts": "/rest/api/receipts",
    "one run": "/rest/api/runs/300005",
    "receipts of a run": "/rest/api/runs/300005/receipts",
}


def fill(data: Path) -> None:
    """Write the receipts of earlier runs."""
    for run in range(300_000, 300_000 + RUNS):
        folder = data / ".receipts" / str(run)
        folder.mkdir(mode=0o700, parents=True)
        lines = []
        for number in range(RECEIPTS):
            at = f"2026-11-01T00:{number // 60:02}:{number % 60:02}.000000Z"
            name = f"EMChistos_{run}_DQM_2026_11_01_01_{number // 60:02}_{number % 60:02}.root"
            receipt = {"outcome": "stored", "filename": name, "run": run, "time_stamp": number, "agent": "EMC"}
            receipt |= {"data_status": 0, "sender": "default", "seconds": 0.01, "size": 6000, "sha256": "ab" * 32}
            receipt |= {"objects": 10, "received_at": at, "id": f"{at}-{number:06}-00000000"}
            lines.append(json.dumps(receipt) + "\n")
        (folder / "earlier.jsonl").write_text("".join(lines))
    (data / ".receipts").chmod(0o700)


def measure(folder: Path, runs: bool) -> dict[str, float]:
    """Return seconds, and megabytes of the worker, with or without earlier runs."""
    figures = {}
    with common.server(folder, "receiver", 1) as server:
        if runs:
            fill(server.data)
        else:
            (server.data / ".receipts" / "300005").mkdir(mode=0o700, parents=True)
            (server.data / ".receipts").chmod(0o700)
    with common.server(folder, "receiver", 1, server.data) as server:
        figures["start"] = server.seconds_to_answer
        for what, address in ADDRESSES.items():
            began = time.monotonic()
            status, _, _ = server.get(address)
            figures[what] = time.monotonic() - began
            if status != 200:
                raise RuntimeError(f"{address} answers {status}")
        path = common.file(folder, "h10")
        figures["an upload"] = common.uploads(server, "receiver", path, 1, 1).median
        figures["memory"] = resident(server.workers()[0])
    return figures


def main() -> None:
    options = common.options(__doc__)
    measured = [(measure(options.folder, False), measure(options.folder, True)) for _ in range(options.rounds)]
    rows = []
    for what in measured[0][0]:
        empty, full = (median(pair[index][what] for pair in measured) for index in (0, 1))
        unit, scale = ("MB", 1.0) if what == "memory" else ("ms", 1e3)
        rows.append([what, f"{empty * scale:.1f} {unit}", f"{full * scale:.1f} {unit}"])
    print(common.table(["", "empty folder", f"{RUNS:,} runs of {RECEIPTS} receipts"], rows))


if __name__ == "__main__":
    main()
