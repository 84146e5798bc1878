"""Compressed payloads of ROOT files, inflated block by block within bounds.

A compressed payload is a sequence of blocks. Each begins with a header of 9 bytes: two letters, a method, and the lengths of the
block as stored and inflated, each in three bytes, little-endian. A block inflates to at most 16 MiB, so memory is bounded by one
block. A `Budget` bounds the bytes, the blocks and the processor time of a whole file.

The format: RZip.cxx, ZipLZMA.c, ZipLZ4.cxx and ZipZSTD.cxx of ROOT.
"""

from __future__ import annotations

import lzma
import struct
import time
import zlib
from collections.abc import Callable, Iterator

import cramjam
import deflate
import xxhash

# Limits on the cost of one file. No honest file comes near them.
MAX_OBJECT_SIZE = 1 << 30  # bytes, inflated
MAX_INFLATED = 2 << 30  # bytes, of the whole file; or MAX_INFLATION times its size, if that is more
MAX_INFLATION = 32
MAX_INFLATED_SLOWLY = 512 << 20  # bytes; like MAX_INFLATED, for the codecs that are several times slower (XZ, CS)
MAX_BLOCKS = 20_000  # per file beyond the first of each object; writers fill 16 MiB before starting another
MAX_XZ_MEMORY = 256 << 20  # bytes
# Processor time. The dearest honest files, empty histograms in XZ, need about half of it; those in other codecs need less.
MAX_SECONDS = 30.0
MIN_SECONDS = 1.0
BYTES_PER_SECOND = 1_000_000  # bytes of the file that allow another second
INFLATED_PER_SECOND = 400_000_000  # inflated bytes that allow another second

_INFLATE_CHUNK = 1 << 16  # bytes inflated at once, by codecs that allow it
_XZ_END = 64  # bytes: room for the end of a block, its CRC, an index of one block and the stream's footer
_CHECKSUM = struct.Struct(">I")  # Adler-32, with which a zlib stream ends

_BLOCK_HEADER = struct.Struct("<3sHBHB")  # the upper byte of each length is a field of its own
CHECKSUMMED = (b"ZL", b"XZ", b"L4")  # letters of the blocks in which damage shows

Block = bytes | bytearray


class InflateError(Exception):
    """A payload does not inflate to the size in its key, or the file exceeds a limit; the text says why."""


class Budget:
    """The bytes, blocks and processor time that the check of one file may still cost."""

    def __init__(self, file_size: int) -> None:
        self._inflated_left = max(MAX_INFLATED, MAX_INFLATION * file_size)
        self._slow_left = max(MAX_INFLATED_SLOWLY, MAX_INFLATION * file_size)
        self._blocks_left = MAX_BLOCKS
        # Processor time of this thread, so that a valid file on a slow disk or beside many others is not refused.
        self._start = time.thread_time()
        self._seconds = MIN_SECONDS + file_size / BYTES_PER_SECOND

    def claim_object(self, size: int) -> None:
        """Count an object before it is inflated."""
        self._inflated_left -= size
        if size > MAX_OBJECT_SIZE or self._inflated_left < 0:
            raise InflateError(f"an object of {size} bytes is more than is allowed")

    def add_single_block(self, size: int) -> None:
        """Count an object that has been inflated from a single block."""
        self._seconds += size / INFLATED_PER_SECOND
        self._inflated_left -= size
        if size > MAX_OBJECT_SIZE or self._inflated_left < 0:
            raise InflateError(f"an object of {size} bytes is more than is allowed")

    def add_block(self, letters: bytes, size: int, is_first: bool) -> None:
        """Count a block that has been inflated, and add its share to the time that is allowed."""
        self._seconds += size / INFLATED_PER_SECOND
        if letters in (b"XZ", b"CS"):
            self._slow_left -= size
            if self._slow_left < 0:
                raise InflateError(f"{letters.decode()} blocks inflate to more than is allowed")
        if not is_first:
            self._blocks_left -= 1
            if self._blocks_left < 0:
                raise InflateError(f"more than {MAX_BLOCKS} compressed blocks behind the first of an object")

    def check_time(self) -> None:
        allowed = min(self._seconds, MAX_SECONDS)
        if time.thread_time() - self._start > allowed:
            raise InflateError(f"checking the file takes longer than {allowed:.1f} s, which is allowed for its size")


def inflate_single_zlib_block(data: bytes, start: int, compressed_size: int, size: int) -> Block | None:
    """Fast path: inflate a payload of exactly one good zlib block, all of it in `data`. None means: take the general path."""
    end = start + compressed_size
    # For a size of 0, libdeflate does not look at the stream.
    if end > len(data) or compressed_size < _BLOCK_HEADER.size or not size:
        return None
    kind, stored_size, high, block_size, higher = _BLOCK_HEADER.unpack_from(data, start)
    if kind != b"ZL\x08" or stored_size | high << 16 != compressed_size - _BLOCK_HEADER.size:
        return None
    if block_size | higher << 16 != size:
        return None
    try:
        return _inflate_zlib(memoryview(data)[start + _BLOCK_HEADER.size : end], size)
    except (deflate.DeflateError, InflateError):
        return None


