"""What rootcheck accepts, what it refuses and what it says of it."""

from __future__ import annotations

import errno
import json
import lzma
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cramjam
import numpy
import pytest
import uproot
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rootfiles import (
    BEGIN,
    COMPRESS,
    EMPTY_LIST,
    File,
    Key,
    block,
    compressed,
    one_object,
    string,
    tnamed,
    tobject,
    versioned,
)

import inflate
import root_keys
import rootcheck
import second_reader
from rootcheck import InvalidRootFile, RootObject, check_root_file

PROJECT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
EXPECTED: dict[str, dict[str, Any]] = json.loads((DATA / "expected.json").read_text())
TEXT = b"All histograms of the shift, " * 40

# Objects whose GetName() is not that of a TNamed: the name lies elsewhere in the payload, or in no payload at all.
NAMED_OTHERWISE = {
    "TGaxis": "its own fName, behind the bases TLine and TAttText",
    "TParticle": "ROOT looks it up in a table of particles",
}


@pytest.fixture
def check(tmp_path: Path) -> Callable[[bytes], dict[str, RootObject]]:
    """Return a function that checks a file of this content."""

    def run(content: bytes) -> dict[str, RootObject]:
        path = tmp_path / "file.root"
        path.write_bytes(content)
        return check_root_file(path)

    return run


Check = Callable[[bytes], dict[str, RootObject]]


@pytest.fixture
def refuse(check: Check) -> Callable[[bytes, str], None]:
    """Return a function that asserts that content is refused with a text that holds this."""

    def run(content: bytes, text: str) -> None:
        with pytest.raises(InvalidRootFile) as refusal:
            check(content)
        assert text in str(refusal.value)

    return run


Refuse = Callable[[bytes, str], None]


def small_file() -> File:
    """A file of an object and a directory with another, both directories still to be listed."""
    file = File()
    file.add(b"TNamed", b"h", tnamed(b"h"))
    file.add(b"TNamed", b"x", tnamed(b"x"), file.directory(b"d"))
    return file


def put(content: bytes, at: int, form: str, *values: int) -> bytes:
    """Return content with these numbers at byte `at`."""
    data = bytearray(content)
    struct.pack_into(form, data, at, *values)
    return bytes(data)


# --- files of CERN ROOT ------------------------------------------------------------------------------------------------


def test_descriptor_stays_open_at_its_position(tmp_path: Path) -> None:
    path = tmp_path / "file.root"
    path.write_bytes(small_file().close())
    with path.open("rb") as file:
        file.seek(7)
        assert check_root_file(file.fileno()) == check_root_file(path)
        assert file.tell() == 7
        path.unlink()
        assert list(check_root_file(file.fileno())) == ["h", "d"]
    empty = tmp_path / "empty.root"
    empty.touch()
    with empty.open("rb") as file:
        with pytest.raises(InvalidRootFile, match="empty"):
            check_root_file(file.fileno())
        assert file.read() == b""


def test_every_file_of_root_is_expected() -> None:
    assert sorted(EXPECTED) == sorted(path.name for path in DATA.glob("*.root"))
    assert len(EXPECTED) > 80


@pytest.mark.parametrize("name", [name for name, facts in EXPECTED.items() if facts["valid"]])
def test_valid_files_of_root(name: str) -> None:
    """Objects and stored classes are ROOT's; so are the descriptions where ROOT knew the class."""
    found = check_root_file(DATA / name)
    expected = EXPECTED[name]["objects"]
    assert {key: found[key].class_name for key in found} == {key: facts["class"] for key, facts in expected.items()}
    for key, facts in expected.items():
        if facts["class"] in NAMED_OTHERWISE:
            assert found[key].name == key
        elif facts.get("root", "").endswith(f"IsA() Name: {facts['class']}"):
            assert found[key].description == facts["root"]


def test_no_exception_from_the_naming_rule_is_idle() -> None:
    stored = {facts["class"] for file in EXPECTED.values() for facts in file["objects"].values()}
    assert stored >= NAMED_OTHERWISE.keys()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deleted_all.root", "holds no objects"),
        ("no_keys.root", "holds no objects"),
        ("never_closed.root", "never closed"),
        ("truncated.root", "cut short: it has 3340 bytes of the 3341"),
    ],
)
def test_invalid_files_of_root(name: str, text: str) -> None:
    assert not EXPECTED[name]["valid"]
    with pytest.raises(InvalidRootFile, match=text):
        check_root_file(DATA / name)


def test_no_other_file_of_root_is_invalid() -> None:
    assert sum(not facts["valid"] for facts in EXPECTED.values()) == 4


def test_description_calls_a_directory_what_root_calls_it() -> None:
    """ROOT stores a TDirectoryFile as TDirectory."""
    found = check_root_file(DATA / "directories_only.root")
    assert {found[key].class_name for key in found} == {"TDirectory"}
    assert {found[key].description for key in found} == {
        f"Obj name: {key}, Obj IsA() Name: TDirectoryFile" for key in found
    }


def test_objects_that_root_cannot_name_have_the_names_of_their_keys() -> None:
    found = check_root_file(DATA / "not_tobjects.root")
    assert {key: found[key].name for key in found} == {key: key for key in found}


# --- files of uproot ---------------------------------------------------------------------------------------------------

HISTOGRAM = numpy.histogram(numpy.arange(1000) % 37, bins=50)


@pytest.mark.parametrize(
    "compression",
    [None, uproot.ZLIB(1), uproot.ZLIB(9), uproot.LZMA(1), uproot.LZ4(4), uproot.ZSTD(5)],
    ids=lambda compression: "none" if compression is None else f"{type(compression).__name__}({compression.level})",
)
def test_histograms_trees_and_directories_of_uproot(compression: Any, tmp_path: Path) -> None:
    path = tmp_path / "uproot.root"
    with uproot.recreate(path, compression=compression) as file:
        file["h"] = HISTOGRAM
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


def test_updates_and_deletions_of_uproot(tmp_path: Path) -> None:
    path = tmp_path / "uproot.root"
    with uproot.recreate(path) as file:
        for number in range(10):
            file[f"h{number}"] = HISTOGRAM
    with uproot.update(path) as file:
        for number in range(5):
            del file[f"h{number}"]
        file["h7"] = "another"
        file["later"] = HISTOGRAM
    assert set(check_root_file(path)) == {"h5", "h6", "h7", "h8", "h9", "later"}


def test_newest_cycle_of_uproot_wins(tmp_path: Path) -> None:
    path = tmp_path / "uproot.root"
    with uproot.recreate(path) as file:
        for text in ("first", "second", "third"):
            file["text"] = text
    assert check_root_file(path) == {"text": RootObject("third", "TObjString")}


def test_key_lists_of_uproot_that_grow(tmp_path: Path) -> None:
    path = tmp_path / "uproot.root"
    with uproot.recreate(path) as file:
        for number in range(200):
            file[f"folder{number % 3}/text{number}"] = "text"
            file[f"text{number}"] = "text"
            if number % 60 == 0:
                assert f"text{number}" in check_root_file(path)
    assert len(check_root_file(path)) == 203


def test_file_of_uproot_without_objects(tmp_path: Path) -> None:
    path = tmp_path / "uproot.root"
    uproot.recreate(path).close()
    with pytest.raises(InvalidRootFile, match="holds no objects"):
        check_root_file(path)


# --- check_root_file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("big", [False, True])
def test_file_record_by_record(big: bool, check: Check) -> None:
    """The builder of the files below is sound, with 4-byte and with 8-byte positions."""
    file = File(big=big)
    file.add(b"TNamed", b"h", tnamed(b"own"))
    file.add(b"TNamed", b"x", tnamed(b"x"), file.directory(b"e", file.directory(b"d")))
    assert check(file.close()) == {"h": RootObject("own", "TNamed"), "d": RootObject("d", "TDirectory")}


def test_path_as_text_or_path() -> None:
    path = DATA / "h1_all.root"
    assert check_root_file(path) == check_root_file(str(path))


