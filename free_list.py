"""The list of free segments: the gaps between records, and the room after the last one.

ROOT also writes a negative record length into the first bytes of a gap. uproot leaves the old bytes there.

The format: TFree.cxx of ROOT; tools/wroot/free_seg of Geant4.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from root_keys import InvalidRootFile, Reader

_SEGMENT = struct.Struct(">hii")  # fVersion, fFirst, fLast
_SEGMENT_64 = struct.Struct(">hqq")  # where fVersion is above 1000
SMALLEST_SEGMENT = _SEGMENT.size
SEGMENT_VERSIONS = (1, 1001)
_LEAST_ROOM = 2_000_000_000  # the room after the file ends here (kStartBigFile),
_ROOM_STEP = 1_000_000_000  # or one or more such steps later (TFree::GetBestFree)


class _Segment(NamedTuple):
    version: int
    first: int
    last: int
    size: int  # of the entry

    @property
    def is_room_behind_file(self) -> bool:
        return self.last >= _LEAST_ROOM and not self.last % _ROOM_STEP


def _read_segment(reader: Reader, start: int, end: int) -> _Segment | None:
    """Return the entry at byte `start`, or None if the list ends before the entry does."""
    length = min(_SEGMENT_64.size, end - start)
    if length < _SEGMENT.size:
        return None
    data, at = reader.read(start, length)
    form = _SEGMENT_64 if int.from_bytes(data[at : at + 2], "big", signed=True) > 1000 else _SEGMENT
    if length < form.size:
        return None
    version, first, last = form.unpack_from(data, at)
    return _Segment(version, first, last, form.size)


def read_segments(reader: Reader, start: int, end: int, count: int, records: range) -> tuple[dict[int, int], int]:
    """Return the gaps, from their first byte to the byte after them, and where the list ends.

    If the count is 0, as Geant4 writes it, the list ends with the room after the file.
    """
    gaps: dict[int, int] = {}
    at, number, before = start, 0, records.start
    while True:
        segment = _read_segment(reader, at, end)
        if segment is None:
            raise InvalidRootFile(f"list of free segments: it ends at byte {end}, amid a segment")
        _, first, last, size = segment
        at += size
        number += 1
        if number == count or (not count and segment.is_room_behind_file):
            _check_room(segment, records)
            return gaps, at
        if not before < first <= last < records.stop:
            raise InvalidRootFile(
                f"list of free segments: a segment from byte {first} to byte {last} behind byte {before}"
            )
        gaps[first] = last + 1
        before = last


def _check_room(segment: _Segment, records: range) -> None:
    # Older releases of Geant4 write the first byte of the room as it was in the empty file. ROOT's writer of files that hold
    # only an RNTuple forgets, beyond 2 GB, that its last key has become 8 bytes longer.
    firsts = [records.stop, records.start]
    if segment.size == _SEGMENT_64.size:
        firsts.append(records.stop - 8)
    if segment.first not in firsts or not segment.is_room_behind_file:
        where = f"{segment.first} to {segment.last}, is not the room behind byte {records.stop}"
        raise InvalidRootFile(f"list of free segments: the last one, {where}")


def skip_old_segments(reader: Reader, start: int, end: int) -> int:
    """Return where the rest of an older, longer list ends, or `start` if there is none.

    uproot leaves it when the list becomes shorter. Its last segment is the room after a file that ended elsewhere.
    """
    at, before = start, 0
    while (segment := _read_segment(reader, at, end)) and segment.version in SEGMENT_VERSIONS:
        if not before < segment.first <= segment.last:
            break
        at += segment.size
        if segment.is_room_behind_file:
            return at
        before = segment.last
    return start