def inflate_blocks(
    read: Callable[[int, int], tuple[bytes, int]], start: int, compressed_size: int, size: int, budget: Budget
) -> Iterator[Block]:
    """Yield the inflated blocks of the payload at byte `start` of a file. They must tile the payload and sum to `size`.

    Only the first 64 KiB of an XZ block are yielded; its checksum has been verified. `read` is `Reader.read`. Memory stays at
    one block if the caller lets go of each.
    """
    position, end, left = start, start + compressed_size, size
    while position < end:
        budget.check_time()
        room = end - position - _BLOCK_HEADER.size
        if room < 0:
            raise InflateError(f"{end - position} bytes behind its last compressed block")
        data, at = read(position, _BLOCK_HEADER.size)
        kind, stored_size, high, block_size, higher = _BLOCK_HEADER.unpack_from(data, at)
        stored_size |= high << 16
        block_size |= higher << 16
        if kind not in _INFLATERS:
            raise InflateError(
                f"compressed in an unknown way ({kind!r}), or {compressed_size} bytes where {size} belong"
            )
        if stored_size > room:
            raise InflateError(f"a block of {stored_size} bytes in the last {room} bytes of the record")
        if not 0 < block_size <= left:
            raise InflateError(f"a block that inflates to {block_size} bytes where {left} are left to come")
        at += _BLOCK_HEADER.size
        position += _BLOCK_HEADER.size
        if at + stored_size > len(data):
            del data  # up to 16 MiB; the next read takes as much
            data, at = read(position, stored_size)
        yield _inflate_block(kind, memoryview(data)[at : at + stored_size], block_size, position, budget)
        budget.add_block(kind[:2], block_size, is_first=left == size)
        position += stored_size
        left -= block_size
    if left:
        raise InflateError(f"payload inflates to {size - left} bytes, its key says {size}")


def _inflate_block(kind: bytes, stored: memoryview, size: int, position: int, budget: Budget) -> Block:
    try:
        return _INFLATERS[kind](stored, size, budget)
    except (deflate.DeflateError, cramjam.DecompressionError, lzma.LZMAError, zlib.error) as error:
        raise InflateError(f"damaged {kind[:2].decode()} block of {len(stored)} bytes at byte {position}") from error


def _require_size(block: Block, inflated: int, size: int) -> Block:
    if inflated != size:
        raise InflateError(f"a block inflates to {inflated} bytes, its head says {size}")
    return block


def _inflate_zlib(stored: memoryview, size: int, budget: Budget | None = None) -> Block:
    inflated: bytearray = deflate.zlib_decompress(stored, size)  # libdeflate never writes more than `size` bytes
    # libdeflate ignores bytes after the stream. If there are none, the block ends with the stream's checksum.
    (checksum,) = _CHECKSUM.unpack_from(stored, -_CHECKSUM.size)
    if deflate.adler32(inflated) != checksum:
        raise InflateError("bytes behind the end of its zlib stream")
    if len(inflated) != size:
        raise InflateError(f"a block inflates to {len(inflated)} bytes, its head says {size}")
    return inflated


def _check_xz_structure(stored: memoryview) -> None:
    """Raise LZMAError unless an XZ stream has one block, with one filter and a CRC, as all writers of ROOT files make it.

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


def _inflate_xz(stored: memoryview, size: int, budget: Budget) -> Block:
    """Return the first 64 KiB only: collecting all of them would take a tenth of the time of the dearest files."""
    _check_xz_structure(stored)
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)
    first = piece = decoder.decompress(stored, max_length=_INFLATE_CHUNK)
    length = len(piece)
    while not decoder.eof and piece and length <= size:
        piece = decoder.decompress(b"", max_length=_INFLATE_CHUNK)
        length += len(piece)
        budget.check_time()
    _require_size(first, length if decoder.eof and not decoder.unused_data else -1, size)
    return first


def _inflate_cs(stored: memoryview, size: int, budget: Budget) -> Block:
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)  # deflate without zlib's head and checksum
    inflated, length = bytearray(size), 0
    data: memoryview | bytes = stored
    while not decoder.eof and length <= size:
        piece = decoder.decompress(data, _INFLATE_CHUNK)
        if not piece:
            break
        data = decoder.unconsumed_tail
        inflated[length : length + len(piece)] = piece
        length += len(piece)
        budget.check_time()
    return _require_size(inflated, length if decoder.eof and not decoder.unused_data else -1, size)


def _inflate_lz4(stored: memoryview, size: int, budget: Budget) -> Block:
    if xxhash.xxh64_intdigest(stored[8:]) != int.from_bytes(stored[:8], "big"):
        raise InflateError("damaged L4 block: its checksum is wrong")
    inflated = bytearray(size)
    return _require_size(inflated, cramjam.lz4.decompress_block_into(stored[8:], inflated, output_len=size), size)


def _inflate_zstd(stored: memoryview, size: int, budget: Budget) -> Block:
    inflated = bytearray(size)
    return _require_size(inflated, cramjam.zstd.decompress_into(stored, inflated), size)


# Letters and method byte of a block, and its inflater, which returns no more than the size asked for, or raises.
_INFLATERS: dict[bytes, Callable[[memoryview, int, Budget], Block]] = {
    b"ZL\x08": _inflate_zlib,
    b"XZ\x00": _inflate_xz,
    b"L4\x01": _inflate_lz4,
    b"ZS\x01": _inflate_zstd,
    b"CS\x08": _inflate_cs,
}
