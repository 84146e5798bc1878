"""ROOT files made to hurt: each must be answered within seconds and a few blocks of memory."""

from __future__ import annotations

import json
import lzma
import random
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cramjam
import pytest
import xxhash
from hostile_streams import zstd_of_short_sequences
from rootfiles import COMPRESS, File, block, one_object, tnamed, versioned

import inflate
from rootcheck import InvalidRootFile, check_root_file

PROJECT = Path(__file__).parent.parent
# Of processor time, as other processes share the machine the tests run on, where the loop below takes no more than UNIT.
SECONDS = 3.0
UNIT = 0.1
HONEST = Path(__file__).parent / "data" / "h1_all.root"
MEBIBYTES = 64
BLOCK = (1 << 24) - 1  # bytes, the most that three bytes can say
GIBIBYTE = 1 << 30

# Says how the check of each file ended, what it took and how much more memory the process ever used than before.
MEASURE = """
import json, sys, time
import rootcheck

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

honest, *paths = sys.argv[1:]
rootcheck.check_root_file(honest)
start = time.process_time()
for _ in range(3):  # always the same work, by which a slower machine is given more time
    sum(number * number for number in range(500_000))
unit = time.process_time() - start
before = peak()
for path in paths:
    start = time.process_time()
    try:
        reason, objects = None, len(rootcheck.check_root_file(path))
    except rootcheck.InvalidRootFile as error:
        reason, objects = str(error), 0
    seconds, grown = time.process_time() - start, peak() - before
    print(json.dumps({"reason": reason, "objects": objects, "seconds": seconds, "unit": unit, "kibibytes": grown}))
"""


class Answer(NamedTuple):
    """How check_root_file ended in a process of its own, and what that took."""

    reason: str | None  # None for a valid file
    objects: int
    seconds: float
    unit: float
    kibibytes: int


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


