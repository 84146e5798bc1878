"""Damage in streamer infos whose codec has no checksum; CERN ROOT complains of it when it opens the file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import cramjam
import pytest
from damage import valid_files
from rootfiles import reason

from streamer_info import DamagedStreamerInfo, check_streamer_info

DATA = Path(__file__).parent / "data"


class StreamerInfo(NamedTuple):
    """The streamer info of a file: its payload, where that stands, and the size of the key before it."""

    payload: bytes
    start: int
    key_size: int

    @classmethod
    def of(cls, content: bytes) -> StreamerInfo:
        form = ">37xii" if int.from_bytes(content[4:8], "big") < 1_000_000 else ">45xqi"
        position, size = struct.unpack_from(form, content)
        (key_size,) = struct.unpack_from(">h", content, position + 14)
        return cls(content[position + key_size : position + size], position + key_size, key_size)

    def replaced(self, at: int, new: bytes) -> StreamerInfo:
        return self._replace(payload=self.payload[:at] + new + self.payload[at + len(new) :])

    def walk(self) -> None:
        check_streamer_info(self.payload, self.key_size, lambda: None)


@pytest.fixture(scope="module")
def raw() -> StreamerInfo:
    """An uncompressed streamer info."""
    return StreamerInfo.of((DATA / "compression_none.root").read_bytes())


def test_streamer_infos_of_root_are_consistent() -> None:
    walked = 0
    for path in valid_files(DATA):
        info = StreamerInfo.of(path.read_bytes())
        if info.payload.startswith(b"ZS"):
            (size,) = struct.unpack_from("<I", info.payload[6:9] + b"\0")
            info = info._replace(payload=bytes(cramjam.zstd.decompress(info.payload[9:], size)))
        if info.payload.startswith(b"@"):
            info.walk()
            walked += 1
    assert walked > 1


@pytest.mark.parametrize(
    ("found", "put", "text"),
    [
        (b"TStreamerBase\0", b"TStreamerBaze\0", "class 'TStreamerBaze'"),
        (b"TObjArray\0", b"TObjErray\0", "class 'TObjErray'"),
        (b"\0\1\0\1\0\0\0\0", b"\0\2\0\1\0\0\0\0", "TNamed of version 2"),
        (b"\0\1\0\1\0\0\0\0", b"\0\0\0\1\0\0\0\0", "TNamed of version 0"),
        (b"\0\4\x40\0", b"\0\5\x40\0", "TStreamerElement of version 5"),
        (b"\x40\0", b"\0\0", "of version"),
        (b"\x04BASE", b"\x05BASE", "damaged"),
        (b"\x04BASE", b"\xffBASE", "a string of"),
        (b"\x80\0", b"\x88\0", "class '0x88"),
        (b"\x04TH1F\0", b"\x04\\H1F\0", "a class of the name"),
        (b"\x04TH1F\0", b"\x04\x14H1F\0", "a class of the name"),
    ],
    ids=str,
)
def test_damaged_bytes(found: bytes, put: bytes, text: str, raw: StreamerInfo) -> None:
    with pytest.raises(DamagedStreamerInfo, match=text):
        raw.replaced(raw.payload.index(found), put).walk()


@pytest.mark.parametrize("version", [-2, 65_001, 2**31 - 1, -(2**31)])
def test_impossible_version_of_a_class(version: int, raw: StreamerInfo) -> None:
    at = raw.payload.index(b"\x04TH1F\0") + len(b"\x04TH1F\0") + 4
    with pytest.raises(DamagedStreamerInfo, match=f"version {version} of the class b'TH1F'"):
        raw.replaced(at, struct.pack(">i", version)).walk()


def test_room_behind_the_list_is_accepted(raw: StreamerInfo) -> None:
    raw._replace(payload=raw.payload + bytes(1000)).walk()


def test_every_truncation_is_found(raw: StreamerInfo) -> None:
    for size in range(0, len(raw.payload), 7):
        with pytest.raises(DamagedStreamerInfo):
            raw._replace(payload=raw.payload[:size]).walk()


def test_tags_moved_by_uproot_update_are_accepted(raw: StreamerInfo) -> None:
    """It copies a payload from behind a key with 8-byte positions, eight bytes longer."""
    raw._replace(key_size=raw.key_size - 8).walk()
    with pytest.raises(DamagedStreamerInfo):
        raw._replace(key_size=raw.key_size - 7).walk()


def test_large_streamer_info_is_walked_within_its_time(raw: StreamerInfo) -> None:
    calls: list[None] = []
    check_streamer_info(raw.payload + bytes(1 << 16), raw.key_size, lambda: calls.append(None))
    assert len(calls) > 5


# In a raw one most bytes are those of names and titles, which nothing repeats.
@pytest.mark.parametrize(("name", "share"), [("compression_none.root", 0.1), ("compression_zstd.root", 0.5)])
def test_flipped_bits_of_byte_counts_are_refused(name: str, share: float) -> None:
    content = (DATA / name).read_bytes()
    info = StreamerInfo.of(content)
    end = info.start + len(info.payload)
    refused = [
        reason(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]) is not None
        for at in range(info.start, end, max(1, len(info.payload) // 150))
    ]
    assert sum(refused) > len(refused) * share
