"""Damaged files are refused wherever the file itself can tell; what fuzzing found stays found.

The long form: DQM_DAMAGE_COUNT=100000 DQM_DAMAGE_SEED=7 python -m pytest -m slow tests/test_damage.py
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from damage import ACCEPTED, MUTATORS, Layout, Mutant, Part, check_with_rootcheck, mutants, valid_files

DATA = Path(__file__).parent / "data"
CASES = sorted((Path(__file__).parent / "fuzz" / "cases").iterdir())
REAL = Path(__file__).parent.parent.parent / "shared" / "real"  # files of CERN ROOT, not everywhere
SEED = int(os.environ.get("DQM_DAMAGE_SEED", "1"))
COUNT = int(os.environ.get("DQM_DAMAGE_COUNT", "20000"))  # of the long form
SHORT_COUNT = 4000

# Nobody reads these: a file is not refused for them.
WITHOUT_MEANING = frozenset({Part.BEHIND, Part.DATE, Part.UUID, Part.COMPRESSION, Part.FREE})
# No checksum, but few other bytes make a stream of the right length.
STREAMS = frozenset({Part.ZSTD, Part.OLD})


class Outcome(NamedTuple):
    mutant: Mutant
    is_accepted: bool


def _outcomes(sources: list[Path], count: int, seed: int, folder: Path) -> list[Outcome]:
    path = folder / "mutant.root"
    found = []
    for mutant in mutants(sources, count, seed):
        path.write_bytes(mutant.data)
        # The bytes would be 40 MB in all.
        found.append(Outcome(mutant._replace(data=b""), check_with_rootcheck(path) == ACCEPTED))
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return _outcomes(valid_files(DATA), SHORT_COUNT, 1, tmp_path_factory.mktemp("damage"))


def _missed(outcomes: list[Outcome]) -> list[str]:
    return [str(mutant) for mutant, is_accepted in outcomes if is_accepted and mutant.is_detectable]


@pytest.mark.parametrize("kind", MUTATORS)
def test_every_damage_to_structure_or_to_a_checksummed_payload_is_refused(kind: str, outcomes: list[Outcome]) -> None:
    of_kind = [outcome for outcome in outcomes if outcome.mutant.kind == kind]
    assert sum(mutant.is_detectable for mutant, _ in of_kind) > SHORT_COUNT // len(MUTATORS) // 2
    assert not _missed(of_kind)


def test_most_damage_to_compressed_payloads_without_a_checksum_is_refused(outcomes: list[Outcome]) -> None:
    accepted = [is_accepted for mutant, is_accepted in outcomes if mutant.touched and mutant.touched <= STREAMS]
    assert len(accepted) > 15
    assert sum(accepted) < 0.5 * len(accepted)


def test_nothing_is_refused_for_damage_without_meaning(outcomes: list[Outcome]) -> None:
    meaningless = [outcome for outcome in outcomes if outcome.mutant.touched <= WITHOUT_MEANING]
    assert len(meaningless) > 100
    assert [str(mutant) for mutant, is_accepted in meaningless if not is_accepted] == []


@pytest.mark.slow
def test_every_detectable_damage_is_refused_among_many_files(tmp_path: Path) -> None:
    sources = valid_files(DATA) + (valid_files(REAL) if REAL.is_dir() else [])
    found = _outcomes(sources, COUNT, SEED, tmp_path)
    assert not _missed(found)


def test_each_byte_of_the_structure_matters(tmp_path: Path) -> None:
    """Every one of them changed, in one file, in three ways."""
    layout = Layout((DATA / "objstring_only.root").read_bytes())
    path = tmp_path / "changed.root"
    accepted = []
    for at in range(len(layout.data)):
        for flip in 0x01, 0x80, 0xFF:
            data = bytearray(layout.data)
            data[at] ^= flip
            path.write_bytes(data)
            if check_with_rootcheck(path) == ACCEPTED and Part.STRUCTURE in layout.touched(bytes(data)):
                accepted.append((at, flip))
    assert accepted == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_fuzzing_found_is_refused_soon(case: Path) -> None:
    start = time.process_time()
    assert check_with_rootcheck(case) != ACCEPTED
    assert time.process_time() - start < 3


def test_damage_is_the_same_at_each_run() -> None:
    def some() -> list[Mutant]:
        return list(mutants(valid_files(DATA), 100, seed=5))

    assert some() == some()


def test_the_layout_accounts_for_the_parts_of_a_file() -> None:
    layout = Layout((DATA / "trailing_bytes.root").read_bytes())
    assert [key.class_name for key in layout.keys] == [b"TFile", b"TH1F", b"TList", b"TFile", b"TFile"]
    assert layout.touched(layout.data) == frozenset()
    assert layout.touched(layout.data + b"more") == {Part.BEHIND}
    assert layout.touched(layout.data[:-1]) == {Part.BEHIND}
    assert layout.touched(layout.data[: layout.end - 1]) == {Part.STRUCTURE}
    assert layout.touched(b"Root" + layout.data[4:]) == {Part.STRUCTURE}
