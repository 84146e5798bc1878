"""Write a corpus of ROOT files of every writer that can be installed, for tests/test_oracle.py.

Usage: python make_corpus.py FOLDER --root-python PYTHON [--venvs FOLDER]

PYTHON is one that has PyPI's `root`, which is CERN ROOT itself. The folder of virtual environments gets one for each
release of uproot below; one that is there already is taken as it is. Files that are there already stay.

    root*, uproot-*   see corpus_with_root.py and corpus_with_uproot.py
    geant4            made byte by byte: headers, keys and directories as Geant4's writers make them, and their variants
    header            headers of files of CERN ROOT and uproot, changed in what ROOT does not look at
    flipped           one bit flipped (seeded), by what it is part of: half of them in streamer infos

The files of `flipped` may be damaged. All others are what a writer meant.
"""

from __future__ import annotations

import argparse
import itertools
import random
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PYENV = Path.home() / ".pyenv" / "versions"
SECONDS = 3600  # for one writer
SEED = 17

# Release: the series of Python it runs on, and what to install.
UPROOTS = {
    "3.14": ("3.8", ["uproot3==3.14.*", "numpy<1.20"]),
    "4.1": ("3.8", ["uproot==4.1.*", "numpy<1.24", "awkward<2"]),
    "4.3": ("3.8", ["uproot==4.3.*", "numpy<1.24", "awkward<2"]),
    "5.0": ("3.9", ["uproot==5.0.*", "numpy<2", "awkward<2.5"]),
    "5.3": ("3.11", ["uproot==5.3.*", "numpy<2", "awkward<2.7"]),
    "5.7": ("3.11", ["uproot==5.7.*", "numpy<3"]),
}
CODECS = ["lz4", "zstandard", "xxhash", "cramjam"]


def python_of(series: str) -> str:
    """Return a Python of a series: pyenv's newest, or the one on the path."""
    found = sorted(PYENV.glob(f"{series}.*/bin/python"))
    return str(found[-1]) if found else f"python{series}"


def venv(folder: Path, release: str) -> Path:
    """Return the Python of the virtual environment that has a release of uproot; make it if need be."""
    series, packages = UPROOTS[release]
    python = folder / release / "bin" / "python"
    if not python.exists():
        subprocess.run([python_of(series), "-m", "venv", folder / release], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages, *CODECS], check=True)
    return python


# --- Geant4 ------------------------------------------------------------------------------------------------------------


class Style(NamedTuple):
    """The differences between the writers that are not CERN ROOT, and numbers that ROOT does not look at."""

    begin: int = 64  # fBEGIN
    version: int = 40000  # fVersion
    key_version: int = 2
    directory_version: int = 1
    inner_cycle: int = 0  # of the keys of the key list, the streamer info and the free list
    free_segments: int = 0  # as the header counts them
    last_from_begin: bool = False  # the last free segment begins at fBEGIN
    date: int = 0
    gap: bool = True  # a deleted record
    streamer_info: bytes | None = b""  # None: no such record
    compressed: bool = False
    subdirectory: bool = False
    units: int = 4
    free_list_excess: int = 0  # in fNbytesFree
    trailing: int = 0  # bytes behind fEND
    names_in_directory: bool = True  # an uncompressed copy of name and title before the directory's fields
    uuid: bool = False


def text(value: str) -> bytes:
    return bytes([len(value)]) + value.encode()


def key(style: Style, names: tuple[str, str, str], seek: tuple[int, int], sizes: tuple[int, int], cycle: int) -> bytes:
    """Return a key: class, name, title; position, directory; stored and inflated size of its payload."""
    strings = b"".join(map(text, names))
    wide = style.key_version > 1000
    length = 18 + (16 if wide else 8) + len(strings)
    head = struct.pack(">ihiIhh", length + sizes[0], style.key_version, sizes[1], style.date, length, cycle)
    return head + struct.pack(">qq" if wide else ">ii", *seek) + strings


