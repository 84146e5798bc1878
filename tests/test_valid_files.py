"""Valid files are never refused, whoever wrote them, however often they were changed since, and however large they are.

The long forms: DQM_DAMAGE_COUNT=400 DQM_DAMAGE_SEED=7 python -m pytest -m slow tests/test_valid_files.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uproot
from damage import Layout
from rootfiles import EMPTY_LIST, Key, reason

from rootcheck import InvalidRootFile, check_root_file

DATA = Path(__file__).parent / "data"
REAL = Path(__file__).parent.parent.parent / "shared" / "real"
SEED = int(os.environ.get("DQM_DAMAGE_SEED", "1"))
COUNT = int(os.environ.get("DQM_DAMAGE_COUNT", "400"))  # sessions of a long form
GIGABYTE = 1_000_000_000
BIG = 2 * GIGABYTE  # from here on ROOT's positions have 8 bytes (TFile.h, kStartBigFile)

needs_root = pytest.mark.skipif(find_spec("ROOT") is None, reason="CERN ROOT is not installed: pip install root")
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")


@needs_real
def test_files_of_cern_root_in_shared_real() -> None:
    for name, facts in json.loads((REAL / "expected.json").read_text()).items():
        if facts["valid"]:
            assert check_root_file(REAL / name).keys() == facts["objects"].keys(), name
        else:
            assert reason((REAL / name).read_bytes()), name


# --- files that are changed again and again ----------------------------------------------------------------------------


def _uproot_sessions(path: Path, seed: int) -> int:
    """Write, overwrite, delete and update at random, checking the file after each session; return their number."""
    rng = random.Random(f"uproot {seed}")
    content: set[str] = set()  # paths of objects and, with a slash behind them, of directories
    compression = rng.choice([None, uproot.ZLIB(1), uproot.ZLIB(9), uproot.LZ4(4), uproot.ZSTD(5), uproot.LZMA(3)])
    sessions = rng.randint(2, 5)
    for session in range(sessions):
        try:
            file = uproot.update(path) if session else uproot.recreate(path, compression=compression)
        except AssertionError:  # uproot 5.3 does not always understand its own list of free segments
            return session
        with file:
            for _ in range(rng.randint(1, 8)):
                _change_with_uproot(file, content, rng)
            if not content:
                file["last"] = "not an empty file"
                content.add("last")
        assert set(check_root_file(path)) == {name.split("/")[0] for name in content}, f"{path.name}, session {session}"
    return sessions


def _change_with_uproot(file: Any, content: set[str], rng: random.Random) -> None:
    directories = ["", *sorted(name for name in content if name.endswith("/"))]
    folder = rng.choice(directories)
    name = folder + rng.choice("abcdefgh") * rng.choice([1, 1, 5, 40])
    # uproot leaves it to us that a name is not both an object's and a directory's.
    is_new = name not in content and f"{name}/" not in content
    match rng.randrange(8):
        case 0 | 1 if f"{name}/" not in content:
            bins = rng.choice([3, 10, 100, 3000])
            file[name] = np.histogram(np.array([rng.gauss(0, 1) for _ in range(50)]), bins=bins)
            content.add(name)
        case 2 if f"{name}/" not in content:
            file[name] = rng.choice(["", "text", "x" * 300, "long " * 5000])
            content.add(name)
        case 3 if is_new:
            tree = file.mktree(name, {"x": "f8", "n": "i4"})
            for _ in range(rng.randint(0, 3)):
                tree.extend({"x": np.arange(20.0), "n": np.arange(20, dtype="i4")})
            content.add(name)
        case 4 if is_new and len(directories) < 6:
            file.mkdir(name)
            content.add(f"{name}/")
        case 5 | 6 if name in content:
            del file[name]  # the newest cycle; there may be older ones
            if name not in file.keys(cycle=False):
                content.remove(name)
        case 7 if folder and sum(other.startswith(folder) for other in content) == 1:
            # An empty directory goes, and often comes back.
            del file[folder.rstrip("/")]
            content.remove(folder)
            if rng.random() < 0.5:
                file.mkdir(folder.rstrip("/"))
                content.add(folder)


# In the last three uproot leaves behind ten bytes of a list of free segments that has become shorter.
@pytest.mark.parametrize("seed", [*range(9), 39, 115, 268])
def test_files_that_uproot_changed_again_and_again(seed: int, tmp_path: Path) -> None:
    assert _uproot_sessions(tmp_path / f"uproot-{seed}.root", seed)


@pytest.mark.slow
def test_files_that_uproot_changed_in_many_sessions(tmp_path: Path) -> None:
    sessions = seed = 0
    while sessions < COUNT:
        seed += 1
        sessions += _uproot_sessions(tmp_path / f"uproot-{SEED}-{seed}.root", 1000 * SEED + seed)


# Changes files at random with CERN ROOT; after each session it prints where a copy is and its top-level keys.
# Arguments: folder, first seed, number of files.
ROOT_SESSIONS = """
import json, random, shutil, sys, warnings
warnings.simplefilter("ignore")
import ROOT
ROOT.gErrorIgnoreLevel = ROOT.kError
ROOT.gROOT.SetBatch(True)
folder, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def change(file, rng):
    directories = [file]
    for key in file.GetListOfKeys():
        if key.GetClassName() in ("TDirectory", "TDirectoryFile"):
            directories.append(file.GetDirectory(key.GetName()))
    directory = rng.choice(directories)
    directory.cd()
    name = rng.choice("abcdefgh") * rng.choice([1, 1, 5, 300])
    keys = [key.GetName() for key in directory.GetListOfKeys()]
    others = [key.GetName() for key in directory.GetListOfKeys() if not key.GetClassName().startswith("TDirectory")]
    action = rng.randrange(10)
    if action < 3 and f"dir {name}" not in keys:
        histogram = ROOT.TH1D(name, "title", rng.choice([2, 20, 200, 5000]), -3, 3)
        histogram.SetDirectory(ROOT.nullptr)
        for _ in range(20):
            histogram.Fill(rng.gauss(0, 1))
        option = rng.choice(["", "", "Overwrite", "WriteDelete", "SingleKey"])
        directory.WriteTObject(histogram, name, option)
    elif action == 3:
        tree = ROOT.TNtuple(name, "title", "x:y", rng.choice([200, 32000]))
        for i in range(rng.choice([0, 10, 2000])):
            tree.Fill(i, rng.random())
        tree.Write("", rng.choice([0, ROOT.TObject.kOverwrite]))
        tree.SetDirectory(ROOT.nullptr)
    elif action == 4 and len(directories) < 6:
        if not directory.GetListOfKeys().FindObject(f"dir {name}"):
            made = directory.mkdir(f"dir {name}", "a directory")
            if rng.random() < 0.7:
                made.WriteTObject(ROOT.TNamed("inside", "x" * rng.choice([1, 1000])))
    elif action in (5, 6) and others:
        directory.Delete(rng.choice(others) + rng.choice([";*", ";1", ";2"]))
    elif action == 7 and len(directories) > 1:
        gone = rng.choice(directories[1:]).GetName()
        file.Delete(f"{gone};*") if rng.random() < 0.5 else file.rmdir(gone)
        if rng.random() < 0.5:
            file.mkdir(gone).WriteTObject(ROOT.TNamed("again", ""))
    elif action == 8:
        things = ROOT.TObjArray()
        kept = [ROOT.TObjString(str(i)) for i in range(rng.randint(0, 50))]
        for thing in kept:
            things.Add(thing)
        directory.WriteObject(things, name)
    else:
        file.Write() if rng.random() < 0.5 else file.Flush()

