"""Reads the metadata, drops rows that are not worth a request, and deals the rest into shards.

Parquet files in the order of their names, rows in the order of the files. Every dropped row has one reason, the first
of:

    no_url, no_caption, too_small (or of unknown size), extreme_shape, <score> (outside of
    dataset.filter_metadata.bounds, or missing), short_caption, duplicate_url_caption, duplicate_url

Of rows with the same URL and caption, and then of rows with the same URL, the first one stays; a duplicate of a row
that was dropped is none.

-> filter_metadata/000042.parquet {key, url, caption, width, height, scores}. DuckDB does the work out of core.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import sample_web
from pipelines.dag import Job
from pipelines.manifest import shard_name
from pipelines.settings import FilterMetadataConfig, SourceConfig

NEEDED = ("url", "caption")
SHAPE = ("width", "height")
DUPLICATES = {"duplicate_url_caption": "url, caption", "duplicate_url": "url"}  # reason -> what is equal, in order


def sample_key(shard: int, row: int, shard_samples: int) -> str:
    """The name of a sample for good: six digits of shard, then the row, as img2dataset counts them too."""
    return f"{shard:06d}{row:0{math.ceil(math.log10(shard_samples))}d}"


def source_files(job: Job) -> list[str]:
    """The metadata files in order; the embedded web writes its own first."""
    source: SourceConfig = job.what["dataset.source"]
    if source.metadata is None:
        path = Path(job.how.run) / "sample_web" / "metadata.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_web.write_metadata(job.what["dataset.sample_web"], path)
        return [str(path)]
    files = sorted(glob.glob(source.metadata))
    if not files:
        raise FileNotFoundError(f"no metadata at dataset.source.metadata={source.metadata}")
    return files


def check_columns(files: list[str], source: SourceConfig, settings: FilterMetadataConfig) -> None:
    """Raises ValueError showing found and expected columns when a file lacks one."""
    unmapped = [name for name in [*NEEDED, *settings.bounds] if name not in source.columns]
    if unmapped:
        raise ValueError(f"dataset.source.columns does not say which columns hold {', '.join(unmapped)}")
    for file in files:
        found = pq.read_schema(file).names
        missing = [column for column in source.columns.values() if column not in found]
        if missing:
            raise ValueError(
                f"{file} has no column {', '.join(missing)}; it has {', '.join(found)}. "
                f"Say what they are called there with dataset.source.columns"
            )


def reason_sql(settings: FilterMetadataConfig, columns: dict[str, str]) -> str:
    """A CASE expression: the first reason to drop a row, or ''."""
    rules = [("no_url", "coalesce(trim(url), '') = ''"), ("no_caption", "coalesce(trim(caption), '') = ''")]
    if all(name in columns for name in SHAPE):
        unknown = " OR ".join(f"{side} IS NULL OR isnan({side}::DOUBLE)" for side in SHAPE)
        rules.append(("too_small", f"{unknown} OR least(width, height) < {settings.min_size}"))
        rules.append(("extreme_shape", f"greatest(width, height) > {settings.max_aspect} * least(width, height)"))
    for score, (low, high) in settings.bounds.items():
        outside = [f"{score} IS NULL OR isnan({score}::DOUBLE)"]
        outside += [f"{score} < {low}"] if low is not None else []
        outside += [f"{score} > {high}"] if high is not None else []
        rules.append((score, " OR ".join(outside)))
    rules.append(("short_caption", f"length(trim(caption)) < {settings.min_caption_chars}"))
    return "CASE " + " ".join(f"WHEN {rule} THEN '{reason}'" for reason, rule in rules) + " ELSE '' END"


def run(job: Job) -> dict[str, Any]:
    """Writes the shards and their records. Returns the stage's funnel {rows, samples, dropped}."""
    source: SourceConfig = job.what["dataset.source"]
    settings: FilterMetadataConfig = job.what["dataset.filter_metadata"]
    files = source_files(job)
    check_columns(files, source, settings)
    with job.output.attempt(None, job.fingerprint) as scratch:
        database = duckdb.connect(str(scratch.path / "rows.duckdb"), config={"temp_directory": str(scratch.path)})
        with database:
            _judge(database, files, source, settings)
            for shard, table in enumerate(_shards(database, settings.shard_samples)):
                _commit(job, shard, table)
            counts = database.execute("SELECT reason, count(*) FROM rows GROUP BY reason ORDER BY reason").fetchall()
    dropped = {reason: count for reason, count in counts if reason}
    kept = dict(counts).get("", 0)
    return {"rows": kept + sum(dropped.values()), "samples": kept, "dropped": dropped}


def _judge(database: Any, files: list[str], source: SourceConfig, settings: FilterMetadataConfig) -> None:
    """Fills the table `rows`: every row of every file with its reason."""
    names = ", ".join(f'"{column}" AS {name}' for name, column in source.columns.items())
    database.execute("SET preserve_insertion_order = true; SET enable_progress_bar = false")
    for number, file in enumerate(files):
        into = "CREATE TABLE rows AS" if number == 0 else "INSERT INTO rows"
        database.execute(
            f"{into} SELECT {number} AS file, file_row_number AS row, {', '.join(source.columns)}, "
            f"{reason_sql(settings, source.columns)} AS reason "
            f"FROM (SELECT {names}, file_row_number FROM read_parquet(?, file_row_number = true))",
            [file],
        )
    for reason, equal in DUPLICATES.items():
        same = " AND ".join(f"rows.{column} = twice.{column}" for column in equal.split(", "))
        database.execute(
            f"UPDATE rows SET reason = '{reason}' FROM (SELECT {equal}, min((file, row)) AS first FROM rows "
            f"WHERE reason = '' GROUP BY {equal} HAVING count(*) > 1) AS twice "
            f"WHERE rows.reason = '' AND {same} AND (rows.file, rows.row) <> twice.first"
        )


def _shards(database: Any, shard_samples: int) -> Iterator[pa.Table]:
    """The kept rows in order, a table of `shard_samples` rows at a time."""
    query = "SELECT * EXCLUDE (file, row, reason) FROM rows WHERE reason = '' ORDER BY file, row"
    rest: pa.Table | None = None
    for batch in database.cursor().sql(query).to_arrow_reader(shard_samples):
        table = pa.Table.from_batches([batch])
        rest = table if rest is None else pa.concat_tables([rest, table])
        while rest.num_rows >= shard_samples:
            yield rest.slice(0, shard_samples)
            rest = rest.slice(shard_samples)
    if rest is not None and rest.num_rows:
        yield rest


def _commit(job: Job, shard: int, table: pa.Table) -> None:
    shard_samples = job.what["dataset.filter_metadata"].shard_samples
    keys = pa.array([sample_key(shard, row, shard_samples) for row in range(table.num_rows)])
    with job.output.attempt(shard, job.fingerprint) as attempt:
        path = attempt.path / f"{shard_name(shard)}.parquet"
        pq.write_table(table.add_column(0, "key", keys).combine_chunks(), path, compression="zstd")
        attempt.commit(rows=table.num_rows, samples=table.num_rows, dropped={}, inputs={})
