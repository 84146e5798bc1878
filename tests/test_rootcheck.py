"""The promises of rootcheck: which files it accepts, which it refuses and why, and which objects it finds."""

from __future__ import annotations

import contextlib
import errno
import json
import lzma
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cramjam
import numpy
import pytest
import uproot
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from rootfiles import (
    BEGIN,
    COMPRESS,
    EMPTY_LIST,
    TEXT,
    File,
    Key,
    block,
    check,
    compressed,
    one_object,
    reason,
    small_file,
    string,
    tnamed,
    tobject,
    versioned,
)

import root_keys
import rootcheck
import second_reader
from rootcheck import InvalidRootFile, RootObject, check_root_file

PROJECT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
EXPECTED: dict[str, dict[str, Any]] = json.loads((DATA / "expected.json").read_text())
NO_FREE_LIST = {"free_list": 0, "free_list_size": 0}  # as ROOT leaves a file that it has saved but not closed


def refuse(content: bytes, text: str = "") -> None:
    """Assert that a file of this content is refused for a reason that holds this text."""
    refusal = reason(content)
    assert refusal and text in refusal


def put(content: bytes, at: int, form: str, *values: int) -> bytes:
    """Return content with these numbers at byte `at`."""
    new = struct.pack(form, *values)
    at %= len(content)
    return content[:at] + new + content[at + len(new) :]


# --- files of CERN ROOT ------------------------------------------------------------------------------------------------

INVALID = {
    "deleted_all.root": "holds no objects",
    "no_keys.root": "holds no objects",
    "never_closed.root": "never closed",
    "truncated.root": "cut short: it has 3340 bytes of the 3341",
}
# Objects whose GetName() lies elsewhere than a TNamed's or in no payload at all, but is not the name of their key:
# that of a TGaxis behind its bases TLine and TAttText; that of a TParticle in ROOT's table of particles.
NAMED_LIKE_THEIR_KEYS = ("TGaxis", "TParticle")


def test_every_file_of_root_is_expected() -> None:
    assert sorted(EXPECTED) == sorted(path.name for path in DATA.glob("*.root"))
    assert {name for name, facts in EXPECTED.items() if not facts["valid"]} == INVALID.keys()
    assert len(EXPECTED) > 80


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in INVALID])
def test_objects_are_those_that_root_lists(name: str) -> None:
    """Keys and stored classes are ROOT's; so are the descriptions where ROOT knew the class and could name the object."""
    found, expected = check_root_file(DATA / name), EXPECTED[name]["objects"]
    assert {key: found[key].class_name for key in found} == {key: facts["class"] for key, facts in expected.items()}
    for key, facts in expected.items():
        if "root" not in facts or facts["class"] in NAMED_LIKE_THEIR_KEYS:
            assert found[key].name == key
        elif facts["root"].endswith((f" {facts['class']}", " TDirectoryFile")):  # which ROOT stores as TDirectory
            assert found[key].description == facts["root"]


@pytest.mark.parametrize("name", INVALID)
def test_invalid_files_of_root(name: str) -> None:
    with pytest.raises(InvalidRootFile, match=INVALID[name]):
        check_root_file(DATA / name)


# --- files of uproot ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compression",
    [None, uproot.ZLIB(1), uproot.ZLIB(9), uproot.LZMA(1), uproot.LZ4(4), uproot.ZSTD(5)],
    ids=lambda compression: "none" if compression is None else f"{type(compression).__name__}({compression.level})",
)
def test_histograms_trees_and_directories_of_uproot(compression: Any, tmp_path: Path) -> None:
    path = tmp_path / "uproot.root"
    with uproot.recreate(path, compression=compression) as file:
        file["h"] = numpy.histogram(numpy.arange(1000) % 37, bins=50)
        file["one/two/h2"] = numpy.histogram2d(numpy.arange(100) % 7, numpy.arange(100) % 11)
        file["text"] = "plain text " * 100
        file.mktree("tree", {"x": numpy.float64})
        file["tree"].extend({"x": numpy.arange(5000.0)})
        file["tree"].extend({"x": numpy.arange(5000.0)})
    assert check_root_file(path) == {
        "h": RootObject("h", "TH1D"),
        "one": RootObject("one", "TDirectory"),
        "text": RootObject(("plain text " * 100)[:1000], "TObjString"),
        "tree": RootObject("tree", "TTree"),
    }


def test_key_lists_of_uproot_that_grow(tmp_path: Path) -> None:
    path = tmp_path / "uproot.root"
    with uproot.recreate(path) as file:
        for number in range(200):
            file[f"folder{number % 3}/text{number}"] = "text"
            file[f"text{number}"] = "text"
            if number % 60 == 0:
                assert f"text{number}" in check_root_file(path)
    assert len(check_root_file(path)) == 203


# --- check_root_file ---------------------------------------------------------------------------------------------------


def test_paths_of_any_kind(tmp_path: Path) -> None:
    """uproot would take these names for an object in a file, a pattern and an address."""
    content = small_file().close()
    for name in ("a:b.root", "a*b.root", "http:", "été Ω.root"):
        path = tmp_path / name
        path.write_bytes(content)
        assert check_root_file(path) == check_root_file(str(path)) == check(content)


@pytest.mark.parametrize("content", [small_file().close(), b""], ids=["valid", "invalid"])
def test_descriptor_stays_open_at_its_position(content: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(7)
        with contextlib.suppress(InvalidRootFile):
            check_root_file(file.fileno())
        assert file.tell() == 7


@pytest.mark.parametrize("name", ["missing.root", "."])
def test_unreadable_file_is_an_oserror(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        check_root_file(tmp_path / name)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=400), st.booleans())
def test_arbitrary_bytes_are_refused(content: bytes, magic: bool) -> None:
    refuse(b"root" * magic + content)


def test_no_byte_raises_another_exception() -> None:
    content = small_file().close()
    for at in range(len(content)):
        for value in (0x00, 0x7F, 0xFF):
            reason(put(content, at, ">B", value))


