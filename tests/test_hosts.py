"""Two hosts that share nothing but the data folder, behind nginx: here two gunicorns, in the slow form on a real NFS.

Each gunicorn has a boot id of its own and so is a host to the receiver. Where user mode Linux is installed, the slow test
boots such a kernel, which exports a folder over NFS 4.2 and mounts it twice, from two network namespaces, as two clients with
caches of their own; in there the other tests of this file run once more.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
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
    PROJECT,
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
BOOT_ID = "/proc/sys/kernel/random/boot_id"
# Two paths to one folder, as two hosts have; else both are the same.
FOLDERS = os.environ.get("DQM_HOSTS_FOLDERS")


class Host(Server):
    """A gunicorn that takes itself for a host of its own."""

    def __init__(self, name: str, base: Path, folder: Path) -> None:
        boot_id = base / f"{name}-boot-id"
        boot_id.write_text(f"{name * 8}-0000-0000-0000-000000000000\n")
        self.name, self.folder = name, folder
        prefix = ("unshare", "--mount", "sh", "-c", f'mount --bind {boot_id} {BOOT_ID} && exec "$@"', "-")
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
            pytest.skip("a host id of its own cannot be given to a process here: that takes root")
        super().__init__(settings(folder), base / f"{name}.log", ("--workers", "1"), prefix)


class Hosts:
    """Two hosts, a and b, and nginx before them."""

    def __init__(self, base: Path) -> None:
        paths = [Path(path) / base.name for path in FOLDERS.split(":")] if FOLDERS else [base / "data"] * 2
        self.a, self.b = Host("a", base, paths[0]), Host("b", base, paths[1])
        self.folder = paths[0]
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


def half_an_upload(host: Host, run: int) -> subprocess.Popen[bytes]:
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
    wait_until(lambda: len(uploads_in_progress(host.folder)) == 1, 15)
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
    sender = half_an_upload(hosts.a, 30)
    hosts.b.kill()
    hosts.b.start()
    assert len(uploads_in_progress(hosts.folder)) == 1
    out, error = sender.communicate(HISTOGRAMS[3000:], timeout=30)
    assert json.loads(out)["status"] == 200, error


def test_other_host_goes_on_when_one_dies(hosts: Hosts) -> None:
    sender = half_an_upload(hosts.a, 31)
    hosts.a.kill()
    sender.communicate(timeout=30)
    for time_stamp in range(6):  # nginx passes over the dead host
        answer = hosts.nginx.curl(URL + FILES, "--data-binary", "@-", headers=headers(31, time_stamp), send=HISTOGRAMS)
        assert answer.status == 200, answer
    assert curl(f"{hosts.b.url}/rest/api/runs/31").json["agents"]["testagent"]["files"] == 6
    hosts.a.start()
    wait_until(lambda: uploads_in_progress(hosts.folder) == [], 15)


# --- a network file system ---------------------------------------------------------------------------------------------

INIT = """#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/mnt TMPDIR=/mnt/tmp LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
exec >/dev/console 2>&1
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /mnt
mount -t tmpfs tmpfs /dev/shm 2>/dev/null || { mkdir -p /dev/shm && mount -t tmpfs tmpfs /dev/shm; }
mkdir -p /mnt/tmp /mnt/modules/lib /mnt/export /run/rpc_pipefs
ln -s /usr/lib/uml/modules /mnt/modules/lib/modules
for module in nfs nfsv4 nfsd veth; do modprobe -d /mnt/modules $module; done
mount -t nfsd nfsd /proc/fs/nfsd
mount -t tmpfs tmpfs /var/lib/nfs
mkdir -p /var/lib/nfs/rpc_pipefs /var/lib/nfs/sm /var/lib/nfs/v4recovery; touch /var/lib/nfs/etab /var/lib/nfs/rmtab
mount -t rpc_pipefs rpc_pipefs /var/lib/nfs/rpc_pipefs
ip link set lo up
mke2fs -q -F /dev/ubda && mount -t ext4 /dev/ubda /mnt/export
rpcbind -w
exportfs -o rw,no_root_squash,no_subtree_check,fsid=0,insecure,sync '*:/mnt/export'
rpc.mountd --no-udp
echo 10 >/proc/fs/nfsd/nfsv4leasetime; echo 10 >/proc/fs/nfsd/nfsv4gracetime
rpc.nfsd 8 && echo Y >/proc/fs/nfsd/v4_end_grace
number=0
for host in a b; do
    number=$((number + 1))
    ip netns add $host; ip link add v$host type veth peer name eth0 netns $host
    ip addr add 10.9.$number.1/24 dev v$host; ip link set v$host up
    ip -n $host addr add 10.9.$number.2/24 dev eth0; ip -n $host link set eth0 up
    ip netns exec $host sh -c "echo $host >/sys/fs/nfs/net/nfs_client/identifier"
    mkdir /mnt/$host
    nsenter --net=/run/netns/$host mount -t nfs4 -o @OPTIONS@ 10.9.$number.1:/ /mnt/$host
done
grep nfs4 /proc/mounts
cd @PROJECT@
DQM_HOSTS_FOLDERS=/mnt/a:/mnt/b @PYTHON@ -m pytest -o addopts= -m "not slow" -p no:cacheprovider \\
    --basetemp /mnt/tmp/pytest -q -rf --color=no tests/test_hosts.py
echo "exit status $?"
sync; poweroff -f
"""


@pytest.mark.slow
@pytest.mark.skipif(FOLDERS is not None, reason="this is the inner run")
def test_all_of_this_holds_on_nfs(tmp_path: Path) -> None:
    needed = ("linux.uml", "rpc.nfsd", "rpc.mountd", "exportfs", "rpcbind", "mke2fs", "modprobe", "ip", "nsenter")
    missing = [program for program in needed if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    options = os.environ.get("DQM_HOSTS_NFS_OPTIONS")
    if options is None:
        documented = re.search(r"`(vers=4\.[12][^`]*)`", (PROJECT / "docs/deployment.md").read_text())
        assert documented
        options = documented[1]
    init, disk = tmp_path / "init", tmp_path / "disk"
    changes = {"@OPTIONS@": options, "@PROJECT@": str(PROJECT), "@PYTHON@": sys.executable}
    text = INIT
    for name, value in changes.items():
        text = text.replace(name, value)
    init.write_text(text)
    init.chmod(0o755)
    with disk.open("wb") as file:
        file.truncate(300 << 20)
    command = ["linux.uml", "rootfstype=hostfs", "rootflags=/", "ro", "mem=1500M", f"ubd0={disk}", f"init={init}"]
    with (tmp_path / "console").open("wb") as console:
        kernel = subprocess.Popen(
            [*command, "con=null", "con0=null,fd:1"],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
        try:
            kernel.wait(600)
        finally:
            if kernel.poll() is None:
                os.killpg(kernel.pid, signal.SIGKILL)
    said = (tmp_path / "console").read_text(errors="replace")
    print(said[said.find("Run /") :])
    assert said.count(" nfs4 ") >= 2, said
    assert "exit status 0" in said, said
