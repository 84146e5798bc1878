"""The files in deploy/: the real nginx, uWSGI and gunicorn with them, and what systemd says of the unit."""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import json
import os
import pwd
import re
import runpy
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import uproot
from client import (
    FILES,
    GRAPHS,
    HEADERS,
    HISTOGRAMS,
    NAME,
    PROFILES,
    PROJECT,
    TOKEN,
    Answer,
    curl,
    receipts,
    settings,
    visible,
    wait_until,
)
from server import Nginx, Server, adapted, free_port
from werkzeug.test import Client

import gunicorn_worker
import receiver
from receiver_requests import FORM_OVERHEAD
from receiver_settings import Settings

DEPLOY = PROJECT / "deploy"
UWSGI = Path(sys.executable).with_name("uwsgi")
# PyPI's package `uwsgi`, in an environment with Flask and what the receiver needs; compiled, so that few have it.
UWSGIS = [UWSGI, Path(os.environ.get("DQM_TEST_UWSGI", "/nonexistent"))]
LARGE = 200 << 20  # bytes
LIMIT = 2 << 30  # bytes a file may have by default
PREFIXES = {"gunicorn": "https://dqm.example.org", "uwsgi": "https://overwatch.example.org/dqm"}

# What stands for Overwatch: it sets up the root logger and has pages of its own.
OVERWATCH = """
import logging
from flask import Flask
logging.basicConfig(level=logging.WARNING)
app = Flask(__name__)
app.add_url_rule("/", view_func=lambda: "Overwatch's page")
"""


def unit() -> configparser.ConfigParser:
    """Return the systemd unit; of a key that is there several times, the last value."""
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "dqm-receiver.service").read_text().replace("\\\n", " "))
    return parser


def gunicorn_setting(name: str) -> Any:
    with mock.patch.dict(os.environ):  # it sets up the metrics' folder
        return runpy.run_path(str(PROJECT / "gunicorn.conf.py"))[name]