def test_path_with_uproots_special_characters(tmp_path: Path) -> None:
    for name in ("a:b.root", "a*b.root", "http:", "été Ω.root"):
        path = tmp_path / name
        path.write_bytes(one_object(tnamed(b"h")))
        assert list(check_root_file(path)) == ["h"]


def test_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_root_file(tmp_path / "missing.root")


def test_directory_of_the_disk_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        check_root_file(tmp_path)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=400), st.booleans())
def test_arbitrary_bytes_are_refused(tmp_path: Path, content: bytes, magic: bool) -> None:
    path = tmp_path / "arbitrary.root"
    path.write_bytes(b"root" * magic + content)
    with pytest.raises(InvalidRootFile):
        check_root_file(path)


MUTANTS = [(DATA / name).read_bytes() for name in ("directories.root", "compression_lz4.root", "updated.root")]
MUTANTS.append(small_file().close())


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(MUTANTS),
    st.lists(st.tuples(st.integers(4, 1 << 20), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4),
)
def test_only_invalid_root_file_leaves_for_mutants(
    tmp_path: Path, content: bytes, changes: list[tuple[int, bytes]]
) -> None:
    mutant = bytearray(content)
    for at, piece in changes:
        at %= len(content)
        mutant[at : at + len(piece)] = piece
    path = tmp_path / "mutant.root"
    path.write_bytes(mutant)
    try:
        found = check_root_file(path)
    except InvalidRootFile as error:
        assert str(error)
    else:
        assert found


def test_every_byte_of_a_small_file_set_to_extremes(check: Check) -> None:
    content = small_file().close()
    for at in range(len(content)):
        for value in (0x00, 0x7F, 0xFF):
            mutant = bytearray(content)
            mutant[at] = value
            try:
                assert check(bytes(mutant))
            except InvalidRootFile as error:
                assert str(error)


def test_no_file_stays_open(check: Check) -> None:
    valid = (DATA / "tree.root").read_bytes()
    check(valid)
    before = sorted(os.listdir("/proc/self/fd"))
    for content in (b"", b"root", valid[:-1], small_file().close(streamer_info=7), File().close()):
        with pytest.raises(InvalidRootFile):
            check(content)
    check(valid)
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
    run = subprocess.run(
        [sys.executable, "-c", script, str(PROJECT)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# --- the header --------------------------------------------------------------------------------------------------------


def test_empty_file(refuse: Refuse) -> None:
    refuse(b"", "the file is empty")


def test_a_single_byte(refuse: Refuse) -> None:
    refuse(b"r", "begins with b'r'")


def test_another_format(refuse: Refuse) -> None:
    refuse(b"PK\3\4" + bytes(500), "not a ROOT file")


@pytest.mark.parametrize(
    "content", [small_file().close(), (DATA / "compression_zlib9.root").read_bytes()], ids=["small", "of ROOT"]
)
def test_file_truncated_at_every_length(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "truncated.root"
    path.write_bytes(content)
    check_root_file(path)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        with pytest.raises(InvalidRootFile):
            check_root_file(path)


@pytest.mark.parametrize("more", [b"\0", b"\xff" * 1000, b"root" * 100])
def test_bytes_behind_the_end(more: bytes, check: Check) -> None:
    assert list(check(small_file().close() + more)) == ["h", "d"]


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("begin", 0, "from byte 0"),
        ("begin", 40, "from byte 40"),
        ("begin", 99, "root directory"),
        ("begin", 101, "root directory"),
        ("begin", -1, "from byte -1"),
        ("end", 0, "to byte 0"),
        ("end", 100, "to byte 100"),
        ("end", -1, "to byte -1"),
        ("end", 2**31 - 1, "cut short"),
        ("free_list", 0, "list of free segments"),
        ("free_list", 100, "list of free segments"),
        ("free_list", -1, "list of free segments"),
        ("free_list", 2**31 - 1, "list of free segments"),
        ("free_list_size", 0, "list of free segments"),
        ("free_list_size", -1, "list of free segments"),
        ("free_segments", 2, "2 free segments"),
        ("free_segments", -1, "-1 free segments"),
        ("name_size", 0, "root directory"),
        ("name_size", 52, "root directory"),
        ("name_size", -1, "root directory"),
        ("name_size", -(2**31), "root directory"),
        ("name_size", 2**31 - 1, "root directory"),
        ("streamer_info", 100, "streamer info"),
        ("streamer_info", -1, "streamer info"),
        ("streamer_info", 2**31 - 1, "streamer info"),
        ("streamer_info", 0, "streamer info"),
        ("streamer_info_size", 0, "streamer info"),
        ("streamer_info_size", 60, "streamer info"),
        ("streamer_info_size", -1, "streamer info"),
    ],
)
def test_wrong_header(field: str, value: int, text: str, refuse: Refuse) -> None:
    refuse(small_file().close(**{field: value}), text)


def test_header_that_says_positions_have_eight_bytes(refuse: Refuse) -> None:
    refuse(put(small_file().close(), 4, ">i", 1_063_200), "")


def test_file_that_ends_within_a_record(refuse: Refuse) -> None:
    content = small_file().close()
    refuse(put(content, 12, ">i", len(content) - 1), "")


def test_file_with_more_in_its_header_than_there_is(refuse: Refuse) -> None:
    content = small_file().close()
    refuse(content[:-1], f"cut short: it has {len(content) - 1} bytes of the {len(content)} its header names")


def test_file_of_root_3_begins_at_byte_64(check: Check) -> None:
    file = File(begin=64)
    file.add(b"TNamed", b"h", tnamed(b"h"))
    assert list(check(file.close())) == ["h"]


@pytest.mark.parametrize("version", [0, -1, 1, 40_000, 999_999, -937_600, -119_937_600])
def test_small_file_of_any_version(version: int, check: Check) -> None:
    """uproot.update of 4.1 to 5.3.6 subtracts a million each time."""
    assert list(check(small_file().close(version=version))) == ["h", "d"]


@pytest.mark.parametrize("version", [1_000_000, 2_000_000, 3_063_200])
def test_large_file_of_any_version(version: int, check: Check) -> None:
    file = File(big=True)
    file.add(b"TNamed", b"h", tnamed(b"h"))
    assert list(check(file.close(version=version))) == ["h"]


@pytest.mark.parametrize("units", [0, 4, 5, 8, 255])
@pytest.mark.parametrize("big", [False, True])
def test_units_are_not_looked_at(big: bool, units: int, check: Check) -> None:
    file = File(big=big)
    file.add(b"TNamed", b"h", tnamed(b"h"))
    assert list(check(file.close(units=units))) == ["h"]


def test_reason_names_uproot_3(refuse: Refuse) -> None:
    file = File(big=True)
    file.add(b"TNamed", b"h", tnamed(b"h"))
    file.data += bytes(1000)
    refuse(file.close(version=1_061_800, units=4), "uproot 3")


# --- Geant4 ------------------------------------------------------------------------------------------------------------


def geant4_file() -> File:
    """A file as tools::wroot writes it: cycle 0 where it never sets one, dates 0, old versions."""
    file = File(begin=64)
    file.directory_version = 1
    file.add(b"TNamed", b"h", tnamed(b"h"), version=2)
    file.add(b"TNamed", b"x", tnamed(b"x"), file.directory(b"d"), version=2)
    file.unlisted = {"cycle": 0, "version": 2}
    return file


def test_file_of_geant4(check: Check) -> None:
    assert list(check(geant4_file().close(free_segments=0))) == ["h", "d"]


def test_gap_in_a_file_of_geant4(check: Check, refuse: Refuse) -> None:
    file = geant4_file()
    start = len(file.data)
    file.data += struct.pack(">i", -40) + bytes(36)
    file.free = [(start, start + 39)]
    content = file.close(free_segments=0)
    assert list(check(content)) == ["h", "d"]
    refuse(content[:-8] + struct.pack(">ii", len(content) + 1, 2_000_000_000), "is not the room behind byte")


def test_free_list_of_older_geant4(check: Check) -> None:
    file = geant4_file()
    file.room_begins = 64
    assert list(check(file.close(free_segments=0))) == ["h", "d"]


# --- what uproot.update leaves behind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gaps", [0, 1, 4])
def test_old_free_list_between_records(gaps: int, check: Check, refuse: Refuse) -> None:
    file = small_file()
    for number in range(gaps):
        file.data += struct.pack(">hii", 1, 500 + 10 * number, 505 + 10 * number)
    end = len(file.data)
    file.data += struct.pack(">hii", 1, 4099, 2_000_000_000)
    file.add(b"TNamed", b"more", tnamed(b"more"))
    content = file.close()
    assert list(check(content)) == ["h", "d", "more"]
    refuse(put(content, end + 6, ">i", 1_999_999_999), "")


def test_old_free_list_behind_the_new_one(check: Check) -> None:
    file = small_file()
    file.free = [(0, 0)] * 3  # for the room
    content = file.close(free_segments=1)
    segments = struct.pack(">hii", 1, len(content), 2_000_000_000)
    segments += struct.pack(">hiihiihii", 1, 600, 700, 1, 800, 900, 1, 5000, 2_000_000_000)
    assert list(check(content[: -len(segments)] + segments)) == ["h", "d"]


@pytest.mark.parametrize("more", [1, 10, 1_000_000])
def test_free_list_longer_in_the_header(more: int, check: Check) -> None:
    content = small_file().close()
    (size,) = struct.unpack_from(">i", content, 20)
    assert list(check(put(content, 20, ">i", size + more))) == ["h", "d"]


# --- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"size": 0}, "impossible lengths"),
        ({"size": -70}, ""),
        ({"size": 2**31 - 1}, ""),
        ({"object_size": -1}, "impossible lengths"),
        ({"object_size": 2**31 - 1}, "more than is allowed"),
        ({"key_size": 0}, "impossible lengths"),
        ({"key_size": -1}, "impossible lengths"),
        ({"key_size": 37}, "its class, name and title make it"),
        ({"key_size": 36 + 4}, "its class, name and title make it"),
        ({"position": 0}, ""),
        ({"position": -1}, ""),
        ({"position": 2**31 - 1}, "outside the file"),
        ({"directory": 0}, "says it is in the directory at byte 0"),
        ({"directory": 101}, "says it is in the directory at byte 101"),
    ],
    ids=str,
)
def test_wrong_key_in_record_and_list(wrong: dict[str, Any], text: str, refuse: Refuse) -> None:
    file = File()
    file.add(b"TNamed", b"h", tnamed(b"h"), **wrong)
    refuse(file.close(), text)


