"""Validates a ROOT file and lists its objects.

A ROOT file is a header and a chain of records. Each record is a key (lengths, position, class, name, title) and a payload. A
directory is a record whose payload points to a key list: a record that repeats the keys of the directory's objects.

`check_root_file` follows the directories and notes the records that they refer to. Then it walks the chain once from end to
end. It compares the key of each record with its copy in the key list and inflates each payload within the size that the key
claims. It builds no object and keeps no payload. Finally uproot, a second and independent reader, must find the same keys.

A file is valid if CERN ROOT opens it in silence and lists keys of it. A file is invalid if ROOT repairs it, complains of it or
crashes on it, or if a record is damaged so that its codec or its own lengths show it.

The format: https://root.cern/doc/master/md_io_doc_TFile_classTFile.html, TFile.cxx, TKey.cxx, TDirectoryFile.cxx, TFree.cxx
and RZip.cxx of ROOT; tools/wroot of Geant4.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import unicodedata
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from free_list import SEGMENT_VERSIONS, SMALLEST_SEGMENT, read_segments, skip_old_segments
from inflate import CHECKSUMMED, Block, Budget, InflateError, inflate_blocks, inflate_single_zlib_block
from object_names import has_name_of_key, object_name
from root_keys import (
    BASKET,
    KEY_SIZES,
    LONGEST_KEY,
    SHORTEST_KEY,
    WINDOW,
    InvalidRootFile,
    Key,
    Reader,
    decode_name,
    escape_undecodable,
    keys_agree,
    parse_usual_key,
    read_key,
)
from second_reader import compare_with_uproot
from streamer_info import MAX_SIZE as MAX_STREAMER_INFO
from streamer_info import DamagedStreamerInfo, check_streamer_info

__all__ = ["InvalidRootFile", "RootObject", "check_root_file", "escape", "main"]

# Limits on the cost of one file. No honest file comes near them. The limits on inflating are in inflate.py.
MAX_KEYS = 200_000
MAX_DIRECTORIES = 20_000
MAX_DEPTH = 100
MAX_KEY_LISTS = 16 << 20  # bytes of all key lists, which stay in memory
MAX_NAMES = 8 << 20  # characters of the keys' names and classes, and of the objects' own names, which are in the answer
MAX_RECORDS = 5_000_000
MAX_NAME = 1000  # characters of a name in the answer; the rest is cut off

_NAME_BYTES = 1 << 16  # bytes of an uncompressed object searched for its name


class RootObject(NamedTuple):
    """An object at the top level of a ROOT file: its own name, and its class as it is stored."""

    name: str
    class_name: str

    @property
    def description(self) -> str:
        """The name and the class as ROOT prints them: `GetName()` and `IsA()->GetName()`."""
        # ROOT has stored TDirectoryFile under its old name, TDirectory, since the class was split in ROOT 5.
        class_name = "TDirectoryFile" if self.class_name == "TDirectory" else self.class_name
        return f"Obj name: {self.name}, Obj IsA() Name: {class_name}"


def check_root_file(path_or_descriptor: str | os.PathLike[str] | int) -> dict[str, RootObject]:
    """Return the objects at the top level of a valid ROOT file by the names of their keys, the newest cycle of each.

    A descriptor stays open, and its file position is neither used nor changed.
    Raises InvalidRootFile for every other content, and OSError if the file cannot be read.
    """
    reader = Reader(path_or_descriptor)
    try:
        header = _read_header(reader)
        file = _File(reader, Budget(reader.size), header)
        try:
            references = _read_directories(file)
            names = _RecordWalk(file, references).run()
            start = header.begin + header.name_size
            compare_with_uproot(reader, start, header.end, references.top_level_keys.values())
        except (InvalidRootFile, InflateError) as error:
            if not header.is_of_uproot_3:
                raise InvalidRootFile(str(error)) from (error.__cause__ or error)
            raise InvalidRootFile(f"{error}; {_UPROOT_3}") from error
    finally:
        reader.close()
    return _report(references.top_level_keys, names)


def _report(keys: dict[int, Key], names: dict[int, bytes]) -> dict[str, RootObject]:
    """Return the newest cycle of each key name. `names` are, by position, the objects' own names where the key has another."""
    newest: dict[str, Key] = {}
    for key in keys.values():
        other = newest.setdefault(key.name, key)
        if other.cycle < key.cycle:
            newest[key.name] = key
    objects: dict[str, RootObject] = {}
    classes: dict[str, str] = {}  # there are few
    for name, key in newest.items():
        own_name = key_name = name if len(name) <= MAX_NAME and name.isascii() else _escape_and_cut(name)
        if key.position in names:
            own_name = _escape_and_cut(decode_name(names[key.position]))
        if key_name in objects:  # a name that was cut, or whose escapes are letters in another one
            key_name = _make_unique(key_name, objects)
        class_name = classes.get(key.class_name) or classes.setdefault(key.class_name, _escape_and_cut(key.class_name))
        objects[key_name] = RootObject(own_name, class_name)
    return objects