def test_no_file_stays_open(tmp_path: Path) -> None:
    valid = (DATA / "tree.root").read_bytes()
    paths = [tmp_path / str(number) for number in range(5)]
    for path, content in zip(
        paths, [b"", b"root", valid[:-1], small_file().close(streamer_info=7), valid], strict=True
    ):
        path.write_bytes(content)
    check_root_file(paths[-1])
    before = sorted(os.listdir("/proc/self/fd"))
    for path in paths[:-1]:
        with pytest.raises(InvalidRootFile):
            check_root_file(path)
    check_root_file(paths[-1])
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_import_does_nothing(tmp_path: Path) -> None:
    script = """
import logging, os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import cramjam, deflate, lzma, uproot, uproot.source.chunk, xxhash
def state():
    return (os.listdir("."), threading.active_count(), logging.root.handlers[:], logging.root.level, os.environ.copy(),
            [signal.getsignal(number) for number in (1, 2, 15)], len(os.listdir("/proc/self/fd")))
before = state()
import rootcheck
assert state() == before
"""
    command = [sys.executable, "-c", script, str(PROJECT)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# --- wrong numbers -----------------------------------------------------------------------------------------------------

# By what holds them: the numbers that are wrong, and a part of the reason.
WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "header": [
        ({"begin": 40}, "header: the records are said to reach from byte 40"),
        ({"begin": 99}, "root directory: the key at byte 99"),
        ({"begin": 101}, "root directory: the key at byte 101"),
        ({"end": 100}, "from byte 100 to byte 100"),
        ({"end": 722}, ""),
        ({"end": 2**31 - 1}, "cut short: it has 723 bytes of the 2147483647 its header names"),
        ({"free_list": 0}, "header: list of free segments of 53 bytes at byte 0, outside the file"),
        ({"free_list": 100}, "header: list of free segments of 53 bytes at byte 100, outside the file"),
        ({"free_list": 2**31 - 1}, "header: list of free segments of 53 bytes at byte 2147483647, outside the file"),
        ({"free_list_size": 0}, "header: list of free segments of 0 bytes"),
        ({"free_list_size": -1}, "header: list of free segments of -1 bytes"),
        ({"free_segments": 2}, "header: 2 free segments in a list of 10 bytes"),
        ({"free_segments": -1}, "header: -1 free segments in a list of 10 bytes"),
        ({"name_size": 0}, "header: a name of 0 bytes for the root directory"),
        ({"name_size": 52}, "root directory: its name differs from the one in its key"),
        ({"name_size": -(2**31)}, "header: a name of -2147483648 bytes for the root directory"),
        ({"name_size": 2**31 - 1}, "header: a name of 2147483647 bytes for the root directory"),
        ({"streamer_info": 0}, "header: streamer info of 67 bytes at byte 0, outside the file"),
        ({"streamer_info": 100}, "header: streamer info of 67 bytes at byte 100, outside the file"),
        ({"streamer_info": 2**31 - 1}, "header: streamer info of 67 bytes at byte 2147483647, outside the file"),
        ({"streamer_info_size": 0}, "header: streamer info of 0 bytes"),
        ({"streamer_info_size": 60}, "streamer info at byte 603 has 67 bytes, the header says 60"),
        ({"streamer_info_size": -1}, "header: streamer info of -1 bytes"),
    ],
    "record and key list": [
        ({"size": 0}, "impossible lengths (record 0,"),
        ({"size": 2**31 - 1}, "has 2147483647 bytes, outside the file"),
        ({"object_size": -1}, "object -1)"),
        ({"object_size": 2**31 - 1}, "an object of 2147483647 bytes is more than is allowed"),
        ({"key_size": 0}, "impossible lengths (record 55, key 0,"),
        ({"key_size": 37}, "has 37 bytes, but its class, name and title make it 36"),
        ({"key_size": 40}, "has 40 bytes, but its class, name and title make it 36"),
        ({"position": -1}, "its record at byte -1 (TNamed h) has 55 bytes, outside the file"),
        ({"position": 2**31 - 1}, "its record at byte 2147483647 (TNamed h) has 55 bytes, outside the file"),
        ({"directory": 0}, "says it is in the directory at byte 0"),
        ({"directory": 101}, "says it is in the directory at byte 101"),
    ],
    "key list": [
        ({"size": 61}, "record at byte 202 (TNamed h): its key differs from the copy in the key list"),
        ({"object_size": 3}, "its key differs"),
        ({"cycle": 2}, "its key differs"),
        ({"class_name": b"TNamer"}, "its key differs"),
        ({"position": 163}, "no record begins at byte 163, where one is referred to"),
        ({"directory": 1}, "says it is in the directory at byte 1"),
    ],
    "key of a key list": [
        ({"size": 90}, "root directory: 2 keys in a key list of 90 bytes"),
        ({"size": 2**31 - 1}, "root directory: key list of 2147483647 bytes at byte 400, outside the file"),
        ({"object_size": 7}, "in an unknown way (b'\\x00\\x00\\x00'), or 80 bytes where 7 belong"),
        ({"object_size": 2**31 - 1}, "an object of 2147483647 bytes is more than is allowed"),
        ({"key_size": 5}, "impossible lengths (record 123, key 5, object 80)"),
    ],
    "number of keys": [
        ({"count": 1}, "stands behind the last key of a key list: the number of keys is wrong"),
        ({"count": 3}, "3 keys in a key list of 123 bytes"),
        ({"count": -1}, "-1 keys in a key list of 123 bytes"),
        ({"count": 2**31 - 1}, "2147483647 keys in a key list of 123 bytes"),
    ],
    "root directory": [
        ({"key_list": 0, "key_list_size": 0}, "never closed"),
        ({"key_list": 0}, "root directory: key list of 123 bytes at byte 0, outside the file"),
        ({"key_list": 100}, "root directory: key list of 123 bytes at byte 100, outside the file"),
        ({"key_list": 2**31 - 1}, "root directory: key list of 123 bytes at byte 2147483647, outside the file"),
        ({"key_list_size": 0}, "root directory: key list of 0 bytes"),
        ({"key_list_size": -1}, "root directory: key list of -1 bytes"),
        ({"key_list_size": 60}, "root directory: key list at byte 400 has 123 bytes and not 60"),
        ({"name_size": 0}, "root directory: begins with a name of 0 bytes"),
        ({"own": 101}, "root directory: says that it is at byte 101"),
        ({"parent": 7}, "root directory: says that it is at byte 100, in the directory at byte 7"),
    ],
    "directory": [
        ({"key_list": -1}, "directory at byte 257: key list of 80 bytes at byte -1, outside the file"),
        ({"key_list": 2**31 - 1}, "directory at byte 257: key list of 80 bytes at byte 2147483647, outside the file"),
        ({"key_list_size": 0}, "directory at byte 257: key list of 0 bytes"),
        ({"name_size": 1}, "directory at byte 257: begins with a name of 1 bytes"),
        ({"own": 100}, "directory at byte 257: says that it is at byte 100"),
        ({"parent": 101}, "directory at byte 257: says that it is at byte 257, in the directory at byte 101"),
    ],
}


