"""Reads a ROOT file and its keys: the beginnings of its records, and their copies in key lists.

The format: TKey.cxx and TBasket.cxx of ROOT.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import NamedTuple

from object_names import read_string

WINDOW = 1 << 20  # bytes read at once
SMALL_READ = 1 << 14  # bytes of a non-sequential read: directories lie far apart


class InvalidRootFile(Exception):
    """The file is not a valid ROOT file; the text says why."""


class Reader:
    """An open file, read through a window that moves forward over it.

    Not a memory map: a mapped file that shrinks kills the process, and its pages count as memory of the process.
    """

    def __init__(self, path_or_descriptor: str | os.PathLike[str] | int) -> None:
        self._is_ours = not isinstance(path_or_descriptor, int)
        if isinstance(path_or_descriptor, int):
            self._fd = path_or_descriptor
        else:
            self._fd = os.open(path_or_descriptor, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size
        self._window = b""
        self._start = 0

    def close(self) -> None:
        if self._is_ours:
            os.close(self._fd)

    def pread(self, start: int, length: int) -> bytes:
        """Return `length` bytes of the file, or fewer at its end."""
        return os.pread(self._fd, length, start)

    def read(self, start: int, length: int) -> tuple[bytes, int]:
        """Return bytes of the file and the index of byte `start` in them; at least `length` bytes follow from there."""
        at = start - self._start
        if at < 0 or at + length > len(self._window):
            most = WINDOW if 0 <= at <= len(self._window) else SMALL_READ
            self._window = b""  # frees the old bytes before the new ones take as much memory
            # Not more than the file has: a buffer of 1 MiB takes longer to make than a small file to read.
            self._window = self.pread(start, max(length, min(most, self.size - start)))
            self._start, at = start, 0
            if len(self._window) < length:
                raise InvalidRootFile(f"the file ends at byte {self.size}, {length} bytes were to be at byte {start}")
        return self._window, at

    def read_int(self, start: int) -> int:
        data, at = self.read(start, 4)
        return int.from_bytes(data[at : at + 4], "big", signed=True)

    def skip_zeros(self, start: int, end: int, check_time: Callable[[], None]) -> int:
        """Return the position of the first byte that is not zero, or `end`."""
        length = 64  # nearly always enough
        while start < end:
            data, at = self.read(start, 1)
            piece = data[at : at + min(length, end - start)]
            rest = len(piece.lstrip(b"\0"))
            start += len(piece) - rest
            if rest:
                break
            length = WINDOW
            check_time()
        return start


class Key(NamedTuple):
    """The beginning of a record, or its copy in a directory's key list."""

    size: int  # fNbytes: of the record
    object_size: int  # fObjlen: of the payload, inflated
    key_size: int  # fKeylen: of the key itself; the payload follows
    cycle: int
    position: int  # fSeekKey: of the record
    directory: int  # fSeekPdir: position of the directory's record
    class_name: str
    name: str

    def __str__(self) -> str:
        return describe_record(self.position, self.class_name, self.name)


def describe_record(position: int, class_name: str, name: str) -> str:
    return f"record at byte {position} ({escape_undecodable(class_name)[:80]} {escape_undecodable(name)[:80]})"


KEY = struct.Struct(">ihiIhhii")  # fNbytes, fVersion, fObjlen, fDatime, fKeylen, fCycle, fSeekKey, fSeekPdir
KEY_64 = struct.Struct(">ihiIhhqq")  # where fVersion is above 1000
KEY_SIZES = struct.Struct(">ihiIh")  # the fields that both have in common
_PROCESS_ID_BITS = (1 << 48) - 1  # the 16 bits above these in a 64-bit fSeekPdir are TKey's fPidOffset
SHORTEST_KEY = KEY.size + 3  # three empty strings
BASKET = struct.Struct(">iiB")  # fNevBuf, fLast and a flag, with which the key of a TBasket ends
_BASKET_SIZE = 19  # bytes of TBasket's own fields in all; one more if the third, fNevBufSize, is negative
LONGEST_KEY = (1 << 15) + (1 << 10)  # fKeylen has 15 bits, and a listed key whose name was changed may be longer


