"""Damage in streamer infos whose codec has no checksum; CERN ROOT complains of it when it opens the file."""

from __future__ import annotations

import struct
from pathlib import Path

import cramjam
import pytest
from damage import valid_files

from rootcheck import InvalidRootFile, check_root_file
from streamer_info import DamagedStreamerInfo, check_streamer_info

DATA = Path(__file__).parent / "data"


def streamer_info_of(path: Path) -> tuple[bytes, int, int]:
    """Return the content of a file, and where the payload of its streamer info begins and ends."""
    content = path.read_bytes()
    form = ">37xii" if int.from_bytes(content[4:8], "big") < 1_000_000 else ">45xqi"
    position, size = struct.unpack_from(form, content)
    (key_size,) = struct.unpack_from(">h", content, position + 14)
    return content, position + key_size, position + size


@pytest.fixture(scope="module")
def raw() -> tuple[bytes, int]:
    """An uncompressed streamer info and the size of its key."""
    content, start, end = streamer_info_of(DATA / "compression_none.root")
    return content[start:end], key_size_of(content, start)


def key_size_of(content: bytes, start: int) -> int:
    return start - int.from_bytes(content[37:41], "big")


def walk(payload: bytes, key_size: int) -> None:
    check_streamer_info(payload, key_size, lambda: None)


def test_streamer_infos_of_root_are_consistent() -> None:
    walked = 0
    for path in valid_files(DATA):
        content, start, end = streamer_info_of(path)
        if content[start : start + 2] == b"ZS":
            (size,) = struct.unpack_from("<I", content[start + 6 : start + 9] + b"\0")
            walk(bytes(cramjam.zstd.decompress(content[start + 9 : end], size)), key_size_of(content, start))
            walked += 1
        elif content[start : start + 1] == b"@":
            walk(content[start:end], key_size_of(content, start))
            walked += 1
    assert walked > 1


@pytest.mark.parametrize(
    ("found", "put", "reason"),
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
def test_damaged_bytes(found: bytes, put: bytes, reason: str, raw: tuple[bytes, int]) -> None:
    payload, key_size = raw
    assert found in payload
    at = payload.index(found)
    with pytest.raises(DamagedStreamerInfo, match=reason):
        walk(payload[:at] + put + payload[at + len(found) :], key_size)


@pytest.mark.parametrize("version", [-2, 65_001, 2**31 - 1, -(2**31)])
def test_impossible_version_of_a_class(version: int, raw: tuple[bytes, int]) -> None:
    payload, key_size = raw
    at = payload.index(b"\x04TH1F\0") + len(b"\x04TH1F\0") + 4
    with pytest.raises(DamagedStreamerInfo, match=f"version {version} of the class b'TH1F'"):
        walk(payload[:at] + struct.pack(">i", version) + payload[at + 4 :], key_size)


def test_room_behind_the_list_is_accepted(raw: tuple[bytes, int]) -> None:
    payload, key_size = raw
    walk(payload + bytes(1000), key_size)


def test_every_truncation_is_found(raw: tuple[bytes, int]) -> None:
    payload, key_size = raw
    for size in range(0, len(payload), 7):
        with pytest.raises(DamagedStreamerInfo):
            walk(payload[:size], key_size)


def test_tags_moved_by_uproot_update_are_accepted(raw: tuple[bytes, int]) -> None:
    """It copies a payload from behind a key with 8-byte positions, eight bytes longer."""
    payload, key_size = raw
    walk(payload, key_size - 8)
    with pytest.raises(DamagedStreamerInfo):
        walk(payload, key_size - 7)


def test_large_streamer_info_is_walked_within_its_time(raw: tuple[bytes, int]) -> None:
    payload, key_size = raw
    calls = []
    check_streamer_info(payload + bytes(1 << 16), key_size, lambda: calls.append(1))
    assert len(calls) > 5


@pytest.mark.parametrize("name", ["compression_none.root", "compression_zstd.root"])
def test_flipped_bits_of_byte_counts_are_refused(name: str, tmp_path: Path) -> None:
    content, start, end = streamer_info_of(DATA / name)
    path = tmp_path / "flipped.root"

    def is_refused(at: int, bit: int) -> bool:
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            check_root_file(path)
        except InvalidRootFile:
            return True
        return False

    refused = [is_refused(at, at % 8) for at in range(start, end, max(1, (end - start) // 150))]
    # In a raw one most bytes are those of names and titles, which nothing repeats.
    assert sum(refused) > len(refused) * (0.1 if "none" in name else 0.5)
