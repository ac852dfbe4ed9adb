"""Which pictures look like an earlier one: perceptual hashes (64 bits) that differ in few bits, among millions.

A hash falls when it lies near an earlier one that stays, so that of a group the lowest key wins. Equal hashes are one
to begin with. The rest is halved: once it is known which hashes of the first half stay, those of the second half that
lie near one of them fall, and only what is left is looked at further. So a hundred thousand pictures that all look
alike are compared with the one that stays, not with each other.

Near ones are found band by band: two hashes that differ in at most k of 64 bits differ in at most k // 4 bits of one of
four bands of 16 bits (multi-index hashing, Norouzi et al. 2012). Memory holds about 40 bytes for each hash and one
slice of the candidates, however many there are.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

BANDS, BAND_BITS = 4, 16
FEW = 2048  # hashes of which every one is compared with every other
PAIRS_AT_ONCE = 1 << 22


def near_duplicates(hashes: np.ndarray, bits: int) -> np.ndarray:
    """(n,) uint64 in the order of keys -> (n,) bool: True where an earlier one that stays differs in at most `bits`."""
    falls = np.ones(len(hashes), bool)
    _, first = np.unique(hashes, return_index=True)
    first.sort()
    falls[first[_staying(hashes[first], bits)]] = False
    return falls


def _staying(hashes: np.ndarray, bits: int) -> np.ndarray:
    """The places of the hashes that stay, ascending; all hashes are different."""
    if len(hashes) <= FEW:
        return _staying_of_few(hashes, bits)
    half = len(hashes) // 2
    early = _staying(hashes[:half], bits)
    late = half + np.flatnonzero(~near_any(hashes[half:], hashes[early], bits))
    return np.concatenate([early, late[_staying(hashes[late], bits)]])


def _staying_of_few(hashes: np.ndarray, bits: int) -> np.ndarray:
    near = np.triu(np.bitwise_count(hashes[:, None] ^ hashes) <= bits, 1)  # (earlier, later)
    stays = np.ones(len(hashes), bool)
    for earlier in np.flatnonzero(near.any(1)):
        if stays[earlier]:
            stays[near[earlier]] = False
    return np.flatnonzero(stays)


def near_any(hashes: np.ndarray, others: np.ndarray, bits: int) -> np.ndarray:
    """(n,) bool: the hashes that differ from any of the others in at most `bits`."""
    changes = [sum(1 << bit for bit in chosen) for n in range(bits // BANDS + 1)
               for chosen in combinations(range(BAND_BITS), n)]  # fmt: skip
    near = np.zeros(len(hashes), bool)
    for band in range(BANDS):
        values = _band(others, band)
        order = np.argsort(values, kind="stable")
        ends = np.cumsum(np.bincount(values, minlength=1 << BAND_BITS))
        begins = np.concatenate([[0], ends[:-1]])
        for change in changes:
            left = np.flatnonzero(~near)
            wanted = _band(hashes[left], band) ^ np.uint16(change)
            near[left] = _any_in_span(hashes[left], others[order], begins[wanted], ends[wanted], bits)
    return near


def _band(hashes: np.ndarray, band: int) -> np.ndarray:
    return (hashes >> np.uint64(band * BAND_BITS)).astype(np.uint16)


def _any_in_span(
    hashes: np.ndarray, others: np.ndarray, begins: np.ndarray, ends: np.ndarray, bits: int
) -> np.ndarray:
    """(n,) bool: whether any of others[begins[i]:ends[i]] is near hash i, a slice of candidates at a time."""
    near, counts = np.zeros(len(hashes), bool), ends - begins
    until = np.cumsum(counts)
    at = 0
    while at < len(hashes):
        before = until[at - 1] if at else 0
        to = max(int(np.searchsorted(until, before + PAIRS_AT_ONCE, "right")), at + 1)
        left = np.repeat(np.arange(at, to), counts[at:to])
        right = np.arange(len(left)) + np.repeat(begins[at:to] - (until[at:to] - counts[at:to] - before), counts[at:to])
        near[left[np.bitwise_count(hashes[left] ^ others[right]) <= bits]] = True
        at = to
    return near
