"""Which pictures look like an earlier one: perceptual hashes (64 bits) that differ in few bits, among billions.

A hash falls when it lies near an earlier one that stays, so that of a group the lowest key wins. Equal hashes are one
to begin with.

Near ones are found by sorting (Manku et al. 2007). The 64 bits are cut into blocks; two hashes that differ in at most d
bits are equal in all blocks but d, whichever these may be. For every choice of those d blocks the hashes are sorted by
the bits of the others, and only such as have these in common are compared. There are as many blocks as make that the
least work, so that few hashes have a key in common by chance: the time is that of so many sorts. DuckDB sorts, and
spills; memory holds three bytes for each sample, and a slice of the hashes.

Most pictures have a few others near them, some a hundred thousand. So in each order a hash is compared with earlier
ones, the first of them first, until MOST near ones are known. Where all that are known turn out to have fallen, the
hashes that it may still be near to are looked at again, for more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.spilling import Tables

HASH_BITS = 64
MOST = 2  # near ones of one hash that are looked for in an order at first; at most 255
MORE = 8  # times as many where they did not decide
SORTING = 16  # comparisons that take as long as sorting does, for each hash
ROWS_AT_ONCE = 1 << 20
STAYS, UNKNOWN, FALLS = 0, 1, 2  # what becomes of a hash
BANDS, BAND_BITS = 4, 16
PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Sorting:
    """One order of the hashes: those that agree in `key` lie side by side.

    A pair that agrees in more blocks comes up in several orders. It belongs to the first one, in which it differs in
    all blocks of `differ`.
    """

    key: np.uint64
    differ: list[np.uint64]


def sortings(hashes: int, bits: int) -> list[Sorting]:
    """The orders in which so many hashes are compared, so that every pair within `bits` comes up in one."""
    if not 0 <= bits < HASH_BITS:
        raise ValueError(f"dataset.selection.near_duplicate_bits={bits}; expected 0 to {HASH_BITS - 1}")

    def work(blocks: int) -> float:
        chance = 2.0 ** -(HASH_BITS * (blocks - bits) / blocks)
        return math.comb(blocks, bits) * (SORTING + hashes * chance)

    blocks = min(range(bits + 1, min(bits + 8, HASH_BITS) + 1), key=work)
    edges = [HASH_BITS * i // blocks for i in range(blocks + 1)]
    masks = [(1 << end) - (1 << begin) for begin, end in zip(edges, edges[1:], strict=False)]
    found = []
    for left_out in combinations(range(blocks), bits):
        others = [block for block in range(blocks) if block not in left_out]
        differ = [np.uint64(masks[block]) for block in left_out if block > others[0]]
        found.append(Sorting(np.uint64(sum(masks[block] for block in others)), differ))
    return found


def near_duplicates(tables: Tables, count: int, bits: int) -> np.ndarray:
    """(count,) bool: the places in the table `samples` (place, phash) where an earlier one that stays is near."""
    tables.execute("CREATE TABLE hashes AS SELECT min(place) AS place, phash FROM samples GROUP BY phash")
    fates = bytearray(count + 1)  # the last one stands for those near ones that were not looked for
    fate = np.frombuffer(fates, np.uint8)
    for batch in _batches(tables, "SELECT place FROM samples ANTI JOIN hashes USING (place)"):
        fate[batch["place"].to_numpy()] = FALLS
    ((hashes,),) = tables.execute("SELECT count(*) FROM hashes").fetchall()
    orders, most, among = sortings(hashes, bits), MOST, ""
    while most:
        fate[fate == UNKNOWN] = STAYS
        fate[count] = UNKNOWN
        tables.execute("CREATE TABLE near (earlier BIGINT, later BIGINT)")
        _find(tables, orders, count, bits, min(most, 255), among)
        _decide(tables, fates)
        tables.execute("DROP TABLE near")
        most = most * MORE if UNKNOWN in fates[:count] else 0
        if most:
            _forget(tables, fate[:count])
            among = "WHERE phash & {key} IN (SELECT phash & {key} FROM unknown JOIN hashes USING (place))"
    tables.execute("DROP TABLE hashes")
    return fate[:count] == FALLS


def _forget(tables: Tables, fate: np.ndarray) -> None:
    """Takes out of `hashes` what fell; fills `unknown` with the places of which it is not known whether they fall."""
    store_places(tables, "fallen", fate == FALLS)
    tables.execute("DELETE FROM hashes WHERE place IN (SELECT place FROM fallen)")
    store_places(tables, "unknown", fate == UNKNOWN)


def store_places(tables: Tables, name: str, those: np.ndarray) -> None:
    """Makes a table of the places where `those` (n,) bool says so, without holding them all."""
    tables.execute(f"CREATE OR REPLACE TABLE {name} (place BIGINT)")
    for begin in range(0, len(those), ROWS_AT_ONCE):
        places = begin + np.flatnonzero(those[begin : begin + ROWS_AT_ONCE])
        tables.from_arrow(_arrow(place=places)).insert_into(name)


def _batches(tables: Tables, query: str) -> Iterator[pa.RecordBatch]:
    return (batch for batch in tables.sql(query).to_arrow_reader(ROWS_AT_ONCE) if batch.num_rows)


def _arrow(**columns: np.ndarray) -> pa.Table:
    import pyarrow as pa

    return pa.table(columns)


# -- pairs ------------------------------------------------------------------------------------------------------------
def _find(tables: Tables, orders: list[Sorting], count: int, bits: int, most: int, among: str) -> None:
    """Fills the table `near`; that a hash may have more than `most` near ones says a row with a place of `count`."""
    writing, waiting = tables.cursor(), []
    for order in orders:
        those = among.format(key=f"{order.key}::UBIGINT")
        query = f"SELECT place, phash FROM hashes {those} ORDER BY phash & {order.key}::UBIGINT, place"
        for places, hashes in _whole_runs(_batches(tables, query), order.key):
            for earlier, later in _near_pairs(hashes, order, bits, most):
                waiting.append((places[earlier] if earlier is not None else np.full(len(later), count), places[later]))
            if sum(len(later) for _, later in waiting) >= ROWS_AT_ONCE:
                _write(writing, waiting)
                waiting = []
    _write(writing, waiting)
    writing.close()


def _write(tables: Tables, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    if pairs:
        earlier, later = (np.concatenate(each) for each in zip(*pairs, strict=True))
        tables.from_arrow(_arrow(earlier=earlier, later=later)).insert_into("near")


def _whole_runs(batches: Iterable[pa.RecordBatch], key: np.uint64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same places and hashes, cut only where the key changes."""
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for batch in batches:
        places, hashes = batch["place"].to_numpy(), batch["phash"].to_numpy()
        keys = hashes & key
        cut = int(np.searchsorted(keys, keys[-1]))
        if cut or waiting and waiting[-1][1][-1] & key != keys[-1]:
            yield _joined([*waiting, (places[:cut], hashes[:cut])])
            waiting = []
        waiting.append((places[cut:], hashes[cut:]))
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    places, hashes = zip(*parts, strict=True)
    return np.concatenate(places), np.concatenate(hashes)


