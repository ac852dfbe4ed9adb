"""Reads the metadata, drops rows that are not worth a request, and deals the rest into shards.

Parquet files (or tab-separated ones) in the order of their names, rows in the order of the files. Every dropped row has
one reason, by the first rule of pipelines/metadata_rules.py that holds. Of rows with the same URL and caption, and then
of rows with the same URL, the first one stays, across the whole set; a duplicate of a row that was dropped is none.

-> filter_metadata/000042.parquet {key, url, caption, and all else that dataset.source.columns maps}

DuckDB does the work out of core, in two passes over each file. The first judges every row and keeps 24 bytes of those
that stay; where two of these are equal, the second pass leaves the later one out while it deals the rows. Strings are
compared by 128 bits of their hash. DuckDB reads the columns as plain values: what a file says of extension types, which
other readers may turn into code, is not looked at.
"""

from __future__ import annotations

import glob
import math
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import sample_web
from pipelines.dag import ROOT, Job
from pipelines.manifest import Record, shard_name
from pipelines.metadata_rules import NEEDED, SHAPE, check, deny_table, describe, quoted, rules
from pipelines.settings import FilterMetadataConfig, SourceConfig
from pipelines.tab_separated import as_parquet

ROW_BITS = 40  # a row's place in the whole set: its file, then its row in this many bits
NUMBER = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT",
          "FLOAT", "DOUBLE", "DECIMAL")  # fmt: skip
WRITERS = 2  # threads that write shards while the next rows are read


def sample_key(shard: int, row: int, shard_samples: int) -> str:
    """The name of a sample for good: six digits of shard, then the row, as img2dataset counts them too."""
    return f"{shard:06d}{row:0{math.ceil(math.log10(shard_samples))}d}"


def run(job: Job) -> dict[str, Any]:
    """Writes the shards and their records. Returns the stage's funnel {rows, samples, dropped}."""
    source: SourceConfig = job.what["dataset.source"]
    settings: FilterMetadataConfig = job.what["dataset.filter_metadata"]
    check(settings, source.columns)
    files = source_files(job)
    print(f"filter_metadata: {len(files)} files; {describe(settings, source.columns)}", flush=True)
    with job.output.attempt(None, job.fingerprint) as scratch, MetadataSet(files, job, scratch.path) as rows:
        dropped = rows.judge()
        samples = deal(job, rows.kept(), first_shard=0)
    return {"rows": samples + sum(dropped.values()), "samples": samples, "dropped": dropped}


# -- the files --------------------------------------------------------------------------------------------------------
def source_files(job: Job) -> list[str]:
    """The metadata files in order; the embedded web writes its own first."""
    source: SourceConfig = job.what["dataset.source"]
    if source.metadata is None:
        path = Path(job.how.run) / "sample_web" / "metadata.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_web.write_metadata(job.what["dataset.sample_web"], path)
        return [str(path)]
    if source.format not in ("parquet", "tsv"):
        raise ValueError(f"dataset.source.format={source.format}; expected parquet or tsv")
    files = sorted(glob.glob(source.metadata))
    if not files:
        raise FileNotFoundError(
            f"no metadata at dataset.source.metadata={source.metadata} (a path or a glob of {source.format} files)"
        )
    return files