def _make_unique(name: str, others: Container[str]) -> str:
    return next(unique for number in count(2) if (unique := f"{name} ({number})") not in others)


def _escape_and_cut(name: str) -> str:
    """Return a name with backslash escapes for undecodable bytes, cut to its limit."""
    return escape_undecodable(name)[:MAX_NAME]


# --- the header --------------------------------------------------------------------------------------------------------


class _Header(NamedTuple):
    """The header of the file: where its records begin and end, and where three of them are."""

    begin: int
    end: int
    free_list: int
    free_list_size: int
    free_segments: int  # 0: Geant4 does not count them
    name_size: int  # fNbytesName: from `begin` to the root directory's own fields
    streamer_info: int
    streamer_info_size: int
    is_of_uproot_3: bool
    is_of_old_update: bool  # uproot.update of 4.1 to 5.3.6 subtracts 1,000,000 from the version each time


@dataclass
class _File:
    """A file whose header has been read, and the budget of its check."""

    reader: Reader
    budget: Budget
    header: _Header


_HEADER = struct.Struct(">4siiiiiiiBiii")  # 4-byte positions, in files below 2 GB
_HEADER_64 = struct.Struct(">4siiqqiiiBiqi")  # from fVersion 1,000,000 on
_UPROOT_3 = (
    "the file is of uproot 3, which leaves zeros and old key lists between the records, so that damage cannot be told: "
    "rewrite it with CERN ROOT's hadd, or write it with uproot 4 or later"
)


def _read_header(reader: Reader) -> _Header:
    if not reader.size:
        raise InvalidRootFile("the file is empty")
    data, _ = reader.read(0, min(_HEADER_64.size, reader.size))
    if not data.startswith(b"root"):
        raise InvalidRootFile(f"not a ROOT file: it begins with {data[:4]!r}, not b'root'")
    if reader.size < _HEADER_64.size:
        raise InvalidRootFile(f"the file ends at byte {reader.size}, within its header")
    version = int.from_bytes(data[4:8], "big", signed=True)
    fields = (_HEADER_64 if version >= 1_000_000 else _HEADER).unpack_from(data)
    _, _, begin, end, free_list, free_list_size, free_segments, name_size, units, _, info, info_size = fields
    if not 41 <= begin < end:
        raise InvalidRootFile(f"header: the records are said to reach from byte {begin} to byte {end}")
    if end > reader.size:
        raise InvalidRootFile(f"the file is cut short: it has {reader.size} bytes of the {end} its header names")
    if not 0 < name_size < end - begin:
        raise InvalidRootFile(f"header: a name of {name_size} bytes for the root directory")
    # uproot 3 writes the version of a large file, always the same one, with the fUnits of a small file.
    is_of_uproot_3 = version == 1_061_800 and units == 4
    return _Header(
        begin, end, free_list, free_list_size, free_segments, name_size, info, info_size, is_of_uproot_3, version < 0
    )


# --- directories -------------------------------------------------------------------------------------------------------


