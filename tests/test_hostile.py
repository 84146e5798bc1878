"""ROOT files made to hurt: each must be answered within seconds and a few blocks of memory."""

from __future__ import annotations

import contextlib
import lzma
import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cramjam
import pytest
import xxhash
from check_cost import SECONDS, Answer, Checker
from hostile_streams import BLOCK, zstd_of_short_sequences
from rootfiles import COMPRESS, File, block, one_object, small_file, tnamed, versioned

import inflate
from rootcheck import InvalidRootFile, check_root_file

MEBIBYTES = 64
GIBIBYTE = 1 << 30


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    with contextlib.closing(Checker()) as checker:
        yield checker


@pytest.fixture
def check(checker: Checker, tmp_path: Path) -> Callable[..., Answer]:
    """Return a function that checks a file of this content, which must take neither long nor much memory."""

    def run(content: bytes | bytearray, mebibytes: int = MEBIBYTES) -> Answer:
        (answer,) = measure(checker, [write(tmp_path / "hostile.root", content)], mebibytes)
        return answer

    return run


Check = Callable[..., Answer]


def write(path: Path, content: bytes | bytearray) -> Path:
    """Write a file without using the disk for long runs of zeros."""
    step = 1 << 20
    zeros = bytes(step)
    with path.open("wb") as file:
        for start in range(0, len(content), step):
            piece = content[start : start + step]
            if piece != zeros:
                file.seek(start)
                file.write(piece)
        file.truncate(len(content))
    return path


def measure(checker: Checker, paths: Sequence[Path], mebibytes: int = MEBIBYTES) -> list[Answer]:
    """Check files, assert that none took long or much, and remove them."""
    answers = checker.check(paths)
    for path in paths:
        path.unlink()
    assert len(answers) == len(paths), "the process was ended"
    for answer in answers:
        assert answer.seconds < SECONDS, answer
        assert answer.kibibytes < mebibytes << 10, answer
    return answers


# --- blocks that inflate to far more than they claim ------------------------------------------------------------------


def adler32_of_zeros(size: int) -> bytes:
    return struct.pack(">HH", size % 65521, 1)


def deflate_bomb(size: int) -> bytes:
    """Return a deflate stream of zeros: one piece of 16 MiB again and again."""
    squeezer = zlib.compressobj(9, wbits=-15)
    piece = squeezer.compress(bytes(1 << 24)) + squeezer.flush(zlib.Z_FULL_FLUSH)
    return piece * (size >> 24) + squeezer.flush()


def zlib_bomb(size: int) -> bytes:
    return b"\x78\xda" + deflate_bomb(size) + adler32_of_zeros(size)


def crc32(data: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(data))


def vli(number: int) -> bytes:
    """Return an integer of variable length, as XZ writes them."""
    return bytes([number & 0x7F | 0x80]) + vli(number >> 7) if number > 0x7F else bytes([number])


def lzma2(content: bytes) -> bytes:
    return lzma.compress(content, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}])


def xz_block(chunks: bytes, content: bytes, dictionary: int = 12) -> tuple[bytes, bytes]:
    """Return an XZ block and what the index says of it; 12 stands for a dictionary of 256 KiB, 13 for 384 KiB, ..."""
    head = bytes([2, 0, 0x21, 1, dictionary, 0, 0, 0])
    block = head + crc32(head) + chunks
    return block + bytes(-len(block) % 4) + crc32(content), vli(len(block) + 4) + vli(len(content))


