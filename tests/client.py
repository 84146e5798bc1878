"""What tests send and look at: constants, a receiver's settings, real curl, and a fast HTTP client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
TOKEN = "abcd"
HEADERS = {"token": TOKEN, "runNumber": "123", "timeStamp": "234", "amoreAgent": "testagent", "dataStatus": "1"}
NAME = "testagenthistos_123_DQM_1970_01_01_01_03_54.root"  # what these headers call a file
FILES = "/rest/api/files"

# How often an experiment with chance in it is repeated, and where its chance begins.
ROUNDS = int(os.environ.get("DQM_FAULT_ROUNDS", "3"))
SEED = int(os.environ.get("DQM_FAULT_SEED", "1"))

# Three valid files of different content.
HISTOGRAMS = (DATA / "h1_all.root").read_bytes()
PROFILES = (DATA / "profiles.root").read_bytes()
GRAPHS = (DATA / "named_graphs.root").read_bytes()


def settings(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment of a receiver with this data folder; `more` settings as `max_file_size="1000"`."""
    environ = {"DATA_FOLDER": str(folder), "TOKEN": TOKEN, "MIN_FREE_SPACE": "0"}
    environ.update({name.upper(): value for name, value in more.items()})
    return {f"DQM_RECEIVER_{name}": value for name, value in environ.items()}


def visible(folder: Path) -> dict[str, bytes]:
    """Return what Overwatch sees in a data folder: names and contents."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def receipts(folder: Path, run: int = 123) -> list[dict[str, Any]]:
    """Return the receipts of a run, oldest first; a line that a crash cut short is skipped."""
    found = []
    for path in (folder / ".receipts" / str(run)).glob("*.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return sorted(found, key=lambda receipt: str(receipt["id"]))


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something is so; fail if it is not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"what was waited for has not come within {seconds} s"
        time.sleep(0.02)


class Answer(NamedTuple):
    """What curl printed: the status is 0 where there was no answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    curl: int  # curl's own exit status
    error: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def curl(url: str, *arguments: str, headers: Mapping[str, str] = HEADERS, send: bytes | None = None) -> Answer:
    """Run curl and return the last answer it got; `send` is what it reads from standard input."""
    options = [f"-H{name}: {value}" for name, value in headers.items()]
    run = subprocess.run(
        ["curl", "-sS", "-i", "--http1.1", "--max-time", "120", *options, *arguments, url],
        input=send,
        capture_output=True,
        check=False,
    )
    head, body = b"", run.stdout
    while body.startswith(b"HTTP/"):  # "100 Continue" comes before the answer
        head, _, body = body.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    status = int(lines[0].split()[1]) if head else 0
    return Answer(
        status, {name.lower(): value for name, value in fields.items()}, body, run.returncode, run.stderr.decode()
    )


class Reply(NamedTuple):
    """What an upload in this process was answered."""

    status: int
    json: Any


def post(port: int, body: bytes, headers: Mapping[str, str] = HEADERS, seconds: float = 60.0) -> Reply:
    """Upload a file to 127.0.0.1 without the cost of a curl process; raises OSError or HTTPException without an answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)) as connection:
        connection.request("POST", FILES, body, dict(headers))
        response = connection.getresponse()
        return Reply(response.status, json.loads(response.read()))
