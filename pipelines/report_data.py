"""What a run's data looks like, for the report: distributions, the yield of each host, the yield over time.

All of it comes from the parquet files beside the shards: what was asked for (filter_metadata), what came (download),
what was judged good (filter_images). Of a long run, shards spread evenly over it stand for the rest.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.journal import journal_paths, read_entries
from pipelines.manifest import StageFolder
from pipelines.page import cell, curve, histogram, table

SHARDS = 64  # that are looked at
HOSTS = 20  # that are shown
NO_SCORES = ("key", "url", "caption", "width", "height")


def spread_shards(folder: StageFolder) -> list[int]:
    """At most SHARDS committed shards, evenly spaced."""
    shards = sorted(int(path.stem) for path in folder.path.glob("[0-9]*.json"))
    return shards if len(shards) <= SHARDS else [shards[i * len(shards) // SHARDS] for i in range(SHARDS)]


def read_rows(folders: dict[str, StageFolder], shards: list[int]) -> list[dict[str, Any]]:
    """Every row of these shards as the metadata has it, with `reason`: "" for used, else what it fell by."""
    import pyarrow.parquet as pq

    found = []
    for shard in shards:
        name = f"{shard:06d}.parquet"
        rows = pq.read_table(folders["filter_metadata"].data(name)).to_pylist()
        fates: dict[str, str] = {}
        for stage, column in (("download", "reason"), ("filter_images", "verdict")):
            path = folders[stage] / name if stage in folders else None
            if path is not None and path.exists():
                fates |= {row["key"]: row[column] or "" for row in pq.read_table(folders[stage].data(name)).to_pylist()}
        found += [{**row, "reason": fates[row["key"]]} for row in rows if row["key"] in fates]
    return found


def distributions(rows: list[dict[str, Any]]) -> list[str]:
    """Histograms of size, shape, caption length and scores: all rows asked for, and those that were kept."""
    sized = [row for row in rows if row.get("width") and row.get("height")]
    measures = {
        "shorter side as claimed, pixels": [(min(row["width"], row["height"]), row["reason"]) for row in sized],
        "width / height as claimed": [(row["width"] / row["height"], row["reason"]) for row in sized],
        "caption length, characters": [(len(row["caption"]), row["reason"]) for row in rows if row.get("caption")],
    }
    for name in [name for name in (rows[0] if rows else {}) if name not in (*NO_SCORES, "reason")]:
        numbers = [(row[name], row["reason"]) for row in rows if isinstance(row[name], int | float)]
        measures[name.replace("_", " ")] = numbers
    drawn = [
        histogram([value for value, _ in pairs], [value for value, reason in pairs if not reason], label)
        for label, pairs in measures.items()
        if pairs
    ]
    note = f"{len(rows):,} rows that were asked for; green: those whose pictures came and were judged good."
    return [f'<p class="soft">{cell(note)}</p>', f'<div class="charts">{"".join(drawn)}</div>'] if drawn else []


def by_host(rows: list[dict[str, Any]]) -> list[str]:
    """A table of the hosts that were asked most: rows, good pictures, and why the others fell most often."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        reasons[urlsplit(row["url"]).hostname or ""][row["reason"]] += 1
    most = sorted(reasons.items(), key=lambda item: (-item[1].total(), item[0]))[:HOSTS]
    lines = [
        {
            "host": host, "rows": count.total(), "good": count[""], "yield": f"{count[''] / count.total():.0%}",
            "most frequent losses": ", ".join(f"{why} {n}" for why, n in count.most_common(4) if why),
        }
        for host, count in most
    ]  # fmt: skip
    shown = f"; the {HOSTS} that were asked most" if len(reasons) > HOSTS else ""
    return [f"<h3>Yield by host</h3><p class='soft'>{len(reasons):,} hosts{shown}</p>", table(lines)] if lines else []


def over_time(run_folder: Path) -> list[str]:
    """The share of rows that became pictures, shard by shard, over the hours of the download."""
    said = [
        (entry["time"] / 60_000, entry["values"]["data/samples"] / max(1.0, entry["values"]["data/rows"]))
        for path in journal_paths(run_folder, "download")
        for entry in read_entries(path)[0]
        if entry["kind"] == "metrics" and "data/rows" in entry["values"]
    ]
    points = [(minute - said[0][0], share) for minute, share in sorted(said)]
    drawn = curve(points, "share of a shard's rows that became pictures, by minutes of downloading")
    return [f"<h3>Yield over time</h3>{drawn}"] if drawn else []


def data_sections(run_folder: Path, folders: dict[str, StageFolder]) -> list[str]:
    """All of this file; nothing where nothing has been downloaded yet."""
    if not {"filter_metadata", "download"} <= set(folders):
        return []
    rows = read_rows(folders, spread_shards(folders["download"]))
    return [*distributions(rows), *by_host(rows), *over_time(run_folder)]
