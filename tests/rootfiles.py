"""Build ROOT files record by record, right in everything but the numbers that a test wants wrong, and check them."""

from __future__ import annotations

import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import cramjam
import xxhash

from rootcheck import InvalidRootFile, RootObject, check_root_file

BEGIN = 100  # fBEGIN
TEXT = b"All histograms of the shift, " * 40
EMPTY_LIST = struct.pack(">IHHIIBi", 0x40000000 | 17, 5, 1, 0, 0, 0, 0)  # a TList without name and members

# --- payloads ----------------------------------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    """Return a TString."""
    return (bytes([len(text)]) if len(text) < 255 else b"\xff" + struct.pack(">I", len(text))) + text


def versioned(payload: bytes, version: int = 1) -> bytes:
    """Return the bytes of a class: byte count, version, members."""
    return struct.pack(">IH", 0x40000000 | len(payload) + 2, version) + payload


def tobject(bits: int = 0) -> bytes:
    return struct.pack(">HII", 1, 0, bits) + (b"\0\0" if bits & 0x10 else b"")


def tnamed(name: bytes, title: bytes = b"", bits: int = 0) -> bytes:
    return versioned(tobject(bits) + string(name) + string(title))


def block(letters: bytes, method: int, stored: bytes, size: int) -> bytes:
    """Return a compressed block: its head with both lengths, and the stored bytes."""
    return letters + bytes([method]) + len(stored).to_bytes(3, "little") + size.to_bytes(3, "little") + stored


def lz4ed(data: bytes) -> bytes:
    stored = bytes(cramjam.lz4.compress_block(data, store_size=False))
    return struct.pack(">Q", xxhash.xxh64_intdigest(stored)) + stored


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "ZL": lambda data: block(b"ZL", 8, zlib.compress(data), len(data)),
    "XZ": lambda data: block(b"XZ", 0, lzma.compress(data, check=lzma.CHECK_CRC32, preset=0), len(data)),
    "L4": lambda data: block(b"L4", 1, lz4ed(data), len(data)),
    "ZS": lambda data: block(b"ZS", 1, bytes(cramjam.zstd.compress(data)), len(data)),
    "CS": lambda data: block(b"CS", 8, zlib.compress(data, wbits=-15), len(data)),
}

# --- keys --------------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """The head of a record, or its copy in a key list."""

    class_name: bytes
    name: bytes = b""
    title: bytes = b""
    size: int = 0
    object_size: int = 0
    key_size: int = 0
    cycle: int = 1
    position: int = 0
    directory: int = BEGIN
    version: int = 4
    more: bytes = b""  # a TBasket has fields of its own behind the title

    def pack(self) -> bytes:
        return (
            struct.pack(">ihiIhh", self.size, self.version, self.object_size, 0, self.key_size, self.cycle)
            + struct.pack(">qq" if self.version > 1000 else ">ii", self.position, self.directory)
            + string(self.class_name)
            + string(self.name)
            + string(self.title)
            + self.more
        )


class Directory:
    """A directory's record, the keys it will list, and the numbers that are to be wrong in it."""

    def __init__(self, key: Key, start: int, parent: Directory | None) -> None:
        self.key = key
        self.start = start  # of its own fields
        self.parent = parent
        self.position = key.position
        self.keys: list[Key] = []
        self.fields: dict[str, int] = {}  # instead of what would be right
        self.key_list: dict[str, Any] = {}  # instead of what would be right in the key list's own key
        self.count: int | None = None  # instead of the number of keys
        self.slack = b""  # behind the last key
        self.listed = True  # False leaves out the key list, as ROOT does where nothing was ever in the directory


# --- files -------------------------------------------------------------------------------------------------------------


