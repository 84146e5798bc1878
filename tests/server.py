"""Real servers for tests: gunicorn with the shipped settings, nginx with the shipped configuration."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from client import FILES, PROJECT, Answer, curl


class Server:
    """A real gunicorn with the shipped gunicorn.conf.py."""

    def __init__(
        self,
        environ: Mapping[str, str],
        log: Path,
        arguments: tuple[str, ...],
        prefix: tuple[str, ...] = (),
        cwd: Path = PROJECT,
        python: str = sys.executable,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.files = self.url + FILES
        self.log = log
        self.folder = Path(environ["DQM_RECEIVER_DATA_FOLDER"])
        self.environ, self.cwd = {**os.environ, **environ}, cwd
        self.command = [*prefix, python, "-m", "gunicorn", "--bind", f"127.0.0.1:{self.port}", *arguments]
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, cwd=self.cwd, env=self.environ, stdout=output, stderr=output, start_new_session=True
            )
        self.wait()

    def wait(self, seconds: float = 30.0) -> None:
        """Wait until the server answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"gunicorn ended:\n{self.log.read_text()}")
            if curl(self.files, headers={}).status == 400:
                return
            time.sleep(0.05)
        raise RuntimeError(f"gunicorn does not answer:\n{self.log.read_text()}")

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def kill(self) -> None:
        """Kill master and workers at once, as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        end = time.monotonic() + 10
        while time.monotonic() < end:  # the socket listens until the last worker is dead
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                return
            time.sleep(0.01)

    def stop(self, seconds: float = 30.0) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()


def free_port() -> int:
    """Return a free port. It stays bound, so no other test gets it; a server may bind it, too, with SO_REUSEADDR."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    port: int = probe.getsockname()[1]
    probe.detach()  # open to the end of this process
    return port


# --- what is shipped for service ---------------------------------------------------------------------------------------


def adapted(text: str, changes: Mapping[str, str]) -> str:
    """Return a shipped file with other paths and ports; each must be in it."""
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"{old!r} is not in the file")
        text = text.replace(old, new)
    return text


class Nginx:
    """A real nginx that includes the shipped deploy/nginx.conf, adapted; both of its servers listen on `port`."""

    def __init__(self, base: Path, changes: Mapping[str, str]) -> None:
        for program in ("nginx", "openssl", "curl"):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not installed")
        base.mkdir()
        self.port, self.plain_port = free_port(), free_port()
        self.log, self.errors, self.certificate = base / "access.log", base / "error.log", base / "cert.pem"
        names = "subjectAltName=DNS:dqm.example.org,DNS:overwatch.example.org"
        line = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext {names}"
        subprocess.run(
            [*line.split(), "-keyout", base / "key.pem", "-out", self.certificate], check=True, capture_output=True
        )
        paths = {
            "listen 443": f"listen 127.0.0.1:{self.port}",
            "listen 80;": f"listen 127.0.0.1:{self.plain_port};",
            "/etc/ssl/certs/dqm.pem": str(self.certificate),
            "/etc/ssl/certs/overwatch.pem": str(self.certificate),
            "/etc/ssl/private/dqm.key": str(base / "key.pem"),
            "/etc/ssl/private/overwatch.key": str(base / "key.pem"),
            "/var/log/nginx/dqm.log": str(self.log),
            "/var/log/nginx/overwatch.log": str(self.log),
        }
        site = adapted((PROJECT / "deploy/nginx.conf").read_text(), {**paths, **changes})
        (base / "site.conf").write_text(site)
        temporary = [
            f"{kind}_temp_path {base}/{kind};" for kind in ("client_body", "proxy", "uwsgi", "fastcgi", "scgi")
        ]
        (base / "nginx.conf").write_text(
            f"{'user root;' if os.geteuid() == 0 else ''} worker_processes 1; daemon off; pid {base}/pid;\n"
            f"error_log {self.errors} warn;\nevents {{}}\nhttp {{ {' '.join(temporary)} include {base}/site.conf; }}\n"
        )
        self.process = subprocess.Popen(["nginx", "-e", self.errors, "-p", base, "-c", base / "nginx.conf"])
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError(f"nginx does not answer:\n{self.errors.read_text()}")

    def curl(self, url: str, *arguments: str, **more: Any) -> Answer:
        """Run curl through this nginx; the URL as https://dqm.example.org/…"""
        to = ("--connect-to", f"::127.0.0.1:{self.port}", "--cacert", str(self.certificate))
        return curl(url, *to, *arguments, **more)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