def read_key(reader: Reader, start: int, end: int, subject: object, is_listed: bool = False) -> tuple[Key, bytes]:
    """Return the key at byte `start`, which must end before byte `end`, and its bytes; errors name the `subject`."""
    left = min(LONGEST_KEY, end - start)
    if left < SHORTEST_KEY:
        raise InvalidRootFile(f"{subject}: {left} bytes at byte {start} are too few for a key")
    data, at = reader.read(start, left)
    try:
        key, length = parse_key(data[at : at + left], is_listed)
    except InvalidRootFile as error:
        raise InvalidRootFile(f"{subject}: the key at byte {start} {error}") from None
    return key, data[at : at + length]


def parse_key(data: bytes, is_listed: bool) -> tuple[Key, int]:
    """Return the key that `data` begins with, and its length.

    A listed key ends with its strings, not at fKeylen. TKey::SetName and SetTitle change the strings and not fKeylen. ROOT 5
    and 6 list a TDirectoryFile by its long class name, with the length of a key that has the short one, TDirectory.
    """
    size, version, object_size, _, key_size, cycle, position, directory = KEY.unpack_from(data)
    at = KEY.size
    if version > 1000 and len(data) >= KEY_64.size:
        size, version, object_size, _, key_size, cycle, position, directory = KEY_64.unpack_from(data)
        directory &= _PROCESS_ID_BITS
        at = KEY_64.size
    if not (at + 3 <= key_size <= size and object_size >= 0):
        raise InvalidRootFile(f"has impossible lengths (record {size}, key {key_size}, object {object_size})")
    class_name, at = read_string(data, at)
    name, at = read_string(data, at)
    _, at = read_string(data, at)
    if at != key_size and not is_listed:
        # TBasket appends fields of its own to the key.
        is_basket = class_name == b"TBasket" and at + 6 < len(data)
        if not is_basket or key_size - at != _BASKET_SIZE + (data[at + 6] >> 7):
            raise InvalidRootFile(f"has {key_size} bytes, but its class, name and title make it {at}")
        at = key_size
    if at > len(data):
        raise InvalidRootFile(f"has {at} bytes where only {len(data)} are left")
    return Key(size, object_size, key_size, cycle, position, directory, decode_name(class_name), decode_name(name)), at


def parse_usual_key(data: bytes, at: int, end: int) -> Key | None:
    """Return the listed key in `data[at:end]` if it has 4-byte positions, short strings and its own length.

    Nearly all keys are like that, and `parse_key` takes twice as long.
    """
    try:
        size, version, object_size, _, key_size, cycle, position, directory = KEY.unpack_from(data, at)
        class_at = at + KEY.size + 1
        name_at = class_at + data[class_at - 1] + 1
        title_at = name_at + data[name_at - 1] + 1
        title_size = data[title_at - 1]
        if title_at + title_size != at + key_size or not key_size <= end - at or key_size > size or version > 1000:
            return None
        if object_size < 0 or name_at - class_at > 255 or title_at - name_at > 255 or title_size == 255:
            return None
        class_name, name = data[class_at : name_at - 1].decode(), data[name_at : title_at - 1].decode()
    except (IndexError, struct.error, UnicodeDecodeError):
        return None
    # tuple.__new__ takes half the time of Key(...).
    return tuple.__new__(Key, (size, object_size, key_size, cycle, position, directory, class_name, name))


def keys_agree(listed: bytes, key: Key) -> bool:
    """Return whether a listed key agrees with the key of its record in everything but name, title and date."""
    copy, _ = parse_key(listed, is_listed=True)
    if copy.class_name == "TDirectoryFile" and key.class_name == "TDirectory":
        copy = copy._replace(class_name=key.class_name)
    return copy[:-1] == key[:-1]


def decode_name(name: bytes) -> str:
    """Decode a name. Undecodable bytes become surrogates, so two different names never become equal."""
    return name.decode("utf-8", "surrogateescape")


def escape_undecodable(name: str) -> str:
    """Return a name with backslash escapes for undecodable bytes."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