class Uwsgi:
    """A real uWSGI with the shipped deploy/uwsgi.ini and deploy/overwatch_wsgi.py."""

    def __init__(self, base: Path, folder: Path, program: Path = UWSGI, **more: str) -> None:
        if not program.exists():
            pytest.skip("uWSGI is not installed for this Python: pip install pyuwsgi")
        self.socket, self.log = base / "uwsgi.sock", base / "uwsgi.log"
        overwatch = base / "python/overwatch/webApp"
        overwatch.mkdir(parents=True)
        (overwatch / "run.py").write_text(OVERWATCH)
        changes = {
            "/opt/overwatch/share/dqm-receiver/": f"{DEPLOY}/",
            "/run/overwatch/": f"{base}/",
        }
        (base / "uwsgi.ini").write_text(adapted((DEPLOY / "uwsgi.ini").read_text(), changes))
        self.command = [str(program), "--ini", str(base / "uwsgi.ini")]
        self.metrics = base / "metrics"
        self.environ = {
            **os.environ,
            **settings(folder),
            "PYTHONPATH": f"{base / 'python'}:{PROJECT}",
            "PROMETHEUS_MULTIPROC_DIR": str(self.metrics),
            **more,
        }
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        self.log.write_text("")
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, env=self.environ, stdout=output, stderr=output, start_new_session=True
            )
        end = time.monotonic() + 60
        while self.log.read_text().count("WSGI app 0") < 2:  # processes
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"uWSGI does not serve:\n{self.log.read_text()}")
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Site:
    """nginx and behind it, by name of the server: data folder, log and what runs."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.folders = {name: base / f"{name}-data" for name in PREFIXES}
        self.gunicorn = self.start_gunicorn()
        self.uwsgi: Uwsgi | None = None
        (base / "uwsgi").mkdir()
        with contextlib.suppress(pytest.skip.Exception):
            self.uwsgi = Uwsgi(base / "uwsgi", self.folders["uwsgi"])
        self.nginx = Nginx(
            base / "nginx",
            {
                "server 127.0.0.1:8080": f"server 127.0.0.1:{self.gunicorn.port}",
                "/run/overwatch/uwsgi.sock": str(base / "uwsgi/uwsgi.sock"),
            },
        )

    def start_gunicorn(self) -> Server:
        """Start gunicorn with the arguments of the systemd unit, but for where its settings are."""
        line = shlex.split(unit()["Service"]["ExecStart"].replace("%%", "%"))
        assert line[1] == "--config"
        return Server(settings(self.folders["gunicorn"]), self.base / "gunicorn.log", tuple(line[3:]))

    def logs(self, name: str) -> str:
        return (self.base / "gunicorn.log" if name == "gunicorn" else self.base / "uwsgi/uwsgi.log").read_text()

    def stop(self) -> None:
        self.nginx.stop()
        self.gunicorn.stop()
        if self.uwsgi:
            self.uwsgi.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    for program in ("nginx", "openssl", "curl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.stop()


class Way:
    """A way to the receiver: through nginx to gunicorn, or to uWSGI with Overwatch."""

    def __init__(self, site: Site, name: str) -> None:
        if name == "uwsgi" and site.uwsgi is None:
            pytest.skip("uWSGI is not installed for this Python: pip install pyuwsgi")
        self.site, self.name, self.folder, self.prefix = site, name, site.folders[name], PREFIXES[name]

    def __call__(self, path: str, *arguments: str, send: bytes | None = None, **changes: Any) -> Answer:
        """Run curl; `changes` of the usual headers, None for none."""
        headers = {name: value for name, value in {**HEADERS, **changes}.items() if value is not None}
        return self.site.nginx.curl(self.prefix + path, *arguments, headers=headers, send=send)

    def connect(self) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.site.nginx.certificate))
        plain = socket.create_connection(("127.0.0.1", self.site.nginx.port), 60)
        return context.wrap_socket(plain, server_hostname=self.prefix.split("/")[2])

    def head(self, length: int, **changes: str) -> bytes:
        """Return the head of an upload of so many bytes."""
        host, _, prefix = self.prefix.removeprefix("https://").partition("/")
        fields = {"Host": host, "Content-Length": str(length), "Connection": "close", **HEADERS, **changes}
        lines = [f"POST {prefix and '/' + prefix}{FILES} HTTP/1.1", *(f"{name}: {fields[name]}" for name in fields)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.fixture(params=list(PREFIXES))
def way(site: Site, request: pytest.FixtureRequest) -> Way:
    return Way(site, request.param)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file of 200 MB: a tree, not compressed."""
    path = tmp_path_factory.mktemp("large") / "large.root"
    values = numpy.random.default_rng(1).random(LARGE // 8 // 4)
    with uproot.recreate(path, compression=None) as file:
        tree = file.mktree("tree", {"x": numpy.float64})
        for _ in range(4):
            tree.extend({"x": values})
    assert path.stat().st_size > LARGE
    return path


def uploads(folder: Path) -> Iterator[Path]:
    """Yield what is being uploaded."""
    return (path for path in (folder / ".incoming").glob("*/*") if path.name != "lock")


def answer_of(connection: ssl.SSLSocket) -> tuple[int, Any]:
    """Read an answer up to the end of the connection."""
    received = b""
    with contextlib.suppress(ssl.SSLError, ConnectionResetError):
        while piece := connection.recv(1 << 16):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"application/json" in head
    return int(head.split()[1]), json.loads(body)


# --- what mostly waits: conftest.py begins it early --------------------------------------------------------------------

EARLY = ("reloads", "pausing")


@pytest.fixture(scope="module")
def pausing(site: Site) -> Iterator[dict[str, Future[tuple[int, Any]]]]:
    """An upload on each way that pauses for 5 s; uWSGI by default waits for 4."""

    def send(way: Way) -> tuple[int, Any]:
        with way.connect() as connection:
            connection.sendall(way.head(len(HISTOGRAMS), runNumber="204") + HISTOGRAMS[:2000])
            time.sleep(5)
            connection.sendall(HISTOGRAMS[2000:])
            return answer_of(connection)

    with ThreadPoolExecutor() as pool:
        names = [name for name in PREFIXES if name == "gunicorn" or site.uwsgi]
        yield {name: pool.submit(send, Way(site, name)) for name in names}


@pytest.fixture(scope="module")
def reloads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Future[None]]]:
    """A reload of each uWSGI, whose master looks once a second whether to go on."""
    with ThreadPoolExecutor() as pool:
        yield {program: pool.submit(reload_tokens, tmp_path_factory.mktemp("reload"), program) for program in UWSGIS}


# --- uploads -----------------------------------------------------------------------------------------------------------