def zipped(payload: bytes) -> bytes:
    stored = zlib.compress(payload)
    block = b"ZL\x08" + len(stored).to_bytes(3, "little") + len(payload).to_bytes(3, "little") + stored
    return block if len(block) < len(payload) else payload


TNAMED = struct.pack(">IHHII", 0x40000000 | 22, 1, 1, 0, 0x03000000) + text("obj") + text("title")
EMPTY_LIST = struct.pack(">IHHIIBi", 0x40000000 | 17, 5, 1, 0, 0x02000000, 0, 0)


def geant4_file(style: Style, name: str) -> bytes:
    """Return a file of a few TNamed, as its writer would have made it."""
    data = bytearray(style.begin)

    def record(names: tuple[str, str, str], payload: bytes, directory: int, cycle: int = 1) -> bytes:
        stored = zipped(payload) if style.compressed and names[0] == "TNamed" else payload
        made = key(style, names, (len(data), directory), (len(stored), len(payload)), cycle)
        data.extend(made + stored)
        return made

    def fields(own: int, parent: int, name_size: int, key_list: tuple[int, int]) -> bytes:
        wide = ">hIIiiqqq" if style.directory_version > 1000 else ">hIIiiiii"
        packed = struct.pack(
            wide, style.directory_version, style.date, style.date, key_list[1], name_size, own, parent, key_list[0]
        )
        return packed + (b"\0\x01" + bytes(16) if style.uuid else b"")

    def list_keys(keys: list[bytes], names: tuple[str, str, str], own: int) -> tuple[int, int]:
        position = len(data)
        made = record(names, struct.pack(">i", len(keys)) + b"".join(keys), own, style.inner_cycle)
        return position, len(data) - position + 0 * len(made)

    names = text(name) + text("")
    top_key = key(style, ("TFile", name, ""), (style.begin, 0), (0, 0), 1)
    name_size = len(top_key) + len(names)
    record(("TFile", name, ""), names + fields(0, 0, 0, (0, 0)), 0)
    keys = [record(("TNamed", f"obj{i}", "title"), TNAMED, style.begin) for i in range(3)]
    inside: list[tuple[int, int, bytes]] = []
    if style.subdirectory:
        position = len(data)
        made = record(("TDirectory", "d", "d"), fields(0, 0, 0, (0, 0)), style.begin)
        keys.append(made)
        leaf = record(("TNamed", "leaf", ""), TNAMED, position)
        inside.append((position, len(made), leaf))
    info = (0, 0)
    if style.streamer_info is not None:
        info = len(data), 0
        record(
            ("TList", "StreamerInfo", "Doubly linked list"),
            style.streamer_info or EMPTY_LIST,
            style.begin,
            style.inner_cycle,
        )
        info = info[0], len(data) - info[0]
    gap = len(data), len(data)
    if style.gap:
        data.extend(struct.pack(">i", -40) + bytes(36))
        gap = gap[0], len(data) - 1
    for position, length, leaf in inside:
        listed = list_keys([leaf], ("TDirectory", "d", "d"), position)
        made = fields(position, style.begin, length, listed)
        data[position + length : position + length + len(made)] = made
    listed = list_keys(keys, ("TFile", name, "") if style.uuid else ("TDirectory", "g4", "g4"), style.begin)
    made = fields(style.begin, 0, name_size, listed)
    data[style.begin + name_size : style.begin + name_size + len(made)] = made
    free = len(data)
    segments = [gap] if style.gap else []
    form = ">hqq" if style.version >= 1_000_000 else ">hii"
    segment_version = 1001 if style.version >= 1_000_000 else 1
    empty = bytes((len(segments) + 1) * struct.calcsize(form))
    record(("TFile", name, ""), empty, style.begin, style.inner_cycle)
    segments.append((style.begin if style.last_from_begin else len(data), 2_000_000_000))
    data[len(data) - len(empty) :] = b"".join(struct.pack(form, segment_version, *segment) for segment in segments)
    header = ">4siiqqiiiBiqi" if style.version >= 1_000_000 else ">4siiiiiiiBiii"
    free_size = len(data) - free + style.free_list_excess
    struct.pack_into(header, data, 0, b"root", style.version, style.begin, len(data), free, free_size, style.free_segments,
                     name_size, style.units, 1, *info)  # fmt: skip
    return bytes(data) + bytes(style.trailing)


