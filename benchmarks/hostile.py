"""Files that cost the most processor time for their size, codec by codec, beside the dearest honest ones.

Command: python benchmarks/hostile.py [--megabytes 2000]

Each file holds objects whose blocks take the longest to inflate for what they are (tests/hostile_streams.py), up to so many
megabytes inflated or 16 MB in the file. The honest ones are of zeros, as empty histograms are. The budget is what
inflate.Budget allows: a hostile file is refused when it is spent, an honest one should need half of it at the most.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from hostile_streams import BLOCK, HOSTILE
from rootfiles import COMPRESS, File

import inflate
import rootcheck

BLOCKS_PER_OBJECT = inflate.MAX_OBJECT_SIZE // BLOCK - 1
MOST_BYTES = 16_000_000


def file_of(one: bytes, size: int, megabytes: int) -> tuple[bytes, float]:
    """Return a file with as many of these blocks as its limits allow, and the megabytes it inflates to."""
    blocks = min(megabytes * 1_000_000 // size, MOST_BYTES // len(one), inflate.MAX_BLOCKS) or 1
    file = File()
    for number in range(-(-blocks // BLOCKS_PER_OBJECT)):
        count = min(BLOCKS_PER_OBJECT, blocks - number * BLOCKS_PER_OBJECT)
        file.add(b"TH1F", b"h%d" % number, one * count, object_size=size * count)
    return file.close(), blocks * size / 1e6


def files(megabytes: int) -> Iterator[tuple[str, str, bytes, float]]:
    for letters, compress in COMPRESS.items():
        slow = min(megabytes, inflate.MAX_INFLATED_SLOWLY // 1_000_000) if letters in ("XZ", "CS") else megabytes
        one, size = HOSTILE[letters](BLOCK - 1000)
        yield letters, "hostile", *file_of(one, size, slow)
        yield letters, "honest", *file_of(compress(bytes(BLOCK)), BLOCK, slow)


def check(path: Path) -> tuple[float, str]:
    began = time.thread_time()
    try:
        rootcheck.check_root_file(path)
        verdict = "valid"
    except rootcheck.InvalidRootFile as error:
        verdict = "refused: too long" if "takes longer" in str(error) else f"refused: {str(error)[:60]}"
    return time.thread_time() - began, verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000, help="inflated, of each file")
    megabytes = parser.parse_args().megabytes
    print("| codec | file | MB | MB inflated | seconds | seconds for each MB | of the budget | verdict |")
    print("| -- | -- | -- | -- | -- | -- | -- | -- |")
    with tempfile.TemporaryDirectory() as folder:
        for letters, kind, content, inflated in files(megabytes):
            path = Path(folder, "file.root")
            path.write_bytes(content)
            seconds, verdict = check(path)
            mb = len(content) / 1e6
            budget = inflate.MIN_SECONDS + len(content) / inflate.BYTES_PER_SECOND
            budget = min(inflate.MAX_SECONDS, budget + inflated * 1e6 / inflate.INFLATED_PER_SECOND)
            columns = f"{mb:.2f} | {inflated:.0f} | {seconds:.2f} | {seconds / mb:.2f} | {seconds / budget:.0%}"
            print(f"| {letters} | {kind} | {columns} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
