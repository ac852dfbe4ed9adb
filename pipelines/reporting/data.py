"""What a run's data looks like, for the report: distributions, the yield of each host, the yield over time.

All of it comes from the parquet files beside the shards: what was asked for (filter_metadata), what came (download),
what was seen in it (filter_images), what is used (train). Rows spread evenly over the run stand for the rest, so that
memory holds as many of a billion as of a million.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.journal import journal_paths, read_entries
from pipelines.manifest import StageFolder, shard_name
from pipelines.quarantine import QUARANTINED
from pipelines.reporting.page import cell, curve, histogram, table

SHARDS = 64  # that are looked at
ROWS = 32_000  # that are looked at, of all of them together
BATCH_ROWS = 1024  # that are read at a time, with their captions
HOSTS = 20  # that are shown
NO_SCORES = ("key", "url", "caption", "width", "height", "hash")
ORIGINAL, STORED = ("original_width", "original_height"), ("width", "height")


@dataclass
class Fate:
    """What became of a row."""

    reason: str  # what it fell by; "" where it is used
    size: tuple[int, int] | None = None  # of the picture, width and height, measured on what came
    scores: dict[str, float] = field(default_factory=dict)  # measured by filter_images


@dataclass
class Row:
    """A row that was asked for."""

    host: str
    caption_chars: int
    claimed: tuple[int, int] | None  # width and height, as the metadata has them
    scores: dict[str, float]  # as the metadata has them
    fate: Fate


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced."""
    return list(items) if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