@pytest.mark.parametrize("wrong", ["class_name", "name"])
def test_string_longer_than_its_key(wrong: str, refuse: Refuse) -> None:
    file = File()
    key = file.add(b"TNamed", b"h", tnamed(b"h"))
    content = file.close()
    at = content.index(b"\6TNamed\1h", key.position)
    refuse(put(content, at if wrong == "class_name" else at + 7, ">B", 200), "make it")


@pytest.mark.parametrize("version", [4, 1004])
@pytest.mark.parametrize("left", [*range(3, 60), 100])
def test_key_cut_off_by_the_end_of_the_file(left: int, version: int, refuse: Refuse) -> None:
    content = small_file().close()
    end = len(content) + left
    content = put(put(content, 12, ">i", end), len(content) - 8, ">i", end)
    key = Key(b"TNamed", b"n" * 60, b"t" * 60, 1000, 800, 167, 1, len(content), BEGIN, version)
    refuse(content + key.pack()[:left], "")


@pytest.mark.parametrize("length", [254, 255, 256, 1000])
def test_names_of_any_length(length: int, check: Check) -> None:
    """From 255 bytes on, the length takes five bytes."""
    file = File()
    file.add(b"T" * length, b"n" * length)
    assert check(file.close()) == {"n" * length: RootObject("n" * length, "T" * length)}


def test_names_are_cut_at_1000_characters(check: Check) -> None:
    file = File()
    for end in b"a", b"b":
        file.add(b"T" * 1001, b"n" * 1000 + end)
    cut = RootObject("n" * 1000, "T" * 1000)
    assert check(file.close()) == {"n" * 1000: cut, "n" * 1000 + " (2)": cut}


def test_key_with_the_process_id_of_references(check: Check) -> None:
    """The upper 16 bits of an 8-byte fSeekPdir are something else."""
    file = File(big=True)
    file.add(b"TNamed", b"h", tnamed(b"h"), directory=7 << 48 | BEGIN)
    assert list(check(file.close())) == ["h"]


KEY_OF_A_BASKET = len(Key(b"TBasket", b"branch").pack()) + 19


@pytest.mark.parametrize("arrays", [0, 1, 2])
def test_basket_with_fields_of_its_own_in_its_key(arrays: int, check: Check) -> None:
    """Behind its data a basket may have the offsets of its entries, and then their displacements."""
    size = 100 + arrays * 48
    file = small_file()
    file.basket(bytes(size), size, 10, last=KEY_OF_A_BASKET + 100)
    assert list(check(file.close())) == ["h", "d"]


@pytest.mark.parametrize(
    ("entries", "last"),
    [
        (12, KEY_OF_A_BASKET + 100),
        (-1, KEY_OF_A_BASKET + 100),
        (10, KEY_OF_A_BASKET + 99),
        (10, 0),
        (10, 2**31 - 1),
    ],
)
def test_wrong_basket(entries: int, last: int, refuse: Refuse) -> None:
    file = small_file()
    file.basket(bytes(148), 148, entries, last)
    refuse(file.close(), f"{entries} entries, data to byte {last} and 148 bytes do not fit")


def test_key_longer_than_its_strings(refuse: Refuse) -> None:
    file = small_file()
    file.record(b"TNamed", b"unlisted", more=bytes(19))
    refuse(file.close(), "its class, name and title make it")


# --- directories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"key_list": 0, "key_list_size": 0}, "never closed"),
        ({"key_list": 0}, "outside the file"),
        ({"key_list": 100}, "outside the file"),
        ({"key_list": -1}, "outside the file"),
        ({"key_list": 2**31 - 1}, "outside the file"),
        ({"key_list_size": 0}, "outside the file"),
        ({"key_list_size": 2**31 - 1}, "outside the file"),
        ({"key_list_size": -1}, "outside the file"),
        ({"key_list_size": 60}, "root directory"),
        ({"name_size": 0}, "begins with a name of 0 bytes"),
        ({"own": 0}, "says that it is at byte 0"),
        ({"own": 101}, "says that it is at byte 101"),
        ({"parent": 7}, "in the directory at byte 7"),
    ],
    ids=str,
)
def test_wrong_root_directory(wrong: dict[str, int], text: str, refuse: Refuse) -> None:
    file = small_file()
    file.root.fields = wrong
    refuse(file.close(), text)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"key_list": -1}, "outside the file"),
        ({"key_list": 2**31 - 1}, "outside the file"),
        ({"key_list_size": 0}, "outside the file"),
        ({"name_size": 1}, "begins with a name of 1 bytes"),
        ({"own": 100}, "says that it is at byte 100"),
        ({"parent": 101}, "in the directory at byte 101"),
    ],
    ids=str,
)
def test_wrong_subdirectory(wrong: dict[str, int], text: str, refuse: Refuse) -> None:
    file = File()
    directory = file.directory(b"d")
    directory.fields = wrong
    refuse(file.close(), f"directory at byte {directory.position}")
    refuse(bytes(file.data), text)


def test_directory_that_was_never_filled(check: Check) -> None:
    file = File()
    file.directory(b"d").listed = False
    assert list(check(file.close())) == ["d"]


def test_directory_too_short_for_its_fields(refuse: Refuse) -> None:
    file = File()
    file.add(b"TDirectory", b"d", bytes(10))
    refuse(file.close(), "cannot be a directory")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"size": 90}, "2 keys in a key list of 90 bytes"),
        ({"size": 2**31 - 1}, "outside the file"),
        ({"object_size": 7}, "unknown way"),
        ({"object_size": 2**31 - 1}, "more than is allowed"),
        ({"key_size": 5}, "impossible lengths"),
    ],
    ids=lambda wrong: str(wrong)[:30],
)
def test_wrong_key_of_a_key_list(wrong: dict[str, Any], text: str, refuse: Refuse) -> None:
    file = small_file()
    file.root.key_list = wrong
    refuse(file.close(), text)


