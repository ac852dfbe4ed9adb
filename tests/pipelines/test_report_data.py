from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.journal import Journal, journal_path
from pipelines.manifest import StageFolder
from pipelines.page import histogram
from pipelines.report_data import by_host, data_sections, distributions, read_rows, spread_shards


def make(folder: Path) -> dict[str, StageFolder]:
    """Three stages of two shards; of ten rows each, three are not found at one host and one picture is too small."""
    tables: dict[str, list[dict[str, object]]] = {"filter_metadata": [], "download": [], "filter_images": []}
    for stage in tables:
        (folder / stage).mkdir()
    for shard in range(2):
        for i in range(10):
            key, found = f"{10 * shard + i:08d}", i >= 3
            url = f"http://{'good' if found else 'bad'}.test/{key}.jpg"
            row = {"key": key, "url": url, "caption": "x" * (i + 1), "width": 100 + i, "height": 100, "similarity": 0.3}
            tables["filter_metadata"].append(row | {"similarity": None} if i == 0 else row)
            tables["download"].append({"key": key, "reason": "" if found else "http_404"})
            if found:
                tables["filter_images"].append({"key": key, "verdict": "too_small" if i == 9 else ""})
        for stage, rows in tables.items():
            pq.write_table(pa.Table.from_pylist(rows), folder / stage / f"{shard:06d}.parquet")
            (folder / stage / f"{shard:06d}.json").write_text("{}")
            rows.clear()
    return {stage: StageFolder(folder / stage, stage) for stage in tables}


def test_every_row_has_what_it_fell_by(tmp_path: Path) -> None:
    folders = make(tmp_path)
    rows = read_rows(folders, spread_shards(folders["download"]))
    assert [row["reason"] for row in rows[:10]] == ["http_404"] * 3 + [""] * 6 + ["too_small"]
    assert len(rows) == 20


def test_hosts_and_histograms_say_what_there_was(tmp_path: Path) -> None:
    folders = make(tmp_path)
    journal = Journal(journal_path(tmp_path, "download"))
    for shard in range(2):
        journal.metrics({"data/rows": 10, "data/samples": 7}, step=shard)
    page = "".join(data_sections(tmp_path, folders))
    text = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"good\.test\s+14\s+12\s+86%\s+too_small 2", text)
    assert re.search(r"bad\.test\s+6\s+0\s+0%\s+http_404 6", text)
    assert "20 rows that were asked for" in text and "caption length" in text and "similarity" in text


def test_a_run_that_has_not_downloaded_yet_has_no_such_section(tmp_path: Path) -> None:
    folders = make(tmp_path)
    assert data_sections(tmp_path, {"filter_metadata": folders["filter_metadata"]}) == []
    assert distributions([]) == [] and by_host([]) == []


def test_bars_of_a_histogram_are_as_high_as_their_counts() -> None:
    drawn = histogram([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], [0.0, 1.0], "x", bins=2)
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', drawn)]
    assert [round(h / heights[0], 2) for h in heights] == [1.0, 0.5, 0.25, 0.25]
    assert histogram([], [], "x") == "" and "nan" not in histogram([float("nan"), 2.0], [], "x")
