"""Which samples are used is decided from stored scores alone; every sample that is not used has one reason."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.selection import NearDuplicates, read_selection, select, write_selection
from pipelines.settings import SelectionConfig

NOTHING = SelectionConfig(thresholds={}, near_duplicate_bits=None, top_score=None, top_percent=None, removed=None)


def row(key: int, **scores: Any) -> dict[str, Any]:
    return {"key": f"{key:08d}", "url": f"http://a.test/{key}", "phash": key * 0x9E3779B97F4A7C15 % 2**64, **scores}


def settings(**changes: Any) -> SelectionConfig:
    return SelectionConfig(**{**NOTHING.__dict__, **changes})


def test_nothing_asked_uses_everything() -> None:
    masks, reasons = select([(0, [row(0), row(1)]), (2, [row(2)])], NOTHING)
    assert {shard: mask.tolist() for shard, mask in masks.items()} == {0: [True, True], 2: [True]} and not reasons


def test_scores_out_of_bounds_or_missing_are_not_used_and_counted() -> None:
    rows = [row(0, similarity=0.3), row(1, similarity=0.1), row(2, similarity=None), row(3, similarity=9.0)]
    masks, reasons = select([(0, rows)], settings(thresholds={"similarity": [0.2, 1.0]}))
    assert masks[0].tolist() == [True, False, False, False] and reasons == {"similarity_out_of_bounds": 3}


def test_a_score_that_is_not_stored_is_named_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="'aesthetic', which is not stored; there are: .*similarity"):
        select([(0, [row(0, similarity=1.0)])], settings(thresholds={"aesthetic": [5.0, None]}))


def test_of_near_duplicates_the_lowest_key_wins_across_shards() -> None:
    a, b, c = row(0), row(1), row(2)
    b["phash"] = a["phash"] ^ 0b1011
    masks, reasons = select([(0, [a]), (1, [b, c])], settings(near_duplicate_bits=3))
    assert masks[0].tolist() == [True] and masks[1].tolist() == [False, True] and reasons == {"near_duplicate": 1}
    masks, _ = select([(0, [a]), (1, [b, c])], settings(near_duplicate_bits=2))
    assert masks[1].tolist() == [True, True]


def test_bands_find_exactly_what_comparing_all_pairs_finds() -> None:
    chance = random.Random(0)
    hashes = [chance.getrandbits(64) for _ in range(150)]
    hashes += [value ^ sum(1 << bit for bit in chance.sample(range(64), chance.randrange(9))) for value in hashes]
    for bits in (0, 3, 6):
        near, kept = NearDuplicates(bits), []
        for value in hashes:
            expected = all((value ^ other).bit_count() > bits for other in kept)
            assert near.add(value) == expected
            if expected:
                kept.append(value)


def test_the_best_per_cent_by_score_lowest_key_first_among_equals() -> None:
    rows = [row(i, aesthetic=value) for i, value in enumerate([5.0, 7.0, 5.0, 6.0])]
    masks, reasons = select([(0, rows)], settings(top_score="aesthetic", top_percent=75.0))
    assert masks[0].tolist() == [True, True, False, True] and reasons == {"below_top_percent": 1}


def test_removals_name_keys_or_urls(tmp_path: Path) -> None:
    (tmp_path / "removed.txt").write_text("00000001\nhttp://a.test/2\n")
    masks, reasons = select([(0, [row(0), row(1), row(2)])], settings(removed=str(tmp_path / "removed.txt")))
    assert masks[0].tolist() == [True, False, False] and reasons == {"removed": 2}


def test_a_selection_survives_the_disk_and_equal_ones_are_equal_bytes(tmp_path: Path) -> None:
    masks = {0: np.array([True, False, True]), 7: np.ones(17, bool)}
    assert write_selection(tmp_path / "a", masks) == write_selection(tmp_path / "b", masks)
    read = read_selection(tmp_path / "a")
    assert all((read[shard] == mask).all() for shard, mask in masks.items()) and read.keys() == masks.keys()