class File:
    """A ROOT file under construction: records are appended at once; `close` appends those that refer to them."""

    def __init__(self, *, begin: int = BEGIN, big: bool = False, streamer_info: bytes | None = EMPTY_LIST) -> None:
        self.begin = begin
        self.big = big
        self.data = bytearray(begin)
        self.directories: list[Directory] = []
        self.free: list[tuple[int, int]] = []  # segments before the last, which follows from the end of the file
        self.streamer_info = streamer_info
        self.unlisted: dict[str, Any] = {}  # in the keys of streamer info and free list, instead of what would be right
        self.room_begins = 0  # instead of the end of the file, in the last free segment
        self.directory_version = 5
        names = string(b"file.root") + string(b"")
        key = self.record(b"TFile", b"file.root", names + bytes(60 if big else 48), directory=0)
        self.root = self._directory(key, begin + key.key_size + len(names), None)

    def record(self, class_name: bytes, name: bytes = b"", payload: bytes = b"", **fields: Any) -> Key:
        """Append a record that no directory lists; `fields` of its key instead of what would be right."""
        key = Key(class_name, name, position=len(self.data), directory=self.begin, object_size=len(payload))
        key = key._replace(version=1004 if self.big else 4)._replace(**fields)
        length = len(key.pack())
        key = key._replace(**{"key_size": length, "size": length + len(payload), **fields})
        self.data += key.pack() + payload
        return key

    def add(
        self, class_name: bytes, name: bytes, payload: bytes = b"", to: Directory | None = None, **fields: Any
    ) -> Key:
        """Append the record of an object that a directory lists."""
        folder = to or self.root
        folder.keys.append(self.record(class_name, name, payload, **{"directory": folder.position, **fields}))
        return folder.keys[-1]

    def basket(self, payload: bytes, size: int, entries: int = 0, last: int | None = None, **fields: Any) -> Key:
        """Append a TBasket whose data fill it, unless `last`, the position in its buffer where they end, is another."""
        key_size = len(Key(b"TBasket", b"branch").pack()) + 19
        more = struct.pack(">hiiiiB", 3, 32000, 1000, entries, key_size + size if last is None else last, 0)
        return self.record(b"TBasket", b"branch", payload, object_size=size, more=more, **fields)

    def gap(self, content: bytes) -> None:
        """Append bytes that are in no record but in a free segment."""
        self.free.append((len(self.data), len(self.data) + len(content) - 1))
        self.data += content

    def directory(self, name: bytes, to: Directory | None = None) -> Directory:
        """Append the record of a directory that its parent lists."""
        key = self.add(b"TDirectory", name, bytes(60 if self.big else 48), to)
        return self._directory(key, key.position + key.key_size, to or self.root)

    def _directory(self, key: Key, start: int, parent: Directory | None) -> Directory:
        self.directories.append(Directory(key, start, parent))
        return self.directories[-1]

    def list_keys(self, directory: Directory) -> None:
        """Append a directory's key list and tell the directory."""
        count = len(directory.keys) if directory.count is None else directory.count
        keys = b"".join(key.pack() for key in directory.keys)
        payload = struct.pack(">i", count) + keys + directory.slack
        class_name = b"TDirectory" if directory.parent else b"TFile"
        fields = {"directory": directory.position, **directory.key_list}
        key_list = self.record(class_name, directory.key.name, payload, **fields) if directory.listed else Key(b"")
        values = {
            "version": self.directory_version + (1000 if self.big else 0),
            "key_list_size": key_list.size,
            "name_size": directory.start - directory.position,
            "own": directory.position,
            "parent": directory.parent.position if directory.parent else 0,
            "key_list": key_list.position,
            **directory.fields,
        }
        version, *others = values.values()
        form = ">hIIiiqqq" if version > 1000 else ">hIIiiiii"
        struct.pack_into(form, self.data, directory.start, version, 0, 0, *others)

    def close(self, **header: int) -> bytes:
        """Append key lists, streamer info and free list; return the file, with this in the header instead of the right."""
        for directory in self.directories:
            self.list_keys(directory)
        info = Key(b"")
        if self.streamer_info is not None:
            info = self.record(b"TList", b"StreamerInfo", self.streamer_info, **self.unlisted)
        form = ">hqq" if self.big else ">hii"
        segments = len(self.free) + 1
        free_list = self.record(b"TFile", b"file.root", bytes(segments * struct.calcsize(form)), **self.unlisted)
        end = len(self.data)
        version = 1001 if self.big else 1
        last = (self.room_begins or end, max(end, 2_000_000_000))
        packed = b"".join(struct.pack(form, version, *segment) for segment in [*self.free, last])
        self.data[end - len(packed) :] = packed
        values = {
            "version": 63200 + self.big * 1_000_000,
            "begin": self.begin,
            "end": end,
            "free_list": free_list.position,
            "free_list_size": free_list.size,
            "free_segments": segments,
            "name_size": self.root.start - self.begin,
            "units": 8 if self.big else 4,
            "compression": 101,
            "streamer_info": info.position,
            "streamer_info_size": info.size,
            **header,
        }
        form = ">4siiqqiiiBiqi18x" if values["version"] >= 1_000_000 else ">4siiiiiiiBiii18x"
        struct.pack_into(form, self.data, 0, b"root", *values.values())
        return bytes(self.data)


def small_file(**options: Any) -> File:
    """Return a file of an object `h` and a directory `d` with another, before it is closed."""
    file = File(**options)
    file.add(b"TNamed", b"h", tnamed(b"h"))
    file.add(b"TNamed", b"x", tnamed(b"x"), file.directory(b"d"))
    return file


def one_object(payload: bytes = b"", object_size: int | None = None, class_name: bytes = b"TNamed") -> bytes:
    """Return a file of one object `h` with this payload, as stored."""
    file = File()
    file.add(class_name, b"h", payload, object_size=len(payload) if object_size is None else object_size)
    return file.close()


def compressed(blocks: Iterable[bytes], size: int) -> bytes:
    """Return a file of one object `h` that inflates to so many bytes."""
    return one_object(b"".join(blocks), size, b"TH1F")


# --- checking ----------------------------------------------------------------------------------------------------------


def check(content: bytes) -> dict[str, RootObject]:
    """Return the objects of a file of this content, which is in memory and not on the disk."""
    descriptor = os.memfd_create("file.root")
    try:
        os.write(descriptor, content)
        return check_root_file(descriptor)
    finally:
        os.close(descriptor)


def reason(content: bytes) -> str | None:
    """Return why a file of this content is refused, or None."""
    try:
        check(content)
    except InvalidRootFile as error:
        return str(error)
    return None
