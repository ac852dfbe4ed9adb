"""Which pictures look like an earlier one: perceptual hashes (64 bits) that differ in few bits, among millions.

A hash falls when it lies near an earlier one that stays, so that of a group the lowest key wins. Equal hashes are one
to begin with, and pairs are found band by band: two hashes that differ in at most k of 64 bits differ in at most k // 4
bits of one of four bands of 16 bits (multi-index hashing, Norouzi et al. 2012). Memory holds about 40 bytes for each
hash, 16 for each near pair, and one slice of the candidates, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

BANDS, BAND_BITS = 4, 16
PAIRS_AT_ONCE = 1 << 22


def near_duplicates(hashes: np.ndarray, bits: int) -> np.ndarray:
    """(n,) uint64 in the order of keys -> (n,) bool: True where an earlier one that stays differs in at most `bits`."""
    falls = np.ones(len(hashes), bool)
    _, first = np.unique(hashes, return_index=True)
    first.sort()
    stays = np.ones(len(first), bool)
    for earlier, later in _sorted_pairs(hashes[first], bits):
        if stays[earlier]:
            stays[later] = False
    falls[first] = ~stays
    return falls


def near_any(hashes: np.ndarray, others: np.ndarray, bits: int) -> np.ndarray:
    """(n,) and (m,) uint64 -> (n,) bool: True where one of the others differs in at most `bits`."""
    near, others = np.zeros(len(hashes), bool), np.unique(others)
    for band in range(BANDS):
        order, begins = _buckets(others, band)
        for change in _changes(bits):
            for mine, theirs in _candidates(_values(hashes, band) ^ change, order, begins):
                near[mine[np.bitwise_count(hashes[mine] ^ others[theirs]) <= bits]] = True
    return near


def _sorted_pairs(hashes: np.ndarray, bits: int) -> Iterator[tuple[int, int]]:
    """All pairs (earlier, later) of different hashes that are near each other, by the later one."""
    found = [np.stack(pairs) for pairs in _pairs(hashes, bits)]
    if found:
        earlier, later = np.unique(np.concatenate(found, axis=1)[::-1], axis=1)[::-1]
        yield from zip(earlier.tolist(), later.tolist(), strict=True)


def _pairs(hashes: np.ndarray, bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for band in range(BANDS):
        values, (order, begins) = _values(hashes, band), _buckets(hashes, band)
        for change in _changes(bits):
            for left, right in _candidates(values ^ change, order, begins):
                near = (left < right) & (np.bitwise_count(hashes[left] ^ hashes[right]) <= bits)
                if near.any():
                    yield left[near], right[near]


def _changes(bits: int) -> list[int]:
    """The ways in which a band may differ."""
    return [sum(1 << bit for bit in chosen) for n in range(bits // BANDS + 1)
            for chosen in combinations(range(BAND_BITS), n)]  # fmt: skip


def _values(hashes: np.ndarray, band: int) -> np.ndarray:
    """What each hash has in a band, (n,) int64."""
    return (hashes >> np.uint64(band * BAND_BITS)).astype(np.uint16).astype(np.int64)


def _buckets(hashes: np.ndarray, band: int) -> tuple[np.ndarray, np.ndarray]:
    """(the hashes' numbers sorted by what they have in a band, where each value begins among them)."""
    values = _values(hashes, band)
    order = np.argsort(values, kind="stable")
    return order, np.searchsorted(values[order], np.arange((1 << BAND_BITS) + 1))


def _candidates(
    wanted: np.ndarray, order: np.ndarray, begins: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(number of who asks, number of a hash with the value that it asks for), a slice at a time."""
    counts = begins[wanted + 1] - begins[wanted]
    ends = np.cumsum(counts)
    at = 0
    while at < len(wanted):
        before = ends[at - 1] if at else 0
        to = max(int(np.searchsorted(ends, before + PAIRS_AT_ONCE, "right")), at + 1)
        some = np.arange(at, to)
        left = np.repeat(some, counts[at:to])
        offsets = np.arange(len(left)) - np.repeat(ends[at:to] - counts[at:to] - before, counts[at:to])
        yield left, order[np.repeat(begins[wanted[at:to]], counts[at:to]) + offsets]
        at = to