def measure(*paths: Path, mebibytes: int = MEBIBYTES) -> list[Answer]:
    """Check files in a fresh process, assert that none took long or much, and remove them."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(HONEST), *map(str, paths)],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        for path in paths:
            path.unlink()
    assert done.returncode == 0, done.stderr
    answers = [Answer(**json.loads(line)) for line in done.stdout.splitlines()]
    assert len(answers) == len(paths)
    for answer in answers:
        assert answer.seconds < SECONDS * max(1.0, answer.unit / UNIT), answer
        assert answer.kibibytes < mebibytes << 10, answer
    return answers


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Answer]:
    """Return a function that checks a file of this content in a fresh process, which must take neither long nor much."""

    def run(content: bytes | bytearray, mebibytes: int = MEBIBYTES) -> Answer:
        return measure(write(tmp_path / "hostile.root", content), mebibytes=mebibytes)[0]

    return run


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


def xz_bomb(size: int) -> bytes:
    """Return an XZ stream of zeros: one block of 16 MiB again and again, and the index that tells so."""
    one = lzma.compress(bytes(1 << 24), check=lzma.CHECK_CRC32, preset=1)
    index_size = int.from_bytes(one[-8:-4], "little") * 4 + 4
    piece = one[12 : -12 - index_size]
    # The index says how long a block is without its padding; the one of the stream with a single block tells.
    entry = one[-12 - index_size + 2 :]
    count = next(at for at in range(1, 12) if entry[at - 1] < 0x80)
    count += next(at for at in range(1, 12) if entry[count + at - 1] < 0x80)
    blocks = size >> 24
    return one[:12] + piece * blocks + end_of_xz(blocks, entry[:count] * blocks)


def end_of_xz(blocks: int, entries: bytes) -> bytes:
    """Return the index and the last bytes of an XZ stream whose blocks have a CRC32."""
    index = bytearray(b"\0")
    while blocks >= 0x80:
        index.append(blocks & 0x7F | 0x80)
        blocks >>= 7
    index += bytes([blocks]) + entries
    index += bytes(-len(index) % 4)
    index += struct.pack("<I", zlib.crc32(index))
    end = struct.pack("<IBB", len(index) // 4 - 1, 0, lzma.CHECK_CRC32)
    return bytes(index) + struct.pack("<I", zlib.crc32(end)) + end + b"YZ"


def xz_of_empty_blocks(number: int) -> bytes:
    """Return an XZ stream of the byte `a`, before which come empty blocks; each has another dictionary than the last."""
    blocks = []
    for content, dictionary in ((b"", 30), (b"", 31), (b"a", 30)):
        head = bytes([2, 0, 0x21, 1, dictionary, 0, 0, 0])
        chunks = (b"\1\0\0a" if content else b"") + b"\0"
        crcs = [struct.pack("<I", zlib.crc32(data)) for data in (head, content)]
        blocks.append(head + crcs[0] + chunks + bytes(-len(chunks) % 4) + crcs[1])
    start = lzma.compress(b"", check=lzma.CHECK_CRC32)[:12]
    entries = bytes([17, 0]) * 2 * number + bytes([21, 1])
    return start + (blocks[0] + blocks[1]) * number + blocks[2] + end_of_xz(2 * number + 1, entries)


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
    """What is called a bomb below is a well-formed stream."""
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
def test_block_that_inflates_to_gigabytes(letters: str, claimed: int, check: Callable[..., Answer]) -> None:
    bomb, tag, method = BOMBS[letters]
    answer = check(one_object(block(tag, method, bomb(2 * GIBIBYTE), claimed), claimed))
    assert answer.reason and "block" in answer.reason


# --- honest gigabytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letters", COMPRESS)
def test_gigabytes_of_zeros_in_honest_blocks(letters: str, check: Callable[..., Answer]) -> None:
    one = COMPRESS[letters](bytes(BLOCK))
    file = File()
    for number in range(4):
        file.add(b"TH1F", b"h%d" % number, one * 64, object_size=BLOCK * 64)
    answer = check(file.close())
    assert answer.reason and "allowed" in answer.reason


@pytest.mark.parametrize("letters", COMPRESS)
def test_blocks_of_16_mib_that_hardly_shrink(letters: str, check: Callable[..., Answer]) -> None:
    data = bytearray(random.Random(1).randbytes(BLOCK).translate(bytes(range(128)) * 2))
    data[:: 1 << 10] = data[1 :: 1 << 10] = bytes(1 << 14)
    data[: 1 << 20] = bytes(1 << 20)  # what LZ4 can shrink
    one = COMPRESS[letters](bytes(data))
    blocks = 1 if letters == "XZ" else 3  # XZ takes most of a second for each
    assert check(one_object(one * blocks, BLOCK * blocks, b"TH1F")).reason is None


@pytest.mark.parametrize("letters", COMPRESS)
def test_a_payload_of_many_tiny_blocks(letters: str, check: Callable[..., Answer]) -> None:
    one = COMPRESS[letters](b"a")
    number = 20_001  # as many as are allowed
    assert check(one_object(one * number, number, b"TH1F")).reason is None
    answer = check(one_object(one * 10 * number, 10 * number, b"TH1F"))
    assert answer.reason and "more than 20000 compressed blocks" in answer.reason


def test_xz_with_a_giant_dictionary(check: Callable[..., Answer]) -> None:
    # The encoder would take gigabytes for such a dictionary; its size is one byte of the block's head, with a CRC behind.
    stored = bytearray(lzma.compress(bytes(1000), check=lzma.CHECK_CRC32, preset=0))
    assert stored[12] == 2
    at = stored.index(b"\x21\x01", 12) + 2
    stored[at] = 37  # 3 << 29 bytes
    stored[20:24] = struct.pack("<I", zlib.crc32(stored[12:20]))
    answer = check(one_object(block(b"XZ", 0, bytes(stored), 1000), 1000, b"TH1F"))
    assert answer.reason and "damaged XZ block" in answer.reason


def test_xz_blocks_with_the_largest_dictionary_allowed(check: Callable[..., Answer]) -> None:
    stored = bytearray(lzma.compress(bytes(BLOCK), check=lzma.CHECK_CRC32, preset=0))
    at = stored.index(b"\x21\x01", 12) + 2
    stored[at] = 31  # 192 MiB
    stored[20:24] = struct.pack("<I", zlib.crc32(stored[12:20]))
    one = block(b"XZ", 0, bytes(stored), BLOCK)
    assert check(one_object(one * 4, BLOCK * 4, b"TH1F")).reason is None


def test_xz_of_hundreds_of_thousands_of_empty_blocks(check: Callable[..., Answer]) -> None:
    assert lzma.decompress(xz_of_empty_blocks(10)) == b"a"
    answer = check(one_object(block(b"XZ", 0, xz_of_empty_blocks(350_000), 1), 1, b"TH1F"))
    assert answer.reason and "XZ" in answer.reason


@pytest.mark.parametrize("more", [{"id": lzma.FILTER_DELTA, "dist": 1}, {"id": lzma.FILTER_X86}], ids=["delta", "x86"])
def test_xz_with_more_filters_and_sha256(more: dict[str, int], check: Callable[..., Answer]) -> None:
    last = {"id": lzma.FILTER_LZMA2, "preset": 0, "nice_len": 2, "mf": lzma.MF_BT2, "mode": lzma.MODE_FAST}
    stored = lzma.compress(bytes(BLOCK), check=lzma.CHECK_SHA256, filters=[more] * 3 + [last])
    answer = check(one_object(block(b"XZ", 0, stored, BLOCK) * 31, BLOCK * 31, b"TH1F"))
    assert answer.reason and "XZ" in answer.reason


@pytest.mark.parametrize("window", [0x88, 0xA8, 0xF8])  # 128 MiB, 2 GiB, 2 TiB
def test_zstd_with_a_giant_window(window: int, check: Callable[..., Answer]) -> None:
    size = 1 << 23
    one = block(b"ZS", 1, zstd_bomb(size, window), size)
    assert (check(one_object(one * 4, size * 4, b"TH1F")).reason is None) == (window == 0x88)


def test_zstd_of_short_sequences_is_refused_in_time(tmp_path: Path) -> None:
    """A valid file of 0.2 MB that inflates to 2 GB, ten times as slowly as others, stays within its budget."""
    size = BLOCK - 1000
    one = block(b"ZS", 1, zstd_of_short_sequences(size), size)
    assert bytes(cramjam.zstd.decompress(one[9:])) == bytes(size)
    file = File()
    for number in range(2):
        file.add(b"TH1F", b"h%d" % number, one * 63, object_size=63 * size)
    path = write(tmp_path / "hostile.root", file.close())
    before = time.thread_time()
    try:
        check_root_file(path)
    except InvalidRootFile as refusal:
        assert "takes longer" in str(refusal)
    inflated = 2 * 63 * size
    most = inflate.MIN_SECONDS + path.stat().st_size / inflate.BYTES_PER_SECOND + inflated / inflate.INFLATED_PER_SECOND
    assert time.thread_time() - before < most + 0.5  # a block may be under way


# --- keys and directories ----------------------------------------------------------------------------------------------


def test_200_000_keys_on_one_record(check: Callable[..., Answer]) -> None:
    file = File()
    key = file.add(b"TNamed", b"h", tnamed(b"h"))
    file.root.keys = [key] * 200_000
    assert "place elsewhere" in str(check(file.close()).reason)


def test_5_000_keys_that_share_a_record_of_16_mb(check: Callable[..., Answer]) -> None:
    file = File()
    key = file.add(b"TH1F", b"h", COMPRESS["ZL"](bytes(BLOCK)), object_size=BLOCK)
    file.root.keys = [key._replace(cycle=cycle) for cycle in range(1, 5001)]
    assert "place elsewhere" in str(check(file.close()).reason)


def test_directories_that_contain_each_other(check: Callable[..., Answer]) -> None:
    file = File()
    one = file.directory(b"one")
    two = file.directory(b"two", one)
    two.keys.append(one.key._replace(directory=two.position))
    assert "place elsewhere" in str(check(file.close()).reason)


def test_directories_nested_3_000_deep(check: Callable[..., Answer]) -> None:
    file = File()
    directory = file.root
    for _ in range(3000):
        directory = file.directory(b"d", directory)
    assert "nested more than 100 deep" in str(check(file.close()).reason)


def test_a_graph_of_directories_with_2_to_the_25_paths(check: Callable[..., Answer]) -> None:
    file = File()
    directory = file.root
    for _ in range(25):
        directory, parent = file.directory(b"d", directory), directory
        parent.keys.append(parent.keys[0]._replace(name=b"e"))
    assert "place elsewhere" in str(check(file.close()).reason)


def test_20_000_directories(check: Callable[..., Answer]) -> None:
    file = File()
    for number in range(19_990):
        file.directory(b"%d" % number)
    assert check(file.close()).objects == 19_990


@pytest.mark.parametrize("number", [40_000, pytest.param(199_990, marks=pytest.mark.slow)])
@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "in a directory"])
def test_many_honest_keys(number: int, inside: bool, check: Callable[..., Answer]) -> None:
    file = File()
    directory = file.directory(b"d") if inside else file.root
    for at in range(number):
        file.add(b"TNamed", b"%d" % at, to=directory)
    # As many keys at the top as are allowed, and the answer that names them, take more than any hostile file.
    mebibytes = 2 * MEBIBYTES if number > 100_000 and not inside else MEBIBYTES
    assert check(file.close(), mebibytes=mebibytes).objects == (1 if inside else number)


def test_a_key_list_of_hundreds_of_megabytes_of_nothing(check: Callable[..., Answer]) -> None:
    file = File()
    file.add(b"TNamed", b"h", tnamed(b"h"))
    file.root.slack = bytes(200 << 20)
    check(file.close())


def test_a_key_list_of_a_hundred_megabytes_of_titles(check: Callable[..., Answer]) -> None:
    file = File()
    key = file.add(b"TNamed", b"h", bytes(32_700), title=bytes(32_700))
    file.root.keys = [key._replace(position=key.position + number) for number in range(3_300)]
    assert check(file.close()).reason


# --- counts, lengths, strings ------------------------------------------------------------------------------------------


def test_every_field_of_a_small_file_at_its_extremes(tmp_path: Path) -> None:
    file = File()
    file.add(b"TNamed", b"h", COMPRESS["ZL"](tnamed(b"h" * 100)), object_size=len(tnamed(b"h" * 100)))
    file.add(b"TNamed", b"x", tnamed(b"x"), file.directory(b"d"))
    honest = file.close()
    paths = []
    for at in range(4, len(honest) - 3):
        for number in (0x7FFFFFFF, 0xFFFFFFFF, 0x80000000):
            content = honest[:at] + struct.pack(">I", number) + honest[at + 4 :]
            paths.append(write(tmp_path / f"{at}_{number}.root", content))
    assert sum(answer.reason is not None for answer in measure(*paths)) > len(paths) // 2


@pytest.mark.parametrize(
    "name", [b"\xff\xff\xff\xff\xff", b"\xff\x7f\xff\xff\xff", b"\xff\0\1\0\0" + bytes(65536)], ids=len
)
def test_absurd_lengths_of_an_objects_own_name(name: bytes, check: Callable[..., Answer]) -> None:
    assert check(one_object(versioned(bytes(10) + name))).reason is None


def test_class_name_of_60_kilobytes(check: Callable[..., Answer]) -> None:
    file = File()
    file.add(b"T" * 60_000, b"h", key_size=60_030 - 65_536, size=60_030)
    assert "impossible lengths" in str(check(file.close()).reason)


@pytest.mark.parametrize("end", ["", "\N{GRINNING FACE}"], ids=["narrow", "wide"])
@pytest.mark.parametrize("letter", [b"a", b"\xff"], ids=["valid", "undecodable"])
@pytest.mark.parametrize("what", ["class", "name"])
def test_key_lists_full_of_names(what: str, letter: bytes, end: str, check: Callable[..., Answer]) -> None:
    file = File()
    for number in range(500):
        long = letter * 32_600 + end.encode()
        if what == "class":
            file.add(b"T" + long, b"h%d" % number)
        else:
            file.add(b"T", b"h%d" % number + long)
    answer = check(file.close())
    assert answer.reason and "names" in answer.reason


def test_class_names_of_32_kilobytes(check: Callable[..., Answer]) -> None:
    file = File()
    for number in range(1000):
        file.add(b"T" * 32_700, b"%d" % number)
    check(file.close())


def test_objects_whose_own_names_inflate_to_gigabytes(check: Callable[..., Answer]) -> None:
    payload = tnamed(b"n" * 60_000)
    stored = COMPRESS["ZL"](payload)
    file = File()
    for number in range(20_000):
        file.add(b"TNamed", b"%d" % number, stored, object_size=len(payload))
    check(file.close())


# --- the chain of records ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4])
def test_a_million_gaps(length: int, check: Callable[..., Answer]) -> None:
    file = File()
    file.add(b"TNamed", b"h", tnamed(b"h"))
    file.data += struct.pack(">i", -length)[-length:] * 1_000_000
    if length == 1:
        file.data += struct.pack(">i", -4)
    assert check(file.close(free_list=0, free_list_size=0)).reason is None


@pytest.mark.parametrize("number", [190_000, 2_000_000])
def test_millions_of_free_segments(number: int, check: Callable[..., Answer]) -> None:
    file = File()
    file.add(b"TNamed", b"h", tnamed(b"h"))
    start = len(file.data)
    file.data += bytes(number)
    file.free = [(at, at) for at in range(start, start + number)]
    answer = check(file.close())
    assert (answer.reason is None) == (number < 200_000)


@pytest.mark.parametrize("between", [b"", bytes(3)], ids=["next to each other", "with zeros between"])
def test_tens_of_thousands_of_tiny_records(between: bytes, check: Callable[..., Answer]) -> None:
    file = File()
    file.add(b"TNamed", b"h", tnamed(b"h"))
    for _ in range(50_000 if between else 100_000):
        file.record(b"", b"")
        file.data += between
    assert check(file.close()).reason is None


def test_hundreds_of_megabytes_of_zeros_between_records(check: Callable[..., Answer]) -> None:
    file = File()
    file.data += bytes(200 << 20)
    file.add(b"TNamed", b"h", tnamed(b"h"))
    assert "zeros from byte" in str(check(file.close()).reason)
