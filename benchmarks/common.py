"""What the benchmarks share: servers, the load generator wrk, the clock of processes, Markdown tables."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import http.client
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PROJECT = HERE.parent
TOKEN = "abcd"
BEFORE = "03f6dfa"
FILES = "/rest/api/files"
HEADERS = {"token": TOKEN, "runNumber": "123", "timeStamp": "234", "amoreAgent": "EMC"}


class Options(argparse.Namespace):
    folder: Path  # for the files and the servers' data; its disk is the one measured
    rounds: int
    seconds: float


def options(description: str | None, rounds: int = 5, seconds: float = 5.0) -> Options:
    """Read the command line, the same for every benchmark, and make the folder."""
    parser = argparse.ArgumentParser(description=description)
    folder = Path(tempfile.gettempdir(), "dqm-receiver-benchmarks")
    parser.add_argument(
        "--folder", type=Path, default=folder, help="for files and data, to be removed later (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="runs of each; the median counts (%(default)s)")
    parser.add_argument("--seconds", type=float, default=seconds, help="of one run (%(default)s)")
    chosen = parser.parse_args(namespace=Options())
    chosen.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and so end the servers, too
    return chosen


def file(folder: Path, name: str) -> Path:
    """Return one of the files that make_files.py makes, making it if it is not there."""
    path = folder / f"{name}.root"
    if not path.exists():
        command = [sys.executable, str(HERE / "make_files.py"), "--folder", str(folder), name]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- processes -------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the processor time that processes have used."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(times[11]) + int(times[12]) for times in fields) / os.sysconf("SC_CLK_TCK")


class Server:
    """A server on a free port of 127.0.0.1."""

    def __init__(
        self, data: Path, command: Sequence[str], port: int, environ: Mapping[str, str], cwd: Path = PROJECT
    ) -> None:
        self.data = data
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = data.parent / "server.log"
        started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=cwd, env={**os.environ, **environ}, stdout=log, stderr=log, start_new_session=True
            )
        self._wait()
        self.seconds_to_answer = time.monotonic() - started

    def _wait(self) -> None:
        end = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.get("/")
                return
            time.sleep(0.01)
        raise RuntimeError(f"the server does not answer:\n{self.log.read_text()}")

    def get(self, path: str, headers: Mapping[str, str] = HEADERS) -> tuple[int, bytes, str]:
        """Return status, body and ETag."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("GET", path, headers=dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers.get("ETag", "")

    def workers(self) -> list[int]:
        return children(self.process.pid)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()


@contextlib.contextmanager
def server(folder: Path, kind: str, workers: int | None = None, data: Path | None = None) -> Iterator[Server]:
    """Run a server with a new data folder, or with one that was filled before.

    `receiver` has its gunicorn.conf.py, `before` is the receiver of an earlier commit. `sync` and `gthread` are Flask with these
    workers of gunicorn, `sync+fsync` and `gthread+fsync` the same with fsync; or `nginx`.
    """
    data = data or new_data(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gunicorn = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}"]
    if workers is not None:
        gunicorn += ["--workers", str(workers)]
    environ = {"DATA_FOLDER": str(data), "TOKEN": TOKEN, "MIN_FREE_SPACE": "0"}
    cwd, worker_class, _, fsync = PROJECT, *kind.partition("+")
    if kind == "receiver":
        command = gunicorn
    elif kind == "before":
        command, cwd = gunicorn, earlier(folder)
    elif worker_class in ("sync", "gthread"):
        command = [
            *gunicorn,
            "--config",
            "/dev/null",
            "--chdir",
            str(HERE),
            "--worker-class",
            worker_class,
            "--threads",
        ]
        command += ["16" if worker_class == "gthread" else "1", "rival_flask:app"]
    else:
        configuration = folder / "nginx.conf"
        configuration.write_text(
            NGINX.format(folder=folder, data=data, port=port, workers=workers or 2, user=getpass.getuser())
        )
        command = ["nginx", "-e", str(folder / "server.log"), "-c", str(configuration)]
    variables = {f"DQM_RECEIVER_{name}": value for name, value in environ.items()} | {
        "RIVAL_FSYNC": "1" if fsync else ""
    }
    running = Server(data, command, port, variables, cwd)
    try:
        yield running
    finally:
        running.stop()