def test_nginx_passes_200_mb_on_without_a_file(way: Way, large: Path) -> None:
    how = ["-F", f"file=@{large}"] if way.name == "gunicorn" else ["--data-binary", f"@{large}"]
    answer = way(FILES, *how, runNumber="200")
    assert answer.status == 200, answer
    assert answer.json["size"] == large.stat().st_size
    stored = way.folder / answer.json["filename"]
    subprocess.run(["cmp", stored, large], check=True)
    assert "buffered to a temporary file" not in way.site.nginx.errors.read_text()
    stored.unlink()


@pytest.mark.parametrize(("form", "expect"), [(True, "Expect:"), (False, "Expect: 100-continue")])
def test_sender_of_100_mb_sees_wrong_token(way: Way, tmp_path: Path, form: bool, expect: str) -> None:
    sent = tmp_path / "sent"
    with sent.open("wb") as file:
        file.truncate(100 << 20)
    how = ["-F", f"file=@{sent}"] if form else ["--data-binary", f"@{sent}"]
    answer = way(FILES, *how, "-H", expect, token="wrong")
    if way.name == "uwsgi" and answer.status != 400:
        # uWSGI closes the connection at once where no more of a body is read: nginx may lose the answer, and says so.
        assert answer.curl or answer.status == 503
    else:
        assert (answer.status, answer.json["message"], answer.curl) == (400, receiver.WRONG_TOKEN, 0)


def test_an_invalid_file_is_refused_with_the_reason(way: Way) -> None:
    answer = way(FILES, "--data-binary", "@-", send=HISTOGRAMS[:-100], runNumber="202")
    assert answer.status == 400
    assert answer.json["message"] == receiver.NOT_VALID
    assert answer.json["reason"]
    assert receipts(way.folder, 202)[0]["outcome"] == "rejected"


def test_a_body_of_unknown_length_arrives(way: Way) -> None:
    answer = way(FILES, "--data-binary", "@-", "-H", "Transfer-Encoding: chunked", send=PROFILES, runNumber="203")
    assert answer.status == 200, answer
    assert visible(way.folder)[answer.json["filename"]] == PROFILES


def test_a_sender_that_pauses_is_waited_for(way: Way, pausing: dict[str, Future[tuple[int, Any]]]) -> None:
    status, answer = pausing[way.name].result(60)
    assert (status, answer["message"]) == (200, receiver.SUCCESS)


def test_body_beyond_limit_is_refused_at_once(way: Way) -> None:
    """nginx answers this one: the limit is the receiver's, and so is the form of the answer."""
    with way.connect() as connection:
        connection.sendall(way.head(LIMIT + (2 << 20)))
        for _ in range(16):
            connection.sendall(bytes(1 << 20))
        connection.settimeout(10)
        received = b""
        while b"}" not in received:
            piece = connection.recv(1 << 16)
            assert piece, received
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert b"Content-Type: application/json" in head
    assert json.loads(body) == {
        "status": 413,
        "message": f"The file is larger than the limit of {LIMIT} bytes",
        "received": None,
    }


