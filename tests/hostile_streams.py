"""Compressed streams that take the longest to inflate for their size, byte by byte as the formats allow it."""

from __future__ import annotations

import lzma
import random
import struct
import zlib
from collections.abc import Callable

import xxhash
from rootfiles import block

BLOCK = (1 << 24) - 1  # bytes, the most that three bytes can say


def zstd_of_short_sequences(size: int) -> bytes:
    """Return a Zstandard frame of matches of three bytes, which take no bits (RFC 8878, section 3.1.1.3.2).

    12 bytes become 128 KiB, so that decoding takes ten times as long as of other frames that shrink as much.
    """
    frame = [struct.pack("<I", 0xFD2FB528) + b"\0\x38"]  # a window of 128 KiB, no checksum
    frame.append((8 << 3).to_bytes(3, "little") + bytes(8))  # a raw block, to which the matches refer
    left = size - 8
    while left >= 3:
        count = min(left, 1 << 17) // 3
        number = bytes([255]) + struct.pack("<H", count - 0x7F00) if count >= 0x7F00 else _count(count)
        # No literals; all of their lengths, offsets and match lengths alike: 0, the last but one, 3; the end mark.
        body = b"\0" + number + b"\x54" + b"\0\0\0" + b"\1"
        frame.append((len(body) << 3 | 2 << 1).to_bytes(3, "little") + body)
        left -= 3 * count
    frame.append((left << 3 | 1).to_bytes(3, "little") + bytes(left))
    return b"".join(frame)


def _count(count: int) -> bytes:
    return bytes([count]) if count < 128 else bytes([(count >> 8) + 128, count & 255])


def deflate_of_empty_blocks(size: int) -> bytes:
    """Return a deflate stream of about `size` bytes in which each 12 bring new codes and nothing else (RFC 1951, 3.2.7)."""
    lengths = {18: 1, 1: 1}  # of the codes for code lengths
    order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1]
    one = [(0, 1), (2, 2), (0, 5), (0, 5), (len(order) - 4, 4)]
    one += [(lengths.get(symbol, 0), 3) for symbol in order]
    # 255 zeros, codes for 255 and the end of the block; one for distances; the end of the block.
    one += [(1, 1), (138 - 11, 7), (1, 1), (117 - 11, 7), (0, 1), (0, 1), (0, 1), (1, 1)]
    bits = length = 0
    for value, width in one:
        bits |= value << length
        length += width
    period = sum((bits << length * number) for number in range(8)).to_bytes(length, "little")
    squeezer = zlib.compressobj(wbits=-15)
    return period * (size // len(period)) + squeezer.compress(b"a") + squeezer.flush()


def zlib_of_empty_blocks(size: int) -> bytes:
    return b"\x78\xda" + deflate_of_empty_blocks(size) + struct.pack(">I", zlib.adler32(b"a"))


def lz4_of_short_sequences(size: int) -> bytes:
    """Return an LZ4 block of matches of four bytes without literals, after its hash."""
    stored = b"\x40" + bytes(4) + b"\4\0" + b"\0\4\0" * ((size - 24) // 4) + b"\xc0" + bytes(12)
    return struct.pack(">Q", xxhash.xxh64_intdigest(stored)) + stored


def lz4_size(size: int) -> int:
    return 8 + 4 * ((size - 24) // 4) + 12


def xz_of_two_letters(size: int) -> bytes:
    """Return an XZ stream of random letters, of which each takes a bit and as long as any other."""
    data = random.Random(1).randbytes(size).translate(bytes([0, 1] * 128))
    return lzma.compress(data, check=lzma.CHECK_CRC32, preset=0)


# For each codec: the stored bytes of one block of at most 16 MiB, and what it inflates to.
HOSTILE: dict[str, Callable[[int], tuple[bytes, int]]] = {
    "ZL": lambda size: (block(b"ZL", 8, zlib_of_empty_blocks(size), 1), 1),
    "XZ": lambda size: (block(b"XZ", 0, xz_of_two_letters(size), size), size),
    "L4": lambda size: (block(b"L4", 1, lz4_of_short_sequences(size), lz4_size(size)), lz4_size(size)),
    "ZS": lambda size: (block(b"ZS", 1, zstd_of_short_sequences(size), size), size),
    "CS": lambda size: (block(b"CS", 8, deflate_of_empty_blocks(size), 1), 1),
}