for seed in range(first, first + count):
    rng = random.Random(f"ROOT {seed}")
    path = f"{folder}/root-{seed}.root"
    for session in range(rng.randint(2, 5)):
        compression = rng.choice([0, 101, 109, 207, 404, 505, 301])
        file = ROOT.TFile(path, "UPDATE" if session else "RECREATE", "a title", compression)
        for _ in range(rng.randint(1, 8)):
            change(file, rng)
        if not file.GetListOfKeys().GetEntries():
            file.WriteTObject(ROOT.TNamed("last", ""))
        names = sorted({key.GetName() for key in file.GetListOfKeys()})
        file.Close()
        copy = f"{folder}/root-{seed}-{session}.root"
        shutil.copy(path, copy)
        print(json.dumps([copy, names]), flush=True)
"""


def _root_sessions(folder: Path, seed: int, files: int) -> int:
    """Have CERN ROOT change files in a process of its own; return how many sessions there were."""
    command = [sys.executable, "-c", ROOT_SESSIONS, str(folder), str(seed), str(files)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    for path, names in lines:
        assert sorted(check_root_file(path)) == names, path
    return len(lines)


@needs_root
def test_files_that_root_changed_again_and_again(tmp_path: Path) -> None:
    assert _root_sessions(tmp_path, 1, 12) >= 24


@pytest.mark.slow
@needs_root
def test_files_that_root_changed_in_many_sessions(tmp_path: Path) -> None:
    sessions, seed = 0, 1000 * SEED
    while sessions < COUNT:  # some files in a process, so that ROOT has some past in each
        sessions += _root_sessions(tmp_path, seed, 20)
        seed += 20


# --- files beyond 2 GB -------------------------------------------------------------------------------------------------


Texts = tuple[bytes, bytes, bytes]  # class, name and title of a key


def _record(position: int, directory: int, payload: int, texts: Texts, wide: bool = True) -> bytes:
    """Return the key of an uncompressed record."""
    key = Key(*texts, object_size=payload, position=position, directory=directory, version=1004 if wide else 4)
    size = len(key.pack())
    return key._replace(key_size=size, size=size + payload).pack()


def _write_sparse(path: Path, objects: int, size: int, early: int = 0) -> None:
    """Write a file as ROOT does beyond 2 GB, of zeros mainly, which take no room on the disk."""
    begin, texts = 100, (b"TFile", b"big.root", b"")
    name = b"\x08big.root\x00"
    first = _record(begin, 0, len(name) + 60, texts, wide=False)
    at = begin + len(first) + len(name) + 60
    with path.open("wb") as file:
        keys = []
        for number in range(objects):
            key = _record(at, begin, size, (b"TH1D", b"h%d" % number, b""), wide=at > BIG)
            file.seek(at)
            file.write(key)
            keys.append(key)
            at += len(key) + size
        info_at, info = at, _record(at, begin, 21, (b"TList", b"StreamerInfo", b"Doubly linked list"))
        file.seek(info_at)
        file.write(info + EMPTY_LIST)
        keys_at = info_at + len(info) + 21
        content = struct.pack(">i", objects) + b"".join(keys) + b"whatever"  # ROOT leaves 8 bytes there
        key_list = _record(keys_at, begin, len(content), texts)
        free_at = keys_at + len(key_list) + len(content)
        free = _record(free_at, begin, 18, texts)
        end = free_at + len(free) + 18
        last = max(BIG, -(-end // GIGABYTE) * GIGABYTE)
        file.write(key_list + content + free + struct.pack(">hqq", 1001, end - early, last))
        sizes = len(free) + 18, 1, len(first) + len(name), 8, 0, info_at, len(info) + 21
        file.seek(0)
        file.write(struct.pack(">4siiqqiiiBiqiH", b"root", 1064000, begin, end, free_at, *sizes, 1))
        file.seek(begin)
        lists = len(key_list) + len(content), len(first) + len(name), begin, 0, keys_at
        file.write(first + name + struct.pack(">hIIiiqqqH", 1005, 0, 0, *lists, 1))


@pytest.mark.parametrize("early", [0, 8])
def test_sparse_file_beyond_2_gb(early: int, tmp_path: Path) -> None:
    """ROOT 6.40 says of nothing but an RNTuple that the room behind it begins 8 bytes before its end."""
    path = tmp_path / "big.root"
    _write_sparse(path, objects=6, size=400_000_000, early=early)
    assert path.stat().st_size > BIG
    assert list(check_root_file(path)) == ["h0", "h1", "h2", "h3", "h4", "h5"]


def test_room_that_begins_earlier_is_refused(tmp_path: Path) -> None:
    _write_sparse(tmp_path / "big.root", objects=6, size=400_000_000, early=16)
    with pytest.raises(InvalidRootFile, match="is not the room behind byte"):
        check_root_file(tmp_path / "big.root")


def test_same_kind_of_file_below_2_gb(tmp_path: Path) -> None:
    path = tmp_path / "small.root"
    _write_sparse(path, objects=3, size=1000)
    assert list(check_root_file(path)) == ["h0", "h1", "h2"]
    assert Layout(path.read_bytes()).end == path.stat().st_size


ROOT_BIG = """
import sys, warnings
warnings.simplefilter("ignore")
import ROOT
file = ROOT.TFile(sys.argv[1], "RECREATE", "", 0)
histogram = ROOT.TH1D("h", "", 12_000_000, 0, 1)
histogram.SetDirectory(ROOT.nullptr)
for number in range(24):
    file.WriteTObject(histogram, f"h{number}")
file.mkdir("d").WriteTObject(ROOT.TNamed("inside", "beyond 2 GB"))
file.Delete("h3;1")
file.Delete("h22;1")
file.Close()
file = ROOT.TFile(sys.argv[1], "UPDATE")
file.WriteTObject(ROOT.TNamed("later", ""))
file.Close()
"""


@pytest.mark.slow
@needs_root
def test_file_of_cern_root_beyond_2_gb(tmp_path: Path) -> None:
    """Not uproot's: beyond 2 GB, uproot 5.7 writes the end of the streamer info over the list of free segments."""
    if shutil.disk_usage(tmp_path).free < 4 * GIGABYTE:
        pytest.skip("less than 4 GB of room")
    path = tmp_path / "big.root"
    subprocess.run([sys.executable, "-c", ROOT_BIG, str(path)], check=True, capture_output=True)
    try:
        assert path.stat().st_size > BIG
        assert set(check_root_file(path)) == {*(f"h{number}" for number in range(24)), "d", "later"} - {"h3", "h22"}
    finally:
        path.unlink()
