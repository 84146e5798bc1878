"""The init process of a User-Mode Linux whose power is cut: serves a receiver and sends it files, or looks at disks."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import http.client
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from history import look, outcome_of

SHARED, DISK = Path("/mnt"), Path("/media")  # mount points: folders that the host's root file system has
FOLDER = DISK / "data"
PORT = 8080
TOKEN = "abcd"
FILES = "/rest/api/files"
ROOM = 1 << 20  # bytes that the receiver keeps free on the small disk
MODULES = Path("/usr/lib/uml/modules")
FINIT_MODULE = 313  # the number of the system call on x86-64; the host need not have insmod
DM_TARGET_MSG = 0xC138FD0E  # linux/dm-ioctl.h


# --- in the guest ------------------------------------------------------------------------------------------------------


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def tell(name: str, what: object) -> None:
    """Write a file for the host, whole or not at all."""
    part = SHARED / f"{name}.part"
    part.write_text(json.dumps(what))
    part.rename(SHARED / name)


def mark(text: str) -> None:
    """Put a mark into the log of dm-log-writes: the message "mark TEXT"."""
    data = struct.pack("<Q", 0) + f"mark {text}\0".encode()
    head = struct.pack("<3IIIIiIIIQ128s129s7x", 4, 0, 0, 312 + len(data), 312, 0, 0, 0, 0, 0, 0, b"log", b"")
    with Path("/dev/mapper/control").open("rb") as control:
        fcntl.ioctl(control, DM_TARGET_MSG, bytearray(head + data))


def log_writes(size: int) -> str:
    """Put dm-log-writes before the disk, with the second disk as its log, and return the device."""
    for name in ("dm-mod", "dm-log-writes"):
        path = next(MODULES.glob(f"*/kernel/drivers/md/{name}.ko"))
        with path.open("rb") as module:
            if ctypes.CDLL(None).syscall(FINIT_MODULE, module.fileno(), b"", 0):
                raise OSError(f"{name} cannot be loaded")
    table = f"0 {size // 512} log-writes /dev/ubdb /dev/ubdc"
    run("dmsetup", "--noudevsync", "--noudevrules", "create", "log", "--table", table)
    return "/dev/dm-0"  # without udev there is no other name


def request(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> tuple[int, Any]:
    try:
        connection.request(method, path, body, {"token": TOKEN, **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, http.client.HTTPException):
        connection.close()
        raise


class Traffic:
    """Threads that upload files: under new names, and again, mostly with other bytes, under names sent before."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.bodies = [path.read_bytes() for path in sorted((SHARED / "bodies").iterdir())]
        self.events = os.open(SHARED / f"events{config['boot']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_SYNC)
        self.lock = threading.Lock()
        self.names = [tuple(name) for name in config["names"]]  # (run, time stamp), those of earlier lives included
        self.acknowledged = 0

    def write(self, *event: Any) -> None:
        """Append an event to the host's file: it is there when this returns."""
        with self.lock:
            if event[0] == "acknowledged":
                if self.config["logged"]:
                    mark(str(self.acknowledged))
                self.acknowledged += 1
            os.write(self.events, json.dumps(event).encode() + b"\n")

    def send(self, thread: int) -> None:
        boot, chance = self.config["boot"], random.Random(f"{self.config['seed']} {self.config['boot']} {thread}")
        connection = http.client.HTTPConnection("127.0.0.1", PORT)
        run, time_stamp = boot * 1000 + thread, 1_400_000_000 + boot * 100_000 + thread * 20_000
        for number in range(10**6):
            if chance.random() < self.config["again"] and self.names:
                name = chance.choice(self.names)
            else:
                time_stamp += 1
                run += 10 * (chance.random() < 0.1)
                name = (run, time_stamp)
            self.upload(connection, name, chance.choice(self.bodies), f"{boot} {thread} {number}")

    def upload(self, connection: http.client.HTTPConnection, name: tuple[int, int], body: bytes, key: str) -> None:
        headers = {"runNumber": str(name[0]), "timeStamp": str(name[1]), "amoreAgent": "EMC"}
        sha256 = hashlib.sha256(body).hexdigest()
        at = datetime.fromtimestamp(name[1], ZoneInfo("Europe/Zurich"))
        self.write("sent", key, f"EMChistos_{name[0]}_DQM_{at:%Y_%m_%d_%H_%M_%S}.root", sha256)
        status, answer = request(connection, "POST", FILES, body, headers)
        if status != 200:
            print("refused:", status, answer, flush=True)
            self.write("refused", key)
            return
        self.write("acknowledged", key, answer["filename"], answer["sha256"], outcome_of(answer))
        if len(self.names) < 1000:
            self.names.append(name)


def serve(config: dict[str, Any]) -> None:
    """Start a receiver on the disk, tell what was on it before and after, then send it files until the power is cut."""
    device = log_writes(config["size"]) if config["logged"] else "/dev/ubdb"
    run("mount", "-t", config["fs"], device, str(DISK))
    tell(f"before{config['boot']}", look(FOLDER))
    environ = os.environ | {
        "DQM_RECEIVER_DATA_FOLDER": str(FOLDER),
        "DQM_RECEIVER_TOKEN": TOKEN,
        "DQM_RECEIVER_MIN_FREE_SPACE": str(ROOM),
        "PYTHONPATH": f"{Path(__file__).parent}/skip_fsync",
        "SKIP_FSYNC": config["skip"],
    }
    subprocess.Popen([sys.executable, "-m", "gunicorn", "--workers", "2"], cwd=PROJECT, env=environ)
    connection = http.client.HTTPConnection("127.0.0.1", PORT)
    while True:
        try:
            if request(connection, "GET", "/rest/api/health", None, {})[0] == 200:
                break
        except OSError:
            time.sleep(0.1)
    traffic = Traffic(config)
    for number in range(4):  # both workers have surely recovered what a dead one left when each has had an upload
        name = (999, config["boot"] * 10 + number)
        traffic.upload(
            http.client.HTTPConnection("127.0.0.1", PORT), name, traffic.bodies[0], f"{config['boot']} first {number}"
        )
    tell(f"after{config['boot']}", look(FOLDER))
    for thread in range(config["threads"]):
        threading.Thread(target=traffic.send, args=(thread,)).start()
    while True:  # init collects the processes that have lost their parent
        try:
            os.wait()
        except ChildProcessError:
            pass
        time.sleep(1)


def inspect(config: dict[str, Any]) -> None:
    """Tell of each disk what is on it before and after a receiver has started."""
    body = min((SHARED / "bodies").iterdir()).read_bytes()
    import receiver  # before the fork, as it takes seconds here

    for number in range(config["disks"]):
        try:
            options = "nouuid" if config["fs"] == "xfs" else "defaults"  # all disks are images of one
            run("mount", "-t", config["fs"], "-o", options, f"/dev/ubd{chr(ord('b') + number)}", str(DISK))
            before = look(FOLDER)
            child = os.fork()
            if child == 0:
                start_receiver(receiver, body)
            if os.waitpid(child, 0)[1]:
                raise RuntimeError("the receiver does not start")
            tell(f"disk{number}", {"before": before, "after": look(FOLDER)})
            run("umount", str(DISK))
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            traceback.print_exc()
            tell(f"disk{number}", {"error": repr(error)})
        if config["fs"] == "btrfs":
            run("btrfs", "device", "scan", "--forget")
    time.sleep(1000)


def start_receiver(receiver: Any, body: bytes) -> None:
    """Start a receiver on the disk, send it a file, and end this process: its status is 0 if all was well."""
    from werkzeug.test import Client

    status = 1
    try:
        settings = {"DATA_FOLDER": str(FOLDER), "TOKEN": TOKEN, "MIN_FREE_SPACE": str(ROOM)}
        client = Client(receiver.create_app({f"DQM_RECEIVER_{name}": value for name, value in settings.items()}))
        headers = {"token": TOKEN, "runNumber": "999", "timeStamp": "999", "amoreAgent": "EMC"}
        sent = client.post(FILES, data=body, headers=headers)
        listed = client.get(FILES, headers={"token": TOKEN}).json["files"]  # type: ignore[index]
        if sent.status_code == 200 and sorted(look(FOLDER).visible) == listed:
            status = 0
        else:
            print("the receiver does not work:", sent.status_code, sent.text, len(listed), flush=True)
    finally:
        os._exit(status)


def main() -> None:
    os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", TMPDIR="/run", HOME="/run", PYTHONDONTWRITEBYTECODE="1")
    run("mount", "-t", "proc", "proc", "/proc")
    run("mount", "-t", "sysfs", "sys", "/sys")
    run("mount", "-t", "tmpfs", "run", "/run")
    run("mount", "-t", "hostfs", "none", str(SHARED), "-o", os.environ["POWERCUT_SHARED"])
    run("ip", "link", "set", "lo", "up")
    config = json.loads((SHARED / "config").read_text())
    {"serve": serve, "inspect": inspect}[config["role"]](config)


if __name__ == "__main__" and os.getpid() == 1:
    main()
