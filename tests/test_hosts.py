"""Two receivers that share nothing but the data folder, behind nginx. test_cluster.py has them on real network file systems."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import (
    FILES,
    GRAPHS,
    HEADERS,
    HISTOGRAMS,
    NAME,
    PROFILES,
    ROUNDS,
    SEED,
    curl,
    post,
    settings,
    visible,
    wait_until,
)
from faults import assert_promise, outcomes, sha256, uploads_in_progress, variant
from server import Nginx, Server

URL = "https://dqm.example.org"


class Hosts:
    """Two hosts, a and b, and nginx before them."""

    def __init__(self, base: Path) -> None:
        self.folder = base / "data"
        self.a, self.b = (Server(settings(self.folder), base / f"{name}.log", ("--workers", "1")) for name in "ab")
        servers = "\n".join(f"server 127.0.0.1:{host.port} fail_timeout=5s;" for host in (self.a, self.b))
        self.nginx = Nginx(base / "nginx", {"server 127.0.0.1:8080 fail_timeout=5s;": servers})

    def run(self, run: int) -> list[Any]:
        """Return what each host says of a run."""
        return [curl(f"{host.url}/rest/api/runs/{run}").json["agents"]["testagent"] for host in (self.a, self.b)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    yield hosts
    hosts.nginx.stop()
    hosts.a.stop()
    hosts.b.stop()


@pytest.fixture
def hosts(running: Hosts) -> Hosts:
    """The two hosts with an empty folder; one that has died is there again."""
    for host in (running.a, running.b):
        if host.process.poll() is not None:
            host.start()
    for path in [
        *running.folder.glob("*.root"),
        *running.folder.glob(".replaced/*"),
        *running.folder.glob(".receipts/*"),
    ]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return running


def headers(run: int, time_stamp: int = 234) -> dict[str, str]:
    return {**HEADERS, "runNumber": str(run), "timeStamp": str(time_stamp)}


def half_an_upload(host: Server, folder: Path, run: int) -> subprocess.Popen[bytes]:
    """Begin an upload that goes on until its sender's standard input is written and closed."""
    fields = [f"-H{name}: {value}" for name, value in headers(run).items()]
    sender = subprocess.Popen(
        ["curl", "-sS", "-T", "-", "-X", "POST", *fields, host.files],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert sender.stdin is not None
    sender.stdin.write(HISTOGRAMS[:3000])
    sender.stdin.flush()
    wait_until(lambda: len(uploads_in_progress(folder)) == 1, 15)
    return sender


# --- names -------------------------------------------------------------------------------------------------------------


def test_file_of_one_host_is_served_by_both(hosts: Hosts) -> None:
    for number, (one, other) in enumerate([(hosts.a, hosts.b), (hosts.b, hosts.a)]):
        reply = post(one.port, HISTOGRAMS, headers(10 + number))
        assert reply.status == 200
        name = reply.json["filename"]
        assert name in curl(other.files).json["files"]
        assert curl(f"{other.files}/{name}").body == HISTOGRAMS
        assert 10 + number in curl(f"{other.url}/rest/api/runs").json["runs"]
        assert [agent["files"] for agent in hosts.run(10 + number)] == [1, 1]


def test_hosts_agree_on_duplicates_and_replacements(hosts: Hosts) -> None:
    assert post(hosts.a.port, HISTOGRAMS).json.keys() & {"duplicate", "replaced"} == set()
    assert post(hosts.b.port, HISTOGRAMS).json["duplicate"] is True
    assert post(hosts.b.port, PROFILES).json["replaced"] is True
    assert post(hosts.a.port, PROFILES).json["duplicate"] is True
    assert visible(hosts.folder) == {NAME: PROFILES}
    assert [path.read_bytes() for path in (hosts.folder / ".replaced").iterdir()] == [HISTOGRAMS]
    assert outcomes(hosts.folder) == {"stored": 1, "duplicate": 2, "replaced": 1}


def test_uploads_of_a_name_through_nginx_lose_nothing(hosts: Hosts) -> None:
    contents = [HISTOGRAMS, PROFILES, GRAPHS] * 6

    def send(number: int) -> Any:
        answer = hosts.nginx.curl(URL + FILES, "--data-binary", "@-", send=contents[number])
        assert answer.status == 200, answer
        return answer.json

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(send, range(len(contents))))
    assert len(answers) == len(contents)
    assert_promise(hosts.folder, [(NAME, sha256(body)) for body in contents])
    wait_until(lambda: uploads_in_progress(hosts.folder) == [], 15)
    # nginx gave both hosts their share.
    assert all(host.log.read_text().count("upload outcome") >= 3 for host in (hosts.a, hosts.b))