REFUSALS = {
    "a lone percent sign": (b"GET /% HTTP/1.1\r\nHost: {host}\r\n\r\n", 400),
    "a long address": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: {host}\r\n\r\n", 414),
    "a method in small letters": (b"get / HTTP/1.1\r\nHost: {host}\r\n\r\n", 400),
    "a path above the root": (b"GET /../../x HTTP/1.1\r\nHost: {host}\r\n\r\n", 400),
    "no path": (b"OPTIONS * HTTP/1.1\r\nHost: {host}\r\n\r\n", 400),
    "a long header": (b"GET / HTTP/1.1\r\nHost: {host}\r\nX: " + b"a" * 40000 + b"\r\n\r\n", 431),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "an unknown version": (b"GET / HTTP/9.1\r\nHost: {host}\r\n\r\n", 505),
    "an unknown transfer encoding": (b"POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: x\r\n\r\n", 501),
    "TRACE": (b"TRACE / HTTP/1.1\r\nHost: {host}\r\n\r\n", 405),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_each_refusal_of_nginx_is_json(site: Site, name: str) -> None:
    sent, status = REFUSALS[name]
    with Way(site, "gunicorn").connect() as connection:
        connection.sendall(sent.replace(b"{host}", b"dqm.example.org"))
        answered, answer = answer_of(connection)
    assert (answered, answer["status"], answer["received"]) == (status, status, None)
    assert answer["message"]


def test_plain_http_hears_of_https(site: Site) -> None:
    answer = curl(f"http://127.0.0.1:{site.nginx.port}{FILES}", "-H", "Host: dqm.example.org")
    assert (answer.status, answer.json["status"]) == (400, 400)
    assert "https://" in answer.json["message"]


def test_a_redirected_upload_stays_an_upload(site: Site) -> None:
    """curl -L turns a POST that meets a 301 or 302 into a GET, which lists the files and answers 200."""
    url = f"http://dqm.example.org:{site.nginx.plain_port}{FILES}"
    to = ["--connect-to", f"dqm.example.org:443:127.0.0.1:{site.nginx.port}", "--cacert", str(site.nginx.certificate)]
    to += ["--resolve", f"dqm.example.org:{site.nginx.plain_port}:127.0.0.1"]
    plain = curl(url, *to, "--data-binary", "@-", send=GRAPHS)
    assert (plain.status, plain.headers["location"]) == (308, f"https://dqm.example.org{FILES}")
    answer = curl(url, *to, "-L", "--data-binary", "@-", send=GRAPHS, headers={**HEADERS, "runNumber": "209"})
    assert (answer.status, answer.json["message"]) == (200, receiver.SUCCESS)


def test_blanks_around_a_header_do_not_matter(way: Way) -> None:
    """RFC 9110, 5.5: tabs, too; nginx hands them on."""
    answer = way(FILES, "--data-binary", "@-", "-H", "runNumber:\t208\t", send=GRAPHS, runNumber=None)
    assert answer.status == 200, answer


# --- downloads ---------------------------------------------------------------------------------------------------------


RANGES = {"0-3": (0, 4), "100-200": (100, 201), "100-": (100, None), "-5": (-5, None)}


def test_file_comes_back_whole_and_in_ranges(way: Way) -> None:
    way(FILES, "--data-binary", "@-", send=HISTOGRAMS)
    answer = way(f"{FILES}/{NAME}")
    assert (answer.status, answer.body) == (200, HISTOGRAMS)
    for asked, (start, end) in RANGES.items():
        answer = way(f"{FILES}/{NAME}", "-r", asked)
        assert (answer.status, answer.body) == (206, HISTOGRAMS[start:end]), asked
    answer = way(f"{FILES}/{NAME}", "-r", f"{len(HISTOGRAMS)}-")
    assert (answer.status, answer.json["status"]) == (416, 416)
    assert way(f"{FILES}/{NAME}", "--head").headers["content-length"] == str(len(HISTOGRAMS))


@pytest.mark.parametrize(("asked", "start", "end"), [(asked, *span) for asked, span in RANGES.items()])
def test_ranges_are_right_with_servers_file_wrapper(client: Client, asked: str, start: int, end: int | None) -> None:
    def sendfile(file: Any, size: int) -> Iterator[bytes]:
        """As uWSGI's: it takes the file's descriptor and knows nothing of a position."""
        yield os.pread(file.fileno(), 1 << 20, 0)
        file.close()

    client.post(FILES, data=HISTOGRAMS, headers=HEADERS)
    headers = {"token": TOKEN, "Range": f"bytes={asked}"}
    answer = client.get(f"{FILES}/{NAME}", headers=headers, environ_overrides={"wsgi.file_wrapper": sendfile})
    assert answer.get_data() == HISTOGRAMS[start:end]


# --- around it ---------------------------------------------------------------------------------------------------------


def test_overwatch_keeps_its_own_pages(site: Site) -> None:
    way = Way(site, "uwsgi")
    assert site.nginx.curl("https://overwatch.example.org/").body == b"Overwatch's page"
    assert way("/").json["message"] == "Not implemented"
    assert way("/rest/api/health", token=None).status == 200
    assert way("/nowhere").json["status"] == 404


def test_logs_have_address_and_upload_but_no_token(way: Way) -> None:
    run = {"gunicorn": 205, "uwsgi": 207}[way.name]
    answer = way(FILES, "--data-binary", "@-", "--interface", "127.0.0.9", send=HISTOGRAMS, runNumber=str(run))
    assert answer.status == 200
    served = re.compile(r"127\.0\.0\.9 \"POST (/dqm)?/rest/api/files HTTP/1\.[01]\" 200 ")
    # Both write their line behind the answer.
    wait_until(lambda: f'run="{run}"' in way.site.nginx.log.read_text(), 10)
    wait_until(lambda: bool(served.search(way.site.logs(way.name))), 10)
    (line,) = [line for line in way.site.nginx.log.read_text().splitlines() if f'run="{run}"' in line]
    assert line.startswith("127.0.0.9 ")
    log = way.site.logs(way.name)
    (line,) = [line for line in log.splitlines() if re.search(f' run="?{run}"? ', line)]
    assert 'outcome="stored"' in line
    assert 'address="127.0.0.9"' in line
    assert f'filename="{answer.json["filename"]}"' in line
    for text in (log, way.site.nginx.log.read_text(), way.site.nginx.errors.read_text()):
        assert TOKEN not in text


def test_nginx_says_that_receiver_is_away(tmp_path: Path) -> None:
    away = {"server 127.0.0.1:8080": f"server 127.0.0.1:{free_port()}", "/run/overwatch/": f"{tmp_path}/"}
    nginx = Nginx(tmp_path / "nginx", away)
    try:
        for prefix in PREFIXES.values():
            answer = nginx.curl(prefix + FILES, "--data-binary", "@-", send=HISTOGRAMS)
            assert answer.status == 503
            assert answer.json["status"] == 503
            assert answer.headers["content-type"] == "application/json"
    finally:
        nginx.stop()


@pytest.mark.parametrize("name", list(PREFIXES))
def test_server_stops_after_upload_in_progress(site: Site, name: str) -> None:
    way = Way(site, name)
    server = site.gunicorn if name == "gunicorn" or not site.uwsgi else site.uwsgi
    process = server.process
    with way.connect() as connection:
        connection.sendall(way.head(len(HISTOGRAMS), runNumber="206") + HISTOGRAMS[:2000])
        wait_until(lambda: any(uploads(way.folder)), 20)
        process.send_signal(signal.SIGTERM)  # to the master, as KillMode=mixed does
        time.sleep(1)
        connection.sendall(HISTOGRAMS[2000:])
        status, answer = answer_of(connection)
    assert (status, answer["message"]) == (200, receiver.SUCCESS)
    process.wait(20)
    server.start()  # for the other tests


def sha256_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def reload_tokens(base: Path, program: Path) -> None:
    """The upload under way is finished, and others are answered meanwhile."""
    tokens = base / "tokens.ini"
    tokens.write_text(f"[tokens]\nEMC = {sha256_of(TOKEN)}\n")
    tokens.chmod(0o600)
    (base / "uwsgi").mkdir()
    folder, port = base / "data", free_port()
    more = {"DQM_RECEIVER_TOKEN": "", "DQM_RECEIVER_TOKENS_FILE": str(tokens), "UWSGI_HTTP_SOCKET": f"127.0.0.1:{port}"}
    server = Uwsgi(base / "uwsgi", folder, program, **more)
    files = f"http://127.0.0.1:{port}/dqm{FILES}"
    head = f"POST /dqm{FILES} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(HISTOGRAMS)}\r\nConnection: close\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items()) + "\r\n"
    try:
        with socket.create_connection(("127.0.0.1", port), 60) as connection:
            connection.sendall(head.encode() + HISTOGRAMS[:2000])
            wait_until(lambda: any(uploads(folder)), 20)
            tokens.write_text(f"[tokens]\nEMC = {sha256_of(TOKEN)} {sha256_of('new')}\n")
            server.process.send_signal(signal.SIGHUP)
            for _ in range(20):
                assert curl(files, headers={"token": TOKEN}).status == 200
                time.sleep(0.1)
            assert not visible(folder)
            connection.sendall(HISTOGRAMS[2000:])
            with connection.makefile("rb") as answer:
                assert b" 200 " in answer.readline()
        wait_until(lambda: "chain reloading complete" in server.log.read_text(), 60)
        assert curl(files, headers={"token": "new"}).status == 200
        # A mistake: the process that starts again waits, and the other goes on.
        tokens.write_text("no tokens")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "the reload waits until this is mended" in server.log.read_text(), 60)
        assert [curl(files, headers={"token": "new"}).status for _ in range(5)] == [200] * 5
        tokens.write_text(f"[tokens]\nEMC = {sha256_of('new')}\n")
        wait_until(lambda: server.log.read_text().count("chain reloading complete") == 2, 60)
        assert curl(files, headers={"token": TOKEN}).status == 400
        assert curl(files, headers={"token": "new"}).status == 200
    finally:
        server.stop()


