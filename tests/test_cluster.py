"""Two receivers on two mounts of a cluster file system; mounts, receivers and the file system's own daemons are killed.

Needs root and Debian's ceph-mon, ceph-mgr, ceph-osd, ceph-mds, ceph-fuse and ceph-common; glusterfs-server; bindfs; or
user-mode-linux and nfs-kernel-server for NFS. What is missing is skipped. The seed is DQM_FAULT_SEED.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import clusters
import pytest
from client import GRAPHS, HISTOGRAMS, PROFILES, PROJECT, SEED, TOKEN, curl, settings
from clusters import Cluster
from faults import variant
from history import Found, History, judge, look
from server import Server
from traffic import Traffic, at_once, upload

pytestmark = pytest.mark.slow

only_outside = pytest.mark.skipif(bool(clusters.FOLDERS), reason="this is the inner run")
MIDST = 20  # uploads acknowledged before something is killed


class Pair:
    """Two receivers on one folder, each through its host's mount."""

    def __init__(self, cluster: Cluster, base: Path) -> None:
        self.folders = [path / base.name for path in cluster.paths]
        self.servers: list[Server] = []
        self.history = History()
        try:
            for host, folder in zip(clusters.HOSTS, self.folders, strict=True):
                self.servers.append(Server(settings(folder), base / f"receiver-{host}.log", ("--workers", "2")))
        except BaseException:
            self.stop()
            raise

    @property
    def ports(self) -> list[int]:
        return [server.port for server in self.servers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    def disturb(
        self, what: str, disturb: Callable[[], object], mend: Callable[[], object] = bool, *, ports: Sequence[int] = ()
    ) -> None:
        """Disturb the traffic. The receivers at these ports (or both) must go on; once it is mended, both."""
        with Traffic(self.ports, self.history, SEED) as traffic:
            traffic.wait(self.ports[0], MIDST, 120)
            began = time.monotonic()
            disturb()
            for port in ports or self.ports:
                traffic.wait(port, MIDST, 600)
            seconds = max(traffic.longest_wait(port, began) for port in ports or self.ports)
            print(f"\n{self.folders[0].name}: {what}: waited for at most {seconds:.1f} s; ", end="")
            print(f"{len(self.history.acknowledged)} acknowledged")
            mend()
            for port in self.ports:
                traffic.wait(port, MIDST, 300)
        self.check()

    def check(self) -> Found:
        """Check that both hosts show all that was acknowledged, and the same."""
        listed = [curl(server.files, headers={"token": TOKEN}).json["files"] for server in self.servers]
        assert listed[0] == listed[1]
        found = [look(folder) for folder in self.folders]
        assert found[0].visible == found[1].visible
        assert sorted(found[0].visible) == listed[0]
        for one in found:
            assert judge(one, self.history) == {}
        return found[0]


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from here(clusters.cephfs, tmp_path_factory.mktemp("ceph"))


@pytest.fixture(scope="module")
def gluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from here(clusters.glusterfs, tmp_path_factory.mktemp("gluster"))


def here(make: Callable[[Path], clusters.Running], base: Path) -> Iterator[Cluster]:
    """Yield a running cluster; skip what needs one that cannot run here."""
    try:
        with make(base / "c") as cluster:
            yield cluster
    except clusters.NotHere as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["given"] if clusters.FOLDERS else ["ceph", "gluster"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    if request.param == "given":
        return clusters.given()
    found: Cluster = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def pair(cluster: Cluster, tmp_path: Path) -> Iterator[Pair]:
    with Pair(cluster, tmp_path) as pair:
        yield pair


# --- what the commit needs ---------------------------------------------------------------------------------------------


def test_names_are_coherent_under_the_lock(cluster: Cluster) -> None:
    found = clusters.probe(cluster)
    assert found == clusters.Coherence(found.renames, 0, 0, 0, 0, 0)


# --- one name, two hosts -----------------------------------------------------------------------------------------------


def test_equal_files_at_once_are_stored_once(pair: Pair) -> None:
    for time_stamp in range(5):
        calls = [partial(upload, port, pair.history, 1, time_stamp, HISTOGRAMS) for port in pair.ports * 6]
        at_once(calls)
    assert Counter(sent.outcome for sent in pair.history.acknowledged) == {"stored": 5, "duplicate": 55}
    assert len(pair.check().visible) == 5


def test_different_files_at_once_are_all_kept(pair: Pair) -> None:
    chance = random.Random(SEED)
    for time_stamp in range(5):
        at_once([partial(upload, port, pair.history, 1, time_stamp, variant(chance)) for port in pair.ports * 6])
    assert Counter(sent.outcome for sent in pair.history.acknowledged) == {"stored": 5, "replaced": 55}
    found = pair.check()
    assert len(found.visible) == 5
    assert len(found.replaced) == 55


def test_three_files_of_one_name_within_a_second(pair: Pair) -> None:
    a, b = pair.ports
    for time_stamp in range(10):
        for port, body in ((a, HISTOGRAMS), (b, PROFILES), (a, GRAPHS)):
            assert upload(port, pair.history, 1, time_stamp, body) == 200
    outcomes = [sent.outcome for sent in pair.history.acknowledged]
    assert outcomes == ["stored", "replaced", "replaced"] * 10
    pair.check()


def test_what_one_host_stores_the_other_gives_back(pair: Pair) -> None:
    for port, other in ((0, 1), (1, 0)):
        for time_stamp in range(5):
            assert curl(f"{pair.servers[other].files}/absent").status == 404
            upload(pair.ports[port], pair.history, 10 + port, time_stamp, HISTOGRAMS)
            name = pair.history.acknowledged[-1].name
            assert curl(f"{pair.servers[other].files}/{name}").body == HISTOGRAMS
    pair.check()


# --- in mid-traffic ----------------------------------------------------------------------------------------------------


def test_traffic_through_both_hosts_loses_nothing(pair: Pair) -> None:
    with Traffic(pair.ports, pair.history, SEED) as traffic:
        for port in pair.ports:
            traffic.wait(port, 4 * MIDST, 300)
    assert set(traffic.statuses) == {200}
    pair.check()


def test_killed_receiver_leaves_the_other_working(pair: Pair) -> None:
    server = pair.servers[0]
    pair.disturb("receiver killed", server.kill, server.start, ports=pair.ports[1:])


def test_killed_mount_leaves_the_other_working(cluster: Cluster, pair: Pair) -> None:
    if not cluster.mounts:
        pytest.skip("this mount belongs to the kernel")
    host = (cluster.mounts[0], pair.servers[0])

    def kill() -> None:
        for one in host:
            one.kill()

    def start() -> None:
        for one in host:
            one.start()

    pair.disturb("mount killed", kill, start, ports=pair.ports[1:])


# --- the file system's own daemons -------------------------------------------------------------------------------------


def test_ceph_restarted_mds_loses_nothing(ceph: Cluster, tmp_path: Path) -> None:
    def restart() -> None:
        ceph.daemons["mds"].kill()
        ceph.daemons["mds"].start()

    with Pair(ceph, tmp_path) as pair:
        pair.disturb("MDS restarted", restart)


def test_ceph_stopped_osd_loses_nothing(ceph: Cluster, tmp_path: Path) -> None:
    def stop_for_a_while() -> None:
        ceph.daemons["osd"].end()  # SIGSTOP would not do: the only OSD would wait for a lease that it lost meanwhile
        time.sleep(20)
        ceph.daemons["osd"].start()

    with Pair(ceph, tmp_path) as pair:
        pair.disturb("OSD stopped for 20 s", stop_for_a_while)


def test_gluster_killed_brick_loses_nothing(gluster: Cluster, tmp_path: Path) -> None:
    with Pair(gluster, tmp_path) as pair:
        pair.disturb(
            "brick killed", partial(clusters.kill_brick, gluster, "3"), partial(clusters.start_bricks, gluster)
        )


# --- what goes wrong with caches ---------------------------------------------------------------------------------------


@only_outside
def test_gluster_default_caches_lose_files(tmp_path: Path) -> None:
    for cluster in here(partial(clusters.glusterfs, options=(), volume=()), tmp_path):
        found = clusters.probe(cluster)
        print(found)
        assert found.old_names or found.stale
        with Pair(cluster, tmp_path) as pair:
            a, b = pair.ports
            for time_stamp in range(10):
                for port, body in ((a, HISTOGRAMS), (b, PROFILES), (a, GRAPHS)):
                    upload(port, pair.history, 1, time_stamp, body)
            wrong = judge(look(pair.folders[0]), pair.history)
            print({kind: len(problems) for kind, problems in wrong.items()}, f"of {len(pair.history.acknowledged)}")
            assert wrong["lost"]


@only_outside
@pytest.mark.parametrize("cache", [0, 1])
def test_path_based_fuse_is_not_coherent(tmp_path: Path, cache: int) -> None:
    """A descriptor's fstat follows the name to another file, whatever is cached: such a file system is unfit."""
    for cluster in here(partial(clusters.bindfs, cache=cache), tmp_path):
        found = clusters.probe(cluster)
        print(found)
        assert found.moved_descriptors
        assert bool(found.old_names) is bool(cache)


# --- NFS ---------------------------------------------------------------------------------------------------------------

NFS_PROGRAMS = ("linux.uml", "rpc.nfsd", "rpc.mountd", "exportfs", "rpcbind", "mke2fs", "modprobe", "ip", "nsenter")
NFS_TESTS = "not ceph and not gluster and not nfs and not fuse and not killed_mount"


@only_outside
def test_nfs_gives_what_the_commit_needs(tmp_path: Path) -> None:
    """The tests of this file that need two mounts and no more, in a User-Mode Linux with kernel server and clients.

    The mounts have the documented options, or those of DQM_NFS_OPTIONS.
    """
    try:
        clusters.require(*NFS_PROGRAMS)
    except clusters.NotHere as error:
        pytest.skip(str(error))
    documented = re.search(r"`(vers=4\.2[^`]*)`", (PROJECT / "docs" / "filesystems.md").read_text())
    assert documented
    options = os.environ.get("DQM_NFS_OPTIONS", documented[1])
    disk, log = tmp_path / "disk", tmp_path / "console"
    with disk.open("wb") as file:
        file.truncate(1 << 30)
    variables = {"OPTIONS": options, "PROJECT": PROJECT, "PYTHON": sys.executable, "TESTS": NFS_TESTS}
    command = ["linux.uml", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "mem=2G", f"ubd0={disk}"]
    command += ["con=null", "con0=null,fd:1", f"init={PROJECT}/tests/nfs/init.sh"]
    command += [f'"{name}={value}"' for name, value in variables.items()]
    kernel = clusters.Daemon(command, log)
    try:
        kernel.process.wait(1800)
    finally:
        kernel.kill()
    said = log.read_text(errors="replace")
    print(said[said.find("10.9.1.1:/") :])
    assert said.count(" nfs4 ") >= 2, said
    assert "exit status 0" in said, said