def earlier(folder: Path) -> Path:
    """Return a checkout of the commit that BEFORE names, the receiver before it committed by rename."""
    checkout = folder / f"receiver-{BEFORE}"
    if not checkout.exists():
        subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(checkout)], check=True)
        subprocess.run(["git", "checkout", "--quiet", BEFORE], check=True, cwd=checkout)
    return checkout


NGINX = """
daemon off; user {user}; worker_processes {workers}; pid {folder}/nginx.pid;
events {{}}
http {{
    access_log {folder}/server.log; sendfile on; tcp_nopush on; keepalive_requests 1000000;
    client_max_body_size 0; client_body_temp_path {data}/.incoming;
    server {{ listen 127.0.0.1:{port}; location / {{ root {data}; dav_methods PUT; dav_access user:rw; }} }}
}}
"""


def new_data(folder: Path) -> Path:
    """Make a new data folder, when all that was written before is on the disk and disturbs no measurement.

    No earlier file is removed: ext4 takes a millisecond to make a file for minutes after many have been removed.
    """
    data = Path(tempfile.mkdtemp(prefix="data-", dir=folder))
    os.sync()
    return data


# --- load ------------------------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """What wrk says."""

    per_second: float
    median: float  # seconds
    slowest: float  # 99 of 100 requests are faster, seconds
    errors: int  # connections and requests that failed, time-outs and answers that were not 2xx or 3xx
    cpu: float  # seconds of the server's processors for each request


_DONE = """
function done(summary, latency, requests)
   local e = summary.errors
   io.write(string.format("RESULT %d %d %d %d %d\\n", summary.requests, summary.duration, latency:percentile(50),
            latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"""

_UPLOAD = """
local file = io.open("{path}", "rb")
local body = file:read("*a")
file:close()
local headers = {{ token = "{token}", runNumber = "123", amoreAgent = "EMC" }}
if "{method}" == "POST" then
   local boundary = "------------------------0123456789abcdef"
   body = "--" .. boundary .. "\\r\\nContent-Disposition: form-data; name=\\"file\\"; filename=\\"a.root\\"\\r\\n"
      .. "Content-Type: application/octet-stream\\r\\n\\r\\n" .. body .. "\\r\\n--" .. boundary .. "--\\r\\n"
   headers["Content-Type"] = "multipart/form-data; boundary=" .. boundary
end
local time = {first}
function request()  -- each with its own time stamp, so that each makes a new file
   time = time + 1
   headers["timeStamp"] = tostring(time)
   return wrk.format("{method}", "{method}" == "PUT" and "/EMC_" .. time .. ".root" or "{target}", headers, body)
end
"""


def load(running: Server, script: str, target: str, seconds: float, connections: int) -> Load:
    """Run wrk: one thread, as many connections as said, each with its next request as soon as it has an answer."""
    path = running.log.with_name("wrk.lua")
    path.write_text(script + _DONE)
    time.sleep(0.5)  # every worker is there, and what was begun for the load before is at its end
    pids = running.workers()
    before = cpu_seconds(pids)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s", str(path)]
    output = subprocess.run([*command, running.url + target], check=True, capture_output=True, text=True).stdout
    cpu = cpu_seconds(pids) - before
    line = next(line for line in output.splitlines() if line.startswith("RESULT"))
    requests, duration, median, slowest, errors = (int(word) for word in line.split()[1:])
    return Load(requests / duration * 1e6, median / 1e6, slowest / 1e6, errors, cpu / max(requests, 1))


_first_time_stamps = itertools.count(1_000_000_000, 2_000_000)  # so that no load sends a name twice


def uploads(running: Server, kind: str, path: Path, seconds: float, connections: int, warm_up: float = 1.0) -> Load:
    """Upload a file again and again, after some seconds to warm up, by PUT to nginx and as a form to the others."""
    method = "PUT" if kind == "nginx" else "POST"
    for duration in (warm_up, seconds) if warm_up else (seconds,):
        script = _UPLOAD.format(path=path, token=TOKEN, method=method, first=next(_first_time_stamps), target=FILES)
        result = load(running, script, FILES, duration, connections)
    return result


def downloads(running: Server, target: str, span: str | None, seconds: float, connections: int) -> Load:
    """Download a file, or a span of its bytes, again and again."""
    lines = [f'wrk.headers["token"] = "{TOKEN}"'] + ([f'wrk.headers["Range"] = "bytes={span}"'] if span else [])
    return load(running, "\n".join(lines), target, seconds, connections)
