"""Rows in, shards out: one reason for each dropped row, the first duplicate stays, equal input gives equal bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import compose
from pipelines.dag import Dag, Job
from pipelines.manifest import StageFolder
from pipelines.settings import FilterMetadataConfig, SourceConfig
from pipelines.stages import filter_metadata

COLUMNS = {"url": "URL", "caption": "TEXT", "width": "WIDTH", "height": "HEIGHT", "similarity": "similarity"}
SETTINGS = FilterMetadataConfig(
    shard_samples=4, min_size=100, max_aspect=3.0, bounds={"similarity": [0.28, 1.0]}, min_caption_chars=5
)


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {"URL": f"http://a.test/{number}", "TEXT": f"caption {number}", "WIDTH": 200, "HEIGHT": 100,
            "similarity": 0.3, **changes}


def make_job(folder: Path, rows: list[list[dict[str, Any]]], columns: dict[str, str] = COLUMNS) -> Job:
    for i, part in enumerate(rows):
        pq.write_table(pa.Table.from_pylist(part), folder / f"part-{i:05d}.parquet")
    job = Dag(compose([])).job("filter_metadata")
    what = {**job.what, "dataset.source": SourceConfig(str(folder / "part-*.parquet"), columns),
            "dataset.filter_metadata": SETTINGS}
    return replace(job, what=what, output=StageFolder(folder / "out", "filter_metadata"))


def read(job: Job) -> list[dict[str, Any]]:
    return [r for path in sorted(job.output.path.glob("*.parquet")) for r in pq.read_table(path).to_pylist()]


def test_every_dropped_row_has_one_reason_the_first_that_holds(tmp_path: Path) -> None:
    rows = [
        row(0), row(1, URL=None), row(2, URL="  ", TEXT=None), row(3, TEXT=""), row(4, WIDTH=99, similarity=None),
        row(5, HEIGHT=None), row(6, WIDTH=301), row(7, similarity=0.1), row(8, similarity=6016.0),
        row(9, similarity=float("nan")), row(10, similarity=None), row(11, TEXT="four"), row(12, URL="http://a.test/0"),
        row(13), row(14, WIDTH=float("nan"), HEIGHT=float("nan")), row(0),
    ]  # fmt: skip
    job = make_job(tmp_path, [rows])
    assert filter_metadata.run(job) == {
        "rows": 16, "samples": 2,
        "dropped": {"duplicate_url": 1, "duplicate_url_caption": 1, "extreme_shape": 1, "no_caption": 1, "no_url": 2,
                    "short_caption": 1, "similarity": 4, "too_small": 3},
    }  # fmt: skip
    assert [(r["key"], r["url"]) for r in read(job)] == [("0000000", "http://a.test/0"), ("0000001", "http://a.test/13")]


def test_rows_keep_their_order_across_files_and_shards(tmp_path: Path) -> None:
    job = make_job(tmp_path, [[row(i) for i in range(7)], [row(i) for i in range(7, 10)]])
    filter_metadata.run(job)
    assert [r["url"] for r in read(job)] == [f"http://a.test/{i}" for i in range(10)]
    assert [r["key"] for r in read(job)] == [f"{i // 4:06d}{i % 4}" for i in range(10)]
    assert {shard: record.samples for shard, record in job.output.committed().items()} == {0: 4, 1: 4, 2: 2}


def test_of_duplicates_across_files_the_first_stays(tmp_path: Path) -> None:
    other = row(1, TEXT="another caption")
    job = make_job(tmp_path, [[row(0), row(1)], [other, row(2)], [row(1), other, row(0)]])
    assert filter_metadata.run(job)["dropped"] == {"duplicate_url": 1, "duplicate_url_caption": 3}
    assert [r["caption"] for r in read(job)] == ["caption 0", "caption 1", "caption 2"]


def test_a_duplicate_of_a_dropped_row_is_none(tmp_path: Path) -> None:
    job = make_job(tmp_path, [[row(0, similarity=0.0), row(0)]])
    assert filter_metadata.run(job)["dropped"] == {"similarity": 1} and len(read(job)) == 1


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        job = make_job(tmp_path / name, [[row(i) for i in range(9)]])
        filter_metadata.run(job)
        digests.append([record.digest for record in job.output.committed().values()])
    assert digests[0] == digests[1]


def test_a_missing_column_shows_found_and_expected(tmp_path: Path) -> None:
    job = make_job(tmp_path, [[row(0)]], {**COLUMNS, "caption": "CAPTION"})
    with pytest.raises(ValueError, match="no column CAPTION; it has URL, TEXT, .* dataset.source.columns"):
        filter_metadata.run(job)


def test_a_score_without_a_column_is_named(tmp_path: Path) -> None:
    job = make_job(tmp_path, [[row(0)]], {"url": "URL", "caption": "TEXT"})
    with pytest.raises(ValueError, match="does not say which columns hold similarity"):
        filter_metadata.run(job)


def test_hostile_captions_are_text_and_nothing_else(tmp_path: Path) -> None:
    nasty = ["'; DROP TABLE rows; --", "NUL \0 inside", "bidi \u202e reversed", "x" * 1_000_000, "${oc.env:HOME}"]
    job = make_job(tmp_path, [[row(i, TEXT=text) for i, text in enumerate(nasty)]])
    filter_metadata.run(job)
    assert [r["caption"] for r in read(job)] == nasty