@pytest.mark.parametrize("program", UWSGIS, ids=["pyuwsgi", "uwsgi"])
def test_a_reload_of_uwsgi_reads_the_tokens(program: Path, reloads: dict[Path, Future[None]]) -> None:
    reloads[program].result()


# --- what agrees with what ---------------------------------------------------------------------------------------------


def test_the_limits_of_nginx_agree_with_the_receivers() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    limit = Settings.read({"DQM_RECEIVER_TOKEN": TOKEN}).max_file_size
    assert set(re.findall(r"client_max_body_size (\S+);", text)) == {f"{(limit + FORM_OVERHEAD) >> 20}m"}
    assert set(re.findall(r"limit of (\d+) bytes", text)) == {str(limit)}
    for name, seconds in {
        "client_header_timeout": gunicorn_worker.HEAD_TIMEOUT,
        "client_body_timeout": gunicorn_worker.RATE_WINDOW,
        r"[ ]send_timeout": gunicorn_worker.ANSWER_TIMEOUT,
    }.items():
        assert set(re.findall(name + r" (\S+);", text)) == {f"{seconds:.0f}s"}, name


def test_systemd_gives_uploads_gunicorns_time() -> None:
    assert int(unit()["Service"]["TimeoutStopSec"]) > gunicorn_setting("graceful_timeout")