@dataclass
class _References:
    """The records that the header and the directories refer to, and the limits on further ones."""

    expected_keys: dict[int, bytes] = field(default_factory=dict)  # by position: the key of the record there
    top_level_keys: dict[int, Key] = field(default_factory=dict)  # by position: those of the root directory
    trailing_keys: dict[int, bytes] = field(default_factory=dict)  # by position: keys after the last one of a key list
    keys_left: int = MAX_KEYS
    key_list_bytes_left: int = MAX_KEY_LISTS
    names_left: int = MAX_NAMES

    def expect(self, position: int, key_bytes: bytes, subject: object) -> None:
        """Note that a record with this key must begin at `position`. Only one reference to it is allowed."""
        if position in self.expected_keys:
            raise InvalidRootFile(f"{subject}: the record at byte {position} has a place elsewhere, too")
        self.expected_keys[position] = key_bytes

    def expect_unlisted(
        self, reader: Reader, start: int, end: int, subject: object, directories: tuple[int, ...]
    ) -> Key:
        """Note a record that is in no key list, and return its key, which must name one of `directories` as its own."""
        key, key_bytes = read_key(reader, start, end, subject)
        self.expect(start, key_bytes, subject)
        # Geant4 gives the keys of the streamer info and of the list of free segments the cycle 0.
        if key.position != start or key.cycle not in (0, 1) or key.directory not in directories:
            is_at = f"is at byte {key.position}, of cycle {key.cycle} and in the directory at byte {key.directory}"
            raise InvalidRootFile(f"{subject}: the key at byte {start} says that it {is_at}")
        return key

    def add_listed(self, header: _Header, directory: _Directory, key: Key, key_bytes: bytes) -> None:
        """Note the record to which a key in the key list of a directory refers."""
        position = key.position
        if not header.begin < position <= header.end - key.size:
            raise InvalidRootFile(f"{directory}: its {key} has {key.size} bytes, outside the file")
        if key.directory != directory.position:
            raise InvalidRootFile(f"{directory}: its {key} says it is in the directory at byte {key.directory}")
        if position in self.expected_keys:
            raise InvalidRootFile(f"{directory}: its {key} has a place elsewhere, too")
        self.expected_keys[position] = key_bytes
        if not directory.depth:
            self.top_level_keys[position] = key
            self.names_left -= len(key.name) + len(key.class_name)
            if self.names_left < 0:
                raise InvalidRootFile(f"keys with names and classes of more than {MAX_NAMES} characters in all")


_DIRECTORY = struct.Struct(">hIIiiiii")  # fVersion, two dates, fNbytesKeys, fNbytesName, fSeekDir, -Parent, -Keys
_DIRECTORY_64 = struct.Struct(">hIIiiqqq")  # where fVersion is above 1000
_DIRECTORY_CLASSES = ("TDirectory", "TDirectoryFile")


class _Directory(NamedTuple):
    position: int  # of its record
    start: int  # of its own fields
    end: int  # of its record
    parent: int  # position of the directory it is in
    depth: int

    def __str__(self) -> str:
        return f"directory at byte {self.position}" if self.depth else "root directory"


def _read_directories(file: _File) -> _References:
    header = file.header
    references = _References(keys_left=MAX_KEYS, key_list_bytes_left=MAX_KEY_LISTS, names_left=MAX_NAMES)
    root = references.expect_unlisted(file.reader, header.begin, header.end, "root directory", (0,))
    # The key of the root directory ends with the file's name and title, and both are repeated after the key.
    data, at = file.reader.read(header.begin, min(header.name_size, 2 * root.key_size))
    middle, end = at + root.key_size, at + header.name_size
    if header.name_size <= root.key_size or data[middle:end] != data[2 * middle - end : middle]:
        raise InvalidRootFile("root directory: its name differs from the one in its key")
    # Not recursion: the file decides how deep its directories are.
    pending = [_Directory(header.begin, header.begin + header.name_size, header.begin + root.size, 0, 0)]
    directories = 1
    while pending:
        directory = pending.pop()
        start, size = _read_directory(file, directory)
        if start:
            found = _list_keys(file, directory, start, size, references)
            pending += found
            directories += len(found)
        if directories > MAX_DIRECTORIES or directory.depth > MAX_DEPTH:
            raise InvalidRootFile(f"more than {MAX_DIRECTORIES} directories, or nested more than {MAX_DEPTH} deep")
        file.budget.check_time()
    if not references.top_level_keys:
        raise InvalidRootFile("the file holds no objects")
    return references