@pytest.mark.parametrize("count", [1, 3, -1, 2**31 - 1, -(2**31)])
def test_wrong_number_of_keys(count: int, refuse: Refuse) -> None:
    file = small_file()
    file.root.count = count
    refuse(file.close(), "")


def test_no_keys(refuse: Refuse) -> None:
    refuse(File().close(), "holds no objects")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"size": 61}, "differs"),
        ({"object_size": 3}, "differs"),
        ({"cycle": 2}, "differs"),
        ({"class_name": b"TNamer"}, "differs"),
        ({"position": 163}, "no record begins"),
        ({"directory": 1}, "says it is in the directory at byte 1"),
    ],
    ids=str,
)
def test_key_list_that_differs_from_the_record(wrong: dict[str, Any], text: str, refuse: Refuse) -> None:
    file = small_file()
    file.root.keys[0] = file.root.keys[0]._replace(**wrong)
    refuse(file.close(), text)


@pytest.mark.parametrize("title", [b"new", b"", b"a long title", b"t" * 300])
@pytest.mark.parametrize("name", [b"h", b"g", b"", b"a long name", b"n" * 300])
def test_renamed_key(name: bytes, title: bytes, check: Check) -> None:
    """TKey::SetName and SetTitle change the list only, behind the old fKeylen."""
    file = File()
    key = file.add(b"TNamed", b"h", tnamed(b"h"), title=b"old")
    file.root.keys = [key._replace(name=name, title=title)]
    file.add(b"TNamed", b"last", tnamed(b"last"))
    assert check(file.close()) == {name.decode(): RootObject("h", "TNamed"), "last": RootObject("last", "TNamed")}


def test_renamed_keys_in_directories(check: Check) -> None:
    file = File()
    directory = file.directory(b"d")
    file.add(b"TNamed", b"x", tnamed(b"x"), directory)
    file.root.keys[0] = file.root.keys[0]._replace(name=b"directory", class_name=b"TDirectoryFile")
    directory.keys[0] = directory.keys[0]._replace(name=b"longer")
    assert list(check(file.close())) == ["directory"]


def test_directories_renamed_to_the_same_name(check: Check) -> None:
    file = File()
    for name in (b"d", b"e"):
        file.add(b"TNamed", b"x", tnamed(b"x"), file.directory(name))
    file.root.keys = [key._replace(name=b"both renamed") for key in file.root.keys]
    assert check(file.close()) == {"both renamed": RootObject("both renamed", "TDirectory")}


def test_title_whose_length_is_damaged(check: Check, refuse: Refuse) -> None:
    """Nothing follows the keys of a list in which one was renamed: ROOT leaves no room there."""
    file = File()
    key = file.add(b"TNamed", b"h", tnamed(b"h"), title=b"a title")
    content = bytearray(file.close())
    at = content.rindex(key.pack()) + len(key.pack()) - len("a title") - 1
    assert content[at] == 7
    content[at] = 3
    refuse(bytes(content), "behind its last key, or a string of a wrong length")


def test_directory_listed_under_its_new_class(check: Check) -> None:
    """ROOT 5 lists a directory whose record says TDirectory as TDirectoryFile, in a key as short as before."""
    file = File()
    directory = file.directory(b"d")
    file.add(b"TNamed", b"x", tnamed(b"x"), directory)
    file.root.keys[0] = file.root.keys[0]._replace(class_name=b"TDirectoryFile")
    assert check(file.close())["d"].name == "d"


def test_record_in_two_places(refuse: Refuse) -> None:
    file = small_file()
    file.root.keys.append(file.root.keys[0])
    refuse(file.close(), "has a place elsewhere, too")


def test_record_in_two_directories(refuse: Refuse) -> None:
    file = small_file()
    directory = file.directories[1]
    directory.keys.append(file.root.keys[0]._replace(directory=directory.position))
    refuse(file.close(), "has a place elsewhere, too")


def test_directory_that_contains_itself(refuse: Refuse) -> None:
    file = small_file()
    directory = file.directories[1]
    directory.keys.append(directory.key._replace(directory=directory.position))
    refuse(file.close(), "has a place elsewhere, too")


def test_directory_that_contains_the_root_directory(refuse: Refuse) -> None:
    file = small_file()
    directory = file.directories[1]
    directory.keys.append(file.root.key._replace(directory=directory.position, position=BEGIN))
    refuse(file.close(), "outside the file")


def test_two_directories_with_one_key_list(refuse: Refuse) -> None:
    file = File()
    one, other = file.directory(b"d"), file.directory(b"e")
    content = bytearray(file.close())
    for at in (10, 26):  # fNbytesKeys, fSeekKeys
        content[other.start + at : other.start + at + 4] = content[one.start + at : one.start + at + 4]
    refuse(bytes(content), "in the directory at byte")


def nested(depth: int) -> bytes:
    file = File()
    directory = file.root
    for _ in range(depth):
        directory = file.directory(b"d", directory)
    return file.close()


def test_directories_100_deep(check: Check) -> None:
    assert list(check(nested(100))) == ["d"]


@pytest.mark.parametrize("depth", [101, 102, 1000])
def test_directories_deeper_than_100(depth: int, refuse: Refuse) -> None:
    refuse(nested(depth), "nested more than 100 deep")


@pytest.mark.parametrize("parent", ["mother", "root"])
def test_parent_of_a_nested_directory(parent: str, check: Check) -> None:
    """ROOT 6.08 names the root directory as the parent of all."""
    file = File()
    mother = file.directory(b"d")
    child = file.directory(b"e", mother)
    child.fields = {"parent": mother.position if parent == "mother" else BEGIN}
    assert list(check(file.close())) == ["d"]


@pytest.mark.parametrize(
    "slack",
    [bytes(1), bytes(8), bytes(500), b"\xde\xad\xbe\xef" * 2, b"rubbish " * 100],
    ids=lambda slack: str(len(slack)),
)
def test_slack_behind_the_keys(slack: bytes, check: Check) -> None:
    """ROOT leaves 8 bytes in files beyond 2 GB, uproot room for more keys and what was in it before."""
    file = small_file()
    file.root.slack = slack
    assert list(check(file.close())) == ["h", "d"]


def test_slack_of_a_key_whose_record_is_gone(check: Check) -> None:
    file = small_file()
    file.root.slack = file.root.keys[0]._replace(position=40_000).pack()
    assert list(check(file.close())) == ["h", "d"]


def test_uncounted_key_of_a_record_that_is_there(refuse: Refuse) -> None:
    file = small_file()
    file.root.count = 1
    refuse(file.close(), "the number of keys is wrong")


# --- the chain of records ----------------------------------------------------------------------------------------------


NO_FREE_LIST = {"free_list": 0, "free_list_size": 0}  # as ROOT leaves a file that it has saved but not closed


def with_hole(hole: bytes, *, in_free_list: bool = False, free_list: bool = True) -> bytes:
    """A file with bytes between its records that may be a free segment."""
    file = small_file()
    if in_free_list:
        file.free.append((len(file.data), len(file.data) + len(hole) - 1))
    file.data += hole
    file.add(b"TNamed", b"later", tnamed(b"later"))
    return file.close(**({} if free_list else NO_FREE_LIST))


@pytest.mark.parametrize("length", [4, 5, 100])
def test_gaps_of_root(length: int, check: Check) -> None:
    """A deleted record begins with its negative length; what follows is old."""
    hole = struct.pack(">i", -length) + b"\xaa" * (length - 4)
    assert "later" in check(with_hole(hole, in_free_list=True))
    assert "later" in check(with_hole(hole, free_list=False))


