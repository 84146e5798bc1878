"""The own name of an object, as CERN ROOT's `GetName()` returns it, from its class and the beginning of its payload.

The payload of a TNamed and of the classes that inherit from it begins with the headers of the classes, the outermost first,
each with a byte count and a version. Then come TObject, the name and the title. Other classes have their name elsewhere, or none.
"""

from __future__ import annotations

import struct

Bytes = bytes | bytearray

_KEY_SIZE = 26  # of a key with 4-byte positions, without its strings
_BYTE_COUNT = 0x40  # in the first of its four bytes, marks a byte count (TBufferFile.cxx, kByteCountMask)
_COUNT_BITS = 0x3FFFFFFF
_VERSION_SIZE = 6  # byte count, class version
_OBJECT_SIZE = 10  # of TObject: class version, fUniqueID, fBits
_IS_REFERENCED = 0x10  # a bit in the last byte of TObject; if it is set, two more bytes follow (kIsReferenced)
_NAMED = struct.Struct(">IHH")  # of TNamed: byte count, class version; and the version of its TObject
_NAMED_SIZE = (_BYTE_COUNT << 24) + _VERSION_SIZE - 4 + _OBJECT_SIZE  # its byte count, without name and title
# TPad 13 has 39 doubles, 9 ints, 2 shorts and 6 bools between its bases and the pointers before its name, and two ints after
# its title.
_PAD_FIELDS = 358
_PAD_END = 8
_BOX_OF_PAD = b"\x40\0\0\2\0\0"  # TAttBBox2D, a base of newer pads, which has no fields
_PAVE_FIELDS = 52  # of TPave: four doubles, three ints and a double between its base, TBox, and its option and name
_POINT_SIZE = 12  # of TPolyMarker3D: three floats

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
_PADS = frozenset(["TCanvas", "TPad", "TButton", "TGroupButton", "TSlider", "TDialogCanvas", "TInspectCanvas"])
_PAVES = frozenset(
    ["TPave", "TPaveText", "TPaveStats", "TPaveLabel", "TPavesText", "TPaveClass", "TLegend", "TDiamond"]
)
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
        "TQuaternion",
        "TLine",
        "TBox",
        "TFrame",
        "TMarker",
        "TMarker3DBox",
        "TEllipse",
        "TCrown",
        "TArc",
        "TArrow",
        "TPolyLine",
        "TPolyMarker",
        "TPolyLine3D",
        "TCurlyLine",
        "TCurlyArc",
        "TFeldmanCousins",
        "TLimitDataSource",
    ]
)


def has_name_of_key(payload: Bytes, key: bytes) -> bool:
    """Return whether an object begins with a TNamed that has the name and title of its key, as nearly all do."""
    name_and_title = key[_KEY_SIZE + 1 + key[_KEY_SIZE] :]
    # Only the headers of the classes that inherit from it come before it. Each begins with a byte count, whose first byte is
    # "@". A TProfile2D, which is a TH2D, TH2 and TH1, has four.
    at = payload.find(_NAMED.pack(_NAMED_SIZE + len(name_and_title), 1, 1), 0, 4 * _VERSION_SIZE + _NAMED.size)
    if at % _VERSION_SIZE or payload[:at:_VERSION_SIZE].strip(b"@"):
        return False
    return payload.startswith(name_and_title, at + _VERSION_SIZE + _OBJECT_SIZE)


def object_name(class_name: str, payload: Bytes) -> bytes | None:
    """Return the object's own name if its class and the beginning of its payload tell it; None means that of its key."""
    try:
        return _object_name(class_name, bytes(payload[: 1 << 20]))
    except (struct.error, IndexError):
        return None


def _object_name(class_name: str, payload: bytes) -> bytes | None:
    template = class_name.partition("<")[0]
    # A header for each class, the innermost last, then TObject: version, fUniqueID, fBits.
    at, last = 0, len(payload) - _OBJECT_SIZE - 2  # two empty strings
    while at <= last and payload[at] & _BYTE_COUNT:
        at += _VERSION_SIZE
    name = b""
    if 0 < at <= last:
        own = at - _VERSION_SIZE
        if template in _PADS:
            return _name_of_pad(payload, own)
        if template in _PAVES:
            return _name_of_pave(payload, own)
        if template == "TPolyMarker3D":
            return _name_of_polymarker(payload, at)
        referenced = payload[at + _OBJECT_SIZE - 1] & _IS_REFERENCED
        name, title_at = read_string(payload, at + _OBJECT_SIZE + (2 if referenced else 0))
        # A class that consists of a TObject and two strings is TNamed, so this also works for classes that are not known here.
        if payload[at : at + 2] == b"\0\1" and read_string(payload, title_at)[1] == _end(payload, own):
            return name
    if template in _STRING_BEHIND_OBJECT:
        return name
    if template in _COLLECTIONS:
        return name or class_name.encode()
    return class_name.encode() if template in _NAMELESS else None


def _end(payload: bytes, at: int) -> int:
    """Return where the class ends whose byte count is at `at`."""
    return at + 4 + (int.from_bytes(payload[at : at + 4], "big") & _COUNT_BITS)


def _name_of_pad(payload: bytes, base: int) -> bytes | None:
    """Return the name of a TPad or TCanvas, whose base TVirtualPad begins at `base`. The name follows the pad's primitives."""
    at = _end(payload, base)
    if payload.startswith(_BOX_OF_PAD, at):
        at += len(_BOX_OF_PAD)
    at += _PAD_FIELDS
    for _ in ("fPrimitives", "fExecs"):
        at = _end(payload, at)  # of a null pointer, too
    name, title_at = read_string(payload, at)
    _, end = read_string(payload, title_at)
    return name if end + _PAD_END == _end(payload, base - _VERSION_SIZE) else None


def _name_of_pave(payload: bytes, base: int) -> bytes | None:
    """Return the name of a TPave, or of a class that inherits from it, whose base TBox begins at `base`."""
    _, at = read_string(payload, _end(payload, base) + _PAVE_FIELDS)  # the option
    name, end = read_string(payload, at)
    return name if end == _end(payload, base - _VERSION_SIZE) else None


def _name_of_polymarker(payload: bytes, base: int) -> bytes | None:
    """Return the name of a TPolyMarker3D, whose base TObject begins at `base`. The name follows the points."""
    at = _end(payload, base + _OBJECT_SIZE)  # of TAttMarker
    points = int.from_bytes(payload[at : at + 4], "big")
    _, at = read_string(payload, at + 4 + _POINT_SIZE * points)  # the option
    name, end = read_string(payload, at)
    return name if end == _end(payload, base - _VERSION_SIZE) and end <= len(payload) else None


def read_string(data: bytes, at: int) -> tuple[bytes, int]:
    """Return a TString, whose length is one byte, or 255 and four bytes, and its end, which may lie after the data."""
    start = at + 1
    length = data[at] if start <= len(data) else 0
    if length == 255:
        start = at + 5
        length = int.from_bytes(data[at + 1 : start], "big")
    end = start + length
    return data[start:end], end
