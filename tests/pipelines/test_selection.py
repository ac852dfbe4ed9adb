"""Which samples are used is decided from stored scores alone; every sample that is not used has one reason."""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines import selection
from pipelines.config import compose
from pipelines.dag import Dag
from pipelines.selection import read_selection, write_selection
from pipelines.settings import SelectionConfig, TableResources

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))
LIMITS = TableResources(threads=1, memory_bytes=100_000_000)
NOTHING = SelectionConfig(
    thresholds={}, exact_duplicates=False, near_duplicate_bits=None, held_out_near_duplicate_bits=None,
    top_score=None, top_percent=None, removed=None,
)  # fmt: skip


def row(key: int, **scores: Any) -> dict[str, Any]:
    return {"key": f"{key:08d}", "url": f"http://a.test/{key}", "phash": key * 0x9E3779B97F4A7C15 % 2**64, **scores}


def select(shards: list[tuple[int, list[dict[str, Any]]]], settings: SelectionConfig, held_out: Any = ()) -> Any:
    chosen = choose(((shard, table(rows)) for shard, rows in shards), settings, held_out)
    return chosen.masks(), chosen.counts()


def choose(shards: Iterable[tuple[int, pa.Table]], settings: SelectionConfig, held_out: Any = ()) -> selection.Chosen:
    with tempfile.TemporaryDirectory() as scratch:
        return selection.select(shards, settings, LIMITS, Path(scratch), held_out)


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], pa.uint64() if name == "phash" else None)
                     for name in rows[0]})  # fmt: skip


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


def test_of_equal_bytes_the_lowest_key_stays() -> None:
    rows = [row(i, sha256=digest * 32) for i, digest in enumerate(["aa", "bb", "aa"])]
    masks, reasons = select([(0, rows[:2]), (4, rows[2:])], settings(exact_duplicates=True))
    assert masks[0].all() and masks[4].tolist() == [False] and reasons == {"exact_duplicate": 1}


def test_the_best_per_cent_by_score_lowest_key_first_among_equals() -> None:
    rows = [row(i, aesthetic=value) for i, value in enumerate([5.0, 7.0, 5.0, 6.0])]
    masks, reasons = select([(0, rows)], settings(top_score="aesthetic", top_percent=75.0))
    assert masks[0].tolist() == [True, True, False, True] and reasons == {"below_top_percent": 1}


def test_removals_name_keys_urls_or_hashes(tmp_path: Path) -> None:
    (tmp_path / "removed.txt").write_text("00000001\nhttp://a.test/2\nABCDEF\n-77\n\nffff\n")
    rows = [row(i, md5_of_source=md5, sha256="ffff" if i == 5 else "00", hash=number)
            for i, (md5, number) in enumerate([("", 1), ("", 2), ("", 3), ("abcdef", 4), (None, -77), ("", 6)])]
    masks, reasons = select([(0, rows)], settings(removed=str(tmp_path / "removed.txt")))
    assert masks[0].tolist() == [True, False, False, False, False, False] and reasons == {"removed": 5}


def test_a_long_removal_list_is_not_gone_through_for_every_shard() -> None:
    class Asked(set[str]):
        def __iter__(self) -> Any:
            raise AssertionError("every line was looked at")

    found = selection.is_removed(table([row(i) for i in range(3)]), Asked({"00000001", "http://a.test/2"}))
    assert found.tolist() == [False, True, True]


def test_a_removal_list_counts_by_content_and_touches_nothing_before_train(tmp_path: Path) -> None:
    (tmp_path / "removed.txt").write_text("00000001\n")
    given = f"dataset.selection.removed={tmp_path / 'removed.txt'}"
    without, before = Dag(compose([])).fingerprints, Dag(compose([given])).fingerprints
    (tmp_path / "removed.txt").write_text("00000002\n")
    after = Dag(compose([given])).fingerprints
    for stage in ("filter_metadata", "download", "filter_images", "precompute_latents"):
        assert without[stage] == before[stage] == after[stage]
    assert len({without["train"], before["train"], after["train"]}) == 3


def test_a_selection_survives_the_disk_and_equal_ones_are_equal_bytes(tmp_path: Path) -> None:
    masks = {0: np.array([True, False, True]), 7: np.ones(17, bool)}
    assert write_selection(tmp_path / "a", masks) == write_selection(tmp_path / "b", masks)
    read = read_selection(tmp_path / "a")
    assert all((read[shard] == mask).all() for shard, mask in masks.items()) and read.keys() == masks.keys()


def test_every_sample_that_is_not_used_has_its_reason_on_disk(tmp_path: Path) -> None:
    digests = ["aa", "aa", "bb", "cc"]
    shards = [(shard, table([row(10 * shard + i, sha256=digest * 32, score=float(i))
                             for i, digest in enumerate(digests)])) for shard in (0, 3)]  # fmt: skip
    chosen = choose(shards, settings(exact_duplicates=True, thresholds={"score": [None, 2.0]}))
    (tmp_path / "reasons").write_bytes(selection.reasons_file(chosen.reasons, chosen.whys()))
    here, there = ["", "exact_duplicate", "", "score_out_of_bounds"], ["exact_duplicate"] * 3 + ["score_out_of_bounds"]
    assert selection.read_reasons(tmp_path / "reasons", [0, 3]) == {0: here, 3: there}
    assert selection.read_reasons(tmp_path / "reasons", [3, 5]) == {3: there}
    write_selection(tmp_path / "selection", chosen.masks())
    assert {shard: mask.tolist() for shard, mask in read_selection(tmp_path / "selection", [3]).items()} == {
        3: [False] * 4
    }


