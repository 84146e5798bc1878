"""Cluster file systems on one machine, each mounted twice as by two hosts: CephFS, GlusterFS, and FUSE with caches.

All take root. Leaving a context ends every daemon and mount that it has started.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

from server import free_port

HOSTS = ("a", "b")
# Two paths and a colon, where a file system is mounted twice already.
FOLDERS = os.environ.get("DQM_CLUSTER_FOLDERS", "")


class NotHere(Exception):
    """A file system cannot run here; the text says why."""


def require(*programs: str) -> None:
    """Raise NotHere where this process is not root or a program is missing."""
    if os.geteuid():
        raise NotHere("it takes root")
    if missing := [program for program in programs if shutil.which(program) is None]:
        raise NotHere(f"not installed: {', '.join(missing)}")


def run(*command: str | Path, seconds: float = 120.0, environ: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environ, check=False)
    if done.returncode:
        raise NotHere(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise NotHere(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)


class Daemon:
    """A program in the foreground that can be killed and started again."""

    def __init__(self, command: Sequence[str | Path], log: Path, prefix: Sequence[str] = ()) -> None:
        self.command, self.log = [*prefix, *command], log
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self, seconds: float = 10.0) -> None:
        """Ask it to end, and kill it where it does not."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.kill()


def mounted(path: Path) -> bool:
    return any(line.split()[1] == str(path) for line in Path("/proc/mounts").read_text().splitlines())


class Mount:
    """One host's mount of a shared file system by FUSE."""

    def __init__(self, path: Path, command: Sequence[str | Path], log: Path, prefix: Sequence[str] = ()) -> None:
        self.path = path
        path.mkdir()
        self.daemon = Daemon(command, log, prefix)
        self._wait()

    def _wait(self) -> None:
        def ready() -> bool:
            if self.daemon.process.poll() is not None:
                self.daemon.start()
            return mounted(self.path)

        try:
            wait_until(ready, 120, f"mount of {self.path}")
        except NotHere as error:
            raise NotHere(f"{error}\n{self.daemon.log.read_text(errors='replace')[-2000:]}") from None

    def kill(self) -> None:
        """Kill the client at once, as a host dies."""
        self.daemon.kill()

    def start(self) -> None:
        """Mount again."""
        self.unmount()
        self.daemon.start()
        self._wait()

    def unmount(self) -> None:
        while mounted(self.path):
            subprocess.run(["umount", "--lazy", self.path], check=False, capture_output=True)
        self.daemon.end()


class Cluster:
    """A file system mounted by two hosts, and the daemons behind it by name."""

    def __init__(self, name: str, base: Path | None = None) -> None:
        self.name, self.base = name, base or Path()
        self.mounts: list[Mount] = []
        self.daemons: dict[str, Daemon] = {}

    @property
    def paths(self) -> list[Path]:
        return [mount.path for mount in self.mounts] or [Path(path) for path in FOLDERS.split(":")]

    def stop(self) -> None:
        for mount in self.mounts:
            mount.unmount()
        for daemon in reversed(self.daemons.values()):
            daemon.end(2)


Running = contextlib.AbstractContextManager[Cluster]


def given() -> Cluster:
    """Return the file system that is mounted already."""
    return Cluster("given")


# --- CephFS ------------------------------------------------------------------------------------------------------------

CEPH = """[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{port}
ms bind msgr2 = false
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block size = 6442450944
osd memory target = 939524096
mds cache memory limit = 268435456
run dir = {base}
admin socket = {base}/$name.asok
log file = {base}/$name.log
crash dir = {base}
mon data = {base}/mon
osd data = {base}/osd
mgr data = {base}/mgr
mds data = {base}/mds
keyring = {base}/keyring
"""