def test_both_hosts_count_the_receipts_of_both(hosts: Hosts) -> None:
    def send(number: int) -> None:
        host = (hosts.a, hosts.b)[number % 2]
        body = HISTOGRAMS[:-100] if number % 5 == 0 else HISTOGRAMS
        assert post(host.port, body, headers(20, number)).status == (400 if number % 5 == 0 else 200)
        if number % 7 == 0:  # a host that has looked before must look again
            hosts.run(20)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(send, range(30)))
    assert outcomes(hosts.folder) == {"stored": 24, "rejected": 6}
    for agent in hosts.run(20):
        assert (agent["files"], agent["rejected"], agent["bytes"]) == (24, 6, 24 * len(HISTOGRAMS))


def test_etag_changes_with_uploads_to_the_other_host(hosts: Hosts) -> None:
    tag = '"none"'
    for time_stamp in range(5):
        assert post(hosts.a.port, HISTOGRAMS, headers(21, time_stamp)).status == 200
        answer = curl(f"{hosts.b.url}/rest/api/runs/21", "-H", f"If-None-Match: {tag}")
        assert answer.status == 200
        assert answer.json["agents"]["testagent"]["files"] == time_stamp + 1
        tag = answer.headers["etag"]


def test_early_404_does_not_last_on_either_host(hosts: Hosts) -> None:
    assert curl(f"{hosts.b.url}/rest/api/runs/123").status == 404
    assert curl(f"{hosts.b.files}/{NAME}").status == 404
    assert post(hosts.a.port, HISTOGRAMS).status == 200
    assert curl(f"{hosts.b.url}/rest/api/runs/123").status == 200
    assert curl(f"{hosts.b.files}/{NAME}").status == 200


def test_two_hosts_keep_every_file_of_a_name(hosts: Hosts) -> None:
    """Both replace one name within a second, over and over: each must see the names as the other left them."""
    chance = random.Random(SEED)
    bodies = [variant(chance) for _ in range(10 * ROUNDS)] + [PROFILES, GRAPHS] * ROUNDS
    ports = [(hosts.a, hosts.b)[number % 2].port for number in range(len(bodies))]

    def send(port: int, body: bytes) -> None:
        # 503: the name changed ten times while the file was compared with it. A sender sends again.
        while (status := post(port, body).status) == 503:
            pass
        assert status == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, ports, bodies))
    assert_promise(hosts.folder, [(NAME, sha256(body)) for body in bodies])


# --- crash recovery ----------------------------------------------------------------------------------------------------


def test_host_that_starts_leaves_uploads_of_others(hosts: Hosts) -> None:
    sender = half_an_upload(hosts.a, hosts.folder, 30)
    hosts.b.kill()
    hosts.b.start()
    assert len(uploads_in_progress(hosts.folder)) == 1
    out, error = sender.communicate(HISTOGRAMS[3000:], timeout=30)
    assert json.loads(out)["status"] == 200, error


def test_other_host_goes_on_when_one_dies(hosts: Hosts) -> None:
    sender = half_an_upload(hosts.a, hosts.folder, 31)
    hosts.a.kill()
    sender.communicate(timeout=30)
    for time_stamp in range(6):  # nginx passes over the dead host
        answer = hosts.nginx.curl(URL + FILES, "--data-binary", "@-", headers=headers(31, time_stamp), send=HISTOGRAMS)
        assert answer.status == 200, answer
    assert curl(f"{hosts.b.url}/rest/api/runs/31").json["agents"]["testagent"]["files"] == 6
    hosts.a.start()
    wait_until(lambda: uploads_in_progress(hosts.folder) == [], 15)