@pytest.mark.parametrize("length", [1, 7, 100])
def test_free_segments_of_uproot(length: int, check: Check) -> None:
    """uproot leaves what was there."""
    assert "later" in check(with_hole(b"\x55" * length, in_free_list=True))


@pytest.mark.parametrize(
    "hole", [b"\x55" * 100, struct.pack(">i", -100) + bytes(96), b"\x55"], ids=["bytes", "gap", "byte"]
)
def test_bytes_of_no_record_and_no_free_segment(hole: bytes, refuse: Refuse) -> None:
    refuse(with_hole(hole), "")


@pytest.mark.parametrize("length", [1_000_000, 2**31])
def test_gap_longer_than_the_file(length: int, refuse: Refuse) -> None:
    refuse(with_hole(struct.pack(">i", -length), free_list=False), "the last record ends at byte")


def test_gap_that_swallows_a_listed_record(refuse: Refuse) -> None:
    file = small_file()
    key = file.root.keys[0]
    refuse(put(file.close(), key.position, ">i", -key.size), "")


def test_listed_record_that_is_zeroed(refuse: Refuse) -> None:
    file = small_file()
    key = file.root.keys[0]
    content = bytearray(file.close())
    content[key.position : key.position + key.size] = bytes(key.size)
    refuse(bytes(content), "")


def test_listed_record_in_a_free_segment(refuse: Refuse) -> None:
    file = small_file()
    key = file.root.keys[0]
    file.free.append((key.position, key.position + key.size - 1))
    refuse(file.close(), f"no record begins at byte {key.position}")


@pytest.mark.parametrize("version", [-937600, 63200])
@pytest.mark.parametrize(("first", "behind"), [(5, 10), (10, 100)], ids=["within the record", "beyond its end"])
def test_free_segment_that_begins_within_a_record(
    first: int, behind: int, version: int, check: Check, refuse: Refuse
) -> None:
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
        refuse(content, "")


def test_free_segment_over_two_records_of_uproot(check: Check) -> None:
    file = File()
    first = file.add(b"TNamed", b"h", tnamed(b"h"))
    second = file.add(b"TNamed", b"i", tnamed(b"i"))
    file.free.append((first.position + 5, second.position + second.size - 1))
    assert list(check(file.close(version=-937600))) == ["h", "i"]


@pytest.mark.parametrize("which", ["root directory", "key list", "streamer info", "free list"])
def test_record_that_says_another_position_than_its_own(which: str, refuse: Refuse) -> None:
    file = small_file()
    content = file.close()
    position = {
        "root directory": BEGIN,
        "key list": struct.unpack_from(">i", content, file.root.start + 26)[0],
        "streamer info": struct.unpack_from(">i", content, 37)[0],
        "free list": struct.unpack_from(">i", content, 16)[0],
    }[which]
    assert struct.unpack_from(">i", content, position + 18) == (position,)
    refuse(put(content, position + 18, ">i", position + 1), "")


def test_gap_over_the_beginning_of_a_record(refuse: Refuse) -> None:
    refuse(with_hole(struct.pack(">i", -30), free_list=False), "")


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 28])
def test_zeros_between_records_of_go_hep(number: int, check: Check) -> None:
    assert "later" in check(with_hole(bytes(number)))


@pytest.mark.parametrize("number", [29, 30, 512, 3_000_000])
def test_as_many_zeros_as_a_record_has(number: int, refuse: Refuse) -> None:
    refuse(with_hole(bytes(number)), "zeros from byte 400 on, and no record within 29 bytes")


def test_zeros_over_whole_baskets(check: Check, refuse: Refuse) -> None:
    """As a disk leaves them that was to write a sector: of what is not compressed, nothing else tells."""
    file = small_file()
    baskets = [file.basket(b"1234567890", 10) for _ in range(5)]
    content = file.close()
    check(content)
    start, end = baskets[1].position - 4, baskets[4].position
    refuse(content[:start] + bytes(end - start) + content[end:], f"zeros from byte {baskets[1].position} on")


@pytest.mark.parametrize("number", [28, 29])
def test_zeros_up_to_the_end(number: int, check: Check, refuse: Refuse) -> None:
    file = small_file()
    content = file.close()
    end = len(content) + number
    last = len(content) - 8  # fFirst of the last free segment
    content = put(put(content, 12, ">i", end), last, ">i", end) + bytes(number)
    if number < 29:
        assert list(check(content)) == ["h", "d"]
    else:
        refuse(content, "zeros from byte")


def test_zeros_and_then_no_record(refuse: Refuse) -> None:
    refuse(with_hole(bytes(10) + b"\x55" * 10), "and no record within 29 bytes")


def test_record_in_no_key_list_is_checked(check: Check, refuse: Refuse) -> None:
    """So the baskets of a tree are covered without reading the tree."""
    good = COMPRESS["ZL"](TEXT)
    file = small_file()
    file.basket(good, len(TEXT))
    check(file.close())
    file = small_file()
    key = file.basket(good[:-1] + b"\0", len(TEXT))
    refuse(file.close(), f"record at byte {key.position} (TBasket branch): damaged ZL block")


def test_record_elsewhere_than_it_says(refuse: Refuse) -> None:
    file = small_file()
    file.basket(b"12345", 5, position=7)
    refuse(file.close(), "record at byte 7 (TBasket branch) is at byte")


def test_pages_of_an_rntuple_are_opaque(check: Check) -> None:
    file = small_file()
    file.record(b"RBlob", b"", b"\xaa" * 48, object_size=40, version=1004)
    assert list(check(file.close())) == ["h", "d"]


def test_pages_of_an_rntuple_elsewhere_than_they_say(refuse: Refuse) -> None:
    file = small_file()
    file.record(b"RBlob", b"", b"\xaa" * 48, object_size=40, version=1004, position=7)
    refuse(file.close(), "is at byte")


def test_damaged_streamer_info(check: Check, refuse: Refuse) -> None:
    for damage, text in ((0, None), (1, "damaged ZL block")):
        file = small_file()
        file.streamer_info = None
        stored = bytearray(COMPRESS["ZL"](TEXT))
        stored[-1] ^= damage
        info = file.record(b"TList", b"StreamerInfo", bytes(stored), object_size=len(TEXT))
        content = file.close(streamer_info=info.position, streamer_info_size=info.size)
        if text:
            refuse(content, f"record at byte {info.position} (TList StreamerInfo): {text}")
        else:
            check(content)


def test_streamer_info_that_is_something_else(refuse: Refuse) -> None:
    file = small_file()
    other = file.record(b"TList", b"Other", EMPTY_LIST)
    refuse(file.close(streamer_info=other.position, streamer_info_size=other.size), "is no streamer info")


def test_file_without_streamer_info(check: Check) -> None:
    file = small_file()
    file.streamer_info = None
    assert list(check(file.close())) == ["h", "d"]


def test_file_without_free_list(check: Check) -> None:
    """ROOT saves a file without one before it closes it."""
    content = small_file().close(**NO_FREE_LIST)
    assert list(check(content)) == ["h", "d"]


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
def test_wrong_free_segments(segments: list[tuple[int, int]], text: str, refuse: Refuse) -> None:
    file = small_file()
    file.free = segments
    refuse(file.close(), text)


@pytest.mark.parametrize("change", [-1, 1, 1000])
def test_last_free_segment_elsewhere_than_at_the_end(change: int, refuse: Refuse) -> None:
    content = small_file().close()
    refuse(put(content, len(content) - 8, ">i", len(content) + change), "is not the room behind byte")


@pytest.mark.parametrize("last", [0, 1_000_000_000, 2_000_000_001, 2**31 - 1])
def test_last_free_segment_that_ends_nowhere(last: int, refuse: Refuse) -> None:
    """ROOT's ends at a multiple of 1 GB from 2 GB on."""
    content = small_file().close()
    refuse(put(content, len(content) - 4, ">i", last), "list of free segments")