@contextlib.contextmanager
def cephfs(base: Path, timeout: int = 60, autoclose: int = 300) -> Iterator[Cluster]:
    """Run CephFS: a monitor, a manager, an OSD with bluestore on a file, an MDS, and two ceph-fuse mounts.

    A client that is silent for `timeout` seconds is stale, and after `autoclose` seconds evicted: Ceph's own defaults.
    """
    require("ceph", "ceph-mon", "ceph-mgr", "ceph-osd", "ceph-mds", "ceph-fuse")
    cluster = Cluster("CephFS", base)
    base.mkdir()
    for name in ("mon", "osd", "mgr", "mds"):
        (base / name).mkdir()
    conf = base / "ceph.conf"
    fsid, port = str(uuid.uuid4()), free_port()
    conf.write_text(CEPH.format(fsid=fsid, port=port, base=base))

    def ceph(*arguments: str) -> str:
        """Run the command ceph.

        Without authentication a client may send a command before it has the monitor's map, and is refused (EPERM): programs
        fail and daemons end at their start for no other reason, so both are tried again.
        """
        end = time.monotonic() + 60
        while True:
            try:
                return run("ceph", "-c", conf, "--connect-timeout", "60", *arguments)
            except NotHere:
                if time.monotonic() > end:
                    raise
            time.sleep(0.5)

    def start(name: str, *command: str) -> None:
        cluster.daemons[name] = Daemon([*command, "-c", conf, "-f"], base / f"{name}.out")

    try:
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{port}]", base / "monmap")
        run("ceph-mon", "-c", conf, "-i", "a", "--mkfs", "--monmap", base / "monmap")
        start("mon", "ceph-mon", "-i", "a")
        start("mgr", "ceph-mgr", "-i", "x")
        osd = str(uuid.uuid4())
        ceph("osd", "new", osd)
        run("ceph-osd", "-c", conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        start("osd", "ceph-osd", "-i", "0")
        for pool in ("metadata", "data"):
            ceph("osd", "pool", "create", pool, "8")
        ceph("fs", "new", "cephfs", "metadata", "data")
        ceph("fs", "set", "cephfs", "session_timeout", str(timeout))
        ceph("fs", "set", "cephfs", "session_autoclose", str(autoclose))
        start("mds", "ceph-mds", "-i", "a")

        def active() -> bool:
            for daemon in cluster.daemons.values():
                if daemon.process.poll() is not None:
                    daemon.start()
            return "up:active" in ceph("mds", "stat")

        wait_until(active, 300, "MDS")
        for host in HOSTS:
            path = base / f"mount-{host}"
            client: list[str | Path] = ["ceph-fuse", "-c", conf, "-f", "--pid-file", base / f"{host}.pid", path]
            cluster.mounts.append(Mount(path, client, base / f"mount-{host}.out"))
        yield cluster
    finally:
        cluster.stop()


# --- FUSE with caches --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bindfs(base: Path, cache: int) -> Iterator[Cluster]:
    """Mount one folder twice through bindfs: locks reach across, names and attributes are cached for so many seconds."""
    require("bindfs")
    cluster = Cluster(f"FUSE, caches of {cache} s", base)
    base.mkdir()
    (base / "shared").mkdir()
    options = f"entry_timeout={cache},attr_timeout={cache},negative_timeout={cache}"
    try:
        for host in HOSTS:
            path = base / f"mount-{host}"
            program = ["bindfs", "-f", "--multithreaded", "--enable-lock-forwarding", "-o", options]
            cluster.mounts.append(Mount(path, [*program, base / "shared", path], base / f"mount-{host}.out"))
        yield cluster
    finally:
        cluster.stop()


# --- GlusterFS ---------------------------------------------------------------------------------------------------------

COHERENT = ("entry-timeout=0", "attribute-timeout=0", "negative-timeout=0")
COHERENT_VOLUME = ("performance.stat-prefetch off",)
BRICKS = ("1", "2", "3")
_numbers = itertools.count()  # of clusters, each with a network of its own


@contextlib.contextmanager
def glusterfs(
    base: Path, options: Sequence[str] = COHERENT, volume: Sequence[str] = COHERENT_VOLUME
) -> Iterator[Cluster]:
    """Run GlusterFS, replica 3: a network namespace for each of the three servers, and two mounts.

    `options` are of the mounts, `volume` those of the volume.
    """
    require("glusterd", "gluster", "glusterfs", "ip")
    cluster = Cluster("GlusterFS, replica 3", base)
    base.mkdir()
    number = next(_numbers)
    tag, network = f"g{os.getpid() % 100000}n{number}", f"10.77.{number}"
    bridge = f"{tag}br"

    def inside(server: str, *command: str | Path) -> list[str]:
        """Return a command to run in a server's network namespace, with state folders of its own."""
        state = base / f"server-{server}"
        binds = "".join(
            f"mount --bind {state}/{name} {path} && "
            for name, path in (("lib", "/var/lib/glusterd"), ("log", "/var/log/glusterfs"), ("run", "/run"))
        )
        words = " ".join(str(word) for word in command)
        return ["ip", "netns", "exec", f"{tag}{server}", "unshare", "--mount", "sh", "-c", f"{binds}exec {words}"]

    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "addr", "add", f"{network}.100/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        for server in BRICKS:
            for name in ("lib", "log", "run", "brick"):
                (base / f"server-{server}" / name).mkdir(parents=True)
            namespace, link = f"{tag}{server}", f"{tag}v{server}"
            run("ip", "netns", "add", namespace)
            run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            run("ip", "link", "set", link, "master", bridge, "up")
            run("ip", "-n", namespace, "addr", "add", f"{network}.{server}/24", "dev", "eth0")
            run("ip", "-n", namespace, "link", "set", "eth0", "up")
            run("ip", "-n", namespace, "link", "set", "lo", "up")
            cluster.daemons[f"server {server}"] = Daemon(
                inside(server, "glusterd", "--no-daemon", "--log-level", "WARNING"), base / f"glusterd-{server}.out"
            )

        gluster = partial(_gluster, cluster)

        def ready() -> bool:
            with contextlib.suppress(NotHere):
                gluster("pool", "list")
                return True
            return False

        wait_until(ready, 60, "glusterd")
        for server in BRICKS[1:]:
            gluster("peer", "probe", f"{network}.{server}")
        wait_until(lambda: gluster("pool", "list").count("Connected") == 3, 60, "peers")
        bricks = [f"{network}.{server}:{base}/server-{server}/brick" for server in BRICKS]
        gluster("volume", "create", "dqm", "replica", "3", *bricks, "force")
        gluster("volume", "set", "dqm", "network.ping-timeout", "5")
        for option in volume:
            gluster("volume", "set", "dqm", *option.split())
        gluster("volume", "start", "dqm")
        for host in HOSTS:
            path = base / f"mount-{host}"
            command = ["glusterfs", "--no-daemon", f"--volfile-server={network}.1", "--volfile-id=dqm"]
            command += [f"--log-file={base}/mount-{host}.log", *(f"--{option}" for option in options), str(path)]
            cluster.mounts.append(Mount(path, command, base / f"mount-{host}.out"))
        yield cluster
    finally:
        cluster.stop()
        for pid in _in_namespaces([f"{tag}{server}" for server in BRICKS]):  # the bricks that glusterd has started
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for server in BRICKS:
            subprocess.run(["ip", "netns", "delete", f"{tag}{server}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", bridge], check=False, capture_output=True)


def _in_namespaces(names: Sequence[str]) -> list[int]:
    pids = []
    for name in names:
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
        pids += [int(pid) for pid in re.findall(r"\d+", listed)]
    return pids


def _gluster(cluster: Cluster, *arguments: str) -> str:
    """Run the command gluster on server 1, and return what it printed."""
    pid = cluster.daemons["server 1"].process.pid
    return run("nsenter", f"--target={pid}", "--mount", "--net", "gluster", "--mode=script", *arguments)


def kill_brick(cluster: Cluster, server: str) -> None:
    brick = f"{cluster.base}/server-{server}/brick".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"glusterfsd") and brick in words:
                os.kill(int(path.parent.name), signal.SIGKILL)


