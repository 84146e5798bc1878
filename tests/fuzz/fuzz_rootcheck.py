"""Coverage-guided fuzzing of `rootcheck.check_root_file` with atheris (pip install atheris).

    mkdir -p /tmp/corpus
    nice python tests/fuzz/fuzz_rootcheck.py /tmp/corpus tests/data -max_total_time=600 -max_len=20000

New inputs that reach new code go to the first folder, the files of further folders are seeds. All options are those of
libFuzzer (-help=1). A finding is an exception other than InvalidRootFile or an input that takes longer than 3 s; it ends
the run and its input is written to `crash-…` (-artifact_prefix=FOLDER/ says where). One that tells something belongs into
`tests/fuzz/cases/`, whose files tests/test_damage.py replays; below 5 kB: try -minimize_crash=1.

    python tests/fuzz/fuzz_rootcheck.py crash-…         what happened with this input
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

import atheris  # type: ignore[import-untyped, unused-ignore]

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
with atheris.instrument_imports(include=["rootcheck"]):
    import rootcheck

SECONDS = 3.0
_MEMORY = Path("/dev/shm")
_SIZES = (2, 3, 4, 4, 4, 8)  # bytes of a number
_EXTREMES = (0, 1, 4, 100, 1000, 1001, 0x7FFF, 0xFFFF, 1_000_000, 2_000_000_000, 0x40000000, 0x7FFFFFFF, 0xFFFFFFFF)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a number, as the format has them, or leave it to libFuzzer, which knows of no numbers."""
    rng = random.Random(seed)
    if rng.random() < 0.5 or len(data) < 16:
        mutated: bytes = atheris.Mutate(data, max_size)
        return mutated
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        size = rng.choice(_SIZES)
        at = rng.randrange(len(data) - size)
        number = int.from_bytes(changed[at : at + size], "big")
        near = (
            number + rng.choice([-256, -8, -4, -1, 1, 4, 8, 256]),
            -number,
            number * 2,
            len(data),
            rng.randrange(len(data)),
        )
        number = rng.choice([*_EXTREMES, *near, *near])
        new, old = (number % (1 << 8 * size)).to_bytes(size, "big"), bytes(changed[at : at + size])
        if size > 2 and any(old) and rng.random() < 0.5:  # everywhere, so that what stands twice goes on being equal
            changed = changed.replace(old, new)
        else:
            changed[at : at + size] = new
    return bytes(changed[:max_size])


class Target:
    """Checks each input as a file in memory."""

    def __init__(self) -> None:
        folder = _MEMORY if _MEMORY.is_dir() else None
        descriptor, self.path = tempfile.mkstemp(suffix=".root", dir=folder)
        os.close(descriptor)

    def __call__(self, data: bytes) -> None:
        Path(self.path).write_bytes(data)
        start = time.process_time()  # the machine may stand still, too
        try:
            rootcheck.check_root_file(self.path)
        except rootcheck.InvalidRootFile:
            pass
        if (seconds := time.process_time() - start) > SECONDS:
            raise TimeoutError(f"{seconds:.1f} s for {len(data)} bytes")


if __name__ == "__main__":
    atheris.Setup(sys.argv, Target(), custom_mutator=mutate)
    atheris.Fuzz()
