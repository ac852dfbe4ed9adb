"""What the report says of the data: distributions, hosts and yield, from a few rows of many."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.journal import Journal, journal_path
from pipelines.manifest import StageFolder
from pipelines.reporting import data
from pipelines.reporting.data import by_host, data_sections, distributions, sample_rows, spread
from pipelines.reporting.page import histogram
from pipelines.selection import REASONS, reasons_file, write_selection


def make(folder: Path, shards: int = 2, rows: int = 10, caption: str = "x") -> dict[str, StageFolder]:
    """Three stages of two shards; of ten rows each, three are not found at one host and one picture is too small.

    The metadata claims sizes of even rows only, all of them wrong.
    """
    stages = {stage: StageFolder(folder / stage, stage) for stage in ("filter_metadata", "download", "filter_images")}
    for shard in range(shards):
        tables: dict[str, list[dict[str, Any]]] = {stage: [] for stage in stages}
        for i in range(rows):
            key, found = f"{shard:06d}{i:04d}", i % 10 >= 3
            url = f"http://{'good' if found else 'bad'}.test/{key}.jpg"
            claimed = {"width": 7, "height": 7} if i % 2 == 0 else {"width": None, "height": None}
            score = None if i == 0 else 0.3
            tables["filter_metadata"].append(
                {"key": key, "url": url, "caption": caption * (i + 1), "similarity": score, "hash": 5, **claimed}
            )
            size = (1000 + i, 500) if found else (None, None)
            ledger = {"key": key, "url": url, "reason": "" if found else "http_404"}
            tables["download"].append(ledger | {"original_width": size[0], "original_height": size[1]})
            if found:
                verdict = "too_small" if i % 10 == 9 else ""
                seen = {"key": key, "verdict": verdict, "width": 100, "height": 50, "phash": 1}
                known = {"original_width": size[0], "original_height": size[1]}
                scores = {"clip_similarity": None if verdict else 0.2, "nsfw": None if verdict else i / 10}
                tables["filter_images"].append(seen | known | scores)
        for stage, folder_of in stages.items():
            with folder_of.attempt(shard, "f") as attempt:
                table = pa.Table.from_pylist(tables[stage])
                pq.write_table(table, attempt.path / f"{shard:06d}.parquet")
                attempt.commit(rows=len(table), samples=len(table), dropped={}, inputs={})
    return stages


def charts(page: list[str]) -> dict[str, list[tuple[str, float, float]]]:
    """Caption of each histogram -> (colour, x, height) of its bars."""
    found = {}
    for figure in re.findall(r"<figure>(.*?)</figure>", "".join(page)):
        bars = re.findall(r'<rect x="([\d.]+)" [^>]*height="([\d.]+)" fill="([^"]+)"', figure)
        label = re.search(r"<figcaption>(.*?)</figcaption>", figure)
        found[label[1] if label else ""] = [(colour, float(x), float(height)) for x, height, colour in bars]
    return found


def test_every_row_has_what_it_fell_by(tmp_path: Path) -> None:
    rows = sample_rows(make(tmp_path))
    assert [row.fate.reason for row in rows[:10]] == ["http_404"] * 3 + [""] * 6 + ["too_small"]
    assert len(rows) == 20


def test_what_the_selection_leaves_out_has_its_reason_too(tmp_path: Path) -> None:
    folders = make(tmp_path)
    train = folders["train"] = StageFolder(tmp_path / "train", "train")
    train.path.mkdir()
    whys = np.array([0, 2, 0, 0, 1, 0], np.uint8)
    write_selection(train / "selection.parquet", {1: whys == 0})
    (train / REASONS).write_bytes(reasons_file(["used", "removed", "nsfw_out_of_bounds"], {1: whys}))
    rows = sample_rows(folders)
    assert [row.fate.reason for row in rows[10:]] == [*["http_404"] * 3, "", "nsfw_out_of_bounds", "", "", "removed",
                                                      "", "too_small"]  # fmt: skip
    assert [row.fate.reason for row in rows[:10]].count("") == 6, "a shard that the training does not know"


def test_sizes_are_measured_where_a_picture_came_and_claimed_elsewhere(tmp_path: Path) -> None:
    rows = sample_rows(make(tmp_path))
    assert [row.fate.size or row.claimed for row in rows[:4]] == [(7, 7), None, (7, 7), (1003, 500)]
    drawn = charts(distributions(rows))
    assert "shorter side in pixels, 14 as measured, 4 as claimed" in drawn
    assert "width / height, 14 as measured, 4 as claimed" in drawn
    bars = drawn["shorter side in pixels, 14 as measured, 4 as claimed"]
    grey = [height for colour, _, height in bars if colour == "var(--line)"]
    assert len(grey) == 2 and grey[1] / grey[0] == pytest.approx(14 / 4, rel=0.01)


def test_scores_that_were_measured_are_drawn_beside_those_of_the_metadata(tmp_path: Path) -> None:
    drawn = charts(distributions(sample_rows(make(tmp_path))))
    assert {"similarity, as claimed", "clip similarity, as measured", "nsfw, as measured"} < set(drawn)
    assert not any("hash" in label for label in drawn)
    nsfw = [(x, height) for colour, x, height in drawn["nsfw, as measured"] if colour == "var(--kept)"]
    assert len(nsfw) == 6 and len({height for _, height in nsfw}) == 1  # 0.3 to 0.8, twice each


def test_hosts_and_histograms_say_what_there_was(tmp_path: Path) -> None:
    page = "".join(data_sections(tmp_path, make(tmp_path)))
    text = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"good\.test\s+14\s+12\s+86%\s+too_small 2", text)
    assert re.search(r"bad\.test\s+6\s+0\s+0%\s+http_404 6", text)
    assert "20 rows that were asked for" in text and "caption length" in text
    assert "Yield over time" not in text


def test_the_yield_of_every_shard_stands_at_its_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, clock = make(tmp_path), iter([0, 60, 120, 240])
    monkeypatch.setattr("pipelines.journal.time.time_ns", lambda: next(clock) * 10**9)
    journal = Journal(journal_path(tmp_path, "download"))
    for shard, samples in enumerate((10, 5, 0)):
        journal.metrics({"data/rows": 10, "data/samples": samples}, step=shard)
    journal.metrics({"other": 3.0}, step=9)
    page = "".join(data_sections(tmp_path, folders))
    points = re.search(r'class="curve" points="([^"]+)"', page.partition("Yield over time")[2])
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in points[1].split())
    assert x1 - x0 == pytest.approx(x2 - x1) and y1 - y0 == pytest.approx(y2 - y1) and x0 < x1 and y0 < y1


def test_a_run_that_has_not_downloaded_yet_has_no_such_section(tmp_path: Path) -> None:
    folders = make(tmp_path)
    assert data_sections(tmp_path, {"filter_metadata": folders["filter_metadata"]}) == []
    assert distributions([]) == [] and by_host([]) == []


def test_memory_is_that_of_a_few_rows_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ROWS", 60)
    monkeypatch.setattr(data, "BATCH_ROWS", 50)
    folders = make(tmp_path, shards=3, rows=600, caption="long words " * 30)  # about 180 MB of captions
    sample_rows(folders)  # what is imported and cached does not count
    tracemalloc.start()
    rows = sample_rows(folders)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 60 and len({row.caption_chars for row in rows}) == 20
    assert max(row.caption_chars for row in rows) > 0.9 * 600 * 330
    assert peak < 30e6


def test_items_are_spread_evenly() -> None:
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread(range(3), 4) == [0, 1, 2]


def test_bars_of_a_histogram_are_as_high_as_their_counts() -> None:
    drawn = histogram([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], [0.0, 1.0], "x", bins=2)
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', drawn)]
    assert [round(h / heights[0], 2) for h in heights] == [1.0, 0.5, 0.25, 0.25]
    assert histogram([], [], "x") == "" and "nan" not in histogram([float("nan"), 2.0], [], "x")