@pytest.mark.parametrize(
    ("holder", "wrong", "text"), [(holder, *case) for holder, cases in WRONG.items() for case in cases], ids=str
)
def test_wrong_number(holder: str, wrong: dict[str, Any], text: str) -> None:
    file = File()
    key = file.add(b"TNamed", b"h", tnamed(b"h"), **(wrong if holder == "record and key list" else {}))
    directory = file.directory(b"d")
    file.add(b"TNamed", b"x", tnamed(b"x"), directory)
    match holder:
        case "key list":
            file.root.keys[0] = key._replace(**wrong)
        case "key of a key list":
            file.root.key_list = wrong
        case "number of keys":
            file.root.count = wrong["count"]
        case "root directory":
            file.root.fields = wrong
        case "directory":
            directory.fields = wrong
    refuse(file.close(**(wrong if holder == "header" else {})), text)


# --- the header --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the file is empty"),
        (b"r", "begins with b'r'"),
        (b"PK\3\4" + bytes(500), "not a ROOT file"),
        (put(small_file().close(), 4, ">i", 1_063_200), ""),
    ],
    ids=["nothing", "one byte", "another format", "8-byte positions in its version alone"],
)
def test_file_that_begins_otherwise(content: bytes, text: str) -> None:
    refuse(content, text)


@pytest.mark.parametrize(
    "content", [small_file().close(), (DATA / "compression_zlib9.root").read_bytes()], ids=["small", "of ROOT"]
)
def test_file_truncated_at_every_length(content: bytes) -> None:
    check(content)
    for length in range(len(content)):
        refuse(content[:length])


# uproot.update of 4.1 to 5.3.6 subtracted a million from the version each time.
@pytest.mark.parametrize(
    "version", [0, -1, 1, 40_000, 999_999, -937_600, -119_937_600, 1_000_000, 2_000_000, 3_063_200]
)
def test_files_of_any_version(version: int) -> None:
    assert list(check(small_file(big=version >= 1_000_000).close(version=version))) == ["h", "d"]


@pytest.mark.parametrize("units", [0, 4, 5, 8, 255])
@pytest.mark.parametrize("big", [False, True])
def test_units_are_not_looked_at(big: bool, units: int) -> None:
    assert list(check(small_file(big=big).close(units=units))) == ["h", "d"]


def test_reason_names_uproot_3() -> None:
    file = small_file(big=True)
    file.data += bytes(1000)
    refuse(file.close(version=1_061_800, units=4), "uproot 3")


# --- Geant4 ------------------------------------------------------------------------------------------------------------


def geant4_file() -> File:
    """Return a file as tools::wroot writes it: cycle 0 where it never sets one, dates 0, old versions."""
    file = File(begin=64)
    file.directory_version = 1
    file.add(b"TNamed", b"h", tnamed(b"h"), version=2)
    file.add(b"TNamed", b"x", tnamed(b"x"), file.directory(b"d"), version=2)
    file.unlisted = {"cycle": 0, "version": 2}
    return file


@pytest.mark.parametrize("room_begins", [0, 64], ids=["newer", "older"])
def test_files_of_geant4(room_begins: int) -> None:
    file = geant4_file()
    file.room_begins = room_begins
    assert list(check(file.close(free_segments=0))) == ["h", "d"]


def test_gap_in_a_file_of_geant4() -> None:
    file = geant4_file()
    file.gap(struct.pack(">i", -40) + bytes(36))
    content = file.close(free_segments=0)
    assert list(check(content)) == ["h", "d"]
    refuse(put(content, -8, ">i", len(content) + 1), "is not the room behind byte")


# --- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 7], ids=["class", "name"])
def test_string_longer_than_its_key(at: int) -> None:
    content = one_object(tnamed(b"h"))
    refuse(put(content, content.index(b"\6TNamed\1h") + at, ">B", 200), "make it")


@pytest.mark.parametrize("version", [4, 1004])
@pytest.mark.parametrize("left", [*range(3, 60), 100])
def test_key_cut_off_by_the_files_end(left: int, version: int) -> None:
    content = small_file().close()
    end = len(content) + left
    content = put(put(content, 12, ">i", end), -8, ">i", end)
    key = Key(b"TNamed", b"n" * 60, b"t" * 60, 1000, 800, 167, 1, len(content), BEGIN, version)
    refuse(content + key.pack()[:left])


def test_key_with_the_process_id_of_references() -> None:
    """The upper 16 bits of an 8-byte fSeekPdir are something else."""
    file = File(big=True)
    file.add(b"TNamed", b"h", tnamed(b"h"), directory=7 << 48 | BEGIN)
    assert list(check(file.close())) == ["h"]


def test_key_longer_than_its_strings() -> None:
    file = small_file()
    file.record(b"TNamed", b"unlisted", more=bytes(19))
    refuse(file.close(), "its class, name and title make it")


KEY_OF_A_BASKET = len(Key(b"TBasket", b"branch").pack()) + 19


@pytest.mark.parametrize("arrays", [0, 1, 2])
def test_basket_with_arrays_behind_its_data(arrays: int) -> None:
    """Behind its data a basket may have the offsets of its entries, and then their displacements."""
    size = 100 + arrays * 48
    file = small_file()
    file.basket(bytes(size), size, 10, last=KEY_OF_A_BASKET + 100)
    assert list(check(file.close())) == ["h", "d"]


@pytest.mark.parametrize(("entries", "last"), [(12, 100), (-1, 100), (10, 99), (10, -100), (10, 2**30)])
def test_basket_whose_numbers_do_not_fit(entries: int, last: int) -> None:
    last += KEY_OF_A_BASKET
    file = small_file()
    file.basket(bytes(148), 148, entries, last)
    refuse(file.close(), f"{entries} entries, data to byte {last} and 148 bytes do not fit")


# --- directories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("big", [False, True])
def test_directories_in_directories(big: bool) -> None:
    file = File(big=big)
    file.add(b"TNamed", b"h", tnamed(b"own"))
    file.add(b"TNamed", b"x", tnamed(b"x"), file.directory(b"e", file.directory(b"d")))
    assert check(file.close()) == {"h": RootObject("own", "TNamed"), "d": RootObject("d", "TDirectory")}


def test_directory_too_short_for_its_fields() -> None:
    refuse(one_object(bytes(10), class_name=b"TDirectory"), "cannot be a directory")


@pytest.mark.parametrize("title", [b"new", b"", b"a long title", b"t" * 300])
@pytest.mark.parametrize("name", [b"h", b"g", b"", b"a long name", b"n" * 300])
def test_renamed_key(name: bytes, title: bytes) -> None:
    """TKey::SetName and SetTitle change the list only, behind the old fKeylen."""
    file = File()
    key = file.add(b"TNamed", b"h", tnamed(b"h"), title=b"old")
    file.root.keys = [key._replace(name=name, title=title)]
    file.add(b"TNamed", b"last", tnamed(b"last"))
    assert check(file.close()) == {name.decode(): RootObject("h", "TNamed"), "last": RootObject("last", "TNamed")}