def geant4_styles(streamer_info: bytes) -> Iterator[tuple[str, Style]]:
    """Yield all that Geant4's releases vary at once, then one thing at a time."""
    varied = itertools.product((False, True), repeat=5)
    for compressed, subdirectory, old, gap, cycle in varied:
        name = "-".join(
            word
            for word, used in zip(("compressed", "subdirectory", "old_free_list", "gap", "cycle_1"),
                                  (compressed, subdirectory, old, gap, cycle), strict=True)
            if used
        )  # fmt: skip
        style = Style(
            compressed=compressed, subdirectory=subdirectory, last_from_begin=old, gap=gap, inner_cycle=int(cycle)
        )
        yield f"geant4-{name or 'plain'}", style._replace(free_segments=(1 + gap) * cycle)  # newer releases count them
    base = Style(subdirectory=True)
    for change in (
        {"streamer_info": streamer_info}, {"streamer_info": None}, {"begin": 100}, {"begin": 100, "version": 63200},
        {"key_version": 4}, {"directory_version": 5, "uuid": True}, {"directory_version": 3}, {"free_segments": 2},
        {"free_segments": 7}, {"units": 8}, {"units": 0}, {"version": 50000}, {"version": -937600}, {"version": 999999},
        {"free_list_excess": 20}, {"free_list_excess": 2000}, {"trailing": 50}, {"date": 0x7EF80AC8}, {"uuid": True},
        {"key_version": 1004, "version": 1063200, "begin": 100, "units": 8}, {"key_version": 1004, "begin": 100},
        {"directory_version": 1005, "begin": 100, "uuid": True}, {"version": 1063200, "begin": 100, "units": 8},
        {"inner_cycle": 3}, {"version": 30201, "key_version": 2, "directory_version": 1, "begin": 64},
    ):  # fmt: skip
        name = "-".join(
            f"{field}_{value if isinstance(value, int) else 'real' if value else 'none'}"
            for field, value in change.items()
        )
        yield f"variant-{name}", base._replace(**change)


# --- headers -------------------------------------------------------------------------------------------------------------


