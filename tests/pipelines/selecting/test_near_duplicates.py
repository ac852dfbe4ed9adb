"""What falls as a near-duplicate is what comparing every picture with every earlier one that stays finds."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.selecting import near_duplicates as module
from pipelines.selecting.near_duplicates import HASH_BITS, near_any, near_duplicates, sortings
from pipelines.settings import TableResources
from pipelines.spilling import NoRoom, database

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))


def falling(
    hashes: list[int] | np.ndarray, bits: int, scratch: Path, memory_bytes: int = 200_000_000, threads: int = 2
) -> list[bool]:
    """By the table of all samples that the selection fills; of each second place nothing is known any more."""
    phash = np.asarray(hashes, np.uint64)
    with database(scratch, TableResources(threads, memory_bytes)) as tables:
        tables.register("given", pa.table({"place": 2 * np.arange(len(phash)), "phash": phash}))
        tables.execute("CREATE TABLE samples AS SELECT place::BIGINT AS place, phash FROM given")
        falls = near_duplicates(tables, 2 * len(phash), bits)
    assert not falls[1::2].any()
    return falls[::2].tolist()


def by_all_pairs(hashes: list[int], bits: int) -> list[bool]:
    kept: list[int] = []
    falls = []
    for value in hashes:
        falls.append(any((value ^ other).bit_count() <= bits for other in kept))
        kept += [] if falls[-1] else [value]
    return falls


def planted(chance: random.Random) -> list[int]:
    """Hashes by chance; near ones of some of them, near ones of these, and so on; equal ones; one dense heap."""
    hashes = [chance.getrandbits(64) for _ in range(150)]
    for value in hashes[:60]:
        for _ in range(chance.randrange(5)):
            value ^= sum(1 << bit for bit in chance.sample(range(64), chance.randrange(12)))
            hashes.append(value)
    heap = chance.getrandbits(64)
    hashes += [heap ^ sum(1 << bit for bit in chance.sample(range(64), chance.randrange(7))) for _ in range(120)]
    hashes += hashes[:9]
    chance.shuffle(hashes)
    return hashes


@pytest.mark.parametrize("most", [1, 2, 200])
@pytest.mark.parametrize("rows", [20, 1 << 20])
def test_it_is_what_comparing_all_pairs_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, most: int
) -> None:
    """However few near ones are looked for at first, and however few rows come at once."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(module, "MOST", most)
    hashes = planted(random.Random(SEED + rows + most))
    for bits in (0, 3, 4, 8):
        expected = by_all_pairs(hashes, bits)
        assert falling(hashes, bits, tmp_path) == expected
        assert sum(expected) < 300 and (sum(expected) > 30 or not bits)


@pytest.mark.parametrize("hashes, bits", [(100, 3), (10**7, 3), (10**9, 3), (10**5, 8), (10**9, 8), (10**6, 0)])
def test_every_near_pair_comes_up_in_one_order_and_belongs_to_one(hashes: int, bits: int) -> None:
    orders, chance = sortings(hashes, bits), random.Random(SEED)
    for _ in range(300):
        difference = np.uint64(sum(1 << bit for bit in chance.sample(range(64), chance.randrange(bits + 1))))
        side_by_side = [order for order in orders if not difference & order.key]
        assert side_by_side
        assert sum(all(difference & block for block in order.differ) for order in side_by_side) == 1
    # So few share a key by chance that the time is that of sorting.
    compared = sum(hashes / 2.0 ** int(order.key).bit_count() for order in orders)
    assert compared < 3 * module.SORTING * len(orders)


def test_a_chain_of_pictures_each_near_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second stays; who falls lets none fall."""
    monkeypatch.setattr(module, "MOST", 1)
    chain = [(1 << i) - 1 for i in range(0, 64, 3)]
    expected = by_all_pairs(chain, 3)
    assert falling(chain, 3, tmp_path) == expected == [i % 2 == 1 for i in range(len(chain))]


def test_a_hundred_thousand_pictures_that_look_alike_are_compared_with_few_and_not_with_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, alike = np.random.default_rng(SEED), np.zeros(100_000, np.uint64)
    for _ in range(4):  # all within four bits of one hash, so within eight of each other
        alike |= np.uint64(1) << chance.integers(0, 64, len(alike)).astype(np.uint64)
    compared = Counter[str]()
    count = np.bitwise_count

    def counting(difference: np.ndarray) -> np.ndarray:
        compared["pairs"] += difference.size
        return count(difference)

    monkeypatch.setattr(np, "bitwise_count", counting)
    falls = falling(alike ^ np.uint64(0x0123456789ABCDEF), 8, tmp_path)
    assert falls == [False] + [True] * 99_999
    assert compared["pairs"] < 100 * len(alike), "all pairs would be 5,000,000,000"


def test_what_does_not_fit_into_memory_spills_and_changes_nothing(tmp_path: Path) -> None:
    chance = np.random.default_rng(SEED)
    hashes = chance.integers(0, 2**64, 400_000, np.uint64)
    hashes[200_000:] = hashes[:200_000] ^ (np.uint64(1) << chance.integers(0, 64, 200_000, np.uint64))
    seen = Counter[str]()
    with pytest.MonkeyPatch.context() as patched:
        batches = module._batches

        def looking(tables: object, query: str) -> object:
            for batch in batches(tables, query):
                seen["spilled"] = max(seen["spilled"], *(path.stat().st_size for path in tmp_path.rglob("*")), 0)
                yield batch

        patched.setattr(module, "_batches", looking)
        little = falling(hashes, 3, tmp_path, memory_bytes=24_000_000, threads=1)
    assert seen["spilled"] > 1_000_000 and little == falling(hashes, 3, tmp_path)
    assert sum(little) >= 200_000
    assert list(tmp_path.iterdir()) == []


def test_bits_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"near_duplicate_bits=64; expected 0 to {HASH_BITS - 1}"):
        falling([1, 2], 64, tmp_path)


# -- nearness to others -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [0, 1, 2, 3, 8, 9])
def test_nearness_to_others_is_what_comparing_all_of_them_finds(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(SEED)
    others = chance.integers(0, 2**64, 300, np.uint64)
    hashes = np.concatenate([others[:200], chance.integers(0, 2**64, 50, np.uint64)])
    for flips in range(1, 11):
        hashes[20 * flips :] ^= np.uint64(1) << chance.integers(0, 64, len(hashes) - 20 * flips, np.uint64)
    expected = (np.bitwise_count(hashes[:, None] ^ others[None]) <= bits).any(1)
    assert near_any(hashes, others, bits).tolist() == expected.tolist() and 20 <= expected.sum() < len(expected)
    monkeypatch.setattr("pipelines.selecting.near_duplicates.PAIRS_AT_ONCE", 100)
    assert near_any(hashes, others, bits).tolist() == expected.tolist()


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(NoRoom, match=r"memory_bytes=20000000 go to .*, where [\d,]+ bytes are free"):
        with database(tmp_path, TableResources(1, 20_000_000)) as tables:
            tables.execute("SET max_temp_directory_size = '10MB'")
            tables.execute("CREATE TABLE wide AS SELECT hash(i) AS a, md5(i::VARCHAR) AS b FROM range(5000000) t(i)")