def test_renamed_keys_in_directories() -> None:
    """ROOT 5 lists a directory whose record says TDirectory as TDirectoryFile, in a key as short as before."""
    file = small_file()
    _, directory = file.directories
    file.root.keys[1] = directory.key._replace(class_name=b"TDirectoryFile")
    assert list(check(file.close())) == ["h", "d"]
    file = small_file()
    _, directory = file.directories
    file.root.keys[1] = directory.key._replace(class_name=b"TDirectoryFile", name=b"directory")
    directory.keys[0] = directory.keys[0]._replace(name=b"longer")
    assert list(check(file.close())) == ["h", "directory"]


def test_directories_renamed_to_the_same_name() -> None:
    file = File()
    for name in (b"d", b"e"):
        file.add(b"TNamed", b"x", tnamed(b"x"), file.directory(name))
    file.root.keys = [key._replace(name=b"both renamed") for key in file.root.keys]
    assert check(file.close()) == {"both renamed": RootObject("both renamed", "TDirectory")}


def test_title_whose_length_is_damaged() -> None:
    """Nothing follows the keys of a list in which one was renamed: ROOT leaves no room there."""
    file = File()
    key = file.add(b"TNamed", b"h", tnamed(b"h"), title=b"a title").pack()
    content = file.close()
    at = content.rindex(key) + len(key) - len("a title") - 1
    assert content[at] == 7
    refuse(put(content, at, ">B", 3), "behind its last key, or a string of a wrong length")


def nested(depth: int) -> bytes:
    file = File()
    directory = file.root
    for _ in range(depth):
        directory = file.directory(b"d", directory)
    return file.close()


def test_directories_100_deep() -> None:
    assert list(check(nested(100))) == ["d"]
    refuse(nested(101), "nested more than 100 deep")


def test_nested_directory_in_the_root_directory() -> None:
    """ROOT 6.08 names the root directory as the parent of all."""
    file = File()
    file.directory(b"e", file.directory(b"d")).fields = {"parent": BEGIN}
    assert list(check(file.close())) == ["d"]


@pytest.mark.parametrize("place", ["same directory", "another directory", "itself", "its parent"])
def test_record_in_two_places(place: str) -> None:
    file = small_file()
    root, directory = file.directories
    key = {"another directory": root.keys[0], "itself": directory.key, "its parent": root.key}.get(place)
    if key:
        directory.keys.append(key._replace(directory=directory.position))
    else:
        root.keys.append(root.keys[0])
    refuse(file.close(), "outside the file" if place == "its parent" else "has a place elsewhere, too")


def test_two_directories_with_one_key_list() -> None:
    file = File()
    one, other = file.directory(b"d"), file.directory(b"e")
    content = file.close()
    for at in (10, 26):  # fNbytesKeys, fSeekKeys
        content = put(content, other.start + at, ">i", *struct.unpack_from(">i", content, one.start + at))
    refuse(content, "in the directory at byte")


@pytest.mark.parametrize(
    "slack",
    [
        bytes(1),
        bytes(8),
        bytes(500),
        b"\xde\xad\xbe\xef" * 2,
        b"rubbish " * 100,
        Key(b"TNamed", position=40_000).pack(),
    ],
    ids=len,
)
def test_slack_behind_the_keys(slack: bytes) -> None:
    """ROOT leaves 8 bytes in files beyond 2 GB, uproot room for more keys and what was in it before."""
    file = small_file()
    file.root.slack = slack
    assert list(check(file.close())) == ["h", "d"]


# --- the chain of records ----------------------------------------------------------------------------------------------


def with_hole(hole: bytes, is_listed: bool = False, /, **header: int) -> bytes:
    """Return a file with bytes between its records that may be a free segment."""
    file = small_file()
    if is_listed:
        file.gap(hole)
    else:
        file.data += hole
    file.add(b"TNamed", b"later", tnamed(b"later"))
    return file.close(**header)


@pytest.mark.parametrize("length", [4, 5, 100])
def test_gaps_of_root(length: int) -> None:
    """A deleted record begins with its negative length; what follows is old."""
    hole = struct.pack(">i", -length) + b"\xaa" * (length - 4)
    assert "later" in check(with_hole(hole, True))
    assert "later" in check(with_hole(hole, **NO_FREE_LIST))


@pytest.mark.parametrize("length", [1, 7, 100])
def test_free_segments_of_uproot(length: int) -> None:
    """uproot leaves what was there."""
    assert "later" in check(with_hole(b"\x55" * length, True))


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 28])
def test_zeros_between_records_of_go_hep(number: int) -> None:
    assert "later" in check(with_hole(bytes(number)))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (with_hole(b"\x55"), ""),
        (with_hole(b"\x55" * 100), ""),
        (with_hole(struct.pack(">i", -100) + bytes(96)), ""),
        (with_hole(bytes(10) + b"\x55" * 10), "and no record within 29 bytes"),
        (with_hole(bytes(29)), "zeros from byte 400 on, and no record within 29 bytes"),
        (with_hole(bytes(512)), "zeros from byte 400 on, and no record within 29 bytes"),
        (with_hole(bytes(3_000_000)), "zeros from byte 400 on, and no record within 29 bytes"),
        (with_hole(struct.pack(">i", -30), **NO_FREE_LIST), ""),  # a gap over the beginning of a record
        (with_hole(struct.pack(">i", -1_000_000), **NO_FREE_LIST), "the last record ends at byte"),
        (with_hole(struct.pack(">i", -(2**31)), **NO_FREE_LIST), "the last record ends at byte"),
    ],
    ids=len,
)
def test_bytes_of_no_record_and_no_free_segment(content: bytes, text: str) -> None:
    refuse(content, text)


@pytest.mark.parametrize("damage", ["a gap", "zeros", "a free segment"])
def test_listed_record_that_is_gone(damage: str) -> None:
    file = small_file()
    key = file.root.keys[0]
    if damage == "a free segment":
        file.free.append((key.position, key.position + key.size - 1))
        refuse(file.close(), f"no record begins at byte {key.position}")
    elif damage == "a gap":
        refuse(put(file.close(), key.position, ">i", -key.size))
    else:
        refuse(put(file.close(), key.position, f"{key.size}x"))


def test_zeros_over_whole_baskets() -> None:
    """As a disk leaves them that was to write a sector: of what is not compressed, nothing else tells."""
    file = small_file()
    baskets = [file.basket(b"1234567890", 10) for _ in range(5)]
    content = file.close()
    check(content)
    start, end = baskets[1].position - 4, baskets[4].position
    refuse(put(content, start, f"{end - start}x"), f"zeros from byte {baskets[1].position} on")


@pytest.mark.parametrize("number", [28, 29])
def test_zeros_up_to_the_end(number: int) -> None:
    content = small_file().close()
    end = len(content) + number
    content = put(put(content, 12, ">i", end), -8, ">i", end) + bytes(number)
    assert reason(content) == (None if number < 29 else f"zeros from byte {end - 29} on, and no record within 29 bytes")