@pytest.mark.parametrize(("older", "valid"), [(1900, True), (0x7FFFFFFF, False), (-1, False)])
def test_an_older_last_segment_behind_the_free_segments(older: int, valid: bool, check: Check, refuse: Refuse) -> None:
    """As uproot 5.3 may leave it in a list that has become shorter."""
    file = small_file()
    file.free = [(0, 0)]  # for the room
    content = file.close(free_segments=1)
    last = struct.pack(">hii", 1, len(content), 2_000_000_000)
    left = struct.pack(">hii", 1 if valid else 2, older, 2_000_000_000)
    content = content[: -len(last + left)] + last + left
    if valid:
        check(content)
    else:
        refuse(content, "list of free segments: something else behind")


def test_something_behind_the_free_segments(refuse: Refuse) -> None:
    file = small_file()
    file.data += struct.pack(">i", -10) + bytes(6)
    file.free = [(len(file.data) - 10, len(file.data) - 1)]
    refuse(file.close(free_segments=1), "list of free segments")


# --- payloads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letters", COMPRESS)
@pytest.mark.parametrize("sizes", [[1160], [1000, 160], [1, 1, 1158]], ids=str)
def test_compressed_payload(letters: str, sizes: list[int], check: Check) -> None:
    stops = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    blocks = [COMPRESS[letters](TEXT[stop - size : stop]) for size, stop in zip(sizes, stops, strict=True)]
    assert list(check(compressed(blocks, len(TEXT)))) == ["h"]


def test_payload_of_all_compressions_at_once(check: Check) -> None:
    blocks = [compress(TEXT) for compress in COMPRESS.values()]
    assert list(check(compressed(blocks, len(TEXT) * len(blocks)))) == ["h"]


def test_payload_that_is_not_compressed(check: Check) -> None:
    assert list(check(one_object(TEXT))) == ["h"]


@pytest.mark.parametrize("letters", COMPRESS)
@pytest.mark.parametrize("change", [-1, 1, 100, -1000])
def test_block_that_inflates_to_another_length_than_it_says(letters: str, change: int, refuse: Refuse) -> None:
    """Even where the record agrees with the block's head."""
    whole = bytearray(COMPRESS[letters](TEXT))
    size = len(TEXT) + change
    whole[6:9] = size.to_bytes(3, "little")
    refuse(compressed([bytes(whole)], size), "block")


@pytest.mark.parametrize("letters", COMPRESS)
@pytest.mark.parametrize("change", [-1, 1, 1000])
def test_blocks_that_inflate_to_more_or_less_than_the_record_says(letters: str, change: int, refuse: Refuse) -> None:
    text = "inflates to 1160 bytes" if change > 0 else "a block that inflates to 1160 bytes"
    refuse(compressed([COMPRESS[letters](TEXT)], len(TEXT) + change), text)


def again(letters: str, change: Callable[[bytes], bytes]) -> bytes:
    """Return a file of a block whose stream is changed, and its length with it."""
    whole = COMPRESS[letters](TEXT)
    return compressed([block(whole[:2], whole[2], change(whole[9:]), len(TEXT))], len(TEXT))


@pytest.mark.parametrize("letters", COMPRESS)
@pytest.mark.parametrize("cut", [1, 4, 12])
def test_truncated_stream(letters: str, cut: int, refuse: Refuse) -> None:
    refuse(again(letters, lambda stream: stream[:-cut]), "block")


@pytest.mark.parametrize("letters", COMPRESS)
@pytest.mark.parametrize("more", [b"\0", b"\0\0\0\0", b"\xff" * 20], ids=len)
def test_bytes_behind_the_stream(letters: str, more: bytes, refuse: Refuse) -> None:
    refuse(again(letters, lambda stream: stream + more), "")


# Not ZL: libdeflate stops behind the first stream, and the second ends with the checksum that is looked for; not ZS,
# which takes frames behind one another for one stream: the length tells.
@pytest.mark.parametrize("letters", ["XZ", "L4", "CS"])
def test_two_streams_in_a_block(letters: str, refuse: Refuse) -> None:
    refuse(again(letters, lambda stream: stream * 2), "")


@pytest.mark.parametrize("letters", COMPRESS)
def test_empty_stream(letters: str, refuse: Refuse) -> None:
    refuse(again(letters, lambda stream: b""), "")


@pytest.mark.parametrize(
    ("letters", "at"),
    [("ZL", -1), ("ZL", -4), ("L4", 0), ("L4", 7), ("XZ", -1), ("XZ", -30), ("XZ", 8)],
)
def test_wrong_checksum(letters: str, at: int, refuse: Refuse) -> None:
    def flip(stream: bytes) -> bytes:
        changed = bytearray(stream)
        changed[at] ^= 1
        return bytes(changed)

    refuse(again(letters, flip), "")


def test_checksum_of_zstandard(check: Check, refuse: Refuse) -> None:
    """Frames seldom have one; where they do, it counts."""
    raw = struct.pack("<I", 0xFD2FB528) + bytes([0x04, 0x38]) + (len(TEXT) << 3 | 1).to_bytes(3, "little") + TEXT
    right = xxhash.xxh64_intdigest(TEXT) & 0xFFFFFFFF
    assert cramjam.zstd.decompress(raw + struct.pack("<I", right))
    check(compressed([block(b"ZS", 1, raw + struct.pack("<I", right), len(TEXT))], len(TEXT)))
    refuse(compressed([block(b"ZS", 1, raw + struct.pack("<I", right ^ 1), len(TEXT))], len(TEXT)), "damaged ZS block")


@pytest.mark.parametrize(
    "head", [b"ZL\x09", b"ZL\x00", b"XZ\x01", b"L4\x02", b"ZS\x00", b"CS\x00", b"zl\x08", b"AA\x08"]
)
def test_unknown_compression(head: bytes, refuse: Refuse) -> None:
    refuse(compressed([block(head[:2], head[2], zlib.compress(TEXT), len(TEXT))], len(TEXT)), "unknown way")


@pytest.mark.parametrize("letters", COMPRESS)
@pytest.mark.parametrize("change", [-1, 1, -5, 100, 10_000_000])
def test_block_that_says_another_length_than_it_has(letters: str, change: int, refuse: Refuse) -> None:
    whole = bytearray(COMPRESS[letters](TEXT))
    stored = int.from_bytes(whole[3:6], "little") + change
    whole[3:6] = stored.to_bytes(3, "little")
    refuse(compressed([bytes(whole)], len(TEXT)), "record at byte")


@pytest.mark.parametrize("number", range(1, 9))
def test_block_head_cut_short(number: int, refuse: Refuse) -> None:
    blocks = [COMPRESS["ZL"](TEXT), COMPRESS["ZL"](TEXT)[:number]]
    refuse(compressed(blocks, len(TEXT)), f"{number} bytes behind its last compressed block")


def test_block_of_nothing(refuse: Refuse) -> None:
    refuse(compressed([COMPRESS["ZL"](TEXT), COMPRESS["ZL"](b"")], len(TEXT)), "inflates to 0 bytes")


@pytest.mark.parametrize("stored", [b"", bytes(3), b"\0\0\0\1", zlib.compress(b"")])
def test_block_of_nothing_for_an_object_of_nothing(stored: bytes, refuse: Refuse) -> None:
    refuse(compressed([block(b"ZL", 8, stored, 0)], 0), "inflates to 0 bytes")


def test_record_without_payload_for_an_object_of_some_size(refuse: Refuse) -> None:
    refuse(compressed([], 1000), "inflates to 0 bytes, its key says 1000")


def test_more_bytes_than_the_object_has(refuse: Refuse) -> None:
    refuse(one_object(TEXT, len(TEXT) - 1), f"{len(TEXT)} bytes where {len(TEXT) - 1} belong")


def test_zlib_stream_that_needs_a_dictionary(refuse: Refuse) -> None:
    squeezer = zlib.compressobj(zdict=TEXT[:100])
    stream = squeezer.compress(TEXT) + squeezer.flush()
    refuse(compressed([block(b"ZL", 8, stream, len(TEXT))], len(TEXT)), "damaged ZL block")


def test_lzma_that_is_not_xz(refuse: Refuse) -> None:
    refuse(
        compressed([block(b"XZ", 0, lzma.compress(TEXT, lzma.FORMAT_ALONE), len(TEXT))], len(TEXT)), "damaged XZ block"
    )


