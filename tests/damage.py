"""Damage valid ROOT files as disks, networks and programs do, and tell the damage that can be noticed.

Usage: python -m tests.damage [--count N] [--seed S] [--root] [--keep FOLDER] [FILE ...]

Prints, as Markdown, how many damaged files of each kind rootcheck refuses and, with --root (where PyPI's `root`, which
is CERN ROOT, is installed), how many CERN ROOT refuses when it opens them and reads every key. Then follow the parts of
the files that the damage touched where rootcheck accepted it.

Whether damage is detectable is decided here without rootcheck, by a simple parse of the intact file: each of its bytes
belongs to one `Part`. The parse trusts the file and is for valid ones only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import math
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
from rootfiles import reason

DATA = TESTS / "data"


class Part(IntEnum):
    """The parts of a ROOT file, to one of which each of its bytes belongs."""

    STRUCTURE = 0  # header, keys, key lists, directories, list of free segments, heads of compressed blocks
    CHECKSUMMED = 1  # a compressed block that ends in a checksum or begins with one: ZL, XZ, L4
    # Nothing in the file tells whether these are what they were:
    RAW = 2  # an uncompressed payload
    ZSTD = 3  # a ZS block, which ROOT writes without its checksum
    OLD = 4  # a CS block, deflate without zlib's checksum
    BLOB = 5  # pages of an RNTuple
    DATE = 6
    UUID = 7
    ONCE = 8  # in keys of which there is no copy: names, and what of a basket's key no reader needs; fPidOffset
    VERSION = 9  # a version number, where it goes on meaning the same field widths
    COMPRESSION = 10  # fCompress, which is for writers
    BASKET = 11  # the fields that TBasket adds to its key
    FREE = 12  # deleted records, zeros between records
    SLACK = 13  # behind the last key of a list, behind the fields of a directory or of the header
    BEHIND = 14  # behind fEND
    TITLE = 15  # names and titles of keys: ROOT may rewrite them in the key list alone (TKey::SetName, SetTitle)
    TOLERANT = 16  # a number that some writers set otherwise


DETECTABLE = frozenset({Part.STRUCTURE, Part.CHECKSUMMED})


class Field(NamedTuple):
    """A number in the file."""

    name: str
    start: int
    size: int
    order: str  # of its bytes

    def read(self, data: bytes) -> int:
        return int.from_bytes(data[self.start : self.start + self.size], "big" if self.order == "big" else "little")


class Key(NamedTuple):
    start: int
    size: int
    version: int
    object_size: int
    date: int
    key_size: int
    cycle: int
    position: int
    directory: int
    class_name: bytes
    name: bytes
    title: bytes
    end: int  # of the three strings
    texts: int  # start of them

    @property
    def payload(self) -> int:
        return self.start + self.key_size

    @property
    def record_end(self) -> int:
        return self.start + self.size


class Block(NamedTuple):
    """A compressed block, without its head of 9 bytes."""

    kind: bytes
    start: int
    end: int
    size: int


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    length, at = data[at], at + 1
    if length == 255:
        length, at = int.from_bytes(data[at : at + 4], "big"), at + 4
    return data[at : at + length], at + length


def read_key(data: bytes, start: int) -> Key:
    size, version, object_size, date, key_size, cycle = struct.unpack_from(">ihiIhh", data, start)
    form = ">qq" if version > 1000 else ">ii"
    position, directory = struct.unpack_from(form, data, start + 18)
    texts = at = start + 18 + struct.calcsize(form)
    class_name, at = _string(data, at)
    name, at = _string(data, at)
    title, at = _string(data, at)
    directory &= (1 << 48) - 1 if version > 1000 else -1
    sizes = size, version, object_size, date, key_size, cycle
    return Key(start, *sizes, position, directory, class_name, name, title, at, texts)


class Layout:
    """The parts, fields, keys and blocks of a valid ROOT file, and where they are."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.parts = np.full(len(data), Part.SLACK, np.uint8)
        self.fields: list[Field] = []
        self.blocks: list[Block] = []
        self.keys: list[Key] = []  # of all records
        self.listed: dict[int, Key] = {}  # by position of the record: its copy in a key list
        self.key_lists: dict[int, int] = {}  # position of a key list: position of its directory
        self.directories: list[int] = []  # positions
        self.zeros: list[tuple[int, int]] = []
        self._versions: list[tuple[Field, int]] = []  # and from which number on the fields behind it are wide
        self._tolerant: list[tuple[Field, Callable[[int], bool]]] = []  # and which numbers are accepted
        self._header()
        self.parts[self.end :] = Part.BEHIND
        self._directories()
        self._records()

    def _mark(self, part: Part, start: int, end: int) -> int:
        self.parts[start:end] = part
        return end

    def _field(self, name: str, start: int, size: int, part: Part = Part.STRUCTURE, order: str = "big") -> int:
        self.fields.append(Field(name, start, size, order))
        return self._mark(part, start, start + size)

    def _version(self, name: str, start: int, size: int, wide_from: int) -> int:
        end = self._field(name, start, size, Part.VERSION)
        self._versions.append((self.fields[-1], wide_from))
        return end

    def _tolerated(self, name: str, start: int, size: int, accepts: Callable[[int], bool]) -> int:
        end = self._field(name, start, size, Part.TOLERANT)
        self._tolerant.append((self.fields[-1], accepts))
        return end

    def _header(self) -> None:
        self._mark(Part.STRUCTURE, 0, 4)
        version, self.begin = struct.unpack_from(">ii", self.data, 4)
        wide = 8 if version >= 1_000_000 else 4
        at = self._version("header fVersion", 4, 4, 1_000_000)
        at = self._field("header fBEGIN", at, 4)
        at = self._field("header fEND", at, wide)
        self.end = self.fields[-1].read(self.data)
        at = self._field("header fSeekFree", at, wide)
        self.free_list = self.fields[-1].read(self.data)
        if not self.free_list:  # else the list has fEND once more; here there may be further records behind it
            self._mark(Part.ONCE, at - 2 * wide, at - wide)
        size = int.from_bytes(self.data[at : at + 4], "big")
        if self.free_list:
            at = self._tolerated("header fNbytesFree", at, 4, lambda number: size <= number < 1 << 31)
            at = self._tolerated("header nfree", at, 4, lambda number: number in (0, self.free_segments))
        else:
            at = self._field("header fNbytesFree", at, 4)
            at = self._field("header nfree", at, 4, Part.SLACK)
        self.free_segments = self.fields[-1].read(self.data)
        at = self._field("header fNbytesName", at, 4)
        self.name_size = self.fields[-1].read(self.data)
        at = self._field("header fUnits", at, 1, Part.ONCE)
        at = self._field("header fCompress", at, 4, Part.COMPRESSION)
        at = self._field("header fSeekInfo", at, wide)
        self.streamer_info = self.fields[-1].read(self.data)
        at = self._field("header fNbytesInfo", at, 4)
        self._mark(Part.UUID, at, at + 18)

    def _directories(self) -> None:
        pending = [(self.begin, self.begin + self.name_size)]
        while pending:
            position, start = pending.pop()
            self.directories.append(position)
            key_list = self._directory(start)
            if not key_list:
                continue
            self.key_lists[key_list] = position
            own = read_key(self.data, key_list)
            at = self._field("number of keys", own.payload, 4)
            for _ in range(self.fields[-1].read(self.data)):
                key = read_key(self.data, at)
                self._key("listed ", key)
                self.listed[key.position] = key
                at = key.end
                if key.class_name in (b"TDirectory", b"TDirectoryFile"):
                    pending.append((key.position, key.position + key.key_size))

    def _directory(self, start: int) -> int:
        wide = 8 if int.from_bytes(self.data[start : start + 2], "big") > 1000 else 4
        at = self._version("directory fVersion", start, 2, 1001)
        at = self._mark(Part.DATE, at, at + 8)
        at = self._field("directory fNbytesKeys", at, 4)
        at = self._field("directory fNbytesName", at, 4)
        at = self._field("directory fSeekDir", at, wide)
        at = self._field("directory fSeekParent", at, wide)
        at = self._field("directory fSeekKeys", at, wide)
        key_list = self.fields[-1].read(self.data)
        self._mark(Part.UUID, at, at + 18)
        return key_list

    def _key(self, what: str, key: Key) -> None:
        wide = 8 if key.version > 1000 else 4
        at = self._field(f"{what}key fNbytes", key.start, 4)
        at = self._version(f"{what}key fVersion", at, 2, 1001)
        at = self._field(f"{what}key fObjlen", at, 4)
        at = self._mark(Part.DATE, at, at + 4)
        at = self._field(f"{what}key fKeylen", at, 2)
        at = self._field(f"{what}key fCycle", at, 2)
        at = self._field(f"{what}key fSeekKey", at, wide)
        at = self._field(f"{what}key fSeekPdir", at, wide)
        self.fields.append(Field(f"{what}key length of a string", at, 1, "big"))
        if wide == 8:
            self._mark(Part.ONCE, at - 8, at - 6)  # fPidOffset, in the upper bits of fSeekPdir
        self._mark(Part.STRUCTURE, at, key.end)
        for text in (key.title, key.name) if what or key.start in self.listed else (key.title,):
            end = key.end if text is key.title else _string(self.data, _string(self.data, key.texts)[1])[1]
            self._mark(Part.TITLE, end - len(text), end)

    def _records(self) -> None:
        holes = self._free_list() if self.free_list else {}
        at = self.begin
        while at < self.end:
            size = int.from_bytes(self.data[at : at + 4], "big", signed=True)
            if at in holes:
                at = self._mark(Part.FREE, at, holes[at])
            elif size < 0:
                self._field("length of a gap", at, 4)
                at = self._mark(Part.FREE, at + 4, at - size)
            elif size == 0:
                at = self._zeros(at)
            else:
                at = self._record(read_key(self.data, at))

    def _free_list(self) -> dict[int, int]:
        at = read_key(self.data, self.free_list).payload
        holes = {}
        for _ in range(self.free_segments):
            wide = 8 if int.from_bytes(self.data[at : at + 2], "big") > 1000 else 4
            at = self._version("free segment fVersion", at, 2, 1001)
            first = int.from_bytes(self.data[at : at + wide], "big")
            if first < self.end:
                at = self._field("free segment fFirst", at, wide)
            else:
                at = self._tolerated("free segment fFirst", at, wide, lambda number: number in (self.begin, self.end))
            at = self._field("free segment fLast", at, wide)
            last = self.fields[-1].read(self.data)
            if first < self.end:
                holes[first] = last + 1
        return holes

    def _zeros(self, start: int) -> int:
        at = start
        while at < self.end and not (self.data[at : at + 4] != bytes(4) and self._is_key(at)):
            at += 1
        self.zeros.append((start, at))
        return self._mark(Part.FREE, start, at)

    def _is_key(self, at: int) -> bool:
        try:
            return read_key(self.data, at).position == at
        except (IndexError, struct.error):
            return False

    def _record(self, key: Key) -> int:
        self.keys.append(key)
        self._key("", key)
        if key.start not in self.listed and key.class_name not in (b"TBasket", b"RBlob"):
            self._tolerated("key fCycle", key.start + 16, 2, lambda number: number in (0, 1))
        if key.start not in self.listed and key.start != self.streamer_info:
            # ROOT writes the present class, name and title of the file here, which may have had others before.
            texts = key.class_name, *((key.name, key.title) if key.start != self.begin else ())
            at = key.texts
            for text in texts:
                at = self._mark(Part.ONCE, (end := _string(self.data, at)[1]) - len(text), end)
            if key.class_name in (b"TBasket", b"RBlob"):
                self._mark(Part.ONCE, key.start + 16, key.start + 18)  # fCycle
                self._mark(Part.ONCE, key.start + (26 if key.version > 1000 else 22), key.texts)  # fSeekPdir
        if key.class_name == b"TBasket":
            self._basket(key.end, key.payload)
        if key.start in self.directories or key.start in self.key_lists or key.start == self.free_list:
            return key.record_end  # marked already
        if key.class_name == b"RBlob":
            self._mark(Part.BLOB, key.start + 6, key.start + 10)  # fObjlen
            return self._mark(Part.BLOB, key.payload, key.record_end)
        if key.size - key.key_size == key.object_size:
            return self._mark(Part.RAW, key.payload, key.record_end)
        at = key.payload
        while at < key.record_end:
            at = self._block(at)
        return at

    def _basket(self, start: int, end: int) -> None:
        at = start
        for name, size in ("fVersion", 2), ("fBufferSize", 4), ("fNevBufSize", 4), ("fNevBuf", 4), ("fLast", 4):
            at = self._field(f"basket {name}", at, size, Part.BASKET)
        self._mark(Part.BASKET, at, end)

    def _block(self, start: int) -> int:
        kind = self.data[start : start + 2]
        self._mark(Part.STRUCTURE, start, start + 3)
        self._field("block stored size", start + 3, 3, order="little")
        at = self._field("block size", start + 6, 3, order="little")
        stored, size = (field.read(self.data) for field in self.fields[-2:])
        self.blocks.append(Block(kind, at, at + stored, size))
        part = {b"ZS": Part.ZSTD, b"CS": Part.OLD}.get(kind, Part.CHECKSUMMED)
        return self._mark(part, at, at + stored)

    # --- what damage touched ---

    def touched(self, mutant: bytes) -> frozenset[Part]:
        """Return the parts of the file that differ in their content; none where the damage has no effect."""
        common = min(len(self.data), len(mutant))
        before = np.frombuffer(self.data, np.uint8, common)
        changed = np.flatnonzero(before != np.frombuffer(mutant, np.uint8, common))
        parts = {Part(part) for part in np.unique(self.parts[changed])}
        if len(mutant) < self.end:
            parts.add(Part.STRUCTURE)
        elif len(mutant) != len(self.data):
            parts.add(Part.BEHIND)
        for field, wide_from in self._versions if Part.VERSION in parts else ():
            sign = 1 << 8 * field.size - 1
            number, was = (field.read(data) ^ sign for data in (mutant, self.data))
            if (number >= wide_from + sign) != (was >= wide_from + sign):
                parts.add(Part.STRUCTURE)
        for field, accepts in self._tolerant if Part.TOLERANT in parts else ():
            if field.read(mutant) != field.read(self.data) and not accepts(field.read(mutant)):
                parts.add(Part.STRUCTURE)
        if Part.CHECKSUMMED in parts and Part.STRUCTURE not in parts and not self._inflates_to_other(mutant, changed):
            parts.remove(Part.CHECKSUMMED)
        return frozenset(parts)

    def _inflates_to_other(self, mutant: bytes, changed: np.ndarray[Any, Any]) -> bool:
        """Whether a checksummed block that was changed has lost its content; padding bits of deflate, for one, have none."""
        for block in self.blocks:
            low, high = np.searchsorted(changed, (block.start, block.end))
            if low == high or block.kind in (b"ZS", b"CS"):
                continue
            if block.kind == b"L4":  # the checksum is that of the compressed bytes
                return True
            decoder = zlib.decompressobj() if block.kind == b"ZL" else lzma.LZMADecompressor(memlimit=1 << 28)
            try:
                inflated = decoder.decompress(mutant[block.start : block.end], block.size + 1)
            except (zlib.error, lzma.LZMAError):
                return True
            original = (zlib if block.kind == b"ZL" else lzma).decompress(self.data[block.start : block.end])
            if not decoder.eof or decoder.unused_data or inflated != original:
                return True
        return False