def xz(blocks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return an XZ stream of these blocks, whose checksums are CRC32."""
    index = b"\0" + vli(len(blocks)) + b"".join(entry for _, entry in blocks)
    index += bytes(-len(index) % 4)
    end = struct.pack("<IBB", len(index) // 4, 0, lzma.CHECK_CRC32)
    start = b"\xfd7zXZ\0" + end[4:] + crc32(end[4:])
    return start + b"".join(block for block, _ in blocks) + index + crc32(index) + crc32(end) + end + b"YZ"


def xz_bomb(size: int) -> bytes:
    """Return an XZ stream of zeros: one block of 16 MiB again and again."""
    zeros = bytes(1 << 24)
    return xz([xz_block(lzma2(zeros), zeros)] * (size >> 24))


def xz_of_empty_blocks(number: int) -> bytes:
    """Return an XZ stream of the byte `a`, before which come empty blocks; each has another dictionary than the last."""
    return xz([xz_block(b"\0", b"", 30), xz_block(b"\0", b"", 31)] * number + [xz_block(b"\1\0\0a\0", b"a", 30)])


def lz4_bomb(size: int) -> bytes:
    """Return an LZ4 block: a zero, then one match that repeats it, then five zeros, as the format wants at its end."""
    full, rest = divmod(size - 1 - 5 - 4 - 15, 255)
    stored = b"\x1f\0" + struct.pack("<H", 1) + b"\xff" * full + bytes([rest]) + b"\x50" + bytes(5)
    return struct.pack(">Q", xxhash.xxh64_intdigest(stored)) + stored


def zstd_bomb(size: int, window: int = 0x38) -> bytes:
    """Return a Zstandard frame of blocks that say "a zero, 128 KiB times"."""
    count = size >> 17
    head = struct.pack("<I", 0xFD2FB528) + bytes([0, window])
    one = struct.pack("<I", (1 << 17) << 3 | 1 << 1)[:3] + b"\0"
    last = struct.pack("<I", (1 << 17) << 3 | 1 << 1 | 1)[:3] + b"\0"
    return head + one * (count - 1) + last


BOMBS: dict[str, tuple[Callable[[int], bytes], bytes, int]] = {
    "ZL": (zlib_bomb, b"ZL", 8),
    "XZ": (xz_bomb, b"XZ", 0),
    "L4": (lz4_bomb, b"L4", 1),
    "ZS": (zstd_bomb, b"ZS", 1),
    "CS": (deflate_bomb, b"CS", 8),
}


@pytest.mark.parametrize("letters", BOMBS)
def test_bombs_inflate_to_what_they_should(letters: str) -> None:
    """Each is a well-formed stream, so that only its size can be the reason to refuse it."""
    bomb, _, _ = BOMBS[letters]
    size = 2 << 24
    inflate: dict[str, Callable[[bytes], bytes]] = {
        "ZL": zlib.decompress,
        "XZ": lzma.decompress,
        "L4": lambda data: bytes(cramjam.lz4.decompress_block(data[8:], output_len=size)),
        "ZS": lambda data: bytes(cramjam.zstd.decompress(data)),
        "CS": lambda data: zlib.decompress(data, -15),
    }
    assert inflate[letters](bomb(size)) == bytes(size)


@pytest.mark.parametrize("claimed", [1000, BLOCK])
@pytest.mark.parametrize("letters", BOMBS)
def test_block_that_inflates_to_gigabytes(letters: str, claimed: int, check: Check) -> None:
    bomb, tag, method = BOMBS[letters]
    answer = check(one_object(block(tag, method, bomb(2 * GIBIBYTE), claimed), claimed))
    assert answer.reason and "block" in answer.reason


# --- honest gigabytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letters", COMPRESS)
def test_gigabytes_of_zeros_in_honest_blocks(letters: str, check: Check) -> None:
    one = COMPRESS[letters](bytes(BLOCK))
    file = File()
    for number in range(4):
        file.add(b"TH1F", b"h%d" % number, one * 64, object_size=BLOCK * 64)
    answer = check(file.close())
    assert answer.reason and "allowed" in answer.reason


@pytest.mark.parametrize("letters", COMPRESS)
def test_blocks_of_16_mib_that_hardly_shrink(letters: str, check: Check) -> None:
    repeats = 15 if letters == "XZ" else 1  # as LZMA takes seconds to compress all of it
    piece = random.Random(1).randbytes((15 << 20) // repeats).translate(bytes(range(128)) * 2)
    zeros = bytes(BLOCK - (15 << 20))  # what LZ4 can shrink
    data = zeros + piece * repeats
    if letters == "XZ":
        chunks = lzma2(zeros)[:-1] + lzma2(piece)[:-1] * repeats + b"\0"
        one, blocks = block(b"XZ", 0, xz([xz_block(chunks, data)]), BLOCK), 1  # most of a second to inflate
    else:
        one, blocks = COMPRESS[letters](data), 3
    assert BLOCK * 3 // 4 < len(one) < BLOCK
    assert check(one_object(one * blocks, BLOCK * blocks, b"TH1F")).reason is None


@pytest.mark.parametrize("letters", COMPRESS)
def test_a_payload_of_many_tiny_blocks(letters: str, check: Check) -> None:
    one = COMPRESS[letters](b"a")
    number = 20_001  # as many as are allowed
    assert check(one_object(one * number, number, b"TH1F")).reason is None
    answer = check(one_object(one * 10 * number, 10 * number, b"TH1F"))
    assert answer.reason and "more than 20000 compressed blocks" in answer.reason


@pytest.mark.parametrize(("dictionary", "text"), [(31, None), (37, "damaged XZ block")], ids=["192 MiB", "1.5 GiB"])
def test_xz_with_a_giant_dictionary(dictionary: int, text: str | None, check: Check) -> None:
    # An encoder would take as much memory; the size is one byte of the block's head.
    stored = xz([xz_block(lzma2(bytes(BLOCK)), bytes(BLOCK), dictionary)])
    answer = check(one_object(block(b"XZ", 0, stored, BLOCK) * 4, BLOCK * 4, b"TH1F"))
    assert answer.reason is None if text is None else text in str(answer.reason)


def test_xz_of_hundreds_of_thousands_of_empty_blocks(check: Check) -> None:
    assert lzma.decompress(xz_of_empty_blocks(10)) == b"a"
    answer = check(one_object(block(b"XZ", 0, xz_of_empty_blocks(350_000), 1), 1, b"TH1F"))
    assert answer.reason and "XZ" in answer.reason


@pytest.mark.parametrize("more", [{"id": lzma.FILTER_DELTA, "dist": 1}, {"id": lzma.FILTER_X86}], ids=["delta", "x86"])
def test_xz_with_more_filters_and_sha256(more: dict[str, int], check: Check) -> None:
    last = {"id": lzma.FILTER_LZMA2, "preset": 0, "nice_len": 2, "mf": lzma.MF_BT2, "mode": lzma.MODE_FAST}
    stored = lzma.compress(bytes(BLOCK), check=lzma.CHECK_SHA256, filters=[more] * 3 + [last])
    answer = check(one_object(block(b"XZ", 0, stored, BLOCK) * 31, BLOCK * 31, b"TH1F"))
    assert answer.reason and "XZ" in answer.reason


@pytest.mark.parametrize("window", [0x88, 0xA8, 0xF8])  # 128 MiB, 2 GiB, 2 TiB
def test_zstd_with_a_giant_window(window: int, check: Check) -> None:
    size = 1 << 23
    one = block(b"ZS", 1, zstd_bomb(size, window), size)
    assert (check(one_object(one * 4, size * 4, b"TH1F")).reason is None) == (window == 0x88)


def test_zstd_of_short_sequences_is_refused_in_time(tmp_path: Path) -> None:
    """A valid file of 0.1 MB that inflates to 1 GB, ten times as slowly as others, stays within its budget."""
    size = BLOCK - 1000
    one = block(b"ZS", 1, zstd_of_short_sequences(size), size)
    assert bytes(cramjam.zstd.decompress(one[9:])) == bytes(size)
    path = write(tmp_path / "hostile.root", one_object(one * 63, 63 * size, b"TH1F"))
    before = time.thread_time()
    try:
        check_root_file(path)
    except InvalidRootFile as refusal:
        assert "takes longer" in str(refusal)
    most = inflate.MIN_SECONDS + path.stat().st_size / inflate.BYTES_PER_SECOND
    most += 63 * size / inflate.INFLATED_PER_SECOND
    assert time.thread_time() - before < most + 0.5  # a block may be under way


# --- keys and directories ----------------------------------------------------------------------------------------------


def test_200_000_keys_on_one_record(check: Check) -> None:
    file = small_file()
    file.root.keys = file.root.keys[:1] * 200_000
    assert "place elsewhere" in str(check(file.close()).reason)


def test_keys_that_share_a_record_of_16_mb(check: Check) -> None:
    file = File()
    key = file.add(b"TH1F", b"h", COMPRESS["ZL"](bytes(BLOCK)), object_size=BLOCK)
    file.root.keys = [key._replace(cycle=cycle) for cycle in range(1, 5001)]
    assert "place elsewhere" in str(check(file.close()).reason)


def test_directories_with_two_to_the_25_paths(check: Check) -> None:
    file = File()
    directory = file.root
    for _ in range(25):
        directory, parent = file.directory(b"d", directory), directory
        parent.keys.append(parent.keys[0]._replace(name=b"e"))
    assert "place elsewhere" in str(check(file.close()).reason)


def test_20_000_directories(check: Check) -> None:
    file = File()
    for number in range(19_990):
        file.directory(b"%d" % number)
    assert check(file.close()).objects == 19_990


@pytest.mark.parametrize("number", [40_000, pytest.param(199_990, marks=pytest.mark.slow)])
@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "in a directory"])
def test_many_honest_keys(number: int, inside: bool, check: Check) -> None:
    file = File()
    directory = file.directory(b"d") if inside else file.root
    for at in range(number):
        file.add(b"TNamed", b"%d" % at, to=directory)
    # As many keys at the top as are allowed, and the answer that names them, take more than any hostile file.
    mebibytes = 2 * MEBIBYTES if number > 100_000 and not inside else MEBIBYTES
    assert check(file.close(), mebibytes=mebibytes).objects == (1 if inside else number)


def test_a_key_list_of_hundreds_of_megabytes(check: Check) -> None:
    file = small_file()
    file.root.slack = bytes(200 << 20)
    assert "key lists of more than" in str(check(file.close()).reason)


# --- counts, lengths, strings ------------------------------------------------------------------------------------------


def test_every_field_of_a_file_at_extremes(checker: Checker, tmp_path: Path) -> None:
    file = small_file()
    file.add(b"TNamed", b"compressed", COMPRESS["ZL"](tnamed(b"h" * 100)), object_size=len(tnamed(b"h" * 100)))
    honest = file.close()
    paths = []
    for at in range(4, len(honest) - 3):
        for number in (0x7FFFFFFF, 0xFFFFFFFF, 0x80000000):
            content = honest[:at] + struct.pack(">I", number) + honest[at + 4 :]
            paths.append(write(tmp_path / f"{at}_{number}.root", content))
    assert sum(answer.reason is not None for answer in measure(checker, paths)) > len(paths) // 2


@pytest.mark.parametrize(
    "name", [b"\xff\xff\xff\xff\xff", b"\xff\x7f\xff\xff\xff", b"\xff\0\1\0\0" + bytes(65536)], ids=len
)
def test_absurd_lengths_of_an_objects_own_name(name: bytes, check: Check) -> None:
    assert check(one_object(versioned(bytes(10) + name))).reason is None


@pytest.mark.parametrize("end", ["", "\N{GRINNING FACE}"], ids=["narrow", "wide"])
@pytest.mark.parametrize("letter", [b"a", b"\xff"], ids=["valid", "undecodable"])
@pytest.mark.parametrize("what", ["class", "name"])
def test_key_lists_full_of_names(what: str, letter: bytes, end: str, check: Check) -> None:
    file = File()
    for number in range(500):
        long = letter * 32_600 + end.encode()
        if what == "class":
            file.add(b"T" + long, b"h%d" % number)
        else:
            file.add(b"T", b"h%d" % number + long)
    answer = check(file.close())
    assert answer.reason and "names" in answer.reason


def test_objects_whose_own_names_inflate_to_gigabytes(check: Check) -> None:
    payload = tnamed(b"n" * 60_000)
    stored = COMPRESS["ZL"](payload)
    file = File()
    for number in range(20_000):
        file.add(b"TNamed", b"%d" % number, stored, object_size=len(payload))
    check(file.close())


# --- the chain of records ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4])
def test_a_million_gaps(length: int, check: Check) -> None:
    file = small_file()
    file.data += struct.pack(">i", -length)[-length:] * 1_000_000
    if length == 1:
        file.data += struct.pack(">i", -4)
    assert check(file.close(free_list=0, free_list_size=0)).reason is None


@pytest.mark.parametrize("number", [190_000, 300_000])
def test_hundreds_of_thousands_of_free_segments(number: int, check: Check) -> None:
    file = small_file()
    start = len(file.data)
    file.data += bytes(number)
    file.free = [(at, at) for at in range(start, start + number)]
    assert (check(file.close()).reason is None) == (number < 200_000)


@pytest.mark.parametrize("between", [b"", bytes(3)], ids=["next to each other", "with zeros between"])
def test_tens_of_thousands_of_tiny_records(between: bytes, check: Check) -> None:
    file = small_file()
    for _ in range(50_000 if between else 100_000):
        file.record(b"", b"")
        file.data += between
    assert check(file.close()).reason is None


def test_hundreds_of_megabytes_of_zeros_between_records(check: Check) -> None:
    file = File()
    file.data += bytes(200 << 20)
    file.add(b"TNamed", b"h", tnamed(b"h"))
    assert "zeros from byte" in str(check(file.close()).reason)
