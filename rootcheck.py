"""Is this a valid ROOT file, and what is in it?

A ROOT file is a header and a chain of records. Each record is a key (lengths, position, class, name, title) and a payload;
a directory is a record whose payload points at a key list, a record that repeats the keys of the directory's objects.
`check_root_file` follows the directories, walks the chain once from end to end, compares what the format stores twice and
inflates every payload within the size it claims, keeping nothing and building no object. Only a file that passes is opened
with uproot, a second and independent reader, which must find the same top-level objects.

The format: https://root.cern/doc/master/md_io_doc_TFile_classTFile.html, TFile.cxx, TKey.cxx, TDirectoryFile.cxx, TFree.cxx
and RZip.cxx of ROOT.
"""

from __future__ import annotations

import argparse
import lzma
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cramjam
import deflate
import uproot
import uproot.source.chunk
import xxhash

# Limits on what a file may ask of us; no honest file comes near them.
MAX_KEYS = 200_000
MAX_DIRECTORIES = 20_000
MAX_DEPTH = 100
MAX_KEY_LISTS = 16 << 20  # bytes of all key lists, which stay in memory
MAX_NAMES = 8 << 20  # characters of the keys' names and classes, and of the objects' own, which go into the answer
MAX_RECORDS = 5_000_000
MAX_BLOCKS = 20_000  # compressed, of all objects, not counting the first of each; writers fill 16 MiB before the next
MAX_OBJECT_SIZE = 1 << 30  # bytes, inflated
MAX_INFLATED = 2 << 30  # bytes, of the whole file; or MAX_INFLATION times its size, if that is more
MAX_INFLATION = 32
MAX_INFLATED_SLOWLY = 512 << 20  # bytes; like MAX_INFLATED, for what inflates several times slower than the rest
MAX_XZ_MEMORY = 256 << 20  # bytes
MAX_SECONDS = 30.0  # of processor time

_WINDOW = 1 << 20  # bytes read at once
_GLANCE = 1 << 14  # bytes read at once elsewhere than where the last ones end: directories lie far apart
_PIECE = 1 << 18  # bytes inflated at once where that can be chosen
_NAME_BYTES = 1 << 16  # bytes of an object searched for its name


_Bytes = bytes | bytearray


class InvalidRootFile(Exception):
    """The file is not a valid ROOT file; the text says why."""


class RootObject(NamedTuple):
    """An object at the top level of a ROOT file: the name it gives itself and its stored class."""

    name: str
    class_name: str

    @property
    def description(self) -> str:
        """What ROOT says of the object: `GetName()` and `IsA()->GetName()`."""
        # ROOT has stored TDirectoryFile under its old name, TDirectory, since the class was split in ROOT 5.
        class_name = "TDirectoryFile" if self.class_name == "TDirectory" else self.class_name
        return f"Obj name: {self.name}, Obj IsA() Name: {class_name}"


def check_root_file(path_or_descriptor: str | os.PathLike[str] | int) -> dict[str, RootObject]:
    """Return the objects at the top level of a valid ROOT file by the names of their keys, the newest cycle of each.

    A descriptor stays open, and its file position is neither used nor changed.
    Raises InvalidRootFile, whatever the content; OSError where the file cannot be read at all.
    """
    file = _File(path_or_descriptor)
    try:
        header = _read_header(file)
        tree = _read_directories(file, header)
        names = _walk_records(file, header, tree)
        _compare_with_uproot(file, tree.top)
    finally:
        file.close()
    newest: dict[str, int] = {}
    objects: dict[str, RootObject] = {}
    for position, (name, cycle, class_name) in tree.top.items():
        if name not in newest or newest[name] < cycle:
            newest[name] = cycle
            objects[name] = RootObject(names.get(position, name), class_name)
    return objects


# --- reading -----------------------------------------------------------------------------------------------------------