def test_reason_names_the_record(refuse: Refuse) -> None:
    file = small_file()
    key = file.add(b"TH1F", b"hEta", COMPRESS["ZL"](TEXT), object_size=2000)
    refuse(
        file.close(),
        f"record at byte {key.position} (TH1F hEta): payload inflates to {len(TEXT)} bytes, its key says 2000",
    )


# --- limits ------------------------------------------------------------------------------------------------------------


def test_limit_of_keys(monkeypatch: pytest.MonkeyPatch, check: Check, refuse: Refuse) -> None:
    def content(number: int) -> bytes:
        file = File()
        for at in range(number):
            file.add(b"TNamed", b"%d" % at)
        return file.close()

    monkeypatch.setattr(rootcheck, "MAX_DIRECTORIES", 2)
    monkeypatch.setattr(rootcheck, "MAX_KEYS", 20)
    assert len(check(content(20))) == 20
    refuse(content(30), "more than 20 keys")


def test_limit_of_directories(monkeypatch: pytest.MonkeyPatch, check: Check, refuse: Refuse) -> None:
    def content(number: int) -> bytes:
        file = File()
        for at in range(number):
            file.directory(b"%d" % at)
        return file.close()

    monkeypatch.setattr(rootcheck, "MAX_DIRECTORIES", 10)
    assert len(check(content(8))) == 8
    refuse(content(10), "more than 10 directories")


def test_limit_of_the_names_of_keys(monkeypatch: pytest.MonkeyPatch, check: Check, refuse: Refuse) -> None:
    content = small_file().close()
    most = len("h" + "TNamed" + "d" + "TDirectory")
    monkeypatch.setattr(rootcheck, "MAX_NAMES", most)
    check(content)
    monkeypatch.setattr(rootcheck, "MAX_NAMES", most - 1)
    refuse(content, f"keys with names and classes of more than {most - 1} characters in all")


def test_limit_of_the_names_of_objects(monkeypatch: pytest.MonkeyPatch, check: Check, refuse: Refuse) -> None:
    content = one_object(tnamed(b"of its own"))
    monkeypatch.setattr(rootcheck, "MAX_NAMES", 10)
    assert [found.name for found in check(content).values()] == ["of its own"]
    monkeypatch.setattr(rootcheck, "MAX_NAMES", 9)
    refuse(content, "objects with names of more than 9 characters in all")


def test_limit_of_depth(monkeypatch: pytest.MonkeyPatch, check: Check, refuse: Refuse) -> None:
    monkeypatch.setattr(rootcheck, "MAX_DEPTH", 3)
    check(nested(3))
    refuse(nested(4), "nested more than 3 deep")


def test_limit_of_records(monkeypatch: pytest.MonkeyPatch, check: Check, refuse: Refuse) -> None:
    content = small_file().close()  # root, h, d, x, two key lists, streamer info, free list
    monkeypatch.setattr(rootcheck, "MAX_RECORDS", 8)
    check(content)
    monkeypatch.setattr(rootcheck, "MAX_RECORDS", 7)
    refuse(content, "more than 7 records")


@pytest.mark.parametrize("content", [one_object(TEXT), compressed([COMPRESS["ZL"](TEXT)], len(TEXT))])
def test_limit_of_an_object(content: bytes, monkeypatch: pytest.MonkeyPatch, check: Check, refuse: Refuse) -> None:
    monkeypatch.setattr(inflate, "MAX_OBJECT_SIZE", len(TEXT))
    check(content)
    monkeypatch.setattr(inflate, "MAX_OBJECT_SIZE", len(TEXT) - 1)
    refuse(content, "more than is allowed")


def test_limit_of_what_is_inflated(monkeypatch: pytest.MonkeyPatch, check: Check, refuse: Refuse) -> None:
    data = bytes(200_000)
    content = compressed([COMPRESS["ZL"](data)], len(data))
    monkeypatch.setattr(inflate, "MAX_INFLATED", 201_000)
    check(content)
    monkeypatch.setattr(inflate, "MAX_INFLATED", 199_000)
    refuse(content, "more than is allowed")
    monkeypatch.setattr(inflate, "MAX_INFLATION", 200_000)
    check(content)


def test_limit_of_what_xz_inflates(monkeypatch: pytest.MonkeyPatch, check: Check, refuse: Refuse) -> None:
    data = bytes(200_000)
    monkeypatch.setattr(inflate, "MAX_INFLATED_SLOWLY", 199_000)
    check(compressed([COMPRESS["ZL"](data)], len(data)))
    refuse(compressed([COMPRESS["XZ"](data)], len(data)), "XZ blocks inflate to more than is allowed")


def test_limit_of_memory_for_xz(monkeypatch: pytest.MonkeyPatch, check: Check, refuse: Refuse) -> None:
    content = compressed([COMPRESS["XZ"](TEXT)], len(TEXT))
    check(content)
    monkeypatch.setattr(inflate, "MAX_XZ_MEMORY", 1 << 15)
    refuse(content, "damaged XZ block")


def test_limit_of_seconds(monkeypatch: pytest.MonkeyPatch, refuse: Refuse) -> None:
    monkeypatch.setattr(inflate, "MAX_SECONDS", 0.0)
    refuse(small_file().close(), "takes longer than 0.0 s")


# --- names -------------------------------------------------------------------------------------------------------------


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
        (b"TDirectory", b"", "h"),
        (b"string", string(b"text"), "h"),
        (b"vector<double>", versioned(bytes(20)), "h"),
        (b"MyStruct", versioned(struct.pack(">iii", 1, 2, 3)), "h"),
        (b"MyObject", versioned(tobject() + b"members"), "h"),
        (b"TNamed", b"", "h"),
        (b"TNamed", tnamed(b"own")[:10], "h"),
        (b"TNamed", struct.pack(">IH", 0xFFFFFFFF, 1) * 20, "h"),
    ],
)
def test_name_of_an_object(class_name: bytes, payload: bytes, name: str, check: Check) -> None:
    file = File()
    if class_name == b"TDirectory":
        file.directory(b"h")
    else:
        file.add(class_name, b"h", payload)
    assert check(file.close()) == {"h": RootObject(name, class_name.decode())}


@pytest.mark.parametrize("letters", COMPRESS)
def test_name_of_a_compressed_object(letters: str, check: Check) -> None:
    payload = versioned(tnamed(b"own") + TEXT)
    blocks = [COMPRESS[letters](payload[:600]), COMPRESS[letters](payload[600:])]
    assert check(compressed(blocks, len(payload))) == {"h": RootObject("own", "TH1F")}


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
    ],
)
def test_name_of_a_key(stored: bytes, name: str, check: Check) -> None:
    file = File()
    file.add(b"TStruct", stored)
    assert check(file.close()) == {name: RootObject(name, "TStruct")}


def test_keys_that_differ_in_undecodable_bytes(check: Check) -> None:
    """The escape of one is what the other spells out."""
    file = File()
    for name in b"a\xff", b"a\xfe", rb"a\xff", b"a\xff\xfe":
        file.add(b"TNamed", name, tnamed(name))
    assert sorted(check(file.close())) == [r"a\xfe", r"a\xff", r"a\xff (2)", r"a\xff\xfe"]


def test_undecodable_class(check: Check) -> None:
    file = File()
    file.add(b"T\xff", b"h")
    assert check(file.close()) == {"h": RootObject("h", "T\\xff")}


