"""Damaged files are refused wherever the file itself can tell; files that fuzzing found are still refused.

The long form: DQM_DAMAGE_COUNT=100000 DQM_DAMAGE_SEED=7 python -m pytest -m slow tests/test_damage.py
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from damage import MUTATORS, Layout, Mutant, Part, mutants, valid_files
from rootfiles import reason

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


def _outcomes(sources: list[Path], count: int, seed: int) -> list[Outcome]:
    # Without the bytes, which would be 40 MB in all.
    return [Outcome(mutant._replace(data=b""), reason(mutant.data) is None) for mutant in mutants(sources, count, seed)]


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return _outcomes(valid_files(DATA), SHORT_COUNT, 1)


def _missed(outcomes: list[Outcome]) -> list[str]:
    return [str(mutant) for mutant, is_accepted in outcomes if is_accepted and mutant.is_detectable]


@pytest.mark.parametrize("kind", MUTATORS)
def test_detectable_damage_is_refused(kind: str, outcomes: list[Outcome]) -> None:
    of_kind = [outcome for outcome in outcomes if outcome.mutant.kind == kind]
    assert sum(mutant.is_detectable for mutant, _ in of_kind) > SHORT_COUNT // len(MUTATORS) // 2
    assert not _missed(of_kind)


def test_most_damage_without_a_checksum_is_refused(outcomes: list[Outcome]) -> None:
    accepted = [is_accepted for mutant, is_accepted in outcomes if mutant.touched and mutant.touched <= STREAMS]
    assert len(accepted) > 15
    assert sum(accepted) < 0.5 * len(accepted)


def test_nothing_is_refused_for_damage_without_meaning(outcomes: list[Outcome]) -> None:
    meaningless = [outcome for outcome in outcomes if outcome.mutant.touched <= WITHOUT_MEANING]
    assert len(meaningless) > 100
    assert [str(mutant) for mutant, is_accepted in meaningless if not is_accepted] == []


@pytest.mark.slow
def test_every_detectable_damage_is_refused_among_many_files() -> None:
    sources = valid_files(DATA) + (valid_files(REAL) if REAL.is_dir() else [])
    assert not _missed(_outcomes(sources, COUNT, SEED))


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_each_byte_of_the_structure_matters(flip: int) -> None:
    layout = Layout((DATA / "objstring_only.root").read_bytes())
    accepted = []
    for at in range(len(layout.data)):
        data = layout.data[:at] + bytes([layout.data[at] ^ flip]) + layout.data[at + 1 :]
        if reason(data) is None and Part.STRUCTURE in layout.touched(data):
            accepted.append(at)
    assert accepted == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_fuzzing_found_is_refused_soon(case: Path) -> None:
    start = time.process_time()
    assert reason(case.read_bytes())
    assert time.process_time() - start < 3


def test_damage_is_the_same_at_each_run() -> None:
    def some() -> list[Mutant]:
        return list(mutants(valid_files(DATA), 100, seed=5))

    assert some() == some()


def test_layout_accounts_for_every_part() -> None:
    layout = Layout((DATA / "trailing_bytes.root").read_bytes())
    assert [key.class_name for key in layout.keys] == [b"TFile", b"TH1F", b"TList", b"TFile", b"TFile"]
    assert layout.touched(layout.data) == frozenset()
    assert layout.touched(layout.data + b"more") == {Part.BEHIND}
    assert layout.touched(layout.data[:-1]) == {Part.BEHIND}
    assert layout.touched(layout.data[: layout.end - 1]) == {Part.STRUCTURE}
    assert layout.touched(b"Root" + layout.data[4:]) == {Part.STRUCTURE}
