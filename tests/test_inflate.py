"""Compressed payloads, block by block, and the limits of time and memory for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from hostile_streams import HOSTILE, zstd_of_short_sequences
from rootfiles import COMPRESS, TEXT, block

from inflate import Budget, InflateError, inflate_blocks, inflate_single_zlib_block


def inflated(payload: bytes, size: int, budget: Budget | None = None) -> bytes:
    def read(start: int, length: int) -> tuple[bytes, int]:
        return payload, start

    return b"".join(inflate_blocks(read, 0, len(payload), size, budget or Budget(len(payload))))


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Return a function that lets processor time pass."""
    now = [100.0]
    monkeypatch.setattr(time, "thread_time", lambda: now[0])

    def run(seconds: float) -> None:
        now[0] += seconds

    yield run


@pytest.mark.parametrize("letters", COMPRESS)
def test_blocks_are_joined(letters: str) -> None:
    payload = COMPRESS[letters](TEXT) + COMPRESS["ZL"](TEXT) + COMPRESS[letters](TEXT[:1])
    assert inflated(payload, 2 * len(TEXT) + 1) == TEXT + TEXT + TEXT[:1]


def test_single_zlib_block_is_inflated_in_place() -> None:
    payload = COMPRESS["ZL"](TEXT)
    assert inflate_single_zlib_block(b"key" + payload, 3, len(payload), len(TEXT)) == TEXT
    for other in COMPRESS["ZS"](TEXT), payload[:-1] + b"?", COMPRESS["ZL"](TEXT[1:]) * 2:
        assert inflate_single_zlib_block(other, 0, len(other), len(TEXT)) is None
    assert inflate_single_zlib_block(payload, 0, len(payload) + 1, len(TEXT)) is None


@pytest.mark.parametrize("letters", HOSTILE)
def test_hostile_streams_are_valid(letters: str) -> None:
    """So the benchmark measures how long they take to inflate, not how soon they are refused."""
    stored, size = HOSTILE[letters](300_000)
    assert len(inflated(stored, size)) == (1 << 16 if letters == "XZ" else size)


@pytest.mark.parametrize(
    ("file_size", "inflated_size", "allowed"),
    [(3_000_000, 0, 4), (0, 400_000_000, 3), (10**12, 0, 30)],
    ids=["grows with the file", "grows with what is inflated", "ends at 30 s"],
)
def test_budget_of_time(file_size: int, inflated_size: int, allowed: int, spend: Callable[[float], None]) -> None:
    budget = Budget(file_size)
    budget.add_single_block(inflated_size)
    budget.add_block(b"ZS", inflated_size, is_first=True)
    spend(allowed - 0.1)
    budget.check_time()
    spend(0.2)
    with pytest.raises(InflateError, match=rf"longer than {allowed}\.0 s"):
        budget.check_time()


@pytest.mark.parametrize("letters", ["XZ", "CS"])
def test_time_is_checked_within_a_block(letters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(0)
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    monkeypatch.setattr(budget, "check_time", count)
    size = 5 << 20
    inflated(COMPRESS[letters](bytes(size)), size, budget)
    assert calls > 10


def test_time_is_checked_between_blocks(spend: Callable[[float], None]) -> None:
    one, size = block(b"ZS", 1, zstd_of_short_sequences(1 << 20), 1 << 20), 1 << 20
    blocks = inflate_blocks(lambda start, length: (one * 3, start), 0, 3 * len(one), 3 * size, Budget(0))
    next(blocks)
    spend(1.1)
    with pytest.raises(InflateError, match="takes longer"):
        next(blocks)