@pytest.mark.parametrize("version", [-937600, 63200])
@pytest.mark.parametrize(("first", "behind"), [(5, 10), (10, 100)], ids=["within the record", "beyond its end"])
def test_free_segment_that_begins_within_a_record(first: int, behind: int, version: int) -> None:
    """uproot.update of 4.1 to 5.3.6 frees parts of records that it still needs, and ROOT does not look at that."""
    file = File()
    key = file.add(b"TNamed", b"h", tnamed(b"h" * 20))
    last = key.position + first + behind
    file.data += b"\x55" * (last + 1 - len(file.data))
    file.free.append((key.position + first, last))
    file.add(b"TNamed", b"later", tnamed(b"later"))
    content = file.close(version=version)
    if version < 0:
        assert list(check(content)) == ["h", "later"]
    else:
        refuse(content)


def test_free_segment_over_two_records_of_uproot() -> None:
    file = small_file()
    first, second = file.root.keys
    file.free.append((first.position + 5, second.position + second.size - 1))
    assert list(check(file.close(version=-937600))) == ["h", "d"]


@pytest.mark.parametrize("at", [None, 26, 37, 16], ids=["root directory", "key list", "streamer info", "free list"])
def test_record_that_says_another_position_than_its_own(at: int | None) -> None:
    file = small_file()
    content = file.close()
    position = BEGIN
    if at:
        (position,) = struct.unpack_from(">i", content, at + (file.root.start if at == 26 else 0))
    assert struct.unpack_from(">i", content, position + 18) == (position,)
    refuse(put(content, position + 18, ">i", position + 1))


def test_record_in_no_key_list_is_checked() -> None:
    """So the baskets of a tree are covered without reading the tree."""
    good = COMPRESS["ZL"](TEXT)
    file = small_file()
    file.basket(good, len(TEXT))
    key = file.basket(good[:-1] + b"\0", len(TEXT))
    refuse(file.close(), f"record at byte {key.position} (TBasket branch): damaged ZL block")


def test_pages_of_an_rntuple_are_opaque() -> None:
    file = small_file()
    file.record(b"RBlob", b"", b"\xaa" * 48, object_size=40, version=1004)
    assert list(check(file.close())) == ["h", "d"]


@pytest.mark.parametrize("class_name", [b"TBasket", b"RBlob"])
def test_record_elsewhere_than_it_says(class_name: bytes) -> None:
    file = small_file()
    key = file.basket(b"12345", 5, position=7) if class_name == b"TBasket" else file.record(class_name, position=7)
    refuse(file.close(), f"record at byte 7 ({class_name.decode()} {key.name.decode()}) is at byte")


def test_damaged_streamer_info() -> None:
    stored = COMPRESS["ZL"](TEXT)
    for payload, text in ((stored, None), (stored[:-1] + b"\0", "record at byte 400 (TList StreamerInfo): damaged ZL")):
        file = small_file(streamer_info=None)
        info = file.record(b"TList", b"StreamerInfo", payload, object_size=len(TEXT))
        refusal = reason(file.close(streamer_info=info.position, streamer_info_size=info.size))
        assert refusal == text or (text and refusal and refusal.startswith(text))


def test_streamer_info_that_is_something_else() -> None:
    file = small_file()
    other = file.record(b"TList", b"Other", EMPTY_LIST)
    refuse(file.close(streamer_info=other.position, streamer_info_size=other.size), "is no streamer info")


@pytest.mark.parametrize("header", [{}, NO_FREE_LIST])
@pytest.mark.parametrize("streamer_info", [None, EMPTY_LIST])
def test_file_saved_before_it_is_closed(streamer_info: bytes | None, header: dict[str, int]) -> None:
    """ROOT writes the streamer info and the list of free segments when it closes the file."""
    assert list(check(small_file(streamer_info=streamer_info).close(**header))) == ["h", "d"]


# --- the list of free segments -----------------------------------------------------------------------------------------

ROOM = struct.pack(">hii", 1, 2222, 2_000_000_000)  # the last segment of an older list


@pytest.mark.parametrize(
    ("segments", "text"),
    [
        ([(50, 60)], "a segment from byte 50"),
        ([(300, 299)], "a segment from byte 300 to byte 299"),
        ([(-5, -1)], "a segment from byte -5"),
        ([(300, 310), (305, 320)], "a segment from byte 305"),
        ([(5000, 6000)], "a segment from byte"),
        ([(300, 310)], ""),
        ([(101, 200)], ""),
    ],
)
def test_wrong_free_segments(segments: list[tuple[int, int]], text: str) -> None:
    file = small_file()
    file.free = segments
    refuse(file.close(), text)


@pytest.mark.parametrize("change", [-1, 1, 1000])
def test_last_free_segment_elsewhere_than_at_the_end(change: int) -> None:
    content = small_file().close()
    refuse(put(content, -8, ">i", len(content) + change), "is not the room behind byte")


@pytest.mark.parametrize("last", [0, 1_000_000_000, 2_000_000_001, 2**31 - 1])
def test_last_free_segment_that_ends_nowhere(last: int) -> None:
    """ROOT's ends at a multiple of 1 GB from 2 GB on."""
    refuse(put(small_file().close(), -4, ">i", last), "list of free segments")


@pytest.mark.parametrize("more", [1, 10, 1_000_000])
def test_free_list_longer_in_the_header(more: int) -> None:
    content = small_file().close()
    (size,) = struct.unpack_from(">i", content, 20)
    assert list(check(put(content, 20, ">i", size + more))) == ["h", "d"]


@pytest.mark.parametrize("gaps", [0, 1, 4])
def test_old_free_list_between_records(gaps: int) -> None:
    old = b"".join(struct.pack(">hii", 1, 500 + 10 * number, 505 + 10 * number) for number in range(gaps)) + ROOM
    assert list(check(with_hole(old))) == ["h", "d", "later"]
    refuse(with_hole(put(old, -4, ">i", 1_999_999_999)))