# ---- reading -----------------------------------------------------------------------------------------------------
def sample_rows(folders: dict[str, StageFolder]) -> list[Row]:
    """Rows of the metadata with what became of them, ROWS at most."""
    shards = spread(folders["download"].shards(), SHARDS)
    selected, found = selection_reasons(folders, shards), []
    for shard in shards:
        fates = fates_of(folders, shard, selected.get(shard))
        for row in _spread_metadata(folders["filter_metadata"], shard, max(1, ROWS // len(shards))):
            if row["key"] in fates:
                found.append(_row(row, fates[row["key"]]))
    return found


def _row(row: dict[str, Any], fate: Fate) -> Row:
    scores = {name: value for name, value in row.items() if name not in NO_SCORES and isinstance(value, int | float)}
    return Row(urlsplit(row["url"]).hostname or "", len(row.get("caption") or ""), _size(row, STORED), scores, fate)


def _size(row: dict[str, Any], names: tuple[str, str]) -> tuple[int, int] | None:
    width, height = (row.get(name) or 0 for name in names)
    return (width, height) if width > 0 and height > 0 else None


def _spread_metadata(folder: StageFolder, shard: int, count: int) -> Iterator[dict[str, Any]]:
    """At most `count` rows of a shard, evenly spaced, whole."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(folder.readable(f"{shard_name(shard)}.parquet")) as file:
        wanted, start = np.array(spread(range(file.metadata.num_rows), count)), 0
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            here = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
            yield from batch.take(pa.array(here, pa.int64())).to_pylist()
            start += len(batch)


def rows_of(folder: StageFolder, shard: int, columns: Sequence[str], scores: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a shard, as far as they have these columns; with `scores` those of fractions too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(folder.readable(f"{shard_name(shard)}.parquet"))
    except FileNotFoundError:  # downloads that came from elsewhere have no ledger
        return
    with opened as file:
        names = [f.name for f in file.schema_arrow if f.name in columns or (scores and pa.types.is_floating(f.type))]
        for batch in file.iter_batches(BATCH_ROWS, columns=names, use_threads=False):
            yield from batch.to_pylist()


def fates_of(folders: dict[str, StageFolder], shard: int, selected: list[str] | None) -> dict[str, Fate]:
    """Key -> what became of it, for every row of a downloaded shard."""
    ledger = rows_of(folders["download"], shard, ("key", "reason", *ORIGINAL))
    fates = {row["key"]: Fate(row["reason"] or "", _size(row, ORIGINAL)) for row in ledger}
    if "filter_images" not in folders or folders["filter_images"].record(shard) is None:
        return fates
    judged = judged_of(folders["filter_images"], shard, selected)
    given_up = {key: Fate(QUARANTINED) for key, fate in fates.items() if not fate.reason and key not in judged}
    return fates | given_up | judged


def judged_of(images: StageFolder, shard: int, selected: list[str] | None) -> dict[str, Fate]:
    """The same for the pictures that came; `selected` says of those judged good what they are not used for."""
    used, found = iter(selected or ()), {}
    for row in rows_of(images, shard, ("key", "verdict", *ORIGINAL, *STORED), scores=True):
        size = _size(row, ORIGINAL) or _size(row, STORED)
        scores = {name: value for name, value in row.items() if isinstance(value, float)}
        found[row["key"]] = Fate(row["verdict"] or next(used, ""), size, scores)
    return found


def selection_reasons(folders: dict[str, StageFolder], shards: Sequence[int]) -> dict[int, list[str]]:
    """Shard -> for each picture that was judged good what it is not used for; nothing where none were selected yet."""
    from pipelines.selection import REASONS, read_reasons, read_selection

    train = folders.get("train")
    if train is None or not (train / "selection.parquet").exists():
        return {}
    if (train / REASONS).exists():
        return read_reasons(train / REASONS, shards)
    masks = read_selection(train / "selection.parquet", shards)  # by a training that kept no reasons
    return {shard: ["" if used else "not_selected" for used in mask] for shard, mask in masks.items()}


# ---- sections ----------------------------------------------------------------------------------------------------
def distributions(rows: list[Row]) -> list[str]:
    """Histograms of size, shape, caption length and scores: all rows asked for, and those that are used."""
    sizes = [(size, row) for row in rows if (size := row.fate.size or row.claimed)]
    measured = sum(row.fate.size is not None for _, row in sizes)
    of = f"{measured:,} as measured, {len(sizes) - measured:,} as claimed"
    measures = {
        f"shorter side in pixels, {of}": [(min(size), row) for size, row in sizes],
        f"width / height, {of}": [(size[0] / size[1], row) for size, row in sizes],
        "caption length, characters": [(row.caption_chars, row) for row in rows if row.caption_chars],
    }
    for source in ("claimed", "measured"):
        scores: dict[str, list[tuple[float, Row]]] = defaultdict(list)
        for row in rows:
            for name, value in (row.scores if source == "claimed" else row.fate.scores).items():
                scores[f"{name.replace('_', ' ')}, as {source}"].append((value, row))
        measures |= scores
    drawn = [
        histogram([value for value, _ in pairs], [value for value, row in pairs if not row.fate.reason], label)
        for label, pairs in measures.items()
        if pairs
    ]
    note = (
        f"{len(rows):,} rows that were asked for, spread evenly over the run; green: those that are used, as far as it "
        f"has come. Measured is what was seen in the pictures that came, claimed what the metadata says."
    )
    return [f'<p class="soft">{cell(note)}</p>', f'<div class="charts">{"".join(drawn)}</div>'] if drawn else []


def by_host(rows: list[Row]) -> list[str]:
    """A table of the hosts that were asked most: rows, those that are used, and why the others fell most often."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        reasons[row.host][row.fate.reason] += 1
    most = sorted(reasons.items(), key=lambda item: (-item[1].total(), item[0]))[:HOSTS]
    lines = [
        {
            "host": host, "rows": count.total(), "used": count[""], "yield": f"{count[''] / count.total():.0%}",
            "most frequent losses": ", ".join(f"{why} {n}" for why, n in count.most_common(4) if why),
        }
        for host, count in most
    ]  # fmt: skip
    shown = f"; the {HOSTS} that were asked most" if len(reasons) > HOSTS else ""
    return [f"<h3>Yield by host</h3><p class='soft'>{len(reasons):,} hosts{shown}</p>", table(lines)] if lines else []


def over_time(run_folder: Path) -> list[str]:
    """The share of rows that became pictures, shard by shard, over the hours of the download."""
    said = sorted(
        (entry["time"] / 60_000, entry["values"]["data/samples"] / max(1.0, entry["values"]["data/rows"]))
        for path in journal_paths(run_folder, "download")
        for entry in read_entries(path)[0]
        if entry["kind"] == "metrics" and "data/rows" in entry["values"]
    )
    points = [(minute - said[0][0], share) for minute, share in said]
    drawn = curve(points, "share of a shard's rows that became pictures, by minutes of downloading")
    return [f"<h3>Yield over time</h3>{drawn}"] if drawn else []


def data_sections(run_folder: Path, folders: dict[str, StageFolder]) -> list[str]:
    """All of this file; nothing where nothing has been downloaded yet."""
    if not {"filter_metadata", "download"} <= set(folders):
        return []
    rows = sample_rows(folders)
    return [*distributions(rows), *by_host(rows), *over_time(run_folder)]