def _read_directory(file: _File, directory: _Directory) -> tuple[int, int]:
    """Check a directory's own fields; return position and size of its key list."""
    header = file.header
    size = directory.end - directory.start
    if size < _DIRECTORY.size or directory.end > header.end:
        raise InvalidRootFile(f"{directory}: {size} bytes at byte {directory.start} cannot be a directory")
    data, at = file.reader.read(directory.start, min(size, _DIRECTORY_64.size))
    version, _, _, key_list_size, name_size, own, parent, key_list = _DIRECTORY.unpack_from(data, at)
    if version > 1000:
        if size < _DIRECTORY_64.size:
            raise InvalidRootFile(f"{directory}: {size} bytes are too few for a directory of version {version}")
        version, _, _, key_list_size, name_size, own, parent, key_list = _DIRECTORY_64.unpack_from(data, at)
    # ROOT 6.08 writes the root directory as the parent of a directory that is in another one.
    if own != directory.position or parent not in (directory.parent, header.begin if directory.depth else 0):
        raise InvalidRootFile(f"{directory}: says that it is at byte {own}, in the directory at byte {parent}")
    if name_size != directory.start - directory.position:
        raise InvalidRootFile(f"{directory}: begins with a name of {name_size} bytes, its record says otherwise")
    if key_list == 0 and key_list_size == 0:
        if not directory.depth:
            raise InvalidRootFile("no list of keys: the file was never closed by its writer")
    elif not header.begin < key_list < key_list + key_list_size <= header.end:
        raise InvalidRootFile(f"{directory}: key list of {key_list_size} bytes at byte {key_list}, outside the file")
    return key_list, key_list_size


def _list_keys(file: _File, directory: _Directory, start: int, size: int, references: _References) -> list[_Directory]:
    """Note the records in the key list of a directory; return the directories among them."""
    at, number = _key_list_bounds(file, directory, start, size, references)
    reader, end = file.reader, start + size
    directories = []
    is_renamed = False
    data, index = b"", 0
    for _ in range(number):
        left = min(end - at, LONGEST_KEY)
        if index + left > len(data):
            data, index = reader.read(at, left)
        key = parse_usual_key(data, index, index + left)
        if key is not None:
            key_bytes = data[index : index + key.key_size]
        else:
            key, key_bytes = read_key(reader, at, end, directory, is_listed=True)
            is_renamed |= len(key_bytes) != key.key_size and key.class_name != "TDirectoryFile"
        at += len(key_bytes)
        index += len(key_bytes)
        references.add_listed(file.header, directory, key, key_bytes)
        if key.class_name in _DIRECTORY_CLASSES:
            fields, record_end = key.position + key.key_size, key.position + key.size
            directories.append(_Directory(key.position, fields, record_end, directory.position, directory.depth + 1))
    # Only ROOT renames keys, and it leaves no room after them. So bytes after them mean that a string has a wrong length.
    if is_renamed and end - at not in (0, _ROOM_OF_ROOT):
        raise InvalidRootFile(f"{directory}: {end - at} bytes behind its last key, or a string of a wrong length")
    _note_trailing_key(reader, at, end, directory, references)
    return directories


_ROOM_OF_ROOT = 8  # bytes that ROOT leaves after the keys beyond 2 GB


def _key_list_bounds(
    file: _File, directory: _Directory, start: int, size: int, references: _References
) -> tuple[int, int]:
    """Check the record of a key list; return where its first key begins and how many there are."""
    references.key_list_bytes_left -= size
    if references.key_list_bytes_left < 0:
        raise InvalidRootFile(f"key lists of more than {MAX_KEY_LISTS} bytes")
    # uproot writes the parent directory into the key of a key list.
    owners = directory.position, directory.parent or file.header.begin, file.header.begin
    own = references.expect_unlisted(file.reader, start, start + size, directory, owners)
    if own.size != size:
        raise InvalidRootFile(f"{directory}: key list at byte {start} has {own.size} bytes and not {size}")
    at = start + own.key_size
    room = (start + size - at - 4) // SHORTEST_KEY
    count = file.reader.read_int(at) if room >= 0 else -1
    if not 0 <= count <= room:
        raise InvalidRootFile(f"{directory}: {count} keys in a key list of {size} bytes at byte {start}")
    references.keys_left -= count
    if references.keys_left < 0:
        raise InvalidRootFile(f"more than {MAX_KEYS} keys")
    return at + 4, count