class MetadataSet:
    """The rows of all files in a database of their own, which spills into a folder instead of filling memory."""

    def __init__(self, files: list[str], job: Job, scratch: Path) -> None:
        source, limits = job.what["dataset.source"], job.how.cluster.filter_metadata
        self.settings: FilterMetadataConfig = job.what["dataset.filter_metadata"]
        self.columns = {name: column for name, column in source.columns.items() if column is not None}
        self.files = files
        if source.format == "tsv" and source.metadata is not None:
            self.files = [as_parquet(file, scratch / f"{i}.parquet", self.columns) for i, file in enumerate(files)]
        self.database = duckdb.connect(str(scratch / "rows.duckdb"), config={
            "temp_directory": str(scratch), "threads": limits.threads, "memory_limit": f"{limits.memory_bytes}B",
            "preserve_insertion_order": True, "enable_progress_bar": False, "autoinstall_known_extensions": False,
        })  # fmt: skip
        self.types = self._types(self.files[0])
        self.rules = rules(self.settings, set(self.columns))
        self.samples = 0

    def __enter__(self) -> MetadataSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    def _types(self, file: str) -> dict[str, str]:
        """Our columns' types, as the shards hold them, from the first file; numbers that come as text become such.

        Raises ValueError showing found and expected when a file lacks a column, or holds no text where text must be.
        """
        found = self._found(file)
        types = {name: found[column] for name, column in self.columns.items()}
        for name in {*SHAPE, *self.settings.bounds} & types.keys():
            if types[name].partition("(")[0] not in NUMBER:
                types[name] = "DOUBLE"
        return types

    def _found(self, file: str) -> dict[str, str]:
        """The columns of a file and their types, checked against those that are mapped."""
        try:
            asked = self.database.execute(f"DESCRIBE SELECT * FROM read_parquet({quoted(file)})").fetchall()
        except duckdb.Error as error:
            raise ValueError(f"{file} cannot be read as parquet: {error}. Replace it, or move it away") from error
        found = {name: kind for name, kind, *_ in asked}
        expected = ", ".join(f"{column} (our {name})" for name, column in self.columns.items())
        hint = f"expected {expected}; say what they are called there with dataset.source.columns"
        if missing := [column for column in self.columns.values() if column not in found]:
            raise ValueError(f"{file} has no column {', '.join(missing)}; it has {', '.join(found)}; {hint}")
        for name in NEEDED:
            if (kind := found[self.columns[name]]) != "VARCHAR":
                raise ValueError(f"{file}: column {self.columns[name]} holds {kind}, expected text; {hint}")
        return found

    # -- first pass ---------------------------------------------------------------------------------------------------
    def judge(self, new_from: int = 0) -> dict[str, int]:
        """Judges all rows; returns those of the files from number `new_from` on that fall, by reason."""
        self._load_deny_lists()
        self.database.execute("CREATE TABLE kept (place BIGINT, url UHUGEINT, caption UBIGINT)")
        dropped = Counter[str]()
        for number, file in enumerate(self.files):
            self._found(file)
            counts = self._judge_file(number, file)
            if number >= new_from:
                dropped += counts
        dropped += self._find_duplicates(new_from)
        return dict(sorted(dropped.items()))

    def _load_deny_lists(self) -> None:
        """One value a line: URLs, hashes in hex, or whatever the column of that name holds."""
        for name, file in self.settings.deny_lists.items():
            path = Path(file) if Path(file).is_absolute() else ROOT / file
            values = {line.strip() for line in path.read_text().splitlines()} - {""}
            values = values if name == "url" else {value.lower() for value in values}
            listed = pa.table({"value": pa.array(sorted(values), pa.string())})  # noqa: F841 (DuckDB sees it by name)
            self.database.execute(f"CREATE TABLE {deny_table(name)} AS SELECT value FROM listed")

    def _judge_file(self, number: int, file: str) -> Counter[str]:
        """Adds the rows of one file that stay to `kept`; returns the others by reason."""
        # hash() is 64 bits: enough for captions, which are compared among rows of one URL only.
        self.database.execute(
            f"CREATE OR REPLACE TEMP TABLE judged AS SELECT {number}::BIGINT << {ROW_BITS} | file_row_number AS place, "
            f"{self._fate()} AS fate, CASE WHEN fate = 0 THEN md5_number(url) END AS url, "
            f"CASE WHEN fate = 0 THEN hash(caption) END AS caption FROM ({self._read(file)})"
        )
        self.database.execute("INSERT INTO kept SELECT place, url, caption FROM judged WHERE fate = 0")
        counts = self.database.execute("SELECT fate, count(*) FROM judged WHERE fate > 0 GROUP BY fate").fetchall()
        self.database.execute("DROP TABLE judged")
        return Counter({self.rules[fate - 1].reason: count for fate, count in counts})

    def _fate(self) -> str:
        """The number of the first rule that holds, counted from 1, or 0."""
        return "CASE " + " ".join(f"WHEN {rule.sql} THEN {i}" for i, rule in enumerate(self.rules, 1)) + " ELSE 0 END"

    def _read(self, file: str) -> str:
        names = ", ".join(f'TRY_CAST("{column}" AS {self.types[name]}) AS {name}'
                          for name, column in self.columns.items())
        return f"SELECT {names}, file_row_number FROM read_parquet({quoted(file)}, file_row_number = true)"

    def _find_duplicates(self, new_from: int) -> Counter[str]:
        """Fills `duplicates` with the places of rows that repeat an earlier one; counts those of the new files."""
        both, one = ("url_caption" in self.settings.deduplicate, "url" in self.settings.deduplicate)
        same = "url" if one else "url, caption"
        reason = "CASE WHEN place = first_of_both THEN 'duplicate_url' ELSE 'duplicate_url_caption' END"
        if not both:
            reason = "'duplicate_url'"
        if not one:
            reason = "'duplicate_url_caption'"
        self.database.execute("CREATE TABLE duplicates (place BIGINT, reason VARCHAR)")
        if both or one:
            self.database.execute(
                f"INSERT INTO duplicates SELECT place, {reason} FROM ("
                f"SELECT place, first, min(place) OVER (PARTITION BY url, caption) AS first_of_both FROM kept "
                f"JOIN (SELECT {same}, min(place) AS first FROM kept GROUP BY {same} HAVING count(*) > 1) "
                f"USING ({same})) WHERE place <> first"
            )
        new = f"place >= {new_from}::BIGINT << {ROW_BITS}"
        (kept,) = self.database.execute(f"SELECT count(*) FROM kept WHERE {new}").fetchone()
        counts = self.database.execute(f"SELECT reason, count(*) FROM duplicates WHERE {new} GROUP BY reason").fetchall()
        self.database.execute("DROP TABLE kept")
        self.samples = kept - sum(count for _, count in counts)
        return Counter(dict(counts))

    # -- second pass --------------------------------------------------------------------------------------------------
    def kept(self, new_from: int = 0) -> Iterator[pa.Table]:
        """The rows that stay, in order, in tables of any length."""
        for number, file in enumerate(self.files[new_from:], new_from):
            before = -1
            for batch in self._kept_of(number, file):
                places = batch["file_row_number"].to_numpy()
                if before >= places[0] or (np.diff(places) <= 0).any():
                    raise RuntimeError(f"DuckDB {duckdb.__version__} gave the rows of {file} out of their order")
                before = places[-1]
                yield pa.Table.from_batches([batch]).drop(["file_row_number"])

    def _kept_of(self, number: int, file: str) -> Iterator[pa.RecordBatch]:
        stays = self._fate().replace("CASE", "0 = CASE", 1)
        repeated = f"SELECT place & ((1::BIGINT << {ROW_BITS}) - 1) FROM duplicates WHERE place >> {ROW_BITS} = {number}"
        query = f"SELECT * FROM ({self._read(file)}) WHERE {stays} AND file_row_number NOT IN ({repeated})"
        return (batch for batch in self.database.execute(query).to_arrow_reader(1 << 16) if batch.num_rows)


