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


def _sorted_pairs(hashes: np.ndarray, bits: int) -> Iterator[tuple[int, int]]:
    """All pairs (earlier, later) of different hashes that are near each other, by the later one."""
    found = [np.stack(pairs) for pairs in _pairs(hashes, bits)]
    if found:
        earlier, later = np.unique(np.concatenate(found, axis=1)[::-1], axis=1)[::-1]
        yield from zip(earlier.tolist(), later.tolist(), strict=True)


def _pairs(hashes: np.ndarray, bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    changes = [sum(1 << bit for bit in chosen) for n in range(bits // BANDS + 1)
               for chosen in combinations(range(BAND_BITS), n)]  # fmt: skip
    for band in range(BANDS):
        values = (hashes >> np.uint64(band * BAND_BITS)).astype(np.uint16).astype(np.int64)
        order = np.argsort(values, kind="stable")
        begins = np.searchsorted(values[order], np.arange((1 << BAND_BITS) + 1))
        for change in changes:
            yield from _pairs_between(hashes, values, order, begins, change, bits)


def _pairs_between(
    hashes: np.ndarray, values: np.ndarray, order: np.ndarray, begins: np.ndarray, change: int, bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Near pairs among hashes whose bands differ in exactly the bits of `change`, a slice of candidates at a time."""
    wanted = values ^ change
    counts = begins[wanted + 1] - begins[wanted]
    ends = np.cumsum(counts)
    at = 0
    while at < len(hashes):
        before = ends[at - 1] if at else 0
        to = max(int(np.searchsorted(ends, before + PAIRS_AT_ONCE, "right")), at + 1)
        some = np.arange(at, to)
        left = np.repeat(some, counts[at:to])
        offsets = np.arange(len(left)) - np.repeat(ends[at:to] - counts[at:to] - before, counts[at:to])
        right = order[np.repeat(begins[wanted[at:to]], counts[at:to]) + offsets]
        near = (left < right) & (np.bitwise_count(hashes[left] ^ hashes[right]) <= bits)
        if near.any():
            yield left[near], right[near]
        at = to