# -- all rules together -----------------------------------------------------------------------------------------------
def by_plain_rules(rows: list[dict[str, Any]], held_out: list[bool], removed: set[str]) -> list[str]:
    """The reason of each sample, by comparing every one with every other."""
    why = ["removed" if row["key"] in removed else "" for row in rows]
    why = [reason or ("" if (row["score"] or 0) >= 0.2 else "score_out_of_bounds")
           for reason, row in zip(why, rows, strict=True)]  # fmt: skip
    seen: set[str] = set()
    kept: list[int] = []
    for same in ("exact_duplicate", "near_duplicate"):
        for i, row in enumerate(rows):
            if why[i]:
                continue
            if same == "exact_duplicate":
                why[i] = same if row["sha256"] in seen else ""
                seen.add(row["sha256"])
            else:
                why[i] = same if any((row["phash"] ^ other).bit_count() <= 3 for other in kept) else ""
                kept += [] if why[i] else [row["phash"]]
    used = [i for i, reason in enumerate(why) if not reason]
    best = sorted(used, key=lambda i: (-rows[i]["score"], i))
    for i in best[round(len(used) * 0.7) :]:
        why[i] = "below_top_percent"
    trained = [row["phash"] for i, row in enumerate(rows) if not why[i] and not held_out[i]]
    for i, row in enumerate(rows):
        if not why[i] and held_out[i] and any((row["phash"] ^ other).bit_count() <= 8 for other in trained):
            why[i] = "near_duplicate_of_trained"
    return why


@pytest.mark.parametrize("rows_at_once", [1, 40, 1 << 18])
def test_it_is_what_the_plain_rules_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    for name in ("ROWS_AT_ONCE", "OTHERS_AT_ONCE"):
        monkeypatch.setattr(selection, name, rows_at_once)
    chance = random.Random(SEED + rows_at_once)
    looks = [chance.getrandbits(64) for _ in range(60)]
    rows = [row(i, sha256=f"{chance.randrange(250):064x}", score=chance.choice([None, 0.1, 0.3, 0.5, chance.random()]),
                phash=chance.choice(looks) ^ sum(1 << bit for bit in chance.sample(range(64), chance.randrange(7))))
            for i in range(300)]  # fmt: skip
    sizes = [7, 0, 93, 60, 140]
    shards, begin = [], 0
    for shard, size in enumerate(sizes):
        shards.append((shard, table(rows)[begin : begin + size]))
        begin += size
    held_out = [shard in (0, 3) for shard, size in enumerate(sizes) for _ in range(size)]
    removed = {row["key"] for row in chance.sample(rows, 20)}
    (tmp_path / "removed.txt").write_text("\n".join(removed))
    rules = settings(thresholds={"score": [0.2, None]}, exact_duplicates=True, near_duplicate_bits=3, top_score="score",
                     top_percent=70.0, held_out_near_duplicate_bits=8, removed=str(tmp_path / "removed.txt"))
    chosen = choose(shards, rules, {0, 3})
    expected = by_plain_rules(rows, held_out, removed)
    assert [chosen.reasons[why] for why in chosen.why] == [reason or "used" for reason in expected]
    assert len(Counter(expected)) == 7 and chosen.counts() == Counter(filter(None, expected))


# -- held-out shards -------------------------------------------------------------------------------------------------
def test_no_held_out_sample_looks_like_one_that_is_trained_on() -> None:
    near, far = row(7), row(8)
    near["phash"] ^= 0b101  # two bits from row 7
    twin, removed = row(4), row(5)
    twin["phash"], removed["phash"] = row(3)["phash"], row(9)["phash"]
    shards = [(0, [row(1), row(7), removed]), (1, [row(2), row(3), twin]), (2, [near, far, row(9), row(10)])]

    def used(bits: int | None, held_out: set[int]) -> tuple[list[bool], dict[str, int]]:
        rules = settings(held_out_near_duplicate_bits=bits, removed=None, thresholds={"score": [0.0, None]})
        scored = [(n, [{**each, "score": -1.0 if each is removed else 1.0} for each in rows]) for n, rows in shards]
        masks, reasons = select(scored, rules, held_out)
        assert masks[0].tolist() == [True, True, False] and masks[1].all()  # what is trained on is not touched
        return masks[2].tolist(), reasons

    # Row 9 looks like one that is not trained on, which does no harm.
    assert used(2, {2}) == ([False, True, True, True], {"score_out_of_bounds": 1, "near_duplicate_of_trained": 1})
    assert used(1, {2})[0] == used(2, set())[0] == used(None, {2})[0] == [True] * 4