def header_variants(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield a file of CERN ROOT with 32-bit header, each time with one field changed."""
    for name, offset, form, value in (
        ("units_8", 32, ">B", 8), ("units_0", 32, ">B", 0), ("compression", 33, ">i", 999), ("version_negative", 4, ">i", -937600),
        ("version_more_negative", 4, ">i", -119937600), ("version_999999", 4, ">i", 999999), ("version_0", 4, ">i", 0),
        ("version_3", 4, ">i", 30000), ("free_segments_0", 24, ">i", 0), ("free_segments_1", 24, ">i", 1), ("free_segments_99", 24, ">i", 99),
        ("free_segments_negative", 24, ">i", -1), ("no_streamer_info", 37, ">ii", None), ("streamer_info_size_0", 41, ">i", 0),
        ("free_list_size_0", 20, ">i", 0), ("no_free_list", 16, ">ii", None), ("date_0", 110, ">i", 0), ("uuid_0", 45, ">QQ", None),
    ):  # fmt: skip
        values = [0, 0] if value is None else [value]
        changed = bytearray(data)
        struct.pack_into(form, changed, offset, *values)
        yield name, bytes(changed)
    for name, offset in (
        ("free_list_larger", 20),
        ("streamer_info_larger", 41),
        ("name_size_larger", 28),
        ("end_larger", 12),
    ):
        for more in (1, 30, 3000):
            changed = bytearray(data)
            struct.pack_into(">i", changed, offset, struct.unpack_from(">i", data, offset)[0] + more)
            yield f"{name}_{more}", bytes(changed)
    yield "trailing", data + b"trailing"
    yield "trailing_zeros", data + bytes(5000)


# --- flipped bits ----------------------------------------------------------------------------------------------------------


def regions(data: bytes) -> dict[str, tuple[int, int]]:
    """Return where in a file with 32-bit header the parts are into which bits are flipped."""
    begin, end, free, free_size, _, name_size = struct.unpack_from(">6i", data, 8)
    info, info_size = struct.unpack_from(">ii", data, 37)
    list_size, _, _, _, key_list = struct.unpack_from(">5i", data, begin + name_size + 10)
    first = begin + struct.unpack_from(">i", data, begin)[0]
    return {
        "streamer_info": (info, info + info_size),
        "streamer_info_payload": (info + 64, info + info_size),
        "header": (0, 64),
        "directory": (begin, first),
        "first_record": (first, first + abs(struct.unpack_from(">i", data, first)[0])),
        "key_list": (key_list, key_list + list_size),
        "free_list": (free, free + free_size),
        "anywhere": (0, end),
    }


FLIPS = {"streamer_info_payload": 14, "streamer_info": 2, "header": 3, "directory": 2, "first_record": 2, "key_list": 3,
         "free_list": 2, "anywhere": 4}  # fmt: skip
FLIPPED = ("h1_all", "canvases", "tree", "custom_two_bases", "stl_keys", "alice_objarrays", "classes_interpreted")


def flipped_files(corpus: Path) -> Iterator[tuple[str, bytes]]:
    sources = [
        path
        for kind in ("none", "zlib", "lzma", "lz4", "zstd", "old")
        for path in sorted((corpus / f"root-{kind}").glob("*.root"))
    ]
    sources = [path for path in sources if path.stem in FLIPPED]
    sources += sorted((corpus / "uproot-5.7").glob("histograms-*.root")) + sorted(
        (corpus / "uproot-4.3").glob("one_histogram-*.root")
    )
    sources += [corpus / "geant4" / "variant-streamer_info_real.root"]
    for path in sources:
        data = path.read_bytes()
        for region, number in FLIPS.items():
            rng = random.Random(f"{SEED} {path.parent.name}/{path.stem} {region}")
            start, stop = regions(data)[region]
            for turn in range(number):
                changed = bytearray(data)
                changed[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
                yield f"{path.parent.name}-{path.stem}-{region}-{turn}", bytes(changed)


# --- all of it -------------------------------------------------------------------------------------------------------------


def write(folder: Path, files: Iterator[tuple[str, bytes]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for name, data in files:
        (folder / f"{name}.root").write_bytes(data)
        number += 1
    print(f"{folder.name}: {number} files written")


def raw_streamer_info(path: Path) -> bytes:
    """Return the payload of the streamer info of a file without compression."""
    data = path.read_bytes()
    info, size = struct.unpack_from(">ii", data, 37)
    return data[info + struct.unpack_from(">h", data, info + 14)[0] : info + size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root-python", required=True)
    parser.add_argument("--venvs", type=Path, default=Path("/tmp/uproot-releases"))
    arguments = parser.parse_args()
    corpus = arguments.folder.resolve()
    subprocess.run([arguments.root_python, HERE / "corpus_with_root.py", corpus], check=True, timeout=SECONDS)
    for release in UPROOTS:
        subprocess.run(
            [venv(arguments.venvs, release), HERE / "corpus_with_uproot.py", corpus], check=True, timeout=SECONDS
        )
    made_without_compression = corpus / "root-none" / "h1_all.root"
    info = raw_streamer_info(made_without_compression)
    write(corpus / "geant4", ((name, geant4_file(style, "g4.root")) for name, style in geant4_styles(info)))
    for source in ("root/h1_all", "root/directories", "uproot-5.7/histograms-zlib"):
        variants = header_variants((corpus / f"{source}.root").read_bytes())
        prefix = source.replace("/", "-")
        write(corpus / "header", ((f"{prefix}-{name}", data) for name, data in variants))
    write(corpus / "flipped", flipped_files(corpus))


if __name__ == "__main__":
    main()