# --- damage ------------------------------------------------------------------------------------------------------------

Mutator = Callable[[random.Random, Layout], bytes]
MUTATORS: dict[str, Mutator] = {}


def _kind(mutator: Mutator) -> Mutator:
    """Register a way to damage a file under the words of its function's name."""
    MUTATORS[mutator.__name__.replace("_", " ").strip()] = mutator
    return mutator


def _replace(data: bytes, start: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + len(new) :]


def _page(rng: random.Random, data: bytes, size: int) -> int:
    """Return where one of the file's pages starts."""
    return rng.randrange(0, len(data), size)


@_kind
def _truncated(rng: random.Random, layout: Layout) -> bytes:
    cut = rng.choice([rng.randint(1, 16), rng.randint(1, len(layout.data) - 1)])
    return layout.data[: max(0, len(layout.data) - cut)]


@_kind
def _bits_flipped(rng: random.Random, layout: Layout) -> bytes:
    data = bytearray(layout.data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        bit = rng.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


@_kind
def _bits_of_the_structure_flipped(rng: random.Random, layout: Layout) -> bytes:
    data = bytearray(layout.data)
    at = int(rng.choice(np.flatnonzero(layout.parts == Part.STRUCTURE).tolist()))
    data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


@_kind
def _sector_of_512_bytes_zeroed(rng: random.Random, layout: Layout) -> bytes:
    start = _page(rng, layout.data, 512)
    return _replace(layout.data, start, bytes(min(512, len(layout.data) - start)))


@_kind
def _sector_of_4096_bytes_zeroed(rng: random.Random, layout: Layout) -> bytes:
    start = _page(rng, layout.data, 4096)
    return _replace(layout.data, start, bytes(min(4096, len(layout.data) - start)))


@_kind
def _random_page(rng: random.Random, layout: Layout) -> bytes:
    size = rng.choice([64, 512, 4096])
    start = _page(rng, layout.data, size)
    return _replace(layout.data, start, rng.randbytes(min(size, len(layout.data) - start)))


@_kind
def _pages_swapped(rng: random.Random, layout: Layout) -> bytes:
    size = rng.choice([64, 512, 4096])
    one, other = _page(rng, layout.data, size), _page(rng, layout.data, size)
    pages = layout.data[one : one + size], layout.data[other : other + size]
    size = min(map(len, pages))
    return _replace(_replace(layout.data, one, pages[1][:size]), other, pages[0][:size])


@_kind
def _bytes_lost(rng: random.Random, layout: Layout) -> bytes:
    start = rng.randrange(len(layout.data))
    return layout.data[:start] + layout.data[start + rng.choice([1, 2, 4, rng.randint(1, 300)]) :]


@_kind
def _bytes_inserted(rng: random.Random, layout: Layout) -> bytes:
    start = rng.randint(0, len(layout.data))
    length = rng.choice([1, 2, 4, rng.randint(1, 300)])
    new = rng.choice([bytes(length), rng.randbytes(length), layout.data[start : start + length]])
    return layout.data[:start] + new + layout.data[start:]


@_kind
def _packet_lost(rng: random.Random, layout: Layout) -> bytes:
    start = _page(rng, layout.data, 1460)  # what fits into an Ethernet frame
    return layout.data[:start] + layout.data[start + 1460 :]


@_kind
def _packet_sent_twice(rng: random.Random, layout: Layout) -> bytes:
    start = _page(rng, layout.data, 1460)
    return layout.data[: start + 1460] + layout.data[start:]


@_kind
def _sent_as_text(rng: random.Random, layout: Layout) -> bytes:
    data = layout.data
    ways = (
        data.replace(b"\n", b"\r\n"),
        data.replace(b"\r\n", b"\n"),
        data.replace(b"\n", b"\r"),
        data.replace(b"\r", b""),
    )
    return rng.choice(ways)


@_kind
def _number_of_the_structure_changed(rng: random.Random, layout: Layout) -> bytes:
    field = rng.choice(layout.fields)
    top, number = 1 << 8 * field.size, field.read(layout.data)
    extremes = [0, 1, top - 1, top // 2, top // 2 - 1, len(layout.data), layout.end, layout.begin, 2_000_000_000]
    near = [number + 1, number - 1, number + 4, number * 2, number // 2, -number, number + 256, layout.end - number]
    other = rng.choice(layout.fields).read(layout.data)
    changed = rng.choice([rng.choice(extremes), rng.choice(near), other, rng.randrange(top)]) % top
    return _replace(layout.data, field.start, changed.to_bytes(field.size, "big" if field.order == "big" else "little"))


class Mutant(NamedTuple):
    source: Path
    kind: str
    number: int
    data: bytes
    touched: frozenset[Part]

    @property
    def is_detectable(self) -> bool:
        return bool(self.touched & DETECTABLE)

    def __str__(self) -> str:
        return f"{self.source.stem}, {self.kind}, number {self.number}"


def mutants(sources: Sequence[Path], count: int, seed: int) -> Iterator[Mutant]:
    """Damage files in turn, in each of the ways in turn; the same seed and files give the same mutants."""
    layouts: dict[Path, Layout] = {}
    number = made = 0
    kinds = list(MUTATORS.items())
    while made < count:
        number += 1
        rng = random.Random(f"{seed} {number}")
        source = rng.choice(sources)
        layout = layouts.get(source) or layouts.setdefault(source, Layout(source.read_bytes()))
        kind, mutator = kinds[number % len(kinds)]
        data = mutator(rng, layout)
        if data != layout.data:
            made += 1
            yield Mutant(source, kind, number, data, layout.touched(data))


def valid_files(folder: Path) -> list[Path]:
    """Return the files of a folder that its expected.json calls valid."""
    expected = json.loads((folder / "expected.json").read_text())
    return [folder / name for name, facts in sorted(expected.items()) if facts["valid"]]


# --- the program -------------------------------------------------------------------------------------------------------

# What became of a file; CERN ROOT knows them all, rootcheck the first two.
ACCEPTED, REFUSED, RAISED, CRASHED, HUNG = "accepted", "refused", "raised", "crashed", "hung"


class CernRoot:
    """CERN ROOT in a process of its own that forks one more for each file, which may crash or hang."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--root-worker"]
        self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._worker.stdout is None or self._worker.stdout.readline() != "ready\n":
            raise ImportError("CERN ROOT is not installed: pip install root")

    def check(self, path: Path) -> str:
        """Open the file and read every key, as the first receiver did."""
        if self._worker.stdin is None or self._worker.stdout is None:
            raise ValueError("no pipes")
        print(path, file=self._worker.stdin, flush=True)
        return self._worker.stdout.readline().strip()

    def close(self) -> None:
        self._worker.communicate()


def _root_worker() -> None:
    """Answer each path on standard input with the outcome of CERN ROOT's reading."""
    import ROOT
    from ask_root import in_child

    def read(path: str) -> Iterator[str]:
        try:
            file = ROOT.TFile.Open(path)
            if not file or file.IsZombie():
                yield REFUSED
                return
            for key in file.GetListOfKeys():
                found = key.ReadObj()
                f"Obj name: {found.GetName()}, Obj IsA() Name: {found.IsA().GetName()}"
            yield ACCEPTED
        except OSError:  # "Failed to open file"
            yield REFUSED
        except Exception:  # noqa: BLE001  whatever Python's wrappers raise
            yield RAISED

    ROOT.gROOT.SetBatch(True)
    ROOT.gErrorIgnoreLevel = ROOT.kFatal
    ROOT.gSystem.ResetSignals()  # no stack trace of every crash
    list(read(str(DATA / "h1_all.root")))  # Python's wrappers that are compiled for it serve all children to come
    print("ready", flush=True)
    for line in sys.stdin:
        lines, _, how = in_child(partial(read, line.rstrip("\n")))
        print(lines[0] if lines else HUNG if how == "hangs" else CRASHED, flush=True)


def _table(rows: Iterable[Sequence[object]]) -> str:
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in texts]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def _percent(part: int, whole: int) -> str:
    if not whole:
        return ""
    percent = 100 * part / whole
    # 100 % is said of all and nothing less.
    return f"{math.floor(percent * 10) / 10:g} %"


def _detection_table(outcomes: Counter[tuple[str, bool, str, str]], with_root: bool) -> str:
    """Return the table of detection; `outcomes` are numbers by kind, whether detectable, checker and outcome."""

    def number(kind: str, detectable: bool, checker: str, *results: str) -> int:
        return sum(
            count
            for (its_kind, its_detectable, its_checker, result), count in outcomes.items()
            if kind in (its_kind, "all")
            and (its_detectable, its_checker) == (detectable, checker)
            and result in (results or (ACCEPTED, REFUSED, RAISED, CRASHED, HUNG))
        )

    head = ["kind of damage", "detectable", "rootcheck refuses"]
    if with_root:
        head += ["ROOT read the intact file", "ROOT refuses", "raises", "crashes", "hangs"]
    rows: list[list[object]] = [[*head, "not detectable", "rootcheck refuses"]]
    for kind in [*MUTATORS, "all"]:
        all_of_kind = number(kind, True, "rootcheck")
        row: list[object] = [kind, all_of_kind, _percent(number(kind, True, "rootcheck", REFUSED), all_of_kind)]
        if with_root:
            read = number(kind, True, "ROOT")
            row += [read, *(_percent(number(kind, True, "ROOT", result), read) for result in (REFUSED, RAISED))]
            row += [number(kind, True, "ROOT", result) for result in (CRASHED, HUNG)]
        others = number(kind, False, "rootcheck")
        rows.append([*row, others, _percent(number(kind, False, "rootcheck", REFUSED), others)])
    return _table(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Damage ROOT files and print how much of it is noticed; return 1 if rootcheck misses any that is detectable."""
    parser = argparse.ArgumentParser(prog="python -m tests.damage", description=main.__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="valid files (default: tests/data)")
    parser.add_argument("--count", type=int, default=5000, help="of damaged files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--root", action="store_true", help="ask CERN ROOT, too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep detectable ones that rootcheck accepts")
    options = parser.parse_args(arguments)
    sources = options.files or valid_files(DATA)
    outcomes: Counter[tuple[str, bool, str, str]] = Counter()
    accepted: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "mutant.root")
        root = stack.enter_context(contextlib.closing(CernRoot())) if options.root else None
        readable = {source for source in sources if root and root.check(source) == ACCEPTED}
        for mutant in mutants(sources, options.count, options.seed):
            outcome = REFUSED if reason(mutant.data) else ACCEPTED
            outcomes[mutant.kind, mutant.is_detectable, "rootcheck", outcome] += 1
            if outcome == ACCEPTED:
                accepted[", ".join(sorted(part.name for part in mutant.touched)) or "nothing: no effect"] += 1
                if mutant.is_detectable:
                    print(f"missed: {mutant}", file=sys.stderr)
                    if options.keep:
                        (options.keep / f"{mutant.source.stem}-{mutant.number}.root").write_bytes(mutant.data)
            if root and mutant.source in readable:
                path.write_bytes(mutant.data)
                outcomes[mutant.kind, mutant.is_detectable, "ROOT", root.check(path)] += 1
    print(_detection_table(outcomes, options.root))
    print("\nWhat the damage touched in the files that rootcheck accepted:\n")
    print(_table([("part of the file", "files"), *accepted.most_common()]))
    return int(any(outcomes[kind, True, "rootcheck", ACCEPTED] for kind in MUTATORS))


if __name__ == "__main__":
    if sys.argv[1:] == ["--root-worker"]:
        _root_worker()
    else:
        sys.exit(main())
