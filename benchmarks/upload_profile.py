"""Where the processor time of an upload goes: the receiver called without an HTTP server, under cProfile.

Command: python benchmarks/upload_profile.py [--rounds 5] [--folder FOLDER]
Needs: PyPI's `root`, for the files.

Each file is sent as a form, again and again with a new time stamp, to a data folder in memory (/dev/shm), so that no fsync waits. The
time is that without the profiler, the fastest of the rounds. The shares are the profiler's, which makes small functions look dearer than they
are. A built-in function counts for the module that calls it.
"""

from __future__ import annotations

import cProfile
import logging
import os
import pstats
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

PARTS = {
    "validation: walk, names": ("rootcheck", "root_keys", "free_list", "streamer_info", "object_names"),
    "validation: inflate": ("inflate",),
    "validation: uproot, the second reader": ("second_reader", "uproot"),
    "form": ("multipart", "formparser"),
    "request, routing, headers, answer": ("receiver", "receiver_requests", "receiver_settings", "werkzeug"),
    "file: write, hash, compare, commit": ("storage", "uploads", "durable", "turns"),
    "receipt": ("receipts",),
    "JSON of answer, receipt and log": ("json",),
    "log and metrics": ("logging", "receiver_metrics", "prometheus_client"),
}
BOUNDARY = b"------------------------0123456789abcdef"


def uploads(path: Path, number: int, times: Iterator[int]) -> list[dict[str, Any]]:
    """Return the WSGI environments of so many uploads."""
    from werkzeug.test import EnvironBuilder

    part = b'Content-Disposition: form-data; name="file"; filename="a.root"\r\nContent-Type: application/octet-stream'
    body = b"--%b\r\n%b\r\n\r\n%b\r\n--%b--\r\n" % (BOUNDARY, part, path.read_bytes(), BOUNDARY)
    form = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
    return [
        EnvironBuilder(
            common.FILES, method="POST", headers=common.HEADERS | form | {"timeStamp": str(next(times))}, data=body
        ).get_environ()
        for _ in range(number)
    ]


def part_of(file: str) -> str:
    names = {Path(file).stem, *Path(file).parts}
    return next((part for part, known in PARTS.items() if names.intersection(known)), "the rest")


def shares(profile: cProfile.Profile) -> dict[str, float]:
    """Return the share of each part in a profile."""
    seconds: Counter[str] = Counter()
    for (file, _, _), (_, _, own, _, callers) in pstats.Stats(profile).stats.items():
        if file == "~" and callers:  # a built-in
            for (caller, _, _), (_, _, part, _) in callers.items():
                seconds[part_of(caller)] += part
        else:
            seconds[part_of(file)] += own
    return {part: seconds[part] / seconds.total() for part in (*PARTS, "the rest")}


def main() -> None:
    options = common.options(__doc__)
    sys.path.insert(0, str(common.PROJECT))
    memory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(memory)
    import receiver

    logger = logging.getLogger("dqm_receiver")
    logger.addHandler(logging.FileHandler(os.devnull))
    logger.propagate = False
    app = receiver.create_app({"DQM_RECEIVER_DATA_FOLDER": str(memory / "data"), "DQM_RECEIVER_TOKEN": common.TOKEN})
    times = iter(range(10**9))
    statuses: Counter[str] = Counter()

    def send(environs: list[dict[str, Any]]) -> float:
        began = time.process_time()
        for environ in environs:
            b"".join(app(environ, lambda status, headers, error=None: statuses.update([status])))
        return (time.process_time() - began) / len(environs)

    columns, head = [], ["part"]
    for name, number in (("h10", 200), ("h100", 50), ("h1000", 8), ("th2d", 3)):
        path = common.file(options.folder, name)
        send(uploads(path, number, times))
        milliseconds = 1e3 * min(send(uploads(path, number, times)) for _ in range(options.rounds))
        profile = cProfile.Profile()
        profile.runcall(send, uploads(path, number, times))
        head.append(f"{name}: {milliseconds:.2f} ms")
        columns.append(shares(profile))
    assert set(statuses) == {"200 OK"}, statuses
    print(common.table(head, [[part, *(f"{100 * column[part]:.0f} %" for column in columns)] for part in columns[0]]))
    shutil.rmtree(memory)


if __name__ == "__main__":
    main()
