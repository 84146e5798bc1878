"""The second reader: uproot, which must find the same keys in the root directory of a file that passed all other checks.

uproot's own classes parse the root directory, the number of its keys and each key: name, class, cycle and position, with 4-byte
and 8-byte positions. So a mistake in our layout of these is found. Two things are not uproot's: the position of the root
directory, which its record has confirmed, and the cutting of fields and short strings from the key list, which takes half the
time of uproot's way. uproot neither opens the file nor inflates anything.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from operator import attrgetter
from typing import Any

import uproot.reading
import uproot.source.cursor

from root_keys import WINDOW, InvalidRootFile, Key, Reader, escape_undecodable


class _Chunk:
    """Bytes of the file for uproot, without its numpy arrays. If they end early, the key differs or struct raises."""

    def __init__(self, start: int, data: bytes) -> None:
        self.start = start
        self.bytes = data
        self._view = memoryview(data)

    def get(self, start: int, stop: int, cursor: object, context: object) -> memoryview:
        return self._view[start - self.start : stop - self.start]

    def __contains__(self, bounds: tuple[int, int]) -> bool:
        return self.start <= bounds[0] and bounds[1] <= self.start + len(self.bytes)


class _File:
    """The part of a file that uproot's directory uses. A small file is in memory and becomes one chunk."""

    def __init__(self, reader: Reader, end: int) -> None:
        self.fEND = end
        self._reader = reader

    def chunk(self, start: int, stop: int) -> _Chunk:
        if self._reader.size <= WINDOW:
            return _Chunk(0, self._reader.read(0, self._reader.size)[0])
        return _Chunk(start, self._reader.pread(start, stop - start))


class _KeyCursor(uproot.source.cursor.Cursor):  # type: ignore[misc]
    """uproot's position in a key list, shared by its keys."""

    def copy(self, link_refs: bool = True) -> _KeyCursor:
        return self

    def fields(self, chunk: _Chunk, format: struct.Struct, context: object, move: bool = True) -> tuple[Any, ...]:
        at = self._index - chunk.start
        if move:
            self._index += format.size
        return format.unpack_from(chunk.bytes, at)

    def string(self, chunk: _Chunk, context: object, move: bool = True) -> str:
        at = self._index - chunk.start + 1
        length = chunk.bytes[at - 1]
        if length == 255:
            text: str = super().string(chunk, context)
            return text
        self._index += 1 + length
        return chunk.bytes[at : at + length].decode(errors="surrogateescape")


class _KeysBegin(Exception):
    """Ends the reading of a directory where its keys begin."""

    def __init__(self, chunk: _Chunk, start: int, number: int) -> None:
        self.chunk, self.start, self.number = chunk, start, number


class _Directory(uproot.reading.ReadOnlyDirectory):  # type: ignore[misc]
    """A directory up to its keys. uproot's index of the keys would take half as long as reading them."""

    def hook_before_keys(
        self, *, keys_chunk: _Chunk, keys_cursor: uproot.source.cursor.Cursor, num_keys: int, **_: object
    ) -> None:
        raise _KeysBegin(keys_chunk, keys_cursor.index, num_keys)


_identity = attrgetter("name", "class_name", "cycle", "position")
_uproot_identity = attrgetter("fName", "fClassName", "fCycle", "fSeekKey")


def _read_until_keys(reader: Reader, start: int, end: int) -> tuple[_Chunk, _KeyCursor, int]:
    """Return the bytes with the keys of the directory whose fields begin at `start`, a cursor there, and their number."""
    file = _File(reader, end)
    try:
        _Directory((), uproot.source.cursor.Cursor(start), {}, file, file)
    except _KeysBegin as found:  # deleted at the end of this clause: its traceback refers to the bytes of the file
        return found.chunk, _KeyCursor(found.start), found.number
    raise ValueError("no list of keys")


def compare_with_uproot(reader: Reader, start: int, end: int, keys: Collection[Key]) -> None:
    """Raise InvalidRootFile unless uproot finds these keys, in this order, in the root directory at byte `start`."""
    try:
        chunk, cursor, number = _read_until_keys(reader, start, end)
        if number != len(keys):
            raise InvalidRootFile(f"uproot finds {number} keys in the root directory, not {len(keys)}")
        for key in keys:
            found = _uproot_identity(uproot.reading.ReadOnlyKey(chunk, cursor, {}, None, None, read_strings=True))
            if found != _identity(key):
                raise InvalidRootFile(f"uproot finds other objects: {escape_undecodable(found[0])!r}")
    except (InvalidRootFile, MemoryError, OSError):  # the last two are not uproot's: no memory, no disk
        raise
    except Exception as error:  # uproot raises many kinds: ValueError, AssertionError, KeyError, ...
        raise InvalidRootFile(f"uproot cannot read the file: {error!r}") from error