UNITS = {
    "dqm-receiver.service": {"/opt/dqm-receiver/bin/gunicorn": sys.executable},
    "dqm-receiver.socket": {},
}


def systemd_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for name, changes in UNITS.items():
        (tmp_path / name).write_text(adapted((DEPLOY / name).read_text(), changes))
    run = systemd_analyze("verify", "--man=no", *(str(tmp_path / name) for name in UNITS))
    assert (run.returncode, run.stdout + run.stderr) == (0, "")


def test_systemd_finds_the_unit_hardened() -> None:
    run = systemd_analyze("security", "--offline=true", "--threshold=20", str(DEPLOY / "dqm-receiver.service"))
    if "unrecognized option" in run.stderr:
        pytest.skip("this systemd-analyze knows no --offline")
    assert run.returncode == 0, run.stdout


def test_gunicorn_serves_on_systemds_socket(tmp_path: Path) -> None:
    """It is handed the socket; where systemd listens, no other account can bind the port during a restart."""
    program = shutil.which("systemd-socket-activate")
    if program is None:
        pytest.skip("systemd-socket-activate is not installed")
    port = free_port()
    environ = {**settings(tmp_path / "data"), "PATH": os.environ["PATH"]}
    command = [program, f"--listen=127.0.0.1:{port}", *(f"--setenv={name}={environ[name]}" for name in environ)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, sys.executable, "-m", "gunicorn"], cwd=PROJECT, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}{FILES}"
        wait_until(lambda: curl(url, "--data-binary", "@-", send=HISTOGRAMS).status == 200, 30)
        assert f"Listening at: http://127.0.0.1:{port} " in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_root_may_start_it_for_another_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """gunicorn --user: the application is loaded by root, and the workers are `nobody`."""
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        folder = Path(base, "data")
        folder.mkdir()
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        arguments = ("--user", "nobody", "--group", str(nobody.pw_gid))
        server = Server(settings(folder), Path(base, "gunicorn.log"), arguments)
        try:
            answer = curl(server.files, "--data-binary", "@-", send=HISTOGRAMS)
            assert answer.status == 200, answer
            assert (folder / answer.json["filename"]).stat().st_uid == nobody.pw_uid
            assert curl(server.url + "/rest/api/health", headers={}).status == 200
            assert curl(server.url + "/metrics", headers={}).status == 200
        finally:
            server.stop()


def test_plain_gunicorn_serves_on_this_host_only() -> None:
    assert gunicorn_setting("bind") == "127.0.0.1:8080"


def test_a_dead_workers_gauges_are_removed(make_server: Callable[..., Server], tmp_path: Path) -> None:
    with mock.patch.dict(os.environ, PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "metrics")):
        server = make_server("--workers", "1")
    (worker,) = server.workers()
    gauges = tmp_path / "metrics" / f"gauge_livesum_{worker}.db"
    gauges.touch()
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.workers() != [worker] and not gauges.exists(), 30)
    assert (tmp_path / "metrics").is_dir()


@pytest.mark.parametrize("field", ["X-Forwarded-Protocol: https", "X-Forwarded-Ssl: off"])
def test_other_forwarding_headers_are_let_be(site: Site, field: str) -> None:
    answer = curl(site.gunicorn.url + "/rest/api/health", "-H", "X-Forwarded-Proto: https", "-H", field, headers={})
    assert answer.status == 200