# -- the shards -------------------------------------------------------------------------------------------------------
def deal(job: Job, tables: Iterator[pa.Table], first_shard: int) -> int:
    """Writes the rows into shards from number `first_shard` on and commits these; returns how many rows there were."""
    samples, pending = 0, deque[Future[Record]]()
    with ThreadPoolExecutor(WRITERS) as writers:
        for shard, table in enumerate(_cut(tables, job.what["dataset.filter_metadata"].shard_samples), first_shard):
            samples += table.num_rows
            pending.append(writers.submit(_commit, job, shard, table))
            if len(pending) > WRITERS:
                pending.popleft().result()
        for future in pending:
            future.result()
    return samples


def _cut(tables: Iterator[pa.Table], shard_samples: int) -> Iterator[pa.Table]:
    """The same rows, `shard_samples` at a time; the last table has what is left."""
    rest: list[pa.Table] = []
    rows = 0
    for table in tables:
        rest.append(table)
        rows += table.num_rows
        if rows >= shard_samples:
            whole = pa.concat_tables(rest)
            for at in range(0, rows - shard_samples + 1, shard_samples):
                yield whole.slice(at, shard_samples)
            rows %= shard_samples
            rest = [whole.slice(whole.num_rows - rows)]
    if rows:
        yield pa.concat_tables(rest)


def _commit(job: Job, shard: int, table: pa.Table) -> Record:
    shard_samples = job.what["dataset.filter_metadata"].shard_samples
    keys = pa.array([sample_key(shard, row, shard_samples) for row in range(table.num_rows)])
    with job.output.attempt(shard, job.fingerprint) as attempt:
        path = attempt.path / f"{shard_name(shard)}.parquet"
        pq.write_table(table.add_column(0, "key", keys).combine_chunks(), path, compression="zstd")
        return attempt.commit(rows=table.num_rows, samples=table.num_rows, dropped={}, inputs={})