def _note_trailing_key(reader: Reader, at: int, end: int, directory: _Directory, references: _References) -> None:
    """Note the key after the last counted one: if its record exists, the number of keys is wrong.

    There may be no key: beyond 2 GB ROOT leaves 8 bytes after the keys, and uproot leaves room with old bytes in it.
    """
    if end - at >= SHORTEST_KEY:
        try:
            key, key_bytes = read_key(reader, at, end, directory, is_listed=True)
            references.trailing_keys.setdefault(key.position, key_bytes)
        except InvalidRootFile:
            pass


# --- records that the header refers to ---------------------------------------------------------------------------------


def _expect_from_header(file: _File, references: _References, subject: str, position: int, size: int) -> Key:
    """Note a record to which the header refers."""
    header = file.header
    if not header.begin < position < header.end or size <= 0:
        raise InvalidRootFile(f"header: {subject} of {size} bytes at byte {position}, outside the file")
    end = min(position + size, header.end)
    return references.expect_unlisted(file.reader, position, end, subject, (header.begin,))


def _read_free_list(file: _File, references: _References) -> dict[int, int]:
    """Return the free segments between records, from their first byte to the byte after them."""
    header, subject = file.header, "list of free segments"
    if not header.free_list and not header.free_list_size:  # the file was saved and never closed; its key lists decide
        return {}
    key = _expect_from_header(file, references, subject, header.free_list, header.free_list_size)
    if key.size > min(header.free_list_size, header.end - header.free_list):  # ROOT accepts a smaller one
        raise InvalidRootFile(f"{subject}: {key.size} bytes, the header says {header.free_list_size}")
    at, end, count = header.free_list + key.key_size, header.free_list + key.size, header.free_segments
    if not 0 <= count <= min(MAX_KEYS, (end - at) // SMALLEST_SEGMENT):
        raise InvalidRootFile(f"header: {count} free segments in a list of {end - at} bytes")
    segments, at = read_segments(file.reader, at, end, count, range(header.begin, header.end))
    is_rest_old = (
        file.reader.skip_zeros(at, end, file.budget.check_time) == end or skip_old_segments(file.reader, at, end) == end
    )
    if not is_rest_old:
        raise InvalidRootFile(f"{subject}: something else behind its last segment")
    return segments


def _expect_streamer_info(file: _File, references: _References) -> None:
    subject, position, size = "streamer info", file.header.streamer_info, file.header.streamer_info_size
    if not position and not size:
        return
    key = _expect_from_header(file, references, subject, position, size)
    if key.size != size:
        raise InvalidRootFile(f"{subject} at byte {position} has {key.size} bytes, the header says {size}")
    if (key.class_name, key.name) != ("TList", "StreamerInfo"):
        raise InvalidRootFile(f"header: the {key} is no streamer info")


# --- the chain of records ----------------------------------------------------------------------------------------------


class _RecordWalk:
    """Checks every record from the first byte to the last, once."""

    def __init__(self, file: _File, references: _References) -> None:
        self._reader = file.reader
        self._budget = file.budget
        self._header = file.header
        self._references = references
        self._free_segments = _read_free_list(file, references)
        _expect_streamer_info(file, references)
        # In reverse order, because they are popped. Only this writer lets them begin within records.
        self._stray_segments = list(reversed(self._free_segments.items())) if file.header.is_of_old_update else []
        self._names: dict[int, bytes] = {}
        self._names_left = MAX_NAMES

    def run(self) -> dict[int, bytes]:
        """Check all records; return, by position, the own names of top-level objects whose key has another name."""
        expected, free_segments = self._references.expected_keys, self._free_segments
        position, end = self._header.begin, self._header.end
        records, unchecked = 0, position
        while position < end:
            records += 1
            if not records % 256 or position > unchecked + WINDOW:
                if records > MAX_RECORDS:
                    raise InvalidRootFile(f"more than {MAX_RECORDS} records")
                self._budget.check_time()
                unchecked = position
            if position in free_segments:
                position = free_segments.pop(position)
                continue
            listed = expected.pop(position, None)
            if listed is None:
                position = (
                    self._skip_stray_segment(position) or self._skip_gap(position) or self._check_unlisted(position)
                )
            else:
                position = self._check_listed(position, listed)
        if records > MAX_RECORDS:
            raise InvalidRootFile(f"more than {MAX_RECORDS} records")
        if position != end:
            raise InvalidRootFile(f"the last record ends at byte {position} and the file, its header says, at {end}")
        if self._header.is_of_old_update:
            free_segments.clear()
        if expected or free_segments:
            missing = min([*expected, *free_segments])
            raise InvalidRootFile(f"no record begins at byte {missing}, where one is referred to")
        return self._names

    # Between records

    def _skip_stray_segment(self, position: int) -> int:
        """Return the end of a free segment that began in the record before and reaches further, or 0.

        uproot.update of 4.1 to 5.3.6 frees parts of records that it still uses. CERN ROOT notices that only when it writes.
        """
        while self._stray_segments and self._stray_segments[-1][0] < position:
            _, end = self._stray_segments.pop()
            if end > position:
                return end
        return 0

    def _skip_gap(self, position: int) -> int:
        """Return where the next record begins, or 0 if one begins here."""
        end = self._header.end
        size = self._reader.read_int(position) if end - position >= 4 else 0
        if size == 0:
            return self._skip_zeros(position)
        # A deleted record. It is in the list of free segments, too, unless that list was never written.
        if size < 0 and not self._header.free_list:
            return position - size
        if size >> 16 in SEGMENT_VERSIONS:  # the rest of an old list, or a record of just that size
            after = skip_old_segments(self._reader, position, end)
            return after if after > position else 0
        return 0

    def _skip_zeros(self, position: int) -> int:
        """Return the next record after the few zeros that go-hep and uproot leave between records.

        More zeros, where a record would fit, are refused: a disk that lost a sector gives zeros.
        """
        end = self._header.end
        limit = position + SHORTEST_KEY
        first = self._reader.skip_zeros(position, min(end, limit + 3), self._budget.check_time)
        # Up to three of the zeros belong to the next record's length. The position in its key tells how many.
        for start in range(max(position, first - 3), min(first + 1, limit)):
            if start == end:
                return end
            try:
                if read_key(self._reader, start, end, "record")[0].position == start:
                    return start
            except InvalidRootFile:
                pass
        raise InvalidRootFile(f"zeros from byte {position} on, and no record within {SHORTEST_KEY} bytes")

    # Records

    def _check_listed(self, position: int, listed: bytes) -> int:
        """Check a record against the key that refers to it; return where it ends."""
        length = len(listed)
        if position + length > self._header.end:  # its name was made longer
            length = self._header.end - position
        data, at = self._reader.read(position, length)
        if not data.startswith(listed, at):
            key, _ = self._key_at(position)
            if not keys_agree(listed, key):
                raise InvalidRootFile(f"{key}: its key differs from the copy in the key list")
            data, at = self._reader.read(position, KEY_SIZES.size)
        size: int
        size, _, object_size, _, key_size = KEY_SIZES.unpack_from(data, at)
        payload = inflate_single_zlib_block(data, at + key_size, size - key_size, object_size)
        if payload is not None:
            self._budget.add_single_block(object_size)
        else:
            del data  # up to 16 MiB; the next read takes as much
            payload = self._check_payload(position, size, key_size, object_size)
        top_level_key = self._references.top_level_keys.get(position)
        if top_level_key is not None and not has_name_of_key(payload, listed):
            self._note_name(position, object_name(top_level_key.class_name, payload))
        elif position == self._header.streamer_info:
            self._check_streamer_info(position, size, key_size, object_size)
        return position + size

    def _note_name(self, position: int, name: bytes | None) -> None:
        if name is not None:
            self._names[position] = name
            self._names_left -= len(name)
            if self._names_left < 0:
                raise InvalidRootFile(f"objects with names of more than {MAX_NAMES} characters in all")

    def _check_unlisted(self, position: int) -> int:
        """Check a record that is in no key list; return where it ends."""
        key, key_bytes = self._key_at(position)
        if self._references.trailing_keys.get(position) == key_bytes:
            raise InvalidRootFile(f"{key} stands behind the last key of a key list: the number of keys is wrong")
        if key.class_name != "RBlob":  # pages of an RNTuple, which compresses them in its own way
            if key.class_name == "TBasket":
                _check_basket(key, key_bytes)
            self._check_payload(position, key.size, key.key_size, key.object_size)
        return position + key.size

    def _key_at(self, position: int) -> tuple[Key, bytes]:
        key, key_bytes = read_key(self._reader, position, self._header.end, "record")
        if key.position != position or position + key.size > self._header.end:
            left = self._header.end - position
            raise InvalidRootFile(f"{key} is at byte {position} and has {key.size} bytes of {left}")
        return key, key_bytes

    def _check_payload(self, position: int, size: int, key_size: int, object_size: int) -> Block:
        """Inflate a payload, block by block; return its beginning, where an object has its name."""
        start, compressed_size = position + key_size, size - key_size
        try:
            self._budget.claim_object(object_size)
            if compressed_size == object_size:  # not compressed
                length = min(object_size, _NAME_BYTES)
                data, at = self._reader.read(start, length)
                return data[at : at + length]
            first: Block | None = None
            for block in inflate_blocks(self._reader.read, start, compressed_size, object_size, self._budget):
                if first is None:
                    first = block if len(block) <= _NAME_BYTES else block[:_NAME_BYTES]
                del block  # up to 16 MiB; the next one takes as much
            return first or b""
        except InflateError as error:
            key, _ = read_key(self._reader, position, self._header.end, "record")
            raise InvalidRootFile(f"{key}: {error}") from error.__cause__

    def _check_streamer_info(self, position: int, size: int, key_size: int, object_size: int) -> None:
        """Check the contents of a streamer info whose codec has no checksum."""
        if object_size > MAX_STREAMER_INFO:
            return
        start, compressed_size = position + key_size, size - key_size
        data, at = self._reader.read(start, compressed_size)
        if compressed_size == object_size:
            payload = data[at : at + object_size]
        elif data[at : at + 2] in CHECKSUMMED:
            return
        else:
            payload = b"".join(inflate_blocks(self._reader.read, start, compressed_size, object_size, self._budget))
        try:
            check_streamer_info(payload, key_size, self._budget.check_time)
        except DamagedStreamerInfo as error:
            raise InvalidRootFile(str(error)) from error


def _check_basket(key: Key, key_bytes: bytes) -> None:
    """Compare a basket's number of entries and end of data with its size: after the data come no, one or two arrays."""
    entries, last, _ = BASKET.unpack_from(key_bytes, len(key_bytes) - BASKET.size)
    rest = key.object_size - (last - key.key_size)
    # TBuffer::WriteArray: a length, an offset for each entry and, except in older Geant4, one for the end.
    arrays = [number * (4 * entries + more) for number in (1, 2) for more in (8, 4)]
    if last < key.key_size or rest not in (0, *arrays):
        raise InvalidRootFile(f"{key}: {entries} entries, data to byte {last} and {key.object_size} bytes do not fit")


def escape(text: str) -> str:
    """Escape the characters that move the cursor or change the direction of writing, for terminals."""
    if text.isascii() and text.isprintable():
        return text
    unsafe = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in unsafe else letter
        for letter in text
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """List the objects of ROOT files, or the reason why a file is not valid; return 1 if any is not."""
    parser = argparse.ArgumentParser(prog="python -m rootcheck", description=main.__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE")
    invalid = False
    for path in parser.parse_args(arguments).files:
        try:
            objects = check_root_file(path)
        except InvalidRootFile as error:
            invalid = True
            print(escape(f"{path}: invalid: {error}"))
            continue
        except OSError as error:
            invalid = True
            print(escape(f"{path}: {error.strerror}"))
            continue
        print(escape(f"{path}: valid, {len(objects)} objects"))
        for name, found in objects.items():
            print(escape(f"  {name}: {found.description}"))
    return int(invalid)


if __name__ == "__main__":
    sys.exit(main())