def _near_pairs(
    hashes: np.ndarray, order: Sorting, bits: int, most: int
) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
    """(earlier, later) numbers of near hashes: each is compared with the first of its run, then the second, and so on.

    Without the earlier ones: those that have `most` near ones and were not compared with all.
    """
    begins = np.flatnonzero(np.append(True, np.diff(hashes & order.key) != 0))
    begin = np.repeat(begins, np.diff(begins, append=len(hashes)))
    known = np.zeros(len(hashes), np.uint8)
    left, nth = np.flatnonzero(np.arange(len(hashes)) > begin), 0
    while len(left):
        other = begin[left] + nth
        difference = hashes[left] ^ hashes[other]
        near = np.bitwise_count(difference) <= bits
        known[left[near]] += 1
        for block in order.differ:
            near &= (difference & block) != 0
        if near.any():
            yield other[near], left[near]
        nth += 1
        left = left[left - begin[left] > nth]
        enough = known[left] == most
        if enough.any():
            yield None, left[enough]
            left = left[~enough]


def _decide(tables: Tables, fates: bytearray) -> None:
    """Goes through the pairs in the order of the later ones, so that what becomes of the earlier one is known."""
    for batch in _batches(tables, "SELECT earlier, later FROM near ORDER BY later"):
        pairs = zip(batch["earlier"].to_numpy().tolist(), batch["later"].to_numpy().tolist(), strict=True)
        for earlier, later in pairs:
            fate = FALLS - fates[earlier]
            if fate > fates[later]:
                fates[later] = fate


# -- nearness to others -----------------------------------------------------------------------------------------------
def near_any(hashes: np.ndarray, others: np.ndarray, bits: int) -> np.ndarray:
    """(n,) bool: the few hashes that differ from any of the many others in at most `bits`.

    They are found band by band: two hashes that differ in at most 8 of 64 bits differ in at most two bits of the first
    of four bands of 16 bits, or in at most one of another (multi-index hashing, Norouzi et al. 2012). Memory holds
    about 40 bytes for each of the others and one slice of the candidates.
    """
    near = np.zeros(len(hashes), bool)
    for band in range(BANDS):
        apart = (bits + BANDS - band) // BANDS - 1  # these, each with one more, make one more than `bits`
        changes = [sum(1 << bit for bit in chosen) for n in range(apart + 1)
                   for chosen in combinations(range(BAND_BITS), n)]  # fmt: skip
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