@pytest.mark.parametrize("cycles", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_newest_cycle_of_a_name(cycles: tuple[int, ...], check: Check) -> None:
    file = File()
    for cycle in cycles:
        file.add(b"TNamed", b"h", tnamed(b"cycle %d" % cycle), cycle=cycle)
    assert check(file.close()) == {"h": RootObject("cycle 3", "TNamed")}


def test_first_of_two_keys_with_one_name_and_cycle(check: Check) -> None:
    """As ROOT does, which looks no further."""
    file = File()
    file.add(b"TNamed", b"h", tnamed(b"first"))
    file.add(b"TNamed", b"h", tnamed(b"second"))
    assert check(file.close()) == {"h": RootObject("first", "TNamed")}


@pytest.mark.parametrize("where", ["class", "name", "title"])
@pytest.mark.parametrize("length", [254, 255, 256, 300])
def test_long_string_that_could_be_taken_for_a_short_one(where: str, length: int, check: Check) -> None:
    """Where the first byte of its length, 255, is taken for the length, what follows may fit just as well."""
    for byte in range(256):
        text = b"a" * 251 + bytes([byte]) + b"b" * (length - 252)
        strings = {"class": b"TNamed", "name": b"h", "title": b"", where: text}
        file = File()
        file.add(strings["class"], strings["name"], tnamed(strings["name"]), title=strings["title"])
        (name, found), *more = check(file.close()).items()
        class_name = strings["class"].decode(errors="backslashreplace")
        assert (name.encode(), found.class_name, more) == (
            strings["name"].decode(errors="backslashreplace").encode(),
            class_name,
            [],
        )


def in_versions(*classes: bytes) -> bytes:
    """Return what begins an object whose classes each have this content behind their bases, the outermost last."""
    content = struct.pack(">HII", 1, 0, 0)
    for own in classes:
        content = versioned(content + own)
    return content


@pytest.mark.parametrize(
    "class_name",
    ["TCrown", "TArc", "TCurlyLine", "TMarker3DBox", "TFrame", "TPolyLine3D", "TQuaternion", "TArrow"],
)
def test_nameless_objects_answer_their_class_name(class_name: str, check: Check) -> None:
    file = File()
    file.add(class_name.encode(), b"h", in_versions(bytes(20)))
    assert check(file.close()) == {"h": RootObject(class_name, class_name)}


@pytest.mark.parametrize("points", [0, 3])
def test_name_of_polymarker_stands_behind_its_points(points: int, check: Check) -> None:
    marker = versioned(bytes(8))
    payload = in_versions(marker + struct.pack(">i", points) + bytes(12 * points) + string(b"option") + string(b"mine"))
    file = File()
    file.add(b"TPolyMarker3D", b"h", payload)
    file.add(b"TPolyMarker3D", b"cut short", payload[:-1])
    assert [found.name for found in check(file.close()).values()] == ["mine", "cut short"]


# --- the second reader -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["fName", "fClassName", "fCycle", "fSeekKey"])
def test_uproot_that_finds_other_keys(attribute: str, monkeypatch: pytest.MonkeyPatch, refuse: Refuse) -> None:
    original = getattr(uproot.reading.ReadOnlyKey, attribute)
    monkeypatch.setattr(uproot.reading.ReadOnlyKey, attribute, property(lambda key: original.fget(key) * 2))
    refuse(small_file().close(), "uproot finds other objects: 'h")


@pytest.mark.parametrize("more", [-1, 1])
def test_uproot_that_finds_fewer_or_more_keys(more: int, monkeypatch: pytest.MonkeyPatch, refuse: Refuse) -> None:
    original = second_reader._read_until_keys

    def read(*arguments: Any) -> tuple[Any, ...]:
        *rest, number = original(*arguments)
        return *rest, number + more

    monkeypatch.setattr(second_reader, "_read_until_keys", read)
    refuse(small_file().close(), f"uproot finds {2 + more} keys in the root directory, not 2")


@pytest.mark.parametrize("length", [0, 254, 255, 256, 30_000])
def test_uproot_reads_names_of_all_lengths(length: int, check: Check) -> None:
    file = File()
    for name in (b"a" * length, b"b"):
        file.add(b"TNamed", name, tnamed(name))
    assert [key[:1000] for key in check(file.close())] == ["a" * min(length, 1000), "b"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("v"),
        AssertionError("a"),
        RecursionError("r"),
        KeyError("k"),
        StopIteration(),
    ],
    ids=repr,
)
def test_uproot_that_raises(error: Exception, monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(uproot.reading, "ReadOnlyKey", fail)
    with pytest.raises(InvalidRootFile, match="uproot cannot read the file") as refusal:
        check(small_file().close())
    assert refusal.value.__cause__ is error


def test_what_is_no_fault_of_the_file_is_no_verdict_on_it(monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(uproot.reading, "ReadOnlyKey", no_memory)
        with pytest.raises(MemoryError):
            check(small_file().close())

    def broken_disk(*_: Any) -> bytes:
        raise OSError(errno.EIO, "the disk is broken")

    with monkeypatch.context() as patch:
        patch.setattr(second_reader, "WINDOW", 0)  # as if the file were too large to be in memory
        patch.setattr(second_reader._File, "chunk", chunk_of(broken_disk))
        with pytest.raises(OSError, match="the disk is broken"):
            check(small_file().close())


def chunk_of(pread: Callable[..., bytes]) -> Callable[..., object]:
    """Return uproot's way to read, with a `pread` of its own for the file."""
    original = second_reader._File.chunk

    def chunk(file: second_reader._File, start: int, stop: int) -> object:
        file._reader.pread = pread  # type: ignore[method-assign]
        return original(file, start, stop)

    return chunk


@pytest.mark.parametrize("window", [0, 300, 1 << 20])
def test_uproot_reads_files_beyond_the_window_like_others(
    window: int, monkeypatch: pytest.MonkeyPatch, check: Check
) -> None:
    monkeypatch.setattr(root_keys, "WINDOW", window)
    monkeypatch.setattr(second_reader, "WINDOW", window)
    expected = {"h": RootObject("h", "TNamed"), "d": RootObject("d", "TDirectory")}
    assert check(small_file().close()) == expected


def test_uproot_is_not_asked_about_files_refused_before(monkeypatch: pytest.MonkeyPatch, refuse: Refuse) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(uproot.reading, "ReadOnlyKey", fail)
    refuse(small_file().close()[:-1], "cut short")


# --- on a terminal -----------------------------------------------------------------------------------------------------


def terminal(*files: Path) -> tuple[int, list[str], str]:
    run = subprocess.run(
        [sys.executable, "-m", "rootcheck", *map(str, files)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    return run.returncode, run.stdout.splitlines(), run.stderr


def test_terminal_lists_the_objects_of_valid_files(tmp_path: Path) -> None:
    path = tmp_path / "valid.root"
    path.write_bytes(small_file().close())
    assert terminal(path, path) == (
        0,
        [
            f"{path}: valid, 2 objects",
            "  h: Obj name: h, Obj IsA() Name: TNamed",
            "  d: Obj name: d, Obj IsA() Name: TDirectoryFile",
        ]
        * 2,
        "",
    )


def test_terminal_says_why_files_are_invalid(tmp_path: Path) -> None:
    invalid, valid, missing = (tmp_path / name for name in ("invalid.root", "valid.root", "missing.root"))
    invalid.write_bytes(b"")
    valid.write_bytes(small_file().close())
    status, lines, errors = terminal(invalid, valid, missing)
    assert (status, errors) == (1, "")
    assert lines[0] == f"{invalid}: invalid: the file is empty"
    assert lines[1] == f"{valid}: valid, 2 objects"
    assert lines[4:] == [f"{missing}: No such file or directory"]


def test_terminal_escapes_control_and_bidirectional_characters(tmp_path: Path) -> None:
    file = File()
    file.add(b"TNamed", "\x1b[2J\u202etxt\n é".encode(), tnamed(b"\r"))
    path = tmp_path / "\x1b]0;title.root"
    path.write_bytes(file.close())
    status, lines, _ = terminal(path)
    assert (status, len(lines)) == (0, 2)
    assert lines[1] == r"  \x1b[2J\u202etxt\n é: Obj name: \r, Obj IsA() Name: TNamed"
    assert lines[0].startswith(str(tmp_path)) and r"\x1b]0;title.root: valid, 1 objects" in lines[0]


def test_terminal_without_files() -> None:
    status, lines, errors = terminal()
    assert (status, lines) == (2, [])
    assert "usage: python -m rootcheck" in errors