class _File:
    """An open file, read through a window that moves forward over it.

    `pread` and not a memory map: a mapped file that shrinks kills the process, and its pages count as our memory.
    """

    def __init__(self, path_or_descriptor: str | os.PathLike[str] | int) -> None:
        self._is_ours = not isinstance(path_or_descriptor, int)
        # Of this thread's processor time: a valid file on a slow disk or beside many others has all the time it needs.
        self.deadline = time.thread_time() + MAX_SECONDS
        self.error: OSError | None = None  # of uproot's reading
        if isinstance(path_or_descriptor, int):
            self._fd = path_or_descriptor
        else:
            self._fd = os.open(path_or_descriptor, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size
        self.slow_left = max(MAX_INFLATED_SLOWLY, MAX_INFLATION * self.size)
        self.blocks_left = MAX_BLOCKS
        self.keys_left = MAX_KEYS
        self.lists_left = MAX_KEY_LISTS
        self._window = b""
        self._start = 0

    def close(self) -> None:
        if self._is_ours:
            os.close(self._fd)

    def pread(self, start: int, length: int) -> bytes:
        """Return bytes of the file, as many as there are."""
        return os.pread(self._fd, length, start)

    def load(self, start: int, length: int) -> tuple[bytes, int]:
        """Return bytes of the file and where among them byte `start` is; at least `length` bytes follow it."""
        at = start - self._start
        if at < 0 or at + length > len(self._window):
            most = _WINDOW if 0 <= at <= len(self._window) else _GLANCE
            self._window = b""  # let go of the old bytes before the new ones take their room
            # No more than there is: a buffer of 1 MiB that is not filled takes longer than a small file.
            self._window = self.pread(start, max(length, min(most, self.size - start)))
            self._start, at = start, 0
            if len(self._window) < length:
                raise InvalidRootFile(f"the file ends at byte {self.size}, {length} bytes were to be at byte {start}")
        return self._window, at

    def check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise InvalidRootFile(f"checking the file takes longer than {MAX_SECONDS:g} s")


def _read_int(file: _File, start: int) -> int:
    data, at = file.load(start, 4)
    return int.from_bytes(data[at : at + 4], "big", signed=True)


def _text(name: _Bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


# --- the header --------------------------------------------------------------------------------------------------------


class _Header(NamedTuple):
    """What the first bytes of the file say: where the records begin and end and where three of them are."""

    begin: int
    end: int
    free_list: int
    free_list_size: int
    free_segments: int
    name_size: int  # fNbytesName: from `begin` to the root directory's own fields
    streamer_info: int
    streamer_info_size: int


_HEADER = struct.Struct(">4siiiiiiiBiii")  # 4-byte positions, in files below 2 GB
_HEADER_64 = struct.Struct(">4siiqqiiiBiqi")  # from fVersion 1,000,000 on


def _read_header(file: _File) -> _Header:
    if not file.size:
        raise InvalidRootFile("the file is empty")
    data, _ = file.load(0, min(_HEADER_64.size, file.size))
    if not data.startswith(b"root"):
        raise InvalidRootFile(f"not a ROOT file: it begins with {data[:4]!r}, not b'root'")
    if file.size < _HEADER_64.size:
        raise InvalidRootFile(f"the file ends at byte {file.size}, within its header")
    version = int.from_bytes(data[4:8], "big", signed=True)
    if not 0 < version < 2_000_000:
        raise InvalidRootFile(f"not a ROOT file: version {version}")
    is_64bit = version >= 1_000_000
    fields = (_HEADER_64 if is_64bit else _HEADER).unpack_from(data)
    _, _, begin, end, free_list, free_list_size, free_segments, name_size, units, _, info, info_size = fields
    if not 41 <= begin < end:
        raise InvalidRootFile(f"header: the records are said to reach from byte {begin} to byte {end}")
    if end > file.size:
        raise InvalidRootFile(f"the file is cut short: it has {file.size} bytes of the {end} its header names")
    if units != (8 if is_64bit else 4):
        raise InvalidRootFile(f"header: positions of {units} bytes in a file of version {version}")
    if not 0 < name_size < end - begin:
        raise InvalidRootFile(f"header: a name of {name_size} bytes for the root directory")
    return _Header(begin, end, free_list, free_list_size, free_segments, name_size, info, info_size)


# --- keys --------------------------------------------------------------------------------------------------------------


class _Key(NamedTuple):
    """The head of a record, or its copy in a directory's key list."""

    size: int  # fNbytes: of the record
    object_size: int  # fObjlen: of the payload, inflated
    key_size: int  # fKeylen: of the key itself; the payload follows
    cycle: int
    position: int  # fSeekKey: of the record
    class_name: str
    name: str
    directory: int  # fSeekPdir: position of the directory's record

    def __str__(self) -> str:
        return _record(self.position, self.class_name, self.name)


def _record(position: int, class_name: str, name: str) -> str:
    return f"record at byte {position} ({class_name[:80]} {name[:80]})"


_KEY = struct.Struct(">ihiIhhii")  # fNbytes, fVersion, fObjlen, fDatime, fKeylen, fCycle, fSeekKey, fSeekPdir
_KEY_64 = struct.Struct(">ihiIhhqq")  # where fVersion is above 1000
_KEY_SIZES = struct.Struct(">ihiIh")  # what both have in common
_PROCESS_ID_BITS = (1 << 48) - 1  # the 16 bits above these in a 64-bit fSeekPdir are TKey's fPidOffset
_SHORTEST_KEY = _KEY.size + 3  # three empty strings
_BASKET = struct.Struct(">iiB")  # fNevBuf, fLast and a flag, with which the key of a TBasket ends
_BASKET_SIZE = 19  # bytes of TBasket's own fields in all; one more where the third, fNevBufSize, is negative
_LONGEST_KEY = (1 << 15) + 4  # fKeylen has 15 bits; 4 more where TDirectory is listed as TDirectoryFile


def _read_key(file: _File, start: int, end: int, what: object) -> tuple[_Key, bytes]:
    """Return the key at byte `start`, which must end before byte `end`, and its bytes; errors say `what` has the key."""
    left = min(_LONGEST_KEY, end - start)
    if left < _SHORTEST_KEY:
        raise InvalidRootFile(f"{what}: {left} bytes at byte {start} are too few for a key")
    data, at = file.load(start, left)
    try:
        key, length = _parse_key(data, at, at + left)
    except InvalidRootFile as error:
        raise InvalidRootFile(f"{what}: the key at byte {start} {error}") from None
    return key, data[at : at + length]


def _parse_key(data: bytes, at: int, end: int) -> tuple[_Key, int]:
    """Return the key in `data[at:end]` and its length."""
    size, version, object_size, _, key_size, cycle, position, directory = _KEY.unpack_from(data, at)
    to = at + _KEY.size
    if version > 1000 and end - at >= _KEY_64.size:
        size, version, object_size, _, key_size, cycle, position, directory = _KEY_64.unpack_from(data, at)
        directory &= _PROCESS_ID_BITS
        to = at + _KEY_64.size
    if not (to + 3 - at <= key_size <= size and object_size >= 0):
        raise InvalidRootFile(f"has impossible lengths (record {size}, key {key_size}, object {object_size})")
    class_name, to = _read_string(data, to)
    name, to = _read_string(data, to)
    _, to = _read_string(data, to)
    length = to - at
    if length != key_size:
        # TBasket adds fields of its own to the key. Where ROOT 5 and 6 store a TDirectoryFile as TDirectory, the key
        # list has the long name behind the length of a key with the short one.
        if class_name == b"TBasket" and to + 6 < len(data) and key_size - length == _BASKET_SIZE + (data[to + 6] >> 7):
            length = key_size
        elif class_name != b"TDirectoryFile" or length != key_size + 4:
            raise InvalidRootFile(f"has {key_size} bytes, but its class, name and title make it {length}")
    if length > end - at:
        raise InvalidRootFile(f"has {length} bytes where only {end - at} are left")
    return _Key(size, object_size, key_size, cycle, position, _text(class_name), _text(name), directory), length


def _read_string(data: _Bytes, at: int) -> tuple[_Bytes, int]:
    """Read a TString, a length of one byte (or of four behind a 255) and the text; the end may lie past the data."""
    start = at + 1
    length = data[at] if start <= len(data) else 0
    if length == 255:
        start = at + 5
        length = int.from_bytes(data[at + 1 : start], "big")
    end = start + length
    return data[start:end], end


# --- directories -------------------------------------------------------------------------------------------------------


class _Tree(NamedTuple):
    """What the header and the directories refer to."""

    heads: dict[int, bytes]  # by position: the key of the record that must begin there
    top: dict[int, tuple[str, int, str]]  # by position: name, cycle and class of the keys of the root directory
    uncounted: dict[int, bytes]  # like `heads`, the first key behind the counted ones of a directory

    def refer(self, position: int, head: bytes, what: object) -> None:
        """Note that a record with this key must begin at `position`; nothing else may refer to it."""
        if position in self.heads:
            raise InvalidRootFile(f"{what}: the record at byte {position} has a place elsewhere, too")
        self.heads[position] = head

    def refer_unlisted(self, file: _File, start: int, end: int, what: object, *directories: int) -> _Key:
        """Note a record that is in no key list, and return the key, which must name one of `directories` as its own."""
        key, head = _read_key(file, start, end, what)
        self.refer(start, head, what)
        if key.position != start or key.cycle != 1 or key.directory not in directories:
            is_at = f"is at byte {key.position}, of cycle {key.cycle} and in the directory at byte {key.directory}"
            raise InvalidRootFile(f"{what}: the key at byte {start} says that it {is_at}")
        return key


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


def _read_directories(file: _File, header: _Header) -> _Tree:
    tree = _Tree({}, {}, {})
    root = tree.refer_unlisted(file, header.begin, header.end, "root directory", 0)
    # The name and the title of the file, with which its key ends, stand once more behind the key.
    data, at = file.load(header.begin, min(header.name_size, 2 * root.key_size))
    middle, end = at + root.key_size, at + header.name_size
    if header.name_size <= root.key_size or data[middle:end] != data[2 * middle - end : middle]:
        raise InvalidRootFile("root directory: its name differs from the one in its key")
    # A stack and not recursion: the depth is the file's to choose.
    pending = [_Directory(header.begin, header.begin + header.name_size, header.begin + root.size, 0, 0)]
    directories = 1
    while pending:
        directory = pending.pop()
        key_list, key_list_size = _read_directory(file, header, directory)
        if key_list:
            found = _list_keys(file, header, directory, key_list, key_list_size, tree)
            pending += found
            directories += len(found)
        if directories > MAX_DIRECTORIES or directory.depth > MAX_DEPTH:
            raise InvalidRootFile(f"more than {MAX_DIRECTORIES} directories, or nested more than {MAX_DEPTH} deep")
        file.check_time()
    if not tree.top:
        raise InvalidRootFile("the file holds no objects")
    return tree


def _read_directory(file: _File, header: _Header, directory: _Directory) -> tuple[int, int]:
    """Check a directory's own fields; return position and size of its key list."""
    size = directory.end - directory.start
    if size < _DIRECTORY.size or directory.end > header.end:
        raise InvalidRootFile(f"{directory}: {size} bytes at byte {directory.start} cannot be a directory")
    data, at = file.load(directory.start, min(size, _DIRECTORY_64.size))
    version, _, _, key_list_size, name_size, own, parent, key_list = _DIRECTORY.unpack_from(data, at)
    if version > 1000:
        if size < _DIRECTORY_64.size:
            raise InvalidRootFile(f"{directory}: {size} bytes are too few for a directory of version {version}")
        version, _, _, key_list_size, name_size, own, parent, key_list = _DIRECTORY_64.unpack_from(data, at)
    # ROOT 6.08 calls the root directory the parent of a directory in another one.
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


def _list_keys(
    file: _File, header: _Header, directory: _Directory, start: int, size: int, tree: _Tree
) -> list[_Directory]:
    """Note in the tree what a directory's key list refers to; return the directories among it."""
    file.lists_left -= size
    if file.lists_left < 0:
        raise InvalidRootFile(f"key lists of more than {MAX_KEY_LISTS} bytes")
    # uproot says that a key list is in the mother directory.
    owners = directory.position, directory.parent or header.begin, header.begin
    own = tree.refer_unlisted(file, start, start + size, directory, *owners)
    if own.size != size:
        raise InvalidRootFile(f"{directory}: key list at byte {start} has {own.size} bytes and not {size}")
    at, end = start + own.key_size, start + size
    room = (end - at - 4) // _SHORTEST_KEY
    count = _read_int(file, at) if room >= 0 else -1
    if not 0 <= count <= room:
        raise InvalidRootFile(f"{directory}: {count} keys in a key list of {size} bytes at byte {start}")
    file.keys_left -= count
    if file.keys_left < 0:
        raise InvalidRootFile(f"more than {MAX_KEYS} keys")
    at += 4
    directories = []
    top = None if directory.depth else tree.top
    names_left = MAX_NAMES
    heads, unpack = tree.heads, _KEY.unpack_from
    data, shift = b"", 0
    # This loop and that of _walk_records take most of the time: they spell out the usual.
    for _ in range(count):
        left, index = end - at, at + shift
        if index + left > len(data) and index + _LONGEST_KEY > len(data):
            data, index = file.load(at, min(_LONGEST_KEY, left))
            shift = index - at
        try:  # the usual key: 4-byte positions, short strings
            size, version, object_size, _, key_size, cycle, position, its_directory = unpack(data, index)
            class_at = index + _KEY.size + 1
            name_at = class_at + data[class_at - 1] + 1
            title_at = name_at + data[name_at - 1] + 1
            usual = title_at + data[title_at - 1] - index == key_size <= size and key_size <= left and version <= 1000
            usual = usual and name_at - class_at < 256 > title_at - name_at and data[title_at - 1] < 255
            class_name = data[class_at : name_at - 1].decode()
            name = data[name_at : title_at - 1].decode()
        except (IndexError, struct.error, UnicodeDecodeError):
            usual = False
        if usual and object_size >= 0:
            head = data[index : index + key_size]
        else:
            key, head = _read_key(file, at, end, directory)
            size, _, key_size, cycle, position, class_name, name, its_directory = key
        at += len(head)
        fault = ""
        if not header.begin < position <= header.end - size:
            fault = f"has {size} bytes, outside the file"
        elif its_directory != directory.position:
            fault = f"says it is in the directory at byte {its_directory}"
        elif position in heads:
            fault = "has a place elsewhere, too"
        if fault:
            raise InvalidRootFile(f"{directory}: its {_record(position, class_name, name)} {fault}")
        heads[position] = head
        if top is not None:
            top[position] = name, cycle, class_name
            names_left -= len(name) + len(class_name)
            if names_left < 0:
                raise InvalidRootFile(f"keys with names and classes of more than {MAX_NAMES} characters in all")
        if class_name in _DIRECTORY_CLASSES:
            fields, record_end = position + key_size, position + size
            directories.append(_Directory(position, fields, record_end, directory.position, directory.depth + 1))
    # Beyond 2 GB ROOT leaves 8 bytes behind the keys; uproot leaves room for more, with whatever was in it. What must not
    # be there is one more key of a record that exists: then the number of keys is wrong.
    if end - at >= _SHORTEST_KEY:
        try:
            key, head = _read_key(file, at, end, directory)
            tree.uncounted.setdefault(key.position, head)
        except InvalidRootFile:
            pass
    return directories


# --- the chain of records ----------------------------------------------------------------------------------------------

_FREE = struct.Struct(">hii")  # fVersion, fFirst, fLast
_FREE_64 = struct.Struct(">hqq")  # where fVersion is above 1000


def _walk_records(file: _File, header: _Header, tree: _Tree) -> dict[int, str]:
    """Check every record from the first byte to the last.

    Return, by position, the names of the objects of the root directory that may have another name than their keys.
    """
    holes = _read_free_list(file, header, tree)
    if header.streamer_info or header.streamer_info_size:
        info = _refer_to(file, header, tree, "streamer info", header.streamer_info, header.streamer_info_size)
        if (info.class_name, info.name) != ("TList", "StreamerInfo"):
            raise InvalidRootFile(f"header: the {info} is no streamer info")
    heads, top = tree.heads, tree.top
    names: dict[int, str] = {}
    inflated_left = max(MAX_INFLATED, MAX_INFLATION * file.size)
    names_left = MAX_NAMES
    position, end = header.begin, header.end
    data, shift = b"", 0
    records, unchecked = 0, position
    while position < end:
        records += 1
        if records > MAX_RECORDS:
            raise InvalidRootFile(f"more than {MAX_RECORDS} records")
        if not records % 256 or position > unchecked + _WINDOW:
            file.check_time()
            unchecked = position
        if position in holes:
            position = holes.pop(position)
            continue
        listed = heads.pop(position, None)
        at = position + shift
        if listed is not None and at + len(listed) > len(data):
            data, at = file.load(position, len(listed))
            shift = at - position
        if listed is None or not data.startswith(listed, at):
            data = b""  # which would stay in memory beside what is read now
            after = _read_unlike(file, header, tree, position, listed)
            if after != position:
                position = after
                continue
            data, at = file.load(position, _KEY_SIZES.size)
            shift = at - position
        size, _, object_size, _, key_size = _KEY_SIZES.unpack_from(data, at)
        try:
            inflated_left -= object_size
            if object_size > MAX_OBJECT_SIZE or inflated_left < 0:
                raise InvalidRootFile(f"an object of {object_size} bytes is more than is allowed")
            payload = _check_usual(data, at + key_size, size - key_size, object_size)
            if payload is None:
                data = b""
                payload = _check_payload(file, position + key_size, size - key_size, object_size)
        except InvalidRootFile as error:
            key, _ = _read_key(file, position, header.end, "record")
            raise InvalidRootFile(f"{key}: {error}") from error.__cause__
        if position in top and listed and not _has_name_of_key(payload, listed):
            key_name, _, class_name = top[position]
            names[position] = name = _object_name(key_name, class_name, payload)
            names_left -= len(name)
            if names_left < 0:
                raise InvalidRootFile(f"objects with names of more than {MAX_NAMES} characters in all")
        position += size
    if position != end:
        raise InvalidRootFile(f"the last record ends at byte {position} and the file, its header says, at {header.end}")
    if tree.heads or holes:
        raise InvalidRootFile(f"no record begins at byte {min([*tree.heads, *holes])}, where one is referred to")
    return names


def _read_unlike(file: _File, header: _Header, tree: _Tree, position: int, listed: bytes | None) -> int:
    """Look at what does not begin with the key listed for it: return where the next record begins.

    That is `position` itself, where there is a record after all: listed with another title, or in no key list.
    """
    size = _read_int(file, position) if header.end - position >= 4 else 0
    # A deleted record, which stands in the list of free segments, too, unless that was never written.
    if size < 0 and listed is None and not header.free_list:
        return position - size
    if size == 0 and listed is None:
        return _skip_zeros(file, position, header.end)
    if listed is None and size >> 16 == 1 and file.pread(position, _FREE.size) == _last_segment(position + _FREE.size):
        return position + _FREE.size
    key, head = _read_key(file, position, header.end, "record")
    if key.position != position or position + size > header.end:
        raise InvalidRootFile(f"{key} is at byte {position} and has {size} bytes of {header.end - position}")
    if listed is None:
        if tree.uncounted.get(position) == head:
            raise InvalidRootFile(f"{key} stands behind the last key of a key list: the number of keys is wrong")
        if key.class_name == "RBlob":  # pages of an RNTuple, which compresses them in its own way
            return position + size
        if key.class_name == "TBasket":
            _check_basket(key, head)
    elif not _same(listed, key):
        raise InvalidRootFile(f"{key}: its key differs from the copy in the key list")
    return position


def _last_segment(end: int) -> bytes:
    """Return the last free segment of a file that ended there: uproot leaves it behind where its list becomes shorter."""
    return _FREE.pack(1, end, 2_000_000_000) if end < 2_000_000_000 else b""


def _check_basket(key: _Key, head: bytes) -> None:
    """Compare a basket's number of entries and end of data with its size: behind the data come no, one or two arrays."""
    entries, last, _ = _BASKET.unpack_from(head, len(head) - _BASKET.size)
    behind = key.object_size - (last - key.key_size)
    array = 4 * entries + 8  # TBuffer::WriteArray: its length, and an offset for each entry and for the end
    if last < key.key_size or behind not in (0, array, 2 * array):
        raise InvalidRootFile(f"{key}: {entries} entries, data to byte {last} and {key.object_size} bytes do not fit")


def _same(listed: bytes, key: _Key) -> bool:
    """Whether the bytes of a listed key say the same as the key of the record, but for title and date."""
    copy, _ = _parse_key(listed, 0, len(listed))
    if copy.class_name == "TDirectoryFile":
        copy = copy._replace(class_name=key.class_name)
    return copy == key


def _refer_to(file: _File, header: _Header, tree: _Tree, what: str, position: int, size: int) -> _Key:
    if not header.begin < position < position + size <= header.end:
        raise InvalidRootFile(f"header: {what} of {size} bytes at byte {position}, outside the file")
    key = tree.refer_unlisted(file, position, position + size, what, header.begin)
    if key.size != size:
        raise InvalidRootFile(f"{what} at byte {position} has {key.size} bytes, the header says {size}")
    return key


def _read_free_list(file: _File, header: _Header, tree: _Tree) -> dict[int, int]:
    """Return the free segments between records, from their first byte to the byte behind them.

    ROOT also gives the first of their bytes a negative record length; uproot leaves in them what was there.
    """
    if not header.free_list and not header.free_list_size:  # saved but never closed; the key lists decide
        return {}
    what = "list of free segments"
    key = _refer_to(file, header, tree, what, header.free_list, header.free_list_size)
    at, end = header.free_list + key.key_size, header.free_list + key.size
    if not 0 < header.free_segments <= min(MAX_KEYS, (end - at) // _FREE.size):
        raise InvalidRootFile(f"header: {header.free_segments} free segments in a list of {end - at} bytes")
    holes = {}
    first = last = header.begin
    for _ in range(header.free_segments):
        left = min(_FREE_64.size, end - at)
        data, offset = file.load(at, left)
        form = _FREE_64 if int.from_bytes(data[offset : offset + 2], "big") > 1000 else _FREE
        if left < form.size:
            raise InvalidRootFile(f"{what} at byte {header.free_list} ends amid a segment")
        before, (_, first, last) = last, form.unpack_from(data, offset)
        if not before < first <= last:
            raise InvalidRootFile(f"{what}: a segment from byte {first} to byte {last} behind byte {before}")
        if last < header.end:
            holes[first] = last + 1
        at += form.size
    # The last segment is the room behind the file, which grows in steps of 1 GB (TFree::GetBestFree). ROOT's writer of
    # files with nothing but an RNTuple forgets, beyond 2 GB, that its last key has become 8 bytes longer.
    ends = (header.end,) if form is _FREE else (header.end, header.end - 8)
    if first not in ends or last % 1_000_000_000 or last < 2_000_000_000:
        raise InvalidRootFile(f"{what}: the last one, {first} to {last}, is not the room behind byte {header.end}")
    older = file.pread(at, _FREE.size) if end - at == _FREE.size else b""
    # Where the list has become shorter, uproot may leave an older last segment behind it.
    if _skip_zero_bytes(file, at, end) < end and older != _last_segment(int.from_bytes(older[2:6], "big")):
        raise InvalidRootFile(f"{what}: something else behind its {header.free_segments} segments")
    return holes


def _skip_zero_bytes(file: _File, start: int, end: int) -> int:
    length = 64  # nearly always there are few
    while start < end:
        data, at = file.load(start, 1)
        piece = data[at : at + min(length, end - start)]
        rest = len(piece.lstrip(b"\0"))
        start += len(piece) - rest
        if rest:
            break
        length = _WINDOW
        file.check_time()
    return start


def _skip_zeros(file: _File, position: int, end: int) -> int:
    """Return the next record behind the few zeros between records that go-hep and uproot leave.

    Where a record would fit, one may have been: a disk that lost a sector gives zeros.
    """
    behind = position + _SHORTEST_KEY
    first = _skip_zero_bytes(file, position, min(end, behind + 3))
    # Up to three of the zeros are the beginning of that record's length; its own position tells how many.
    for start in range(max(position, first - 3), min(first + 1, behind)):
        if start == end:
            return end
        try:
            if _read_key(file, start, end, "record")[0].position == start:
                return start
        except InvalidRootFile:
            pass
    raise InvalidRootFile(f"zeros from byte {position} on, and no record within {_SHORTEST_KEY} bytes")


# --- payloads ----------------------------------------------------------------------------------------------------------

# Two letters and a method byte, then the stored and the inflated length, three bytes each, little-endian (RZip.cxx); the
# third of the three bytes is read apart.
_BLOCK = struct.Struct("<3sHBHB")
_CHECKSUM = struct.Struct(">I")  # Adler-32, with which a zlib stream ends
_XZ_END = 64  # bytes in which the end of a block, its CRC, an index of one block and the end of the stream fit


def _check_usual(data: bytes, at: int, stored: int, size: int) -> _Bytes | None:
    """Return what the usual payload inflates to, one zlib block, or the beginning of one that is not compressed.

    Return None for every other, also for a damaged one and where not all of it is in `data`.
    """
    end = at + stored
    if end > len(data) or stored < _BLOCK.size or not size:  # asked for nothing, libdeflate does not look at the stream
        return None
    if stored == size:
        return data[at : min(end, at + _NAME_BYTES)]
    kind, block_stored, high, block_size, higher = _BLOCK.unpack_from(data, at)
    if kind != b"ZL\x08" or block_stored | high << 16 != stored - _BLOCK.size or block_size | higher << 16 != size:
        return None
    try:
        return _inflate_zlib(memoryview(data)[at + _BLOCK.size : end], size)
    except (deflate.DeflateError, InvalidRootFile):
        return None


def _check_payload(file: _File, start: int, stored: int, size: int) -> _Bytes:
    """Inflate a payload block by block and let go of it; return its beginning."""
    if stored == size:  # not compressed
        length = min(size, _NAME_BYTES)
        data, at = file.load(start, length)
        return data[at : at + length]
    first: _Bytes | None = None
    position, end, left = start, start + stored, size
    while position < end:
        room = end - position - _BLOCK.size
        if room < 0:
            raise InvalidRootFile(f"{end - position} bytes behind its last compressed block")
        data, at = file.load(position, _BLOCK.size)
        kind, block_stored, high, block_size, higher = _BLOCK.unpack_from(data, at)
        if high:
            block_stored |= high << 16
        if higher:
            block_size |= higher << 16
        position += _BLOCK.size
        at += _BLOCK.size
        inflate = _INFLATE.get(kind)
        file.check_time()
        if inflate is None:
            raise InvalidRootFile(f"compressed in an unknown way ({kind!r}), or {stored} bytes where {size} belong")
        if block_stored > room:
            raise InvalidRootFile(f"a block of {block_stored} bytes in the last {room} bytes of the record")
        if not 0 < block_size <= left:
            raise InvalidRootFile(f"a block that inflates to {block_size} bytes where {left} are left to come")
        if at + block_stored > len(data):
            del data  # up to 16 MiB, before as much is read
            data, at = file.load(position, block_stored)
        try:
            block = inflate(memoryview(data)[at : at + block_stored], block_size)
        except (deflate.DeflateError, cramjam.DecompressionError, lzma.LZMAError, zlib.error) as error:
            raise InvalidRootFile(
                f"damaged {kind[:2].decode()} block of {block_stored} bytes at byte {position}"
            ) from error
        if kind in _SLOW:
            file.slow_left -= block_size
            if file.slow_left < 0:
                raise InvalidRootFile(f"{kind[:2].decode()} blocks inflate to more than is allowed")
        if first is None:
            first = block if block_size <= _NAME_BYTES else block[:_NAME_BYTES]
        del block  # up to 16 MiB, before the next one takes as much
        position += block_stored
        left -= block_size
        if left:
            file.blocks_left -= 1
            if file.blocks_left < 0:
                raise InvalidRootFile(f"more than {MAX_BLOCKS} compressed blocks behind the first of an object")
    if left:
        raise InvalidRootFile(f"payload inflates to {size - left} bytes, its key says {size}")
    return first or b""


def _inflate_zlib(stored: memoryview, size: int) -> _Bytes:
    inflated: bytearray = deflate.zlib_decompress(stored, size)  # libdeflate never writes more than `size` bytes
    # libdeflate ignores what follows the stream; where nothing does, the stream's checksum ends the block.
    (checksum,) = _CHECKSUM.unpack_from(stored, -_CHECKSUM.size)
    if deflate.adler32(inflated) != checksum:
        raise InvalidRootFile("bytes behind the end of its zlib stream")
    if len(inflated) != size:
        raise InvalidRootFile(f"a block inflates to {len(inflated)} bytes, its head says {size}")
    return inflated


def _check_xz(stored: memoryview) -> None:
    """Raise LZMAError unless XZ has one block, with one filter and a CRC, as all writers make it.

    A million empty blocks, more filters or SHA-256 would take many times as long. The format:
    https://tukaani.org/xz/xz-file-format.txt, sections 2.1.1 and 3.1; lzma2_decoder.c of XZ Utils for the chunks.
    """
    try:
        if stored[7] not in (lzma.CHECK_CRC32, lzma.CHECK_CRC64) or stored[13] & 3:
            raise lzma.LZMAError("an unusual check, or several filters")
        at = 12 + 4 * (stored[12] + 1)
        while control := stored[at]:
            if control < 0x80:  # not compressed
                at += 4 + (stored[at + 1] << 8 | stored[at + 2])
            else:
                at += 6 + (stored[at + 3] << 8 | stored[at + 4]) + (control >= 0xC0)
    except IndexError:
        raise lzma.LZMAError("cut short") from None
    if len(stored) - at > _XZ_END:
        raise lzma.LZMAError("several blocks")


def _inflate_xz(stored: memoryview, size: int) -> _Bytes:
    _check_xz(stored)
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)
    first = piece = decoder.decompress(stored, max_length=_PIECE)
    inflated = len(first)
    while not decoder.eof and inflated <= size and (piece or not decoder.needs_input):
        piece = decoder.decompress(b"", max_length=_PIECE)
        inflated += len(piece)
    if not decoder.eof or decoder.unused_data:
        inflated = -1
    return _complete(first, inflated, size)


def _inflate_lz4(stored: memoryview, size: int) -> _Bytes:
    if xxhash.xxh64_intdigest(stored[8:]) != int.from_bytes(stored[:8], "big"):  # ZipLZ4.cxx
        raise InvalidRootFile("damaged L4 block: its checksum is wrong")
    inflated = bytearray(size)
    return _complete(inflated, cramjam.lz4.decompress_block_into(stored[8:], inflated, output_len=size), size)


def _inflate_zstd(stored: memoryview, size: int) -> _Bytes:
    inflated = bytearray(size)
    return _complete(inflated, cramjam.zstd.decompress_into(stored, inflated), size)


def _inflate_old(stored: memoryview, size: int) -> _Bytes:
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)  # deflate without zlib's head and checksum
    first = piece = decoder.decompress(stored, _PIECE)
    inflated = len(first)
    while piece and not decoder.eof and inflated <= size:
        piece = decoder.decompress(decoder.unconsumed_tail, _PIECE)
        inflated += len(piece)
    return _complete(first, inflated if decoder.eof and not decoder.unused_data else -1, size)


def _complete(block: _Bytes, inflated: int, size: int) -> _Bytes:
    if inflated != size:
        raise InvalidRootFile(f"a block inflates to {inflated} bytes, its head says {size}")
    return block


_SLOW = (b"XZ\x00", b"CS\x08")

# Letters and method byte of a block, and what inflates it: at most to the size asked for, or it raises.
_INFLATE: dict[bytes, Callable[[memoryview, int], _Bytes]] = {
    b"ZL\x08": _inflate_zlib,
    b"XZ\x00": _inflate_xz,
    b"L4\x01": _inflate_lz4,
    b"ZS\x01": _inflate_zstd,
    b"CS\x08": _inflate_old,
}


# --- names -------------------------------------------------------------------------------------------------------------

_BYTE_COUNT = 0x40  # in the first of its four bytes, marks a byte count (TBufferFile.cxx, kByteCountMask)
_COUNT_BITS = 0x3FFFFFFF
_VERSION_SIZE = 6  # byte count, class version
_OBJECT_SIZE = 10  # of TObject: class version, fUniqueID, fBits
_IS_REFERENCED = 0x10  # the bit of TObject, in the last of its bytes, behind which two more follow (kIsReferenced)
_NAMED = struct.Struct(">IHH")  # of TNamed: byte count, class version; and the version of its TObject
_NAMED_SIZE = (_BYTE_COUNT << 24) + _VERSION_SIZE - 4 + _OBJECT_SIZE  # its byte count, without name and title
_COLLECTIONS = frozenset(
    [
        "TObjArray",
        "TList",
        "THashList",
        "TSortedList",
        "TOrdCollection",
        "TMap",
        "THashTable",
        "TBtree",
        "TClonesArray",
        "TRefArray",
    ]
)
_STRING_BEHIND_OBJECT = frozenset(["TObjString", "TParameter", "TStatistic"])
_NAMELESS = frozenset(
    [
        "TObject",
        "TBits",
        "TExMap",
        "TRef",
        "TUrl",
        "TMatrixT",
        "TMatrixTSym",
        "TMatrixTSparse",
        "TVectorT",
        "TVector2",
        "TVector3",
        "TLorentzVector",
        "TRotation",
        "TLine",
        "TBox",
        "TMarker",
        "TEllipse",
        "TArrow",
        "TPolyLine",
        "TPolyMarker",
        "TCurlyArc",
        "TFeldmanCousins",
        "TLimitDataSource",
    ]
)


def _has_name_of_key(payload: _Bytes, key: bytes) -> bool:
    """Whether an object begins with a TNamed of the name and title that are in its key, as nearly all do."""
    name_and_title = key[_KEY.size + 1 + key[_KEY.size] :]
    # Before it come the versions of the classes that inherit it, each with a byte count (of which "@" is the
    # first byte), and nothing else: four of them in a TProfile2D, which is a TH2D, TH2 and TH1.
    at = payload.find(_NAMED.pack(_NAMED_SIZE + len(name_and_title), 1, 1), 0, 4 * _VERSION_SIZE + _NAMED.size)
    if at % _VERSION_SIZE or payload[:at:_VERSION_SIZE].strip(b"@"):
        return False
    return payload.startswith(name_and_title, at + _VERSION_SIZE + _OBJECT_SIZE)


def _object_name(key_name: str, class_name: str, payload: _Bytes) -> str:
    """The object's own name, as its GetName() gives it, where class and beginning of its payload tell; or the key's name."""
    # Versions with byte counts, one for each base class, the innermost last; then TObject: version, fUniqueID, fBits.
    at, last = 0, len(payload) - _OBJECT_SIZE - 2  # two empty strings
    while at <= last and payload[at] & _BYTE_COUNT:
        at += _VERSION_SIZE
    name: _Bytes = b""
    if 0 < at <= last:
        own = at - _VERSION_SIZE
        end = own + 4 + (int.from_bytes(payload[own : own + 4], "big") & _COUNT_BITS)
        referenced = payload[at + _OBJECT_SIZE - 1] & _IS_REFERENCED
        name, title_at = _read_string(payload, at + _OBJECT_SIZE + (2 if referenced else 0))
        # A class version whose bytes are a TObject and two strings is that of TNamed, whatever the name of its heir.
        if payload[at : at + 2] == b"\0\1" and _read_string(payload, title_at)[1] == end:
            return _text(name)
    template = class_name.partition("<")[0]
    if template in _STRING_BEHIND_OBJECT:
        return _text(name)
    if template in _COLLECTIONS:
        return _text(name) or class_name
    return class_name if template in _NAMELESS else key_name


# --- the second reader -------------------------------------------------------------------------------------------------


class _UprootChunk(uproot.source.chunk.Chunk):  # type: ignore[misc]
    """Bytes for uproot, cut as a memory view, which takes half the time of its numpy arrays."""

    def __init__(self, source: _UprootSource, start: int, stop: int, data: bytes) -> None:
        super().__init__(source, start, stop, None)
        view = memoryview(data)

        # uproot asks seven times for each key. What is cut short shows itself: as an error, or as a different name.
        def get(begin: int, end: int, cursor: object, context: object) -> memoryview:
            return view[begin - start : end - start]

        # The same for all of the file.
        def get_of_all(begin: int, end: int, cursor: object, context: object) -> memoryview:
            return view[begin:end]

        self.get = get if start else get_of_all


class _UprootSource(uproot.source.chunk.Source):  # type: ignore[misc]
    """How uproot reads the open file: without a thread or a memory map, and a small file, which is in memory, at once."""

    closed = False

    def __init__(self, path: str, *, file: _File, **_: object) -> None:
        super().__init__()
        self._file_path = path
        self._file = file

    def chunk(self, start: int, stop: int) -> _UprootChunk:
        try:
            if self._file.size <= _WINDOW:
                data, _ = self._file.load(0, self._file.size)
                return _UprootChunk(self, 0, len(data), data)
            return _UprootChunk(self, start, stop, self._file.pread(start, stop - start))
        except OSError as error:
            self._file.error = error
            raise

    def close(self) -> None:
        """Leave the file open; it is not uproot's."""


def _compare_with_uproot(file: _File, top: dict[int, tuple[str, int, str]]) -> None:
    """Have uproot find the same objects at the top level, by name and class, and by cycle where a name has several."""
    try:
        root = uproot.open({"file": None}, handler=_UprootSource, file=file, object_cache=None, array_cache=None)
        expected = {name: class_name for name, _, class_name in top.values()}
        several_cycles = len(expected) < len(top)
        found = root.classnames(recursive=False, cycle=several_cycles)
    except MemoryError:  # ours: what the file can ask for is bounded by now
        raise
    except Exception as error:  # whatever uproot stumbles over: ValueError, AssertionError, KeyError, ...
        if error is file.error:
            raise
        raise InvalidRootFile(f"uproot cannot read the file: {error!r}") from error
    # uproot's directory and keys refer to each other: cut, they are gone now and not when the garbage collector comes by.
    vars(root).clear()
    if several_cycles:
        expected = {f"{name};{cycle}": class_name for name, cycle, class_name in top.values()}
    if found != expected:
        found = {_like_ours(name): _like_ours(class_name) for name, class_name in found.items()}
    if found != expected:
        raise InvalidRootFile(f"uproot finds other objects: {min(dict(found.items() ^ expected.items()))!r}")


def _like_ours(name: str) -> str:
    """Return a name in which uproot has surrogates for undecodable bytes with our backslash escapes for them."""
    return _text(name.encode(errors="surrogateescape"))


def main(arguments: Sequence[str] | None = None) -> int:
    """List the objects of ROOT files, or why a file is not valid; return 1 if any is not."""
    parser = argparse.ArgumentParser(prog="python -m rootcheck", description=main.__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE")
    invalid = False
    for path in parser.parse_args(arguments).files:
        try:
            objects = check_root_file(path)
        except (InvalidRootFile, OSError) as error:
            invalid = True
            print(f"{path}: invalid: {error}" if isinstance(error, InvalidRootFile) else f"{path}: {error.strerror}")
            continue
        print(f"{path}: valid, {len(objects)} objects")
        for name, found in objects.items():
            print(f"  {name}: {found.description}")
    return int(invalid)


if __name__ == "__main__":
    sys.exit(main())
