"""Two receivers that share nothing but the data folder, behind nginx. test_cluster.py has them on real network file systems."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import (
    FILES,
    GRAPHS,
    HISTOGRAMS,
    NAME,
    PROFILES,
    ROUNDS,
    SEED,
    Reply,
    curl,
    hidden,
    incoming,
    post,
    settings,
    visible,
    wait_until,
)
from faults import INVALID, assert_promise, begin_upload, empty, headers_of, name_of, outcomes, sent, variant
from history import outcome_of
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
    empty(running.folder)
    return running


# --- names -------------------------------------------------------------------------------------------------------------


def test_file_of_one_host_is_served_by_both(hosts: Hosts) -> None:
    for run, one, other in ((10, hosts.a, hosts.b), (11, hosts.b, hosts.a)):
        paths = (f"{other.files}/{name_of(234, run)}", f"{other.url}/rest/api/runs/{run}")
        assert [curl(path).status for path in paths] == [404, 404]  # which is not remembered
        assert post(one.port, HISTOGRAMS, headers_of(234, run)).status == 200
        assert [curl(path).status for path in paths] == [200, 200]
        assert curl(paths[0]).body == HISTOGRAMS
        assert name_of(234, run) in curl(other.files).json["files"]
        assert run in curl(f"{other.url}/rest/api/runs").json["runs"]
        assert [agent["files"] for agent in hosts.run(run)] == [1, 1]


def test_hosts_agree_on_duplicates_and_replacements(hosts: Hosts) -> None:
    assert post(hosts.a.port, HISTOGRAMS).json.keys() & {"duplicate", "replaced"} == set()
    assert post(hosts.b.port, HISTOGRAMS).json["duplicate"] is True
    assert post(hosts.b.port, PROFILES).json["replaced"] is True
    assert post(hosts.a.port, PROFILES).json["duplicate"] is True
    assert visible(hosts.folder) == {NAME: PROFILES}
    assert hidden(hosts.folder, ".replaced") == [HISTOGRAMS]
    assert outcomes(hosts.folder) == {"stored": 1, "duplicate": 2, "replaced": 1}


def test_uploads_of_a_name_through_nginx_lose_nothing(hosts: Hosts) -> None:
    contents = [HISTOGRAMS, PROFILES, GRAPHS] * 6

    def send(body: bytes) -> int:
        return hosts.nginx.curl(URL + FILES, "--data-binary", "@-", send=body).status

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(send, contents)) == {200}
    assert_promise(hosts.folder, sent(*contents))
    wait_until(lambda: incoming(hosts.folder) == [], 15)
    # nginx gave both hosts their share.
    assert all(host.log.read_text().count("upload outcome") >= 3 for host in (hosts.a, hosts.b))


def test_both_hosts_count_the_receipts_of_both(hosts: Hosts) -> None:
    def send(number: int) -> None:
        host = (hosts.a, hosts.b)[number % 2]
        body = HISTOGRAMS[:-100] if number % 5 == 0 else HISTOGRAMS
        assert post(host.port, body, headers_of(number, 20)).status == (400 if number % 5 == 0 else 200)
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
        assert post(hosts.a.port, HISTOGRAMS, headers_of(time_stamp, 21)).status == 200
        answer = curl(f"{hosts.b.url}/rest/api/runs/21", "-H", f"If-None-Match: {tag}")
        assert answer.status == 200
        assert answer.json["agents"]["testagent"]["files"] == time_stamp + 1
        tag = answer.headers["etag"]


def test_two_hosts_keep_every_file_of_a_name(hosts: Hosts) -> None:
    """Both replace one name within a second, over and over: each must see the names as the other left them."""
    chance = random.Random(SEED)
    valid = [variant(chance) for _ in range(10 * ROUNDS)] + [PROFILES, GRAPHS] * (4 * ROUNDS)
    bodies = valid + [INVALID] * (4 * ROUNDS)
    chance.shuffle(bodies)
    ports = [(hosts.a, hosts.b)[number % 2].port for number in range(len(bodies))]
    seen, over = set[bytes](), threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            for path in hosts.folder.glob("*.root*"):
                with contextlib.suppress(FileNotFoundError):
                    seen.add(path.read_bytes())

    def send(port: int, body: bytes) -> Reply:
        # 503: the name changed 30 times while the file was compared with it. A sender sends again.
        while (reply := post(port, body)).status == 503:
            pass
        return reply

    with ThreadPoolExecutor(9) as pool:
        watching = pool.submit(watch)
        try:
            replies = list(pool.map(send, ports, bodies))
        finally:
            over.set()
        watching.result()
    assert [reply.status for reply in replies] == [400 if body == INVALID else 200 for body in bodies]
    assert seen <= set(valid), "a file was visible that is not valid"
    assert_promise(hosts.folder, sent(*valid))
    answered = Counter(outcome_of(reply.json) if reply.status == 200 else "rejected" for reply in replies)
    assert outcomes(hosts.folder) == answered


# --- crash recovery ----------------------------------------------------------------------------------------------------


def test_other_host_goes_on_when_one_dies(hosts: Hosts) -> None:
    with begin_upload(hosts.a.port, HISTOGRAMS, 234, runNumber="31"):
        wait_until(lambda: len(incoming(hosts.folder)) == 1, 15)
        hosts.a.kill()
    for time_stamp in range(6):  # nginx passes over the dead host
        headers = headers_of(time_stamp, 31)
        answer = hosts.nginx.curl(URL + FILES, "--data-binary", "@-", headers=headers, send=HISTOGRAMS)
        assert answer.status == 200, answer
    assert curl(f"{hosts.b.url}/rest/api/runs/31").json["agents"]["testagent"]["files"] == 6
    hosts.a.start()
    wait_until(lambda: incoming(hosts.folder) == [], 15)