@pytest.mark.parametrize(
    ("behind", "is_valid"),
    [
        (ROOM, True),
        (struct.pack(">hiihii", 1, 600, 700, 1, 800, 900) + ROOM, True),
        (struct.pack(">hiihii", 1, 800, 900, 1, 600, 700) + ROOM, False),
        (put(ROOM, 0, ">h", 2), False),
        (put(ROOM, 2, ">i", -1), False),
        (put(ROOM, 6, ">i", 1_999_999_999), False),
        (struct.pack(">hii", 1, 600, 700), False),
    ],
    ids=["room", "old list", "order", "version", "position", "end", "no room"],
)
def test_bytes_behind_the_free_segments(behind: bytes, is_valid: bool) -> None:
    """uproot leaves there the rest of a list that has become shorter."""
    file = small_file()
    file.free = [(0, 0)] * (len(behind) // len(ROOM))  # for the room
    content = file.close(free_segments=1)
    own = struct.pack(">hii", 1, len(content), 2_000_000_000)
    content = content[: -len(own + behind)] + own + behind
    assert reason(content) == (None if is_valid else "list of free segments: something else behind its last segment")


# --- payloads ----------------------------------------------------------------------------------------------------------


def again(letters: str, change: Callable[[bytes], bytes]) -> bytes:
    """Return a file of a block whose stream is changed, and its length with it."""
    whole = COMPRESS[letters](TEXT)
    return compressed([block(whole[:2], whole[2], change(whole[9:]), len(TEXT))], len(TEXT))


def test_payload_that_is_not_compressed() -> None:
    assert list(check(one_object(TEXT))) == ["h"]
    refuse(one_object(TEXT, len(TEXT) - 1), f"{len(TEXT)} bytes where {len(TEXT) - 1} belong")


@pytest.mark.parametrize("letters", COMPRESS)
@pytest.mark.parametrize("change", [-1000, -1, 1, 100])
def test_block_that_inflates_to_another_length(letters: str, change: int) -> None:
    """Than the record says, or than its own head says and the record with it."""
    whole, size = COMPRESS[letters](TEXT), len(TEXT) + change
    text = "inflates to 1160 bytes" if change > 0 else "a block that inflates to 1160 bytes"
    refuse(compressed([whole], size), text)
    refuse(compressed([whole[:6] + size.to_bytes(3, "little") + whole[9:]], size), "block")


@pytest.mark.parametrize("letters", COMPRESS)
@pytest.mark.parametrize("change", [-1, 1, -5, 100, 10_000_000])
def test_block_that_says_another_length_than_it_has(letters: str, change: int) -> None:
    whole = COMPRESS[letters](TEXT)
    stored = len(whole) - 9 + change
    refuse(compressed([whole[:3] + stored.to_bytes(3, "little") + whole[6:]], len(TEXT)), "record at byte")


@pytest.mark.parametrize("letters", COMPRESS)
@pytest.mark.parametrize("cut", [1, 4, 12, 10_000])
def test_truncated_stream(letters: str, cut: int) -> None:
    refuse(again(letters, lambda stream: stream[:-cut]), "" if cut > len(TEXT) else "block")


@pytest.mark.parametrize("letters", COMPRESS)
@pytest.mark.parametrize("more", [b"\0", b"\0\0\0\0", b"\xff" * 20], ids=len)
def test_bytes_behind_the_stream(letters: str, more: bytes) -> None:
    refuse(again(letters, lambda stream: stream + more))


# Not ZL: libdeflate stops behind the first stream, and the second ends with the checksum that is looked for; not ZS,
# which takes frames behind one another for one stream: the length tells.
@pytest.mark.parametrize("letters", ["XZ", "L4", "CS"])
def test_two_streams_in_a_block(letters: str) -> None:
    refuse(again(letters, lambda stream: stream * 2))


@pytest.mark.parametrize(
    ("letters", "at"), [("ZL", -1), ("ZL", -4), ("L4", 0), ("L4", 7), ("XZ", -1), ("XZ", -30), ("XZ", 8)]
)
def test_wrong_checksum(letters: str, at: int) -> None:
    refuse(again(letters, lambda stream: put(stream, at, ">B", stream[at] ^ 1)))


def test_checksum_of_zstandard() -> None:
    """Frames seldom have one; where they do, it counts."""
    raw = struct.pack("<I", 0xFD2FB528) + bytes([0x04, 0x38]) + (len(TEXT) << 3 | 1).to_bytes(3, "little") + TEXT
    stream = raw + struct.pack("<I", xxhash.xxh64_intdigest(TEXT) & 0xFFFFFFFF)
    assert bytes(cramjam.zstd.decompress(stream)) == TEXT
    check(again("ZS", lambda _: stream))
    refuse(again("ZS", lambda _: put(stream, -1, ">B", stream[-1] ^ 1)), "damaged ZS block")


def test_zlib_stream_that_needs_a_dictionary() -> None:
    squeezer = zlib.compressobj(zdict=TEXT[:100])
    stream = squeezer.compress(TEXT) + squeezer.flush()
    refuse(again("ZL", lambda _: stream), "damaged ZL block")


def test_lzma_that_is_not_xz() -> None:
    refuse(again("XZ", lambda _: lzma.compress(TEXT, lzma.FORMAT_ALONE)), "damaged XZ block")


@pytest.mark.parametrize(
    "head", [b"ZL\x09", b"ZL\x00", b"XZ\x01", b"L4\x02", b"ZS\x00", b"CS\x00", b"zl\x08", b"AA\x08"]
)
def test_unknown_compression(head: bytes) -> None:
    refuse(compressed([block(head[:2], head[2], zlib.compress(TEXT), len(TEXT))], len(TEXT)), "unknown way")


@pytest.mark.parametrize("number", range(1, 9))
def test_block_head_cut_short(number: int) -> None:
    blocks = [COMPRESS["ZL"](TEXT), COMPRESS["ZL"](TEXT)[:number]]
    refuse(compressed(blocks, len(TEXT)), f"{number} bytes behind its last compressed block")


@pytest.mark.parametrize("stored", [b"", bytes(3), b"\0\0\0\1", zlib.compress(b"")])
def test_block_of_nothing(stored: bytes) -> None:
    nothing = block(b"ZL", 8, stored, 0)
    refuse(compressed([nothing], 0), "inflates to 0 bytes")
    refuse(compressed([COMPRESS["ZL"](TEXT), nothing], len(TEXT)), "inflates to 0 bytes")


def test_record_without_payload_for_its_object() -> None:
    refuse(compressed([], 1000), "record at byte 202 (TH1F h): payload inflates to 0 bytes, its key says 1000")


# --- limits ------------------------------------------------------------------------------------------------------------


def many_objects(number: int) -> bytes:
    file = File()
    for at in range(number):
        file.add(b"TNamed", b"%d" % at)
    return file.close()


ZEROS = {letters: compressed([COMPRESS[letters](bytes(200_000))], 200_000) for letters in ("ZL", "XZ", "CS")}


@pytest.mark.parametrize(
    ("limit", "enough", "too_little", "content", "text"),
    [
        ("rootcheck.MAX_KEYS", 20, 19, many_objects(20), "more than 19 keys"),
        ("rootcheck.MAX_DIRECTORIES", 3, 2, nested(2), "more than 2 directories"),
        ("rootcheck.MAX_DEPTH", 3, 2, nested(3), "nested more than 2 deep"),
        ("rootcheck.MAX_KEY_LISTS", 203, 202, small_file().close(), "key lists of more than 202 bytes"),
        ("rootcheck.MAX_NAMES", 18, 17, small_file().close(), "keys with names and classes of more than 17"),
        ("rootcheck.MAX_NAMES", 10, 9, one_object(tnamed(b"of its own")), "objects with names of more than 9"),
        # Two directories, the objects h and x, two key lists, the streamer info, the list of free segments.
        ("rootcheck.MAX_RECORDS", 8, 7, small_file().close(), "more than 7 records"),
        ("inflate.MAX_OBJECT_SIZE", 1160, 1159, one_object(TEXT), "more than is allowed"),
        ("inflate.MAX_OBJECT_SIZE", 1160, 1159, compressed([COMPRESS["ZL"](TEXT)], 1160), "more than is allowed"),
        ("inflate.MAX_INFLATED", 201_000, 199_000, ZEROS["ZL"], "more than is allowed"),
        ("inflate.MAX_INFLATED_SLOWLY", 200_000, 199_999, ZEROS["XZ"], "XZ blocks inflate to more than is allowed"),
        ("inflate.MAX_INFLATED_SLOWLY", 200_000, 199_999, ZEROS["CS"], "CS blocks inflate to more than is allowed"),
        ("inflate.MAX_XZ_MEMORY", 1 << 20, 1 << 15, ZEROS["XZ"], "damaged XZ block"),
        ("inflate.MAX_SECONDS", 30.0, 0.0, small_file().close(), "takes longer than 0.0 s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limit(
    limit: str, enough: float, too_little: float, content: bytes, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit, enough)
    check(content)
    monkeypatch.setattr(limit, too_little)
    refuse(content, text)


def test_larger_files_may_inflate_to_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflate.MAX_INFLATED", 0)
    monkeypatch.setattr("inflate.MAX_INFLATED_SLOWLY", 0)
    monkeypatch.setattr("inflate.MAX_INFLATION", 200_000)
    for content in ZEROS.values():
        check(content)


def test_fast_codecs_may_inflate_to_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflate.MAX_INFLATED_SLOWLY", 0)
    check(ZEROS["ZL"])


# --- names -------------------------------------------------------------------------------------------------------------


def in_versions(*classes: bytes) -> bytes:
    """Return what begins an object whose classes each have this content behind their bases, the outermost last."""
    content = tobject()
    for own in classes:
        content = versioned(content + own)
    return content


@pytest.mark.parametrize(
    ("class_name", "payload", "name"),
    [
        (b"TNamed", tnamed(b"own"), "own"),
        (b"TNamed", tnamed(b"own", b"title"), "own"),
        (b"TNamed", tnamed(b""), ""),
        (b"TNamed", tnamed(b"own", bits=0x10), "own"),
        (b"TNamed", tnamed(b"n" * 300), "n" * 300),
        (b"TNamed", tnamed("été".encode()), "été"),
        (b"TNamed", tnamed(b"a\xe9"), "a\\xe9"),
        (b"TH1F", versioned(versioned(tnamed(b"own") + b"members")), "own"),
        (b"MyHeir", versioned(tnamed(b"own") + b"members"), "own"),
        (b"MyHeir", versioned(tnamed(b"") + tnamed(b"h")), ""),
        (b"TObjString", versioned(tobject() + string(b"own")), "own"),
        (b"TParameter<int>", versioned(tobject() + string(b"own") + bytes(4)), "own"),
        (b"TObjArray", versioned(tobject() + string(b"") + bytes(8)), "TObjArray"),
        (b"TObjArray", versioned(tobject() + string(b"own") + bytes(8)), "own"),
        (b"TList", versioned(tobject() + string(b"") + bytes(4)), "TList"),
        (b"TList", versioned(tobject() + string(b"") + bytes(4) + bytes(14) + tnamed(b"h")), "TList"),
        (b"TMap", versioned(tobject() + string(b"own") + bytes(4)), "own"),
        (b"TObject", tobject(), "TObject"),
        (b"TVectorT<double>", versioned(tobject() + bytes(20)), "TVectorT<double>"),
        (b"TLine", versioned(tobject() + bytes(50)), "TLine"),
        (b"string", string(b"text"), "h"),
        (b"vector<double>", versioned(bytes(20)), "h"),
        (b"MyStruct", versioned(struct.pack(">iii", 1, 2, 3)), "h"),
        (b"MyObject", versioned(tobject() + b"members"), "h"),
        (b"TNamed", b"", "h"),
        (b"TNamed", tnamed(b"own")[:10], "h"),
        (b"TNamed", struct.pack(">IH", 0xFFFFFFFF, 1) * 20, "h"),
    ],
)
def test_name_of_an_object(class_name: bytes, payload: bytes, name: str) -> None:
    assert check(one_object(payload, class_name=class_name)) == {"h": RootObject(name, class_name.decode())}


@pytest.mark.parametrize("letters", COMPRESS)
def test_name_of_a_compressed_object(letters: str) -> None:
    payload = versioned(tnamed(b"own") + TEXT)
    blocks = [COMPRESS[letters](payload[:600]), COMPRESS[letters](payload[600:])]
    assert check(compressed(blocks, len(payload))) == {"h": RootObject("own", "TH1F")}


@pytest.mark.parametrize(
    "class_name", ["TCrown", "TArc", "TCurlyLine", "TMarker3DBox", "TFrame", "TPolyLine3D", "TQuaternion", "TArrow"]
)
def test_nameless_objects_answer_their_class_name(class_name: str) -> None:
    content = one_object(in_versions(bytes(20)), class_name=class_name.encode())
    assert check(content) == {"h": RootObject(class_name, class_name)}


@pytest.mark.parametrize("points", [0, 3])
def test_name_of_polymarker_stands_behind_its_points(points: int) -> None:
    marker = versioned(bytes(8))
    payload = in_versions(marker + struct.pack(">i", points) + bytes(12 * points) + string(b"option") + string(b"mine"))
    file = File()
    file.add(b"TPolyMarker3D", b"h", payload)
    file.add(b"TPolyMarker3D", b"cut short", payload[:-1])
    assert [found.name for found in check(file.close()).values()] == ["mine", "cut short"]


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (b"a/b", "a/b"),
        (b"/", "/"),
        (b"a;1", "a;1"),
        (b"", ""),
        ("Ω 日本".encode(), "Ω 日本"),
        (b"\xff\xfe", "\\xff\\xfe"),
        (b"a\0b", "a\0b"),
        (b"\n", "\n"),
        (b"..", ".."),
        *((b"n" * length, "n" * length) for length in (254, 255, 256, 999)),  # from 255 on, the length takes five bytes
    ],
    ids=len,
)
def test_name_and_class_of_a_key(stored: bytes, name: str) -> None:
    file = File()
    file.add(b"T" + stored, stored)
    assert check(file.close()) == {name: RootObject(name, "T" + name)}


def test_names_are_cut_at_1000_characters() -> None:
    file = File()
    for end in b"a", b"b":
        file.add(b"T" * 1001, b"n" * 1000 + end)
    cut = RootObject("n" * 1000, "T" * 1000)
    assert check(file.close()) == {"n" * 1000: cut, "n" * 1000 + " (2)": cut}


def test_keys_that_differ_in_undecodable_bytes() -> None:
    """The escape of one is what the other spells out."""
    file = File()
    for name in b"a\xff", b"a\xfe", rb"a\xff", b"a\xff\xfe":
        file.add(b"TNamed", name, tnamed(name))
    assert sorted(check(file.close())) == [r"a\xfe", r"a\xff", r"a\xff (2)", r"a\xff\xfe"]


@pytest.mark.parametrize("cycles", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_newest_cycle_of_a_name(cycles: tuple[int, ...]) -> None:
    file = File()
    for cycle in cycles:
        file.add(b"TNamed", b"h", tnamed(b"cycle %d" % cycle), cycle=cycle)
    assert check(file.close()) == {"h": RootObject("cycle 3", "TNamed")}


def test_first_of_two_keys_of_one_cycle() -> None:
    """As ROOT does, which looks no further."""
    file = File()
    file.add(b"TNamed", b"h", tnamed(b"first"))
    file.add(b"TNamed", b"h", tnamed(b"second"))
    assert check(file.close()) == {"h": RootObject("first", "TNamed")}


@pytest.mark.parametrize("where", ["class_name", "name", "title"])
@pytest.mark.parametrize("length", [254, 255, 256, 300])
def test_long_strings_that_look_like_short_ones(where: str, length: int) -> None:
    """Where the first byte of its length, 255, is taken for the length, what follows may fit just as well."""
    for byte in range(256):
        text = b"a" * 251 + bytes([byte]) + b"b" * (length - 252)
        strings = {"class_name": b"TNamed", "name": b"h", "title": b"", where: text}
        file = File()
        file.add(strings["class_name"], strings["name"], tnamed(strings["name"]), title=strings["title"])
        class_name, name, _ = (string.decode(errors="backslashreplace") for string in strings.values())
        assert check(file.close()) == {name: RootObject(name, class_name)}


# --- the second reader -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["fName", "fClassName", "fCycle", "fSeekKey"])
def test_uproot_that_finds_other_keys(attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(uproot.reading.ReadOnlyKey, attribute)
    monkeypatch.setattr(uproot.reading.ReadOnlyKey, attribute, property(lambda key: original.fget(key) * 2))
    refuse(small_file().close(), "uproot finds other objects: 'h")


@pytest.mark.parametrize("more", [-1, 1])
def test_uproot_that_finds_fewer_or_more_keys(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = second_reader._read_until_keys

    def read(*arguments: Any) -> tuple[Any, ...]:
        *rest, number = original(*arguments)
        return *rest, number + more

    monkeypatch.setattr(second_reader, "_read_until_keys", read)
    refuse(small_file().close(), f"uproot finds {2 + more} keys in the root directory, not 2")


@pytest.mark.parametrize("length", [0, 254, 255, 256, 30_000])
def test_uproot_reads_names_of_all_lengths(length: int) -> None:
    file = File()
    for name in (b"a" * length, b"b"):
        file.add(b"TNamed", name, tnamed(name))
    assert list(check(file.close())) == ["a" * min(length, 1000), "b"]


def raises(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises this, whatever it is given."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [ValueError("v"), AssertionError("a"), RecursionError("r"), KeyError("k"), StopIteration()], ids=repr
)
def test_uproot_that_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uproot.reading, "ReadOnlyKey", raises(error))
    with pytest.raises(InvalidRootFile, match="uproot cannot read the file") as refusal:
        check(small_file().close())
    assert refusal.value.__cause__ is error


def test_lack_of_memory_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uproot.reading, "ReadOnlyKey", raises(MemoryError()))
    with pytest.raises(MemoryError):
        check(small_file().close())


def test_broken_disk_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = second_reader._File.chunk

    def chunk_of_broken_disk(file: second_reader._File, start: int, stop: int) -> object:
        file._reader.pread = raises(OSError(errno.EIO, "the disk is broken"))  # type: ignore[method-assign]
        return chunk(file, start, stop)

    monkeypatch.setattr(second_reader, "WINDOW", 0)  # as if the file were too large to be in memory
    monkeypatch.setattr(second_reader._File, "chunk", chunk_of_broken_disk)
    with pytest.raises(OSError, match="the disk is broken"):
        check(small_file().close())


@pytest.mark.parametrize("window", [0, 300, 1 << 20])
def test_files_beyond_the_window_are_read_like_others(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root_keys, "WINDOW", window)
    monkeypatch.setattr(second_reader, "WINDOW", window)
    assert check(small_file().close()) == {"h": RootObject("h", "TNamed"), "d": RootObject("d", "TDirectory")}


def test_uproot_is_not_asked_about_files_refused_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uproot.reading, "ReadOnlyKey", raises(AssertionError()))
    refuse(small_file().close()[:-1], "cut short")


# --- on a terminal -----------------------------------------------------------------------------------------------------


def test_terminal_lists_objects_and_reasons(tmp_path: Path) -> None:
    valid, invalid, missing = (tmp_path / name for name in ("valid.root", "invalid.root", "missing.root"))
    valid.write_bytes(small_file().close())
    invalid.write_bytes(b"")
    command = [sys.executable, "-m", "rootcheck", str(valid), str(invalid), str(missing), str(valid)]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    objects = [
        f"{valid}: valid, 2 objects",
        "  h: Obj name: h, Obj IsA() Name: TNamed",
        "  d: Obj name: d, Obj IsA() Name: TDirectoryFile",
    ]
    refusals = [f"{invalid}: invalid: the file is empty", f"{missing}: No such file or directory"]
    assert (run.returncode, run.stdout.splitlines(), run.stderr) == (1, [*objects, *refusals, *objects], "")


def test_terminal_escapes_control_and_bidirectional_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = File()
    file.add(b"TNamed", "\x1b[2J\u202etxt\n é".encode(), tnamed(b"\r"))
    path = tmp_path / "\x1b]0;title.root"
    path.write_bytes(file.close())
    assert rootcheck.main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        rf"{tmp_path}/\x1b]0;title.root: valid, 1 objects",
        r"  \x1b[2J\u202etxt\n é: Obj name: \r, Obj IsA() Name: TNamed",
    ]


def test_terminal_without_files(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        rootcheck.main([])
    assert exit.value.code == 2
    assert "usage: python -m rootcheck" in capsys.readouterr().err
