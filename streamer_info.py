"""Checks the lengths and class names in a streamer info, without building any object.

CERN ROOT reads the streamer info when it opens a file. It complains or crashes if byte counts, class tags or class versions in
it are damaged. Some payloads have no checksum (Zstandard, old deflate, uncompressed), so damage shows only there.

A streamer info is a TList of TStreamerInfo, one for each class. Each has a TNamed, a checksum, a class version and a TObjArray
of elements, one for each base and member. Every class begins with a byte count and its version. Every object in a container
begins with a byte count and then either the name of its class or a tag, which refers to the first place of that name.

The format: TList.cxx, TObjArray.cxx, TStreamerElement.cxx, TStreamerInfo.cxx and TBufferFile.cxx (ReadClass) of ROOT.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

MAX_SIZE = 1 << 24  # bytes; larger ones are not checked. Those of the largest experiments have a tenth of that
_CACHED_SIZE = 1 << 16  # bytes; smaller ones are remembered, because all files of an agent have the same

_COUNTED = struct.Struct(">IH")  # byte count, class version
_TAGGED = struct.Struct(">II")  # byte count, class tag
_OBJECT = struct.Struct(">HII")  # of TObject: class version, fUniqueID, fBits
_INT = struct.Struct(">i")
_TWO_INTS = struct.Struct(">Ii")

_BYTE_COUNT = 1  # the two upper bits of a byte count (kByteCountMask)
_COUNT_BITS = 0x3FFFFFFF
_NEW_CLASS = 0xFFFFFFFF  # tag before a name (kNewClassTag)
_CLASS_BIT = 0x80000000  # marks the tag of a class whose name came before (kClassMask)
_MAP_OFFSET = 2  # added to positions in tags (kMapOffset)
_MOVED = 8  # bytes by which a key with 8-byte positions is longer
_LONGEST_CLASS = 80  # TClass::Load
_IS_REFERENCED = 0x10  # a bit of TObject; if it is set, two more bytes follow (kIsReferenced)
_MAX_CLASS_VERSION = 65_000  # TStreamerInfo::BuildCheck

# The newest version of each class. ROOT 6.40 refuses versions of TNamed that it does not know.
_VERSIONS = {
    "TList": 5,
    "THashList": 5,
    "TObjString": 1,
    "TObjArray": 3,
    "TNamed": 1,
    "TStreamerInfo": 10,
    "TStreamerElement": 4,
    "TStreamerBase": 3,
    "TStreamerBasicPointer": 2,
    "TStreamerLoop": 2,
    "TStreamerBasicType": 2,
    "TStreamerObject": 2,
    "TStreamerObjectAny": 2,
    "TStreamerObjectPointer": 2,
    "TStreamerObjectAnyPointer": 2,
    "TStreamerString": 2,
    "TStreamerSTL": 3,
    "TStreamerSTLstring": 2,
    "TStreamerArtificial": 1,
}
_LISTS = ("TList", "THashList")  # one of them, in the list, holds the rules of schema evolution
_NOT_IN_TYPES = frozenset('\\`"#?;')  # characters that no name of a C++ type has


class DamagedStreamerInfo(Exception):
    """The streamer info contradicts itself; the text says where."""


def check_streamer_info(payload: bytes, key_size: int, check_time: Callable[[], None]) -> None:
    """Raise DamagedStreamerInfo unless a streamer info is consistent: its inflated payload, after a key of this size."""
    if len(payload) <= _CACHED_SIZE:
        _check_small(payload, key_size)
    else:
        _Walk(payload, key_size, check_time).run()


@functools.lru_cache(maxsize=16)
def _check_small(payload: bytes, key_size: int) -> None:
    _Walk(payload, key_size, lambda: None).run()


class _Walk:
    """A position in the streamer info, and the places at which its classes were named."""

    def __init__(self, data: bytes, key_size: int, check_time: Callable[[], None]) -> None:
        self._data = data
        self._at = 0
        self._shift = key_size + _MAP_OFFSET  # tags count from the first byte of the key
        self._moved: int | None = None  # all tags are too large by this; None until the first one tells
        self._classes: dict[int, str] = {}
        self._check_time = check_time

    def run(self) -> None:
        try:
            self._list("TList", len(self._data), self._item)
        except (struct.error, IndexError):
            raise self._damaged("ends early") from None
        # Bytes after it are not damage: uproot leaves room there.

    def _damaged(self, text: str) -> DamagedStreamerInfo:
        return DamagedStreamerInfo(f"damaged streamer info: {text} (byte {self._at} of {len(self._data)})")

    # Parts of all classes

    def _enter(self, name: str, end: int) -> tuple[int, int]:
        """Read the byte count and the version of a class; return the version and where the class ends."""
        count, version = _COUNTED.unpack_from(self._data, self._at)
        stop = self._at + 4 + (count & _COUNT_BITS)
        if count >> 30 != _BYTE_COUNT or stop > end or not 1 <= version <= _VERSIONS[name]:
            raise self._damaged(f"a {name} of version {version} and {count & _COUNT_BITS} bytes")
        self._at += _COUNTED.size
        return version, stop

    def _leave(self, name: str, stop: int) -> None:
        if self._at != stop:
            raise self._damaged(f"a {name} that should end at byte {stop}")

    def _string(self) -> bytes:
        at = self._at + 1
        length = self._data[self._at]
        if length == 255:
            (length,) = _INT.unpack_from(self._data, at)
            at += _INT.size
        self._at = at + length
        if not at <= self._at <= len(self._data):
            raise self._damaged(f"a string of {length} bytes")
        return self._data[at : self._at]

    def _tobject(self) -> None:
        version, _, bits = _OBJECT.unpack_from(self._data, self._at)
        if version & 0x4000:  # a byte count, which no writer gives it
            raise self._damaged(f"a TObject of version {version}")
        self._at += _OBJECT.size + (2 if bits & _IS_REFERENCED else 0)

    def _tnamed(self, end: int) -> bytes:
        _, stop = self._enter("TNamed", end)
        self._tobject()
        name = self._string()
        self._string()  # the title
        self._leave("TNamed", stop)
        return name

    def _int(self) -> int:
        (number,) = _INT.unpack_from(self._data, self._at)
        self._at += _INT.size
        return int(number)

    # Containers

    def _list(self, name: str, end: int, read_item: Callable[[str, int], None]) -> None:
        version, stop = self._enter(name, end)
        if version > 2:
            self._tobject()
        if version > 1:
            self._string()
        for _ in range(self._int()):
            self._object(stop, read_item)
            if version > 3:
                self._string()  # the option with which it was added
            else:
                self._at += 1 + self._data[self._at]
        self._leave(name, stop)

    def _array(self, name: str, end: int) -> None:
        if name != "TObjArray":
            raise self._damaged("no TObjArray of elements")
        version, stop = self._enter(name, end)
        if version > 2:
            self._tobject()
        if version > 1:
            self._string()
        count, lower_bound = self._int(), self._int()
        if lower_bound:
            raise self._damaged(f"a TObjArray that begins at {lower_bound}")
        for _ in range(count):
            self._object(stop, self._element)
        self._leave(name, stop)

    def _object(self, end: int, read: Callable[[str, int], None]) -> None:
        """Read an object of a container, or a null pointer."""
        start = self._at
        count, tag = _TAGGED.unpack_from(self._data, start)
        if count == 0:
            self._at += 4
            return
        stop = start + 4 + (count & _COUNT_BITS)
        if count >> 30 != _BYTE_COUNT or stop > end:
            raise self._damaged(f"an object of {count & _COUNT_BITS} bytes")
        self._at += _TAGGED.size
        if tag == _NEW_CLASS:
            name = self._class_name()
            self._classes[start + 4 + self._shift] = name
        else:
            name = self._named_before(tag ^ _CLASS_BIT)
        if name not in _VERSIONS:
            raise self._damaged(f"an object of class {name or hex(tag)!r}")
        read(name, stop)
        self._leave(f"object of class {name}", stop)

    def _named_before(self, tag: int) -> str:
        if self._moved is None:
            # uproot.update copies a payload from a key with 8-byte positions to one with 4-byte positions.
            self._moved = _MOVED if tag not in self._classes and tag - _MOVED in self._classes else 0
        return self._classes.get(tag - self._moved, "")

    def _class_name(self) -> str:
        end = self._data.find(b"\0", self._at, self._at + _LONGEST_CLASS)
        name = self._data[self._at : max(end, self._at)]
        self._at += len(name) + 1
        return name.decode("ascii", "backslashreplace")

    # The objects in them

    def _item(self, name: str, end: int) -> None:
        self._check_time()
        if name in _LISTS:
            self._list(name, end, self._rule)
        elif name == "TStreamerInfo":
            self._info(end)
        else:
            raise self._damaged(f"a {name} among the streamer infos")

    def _rule(self, name: str, end: int) -> None:
        _, stop = self._enter("TObjString", end)
        self._tobject()
        self._string()
        self._leave("TObjString", stop)

    def _info(self, end: int) -> None:
        _, stop = self._enter("TStreamerInfo", end)
        class_name = self._tnamed(stop)
        text = class_name.decode("utf-8", "surrogateescape")
        if not text.isprintable() or not _NOT_IN_TYPES.isdisjoint(text):  # no surrogate is printable
            raise self._damaged(f"a class of the name {class_name!r}")
        _, class_version = _TWO_INTS.unpack_from(self._data, self._at)
        self._at += _TWO_INTS.size
        if not -1 <= class_version <= _MAX_CLASS_VERSION:
            raise self._damaged(f"version {class_version} of the class {class_name!r}")
        self._object(stop, self._array)
        self._leave("TStreamerInfo", stop)

    def _element(self, name: str, end: int) -> None:
        if not name.startswith("TStreamer") or name == "TStreamerInfo":
            raise self._damaged(f"a {name} among the elements")
        if name == "TStreamerElement":
            self._element_fields(end)
            return
        version, stop = self._enter(name, end)
        if name == "TStreamerSTLstring":
            self._element("TStreamerSTL", stop)
        else:
            self._element_fields(stop)
        if name == "TStreamerBase" and (version > 2 or self._at < stop):
            self._at += 4  # the version of the base
        elif name in ("TStreamerBasicPointer", "TStreamerLoop"):
            self._at += 4  # the version of the counter's class; the names of counter and class follow
            self._string()
            self._string()
        elif name == "TStreamerSTL":
            self._at += 8  # the kinds of container and of content
        self._leave(name, stop)

    def _element_fields(self, end: int) -> None:
        version, stop = self._enter("TStreamerElement", end)
        self._tnamed(stop)
        self._at += 16  # type, size, length and number of dimensions of an array
        dimensions = self._int() if version == 1 else 5
        if not 0 <= dimensions <= 5:
            raise self._damaged(f"an array of {dimensions} dimensions")
        self._at += 4 * dimensions
        self._string()  # the name of the type
        if version == 3:
            self._at += 24  # a range and a factor
        self._leave("TStreamerElement", stop)