def start_bricks(cluster: Cluster) -> None:
    """Start the bricks that have been killed."""
    _gluster(cluster, "volume", "start", "dqm", "force")


# --- what a file system gives ------------------------------------------------------------------------------------------


class Coherence(NamedTuple):
    """How often a file system failed, of so many times that one host renamed a file over a name."""

    renames: int
    unlocked: int  # the other host could take a lock that was held
    old_names: int  # the other host saw the old file under the name, though it held the lock
    old_bytes: int  # it read the old file's bytes
    moved_descriptors: int  # fstat of a file that the other host had open followed the name to the new file
    stale: int  # opening it or looking at it failed with ESTALE


def probe(cluster: Cluster, renames: int = 10) -> Coherence:
    """Rename files over one name on one mount, under a lock, and look at the name on the other, under the same lock."""
    one, other = cluster.paths
    unlocked = old_names = old_bytes = moved = stale = 0
    (one / "probe.lock").touch()
    with (one / "probe.lock").open("r+") as lock, (other / "probe.lock").open("r+") as other_lock:
        for size in range(1, renames + 1):
            with locked(lock):
                (one / "probe.new").write_bytes(b"x" * size)
                (one / "probe.new").rename(one / "probe")
                try:
                    fcntl.flock(other_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    unlocked += 1
                except BlockingIOError:
                    pass
            with locked(other_lock):
                old_names += (other / "probe").stat().st_size != size
            try:
                with (other / "probe").open("rb") as file:  # which fills the other's caches, too
                    old_bytes += len(file.read()) != size
                    with locked(lock):
                        (one / "probe.new").write_bytes(b"x" * (size + 1000))
                        (one / "probe.new").rename(one / "probe")
                    moved += os.fstat(file.fileno()).st_size == size + 1000
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                stale += 1
    return Coherence(renames, unlocked, old_names, old_bytes, moved, stale)


@contextlib.contextmanager
def locked(file: TextIO) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
