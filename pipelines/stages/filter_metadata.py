"""Reads the metadata, drops rows that are not worth a request, and deals the rest into shards.

Parquet files (or tab-separated ones) in the order of their names, rows in the order of the files. Every dropped row has
one reason, by the first rule of pipelines/metadata/rules.py that holds. Of rows with the same URL and caption, and then
of rows with the same URL, the first one stays, across the whole set; a duplicate of a row that was dropped is none.

-> filter_metadata/000042.parquet {key, url, caption, and all else that dataset.source.columns maps}

DuckDB does the work out of core: every file is read once, and the rows that stay wait (on disk, where memory is too
small for them) until it is known which of them are equal. Equal is what has the same 128 bits of hash. DuckDB reads the
columns as plain values: what a file says of extension types, which other readers may turn into code, is not looked at.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import sample_web
from pipelines.dag import Job, weights_path
from pipelines.manifest import Record, shard_name
from pipelines.metadata.files import SourceFile, at_hand, listed
from pipelines.metadata.mended_text import mended
from pipelines.metadata.rules import DUPLICATES, NEEDED, SHAPE, Rule, check, deny_table, describe, quoted, rules
from pipelines.settings import FilterMetadataConfig, SourceConfig
from pipelines.spilling import VERSION, Error, InvalidInput, database, lacks_room

ROW_BITS = 40  # a row's place in the whole set: its file, then its row in this many bits
NUMBER = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT",
          "FLOAT", "DOUBLE", "DECIMAL")  # fmt: skip
BATCH_ROWS = 1 << 16  # that DuckDB hands over at once
WRITERS = 2  # threads that write shards while the next rows are read


def key_digits(shard_samples: int) -> int:
    """A sample's key is six digits of shard, then its row in so many digits, as img2dataset counts them too."""
    return math.ceil(math.log10(shard_samples))


def run(job: Job, files: dict[str, int] | None = None) -> dict[str, Any]:
    """Writes the shards and their records. Returns the stage's funnel {rows, samples, dropped}.

    `files` as `source_files` found them: who lists them once more later would find what has come meanwhile.
    """
    source: SourceConfig = job.what["dataset.source"]
    settings: FilterMetadataConfig = job.what["dataset.filter_metadata"]
    check(settings, source.columns)
    files = source_files(job) if files is None else files
    print(f"filter_metadata: {len(files)} files; {describe(settings, source.columns)}", flush=True)
    with job.output.attempt(None, job.fingerprint) as scratch, MetadataSet(files, job, scratch.path) as rows:
        dropped = rows.judge()
        samples = deal(job, rows.kept(), first_shard=0)
    return _funnel(sum(rows.in_files.values()), samples, dropped)


def sources(job: Job, files: dict[str, int]) -> list[dict[str, Any]]:
    """The files that were read, as the manifest lists them; the embedded web's own needs no mention."""
    if job.what["dataset.source"].metadata is None:
        return []
    return [{"name": name, "bytes": size} for name, size in files.items()]


def extend(
    job: Job, files: dict[str, int], manifest: dict[str, Any], retried: Iterator[pa.Table]
) -> dict[str, Any]:
    """Adds shards after those of the manifest: first rows that are tried again, then those of new metadata files.

    `files` are all that there are, as `source_files` found them; rows of new ones must repeat none of the old. Returns
    the funnel {rows, samples, dropped} of what is new.
    """
    found = {file["name"]: file["bytes"] for file in sources(job, files)}
    old, new = _old_and_new(found, manifest["sources"])
    dropped: dict[str, int] = {}
    came = Counter[str]()
    first_shard = 1 + max((row["shard"] for row in manifest["shards"]), default=-1)
    with ExitStack() as stack:
        tables = [_counted(retried, came)]
        if new:
            scratch = stack.enter_context(job.output.attempt(None, job.fingerprint))
            ordered = {name: found[name] for name in (*old, *new)}
            rows = stack.enter_context(MetadataSet(ordered, job, scratch.path))
            dropped = rows.judge(new_from=len(old))
            came["new"] = sum(rows.in_files[number] for number in range(len(old), len(ordered)))
            tables.append(_never_tried(table) for table in rows.kept(new_from=len(old)))
        samples = deal(job, chain(*tables), first_shard)
    return _funnel(came.total(), samples, dropped)


def _funnel(rows: int, samples: int, dropped: dict[str, int]) -> dict[str, Any]:
    """The stage's account. Raises RuntimeError when rows that came in neither went out nor were dropped."""
    if lost := rows - samples - sum(dropped.values()):
        raise RuntimeError(
            f"filter_metadata: {rows} rows came in, {samples} went out and {sum(dropped.values())} were dropped "
            f"{dropped}: {lost} unaccounted for"
        )
    return {"rows": rows, "samples": samples, "dropped": dropped}


def _counted(tables: Iterator[pa.Table], came: Counter[str]) -> Iterator[pa.Table]:
    for table in tables:
        came["retried"] += table.num_rows
        yield table


def _never_tried(table: pa.Table) -> pa.Table:
    return table.append_column("retry_of", pa.nulls(table.num_rows, pa.string()))


def _old_and_new(found: dict[str, int], read: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The files of closed editions, in their order, and the files that are new."""
    for file in read:
        if found.get(file["name"]) != file["bytes"]:
            raise ValueError(
                f"{file['name']} has {found.get(file['name'], 'no')} bytes, expected {file['bytes']} as it was read: "
                f"rows of closed editions stay as they are. Put it back, and new rows into files of their own"
            )
    old = [file["name"] for file in read]
    return old, [name for name in found if name not in old]


# -- the files --------------------------------------------------------------------------------------------------------
def source_files(job: Job) -> dict[str, int]:
    """The bytes of every metadata file by its name, in order; the embedded web writes its own first."""
    source: SourceConfig = job.what["dataset.source"]
    if source.metadata is None:
        path = Path(job.how.run) / "sample_web" / "metadata.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_web.write_metadata(job.what["dataset.sample_web"], path)
        return {str(path): path.stat().st_size}
    return listed(source)


class MetadataSet:
    """The rows of all files in a database of their own, which spills into a folder instead of filling memory."""

    def __init__(self, files: dict[str, int], job: Job, scratch: Path) -> None:
        source: SourceConfig = job.what["dataset.source"]
        self.settings: FilterMetadataConfig = job.what["dataset.filter_metadata"]
        self.columns = {name: column for name, column in source.columns.items() if column is not None}
        self.files, self.scratch = files, scratch
        self.is_tsv = source.format == "tsv" and source.metadata is not None
        self.rules = rules(self.settings, set(self.columns))
        self.in_files: dict[int, int] = {}  # number of a file -> rows that its footer counts
        self.fallen = Counter[int]()  # number of a file -> rows that fell by a rule
        self.stack = ExitStack()
        self.database = self.stack.enter_context(database(scratch, job.how.cluster.filter_metadata))

    def __enter__(self) -> MetadataSet:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.stack.__exit__(*raised)

    def _types(self, file: SourceFile) -> dict[str, str]:
        """Our columns' types, as the shards hold them, from the first file; numbers that come as text become such.

        Raises ValueError showing found and expected when a file lacks a column, or holds no text where text must be.
        """
        found = self._found(file)
        types = {name: found[column] for name, column in self.columns.items()}
        for name in {*SHAPE, *self.settings.bounds} & types.keys():
            if types[name].partition("(")[0] not in NUMBER:
                types[name] = "DOUBLE"
        return types

    def _found(self, file: SourceFile) -> dict[str, str]:
        """The columns of a file and their types, checked against those that are mapped."""
        with _reading(file):
            asked = self.database.execute(f"DESCRIBE SELECT * FROM read_parquet({quoted(str(file.path))})").fetchall()
        found = {name: kind for name, kind, *_ in asked}
        expected = ", ".join(f"{column} (our {name})" for name, column in self.columns.items())
        hint = f"expected {expected}; say what they are called there with dataset.source.columns"
        if missing := [column for column in self.columns.values() if column not in found]:
            raise ValueError(f"{file.name} has no column {', '.join(missing)}; it has {', '.join(found)}; {hint}")
        for name in NEEDED:
            if (kind := found[self.columns[name]]) != "VARCHAR":
                raise ValueError(f"{file.name}: column {self.columns[name]} holds {kind}, expected text; {hint}")
        return found

    # -- what falls ---------------------------------------------------------------------------------------------------
    def judge(self, new_from: int = 0) -> dict[str, int]:
        """Judges all rows; returns those of the files from number `new_from` on that fall, by reason."""
        self._load_deny_lists()
        with closing(at_hand(self.files, self.columns if self.is_tsv else None, self.scratch)) as files:
            for number, file in enumerate(files):
                if number == 0:
                    self._begin(self._types(file))
                self._found(file)
                with _reading(file):
                    self.in_files[number] = self._footer_rows(file.path)
                    self._judge_any_file(number, file.path)
        counts = self.database.execute(
            f"SELECT place >> {ROW_BITS}, fate, count(*) FROM rows WHERE fate > 0 AND place >= {_place(new_from)} "
            f"GROUP BY ALL"
        )
        dropped = Counter[str]()
        for number, fate, count in counts.fetchall():
            self.fallen[number] += count
            dropped[self.rules[fate - 1].reason] += count
        return dict(sorted((dropped + self._find_duplicates(new_from)).items()))

    def _footer_rows(self, path: Path) -> int:
        """The rows that a file says it has, for what is read of it to be held against."""
        asked = self.database.execute(f"SELECT num_rows FROM parquet_file_metadata({quoted(str(path))})")
        ((rows,),) = asked.fetchall()
        return rows

    def _begin(self, types: dict[str, str]) -> None:
        self.types = types
        kinds = ", ".join(f"{name} {kind}" for name, kind in types.items())
        self.database.execute(f"CREATE TABLE rows (place BIGINT, fate UTINYINT, same UHUGEINT, {kinds})")

    def _load_deny_lists(self) -> None:
        """One value a line: URLs, hashes in hex, or whatever the column of that name holds."""
        for name, file in self.settings.deny_lists.items():
            values = {line.strip() for line in weights_path(file).read_text().splitlines()} - {""}
            values = values if name == "url" else {value.lower() for value in values}
            listed = pa.table({"value": pa.array(sorted(values), pa.string())})  # noqa: F841 (DuckDB sees it by name)
            self.database.execute(f"CREATE TABLE {deny_table(name)} AS SELECT value FROM listed")

    def _judge_file(self, number: int, path: Path) -> None:
        """Adds the rows of one file, of those that fall only their place and the number of the rule."""
        names = ", ".join(f'TRY_CAST("{column}" AS {self.types[name]}) AS {name}'
                          for name, column in self.columns.items())
        kept = ", ".join(f"CASE WHEN fate = 0 THEN {value} END" for value in ("md5_number(url)", *self.columns))
        read = f"SELECT {names}, file_row_number FROM read_parquet({quoted(str(path))}, file_row_number = true)"
        judged = f"SELECT *, {_fate(self.rules)} AS fate FROM ({read})"
        self.database.execute(
            f"INSERT INTO rows SELECT {_place(number)} + file_row_number, fate, {kept} FROM ({judged})"
        )

    def _judge_any_file(self, number: int, path: Path) -> None:
        """The same, also for a file with text that is not UTF-8; the rows that have it fall."""
        try:
            return self._judge_file(number, path)
        except InvalidInput as error:
            if "UTF8" not in str(error):
                raise
        columns = list(dict.fromkeys(self.columns.values()))
        copy = self.scratch / f"mended-{number}.parquet"
        mended(path, copy, columns, self.columns["url"])
        self._judge_file(number, copy)
        copy.unlink()

    def _find_duplicates(self, new_from: int) -> Counter[str]:
        """Fills `duplicates` with the places of rows that repeat an earlier one; counts those of the new files."""
        same = {"url": "same", "url_caption": "same, hash(caption)"}
        first = {name: f"min(place) OVER (PARTITION BY {same[name]})" for name in self.settings.deduplicate}
        self.database.execute("CREATE TABLE duplicates (place BIGINT, reason VARCHAR)")
        if first:
            key = same["url" if "url" in first else "url_caption"]
            cases = " ".join(f"WHEN place > {first[name]} THEN {quoted(reason)}"
                             for name, reason in DUPLICATES.items() if name in first)
            self.database.execute(
                f"INSERT INTO duplicates SELECT place, reason FROM (SELECT place, CASE {cases} END AS reason FROM rows "
                f"WHERE fate = 0 AND ({key}) IN (SELECT ({key}) FROM rows WHERE fate = 0 GROUP BY {key} "
                f"HAVING count(*) > 1)) WHERE reason IS NOT NULL"
            )
        counts = self.database.execute(
            f"SELECT reason, count(*) FROM duplicates WHERE place >= {_place(new_from)} GROUP BY reason"
        )
        return Counter(dict(counts.fetchall()))

    # -- what stays ---------------------------------------------------------------------------------------------------
    def kept(self, new_from: int = 0) -> Iterator[pa.Table]:
        """The rows that stay, of the files from number `new_from` on, in order, in tables of any length."""
        for number in range(new_from, len(self.files)):
            within = f"place >= {_place(number)} AND place < {_place(number + 1)}"
            repeated = self.database.sql(f"SELECT place FROM duplicates WHERE {within} ORDER BY place").fetchnumpy()
            before, stayed = -1, 0
            stored = f"SELECT place, {', '.join(self.columns)} FROM rows WHERE fate = 0 AND {within}"
            for batch in self.database.sql(stored).to_arrow_reader(BATCH_ROWS):
                places = batch["place"].to_numpy()
                if (np.diff(places, prepend=before) <= 0).any():
                    raise RuntimeError(f"DuckDB {VERSION} gave rows out of their order; expected ascending")
                before = places[-1] if len(places) else before
                stay = np.isin(places, repeated["place"], assume_unique=True, kind="sort", invert=True)
                stayed += int(stay.sum())
                yield pa.Table.from_batches([batch]).drop(["place"]).filter(pa.array(stay))
            self._account(number, stayed, len(repeated["place"]))

    def _account(self, number: int, stayed: int, repeated: int) -> None:
        """Raises RuntimeError naming a file that has rows which neither stayed nor fell."""
        rows, fell = self.in_files[number], self.fallen[number] + repeated
        if rows != stayed + fell:
            raise RuntimeError(
                f"{list(self.files)[number]} has {rows} rows by its footer, of which {stayed} stayed and {fell} fell: "
                f"{rows - stayed - fell} unaccounted for, so the stage stays open; write the file anew, or move it away"
            )


@contextmanager
def _reading(file: SourceFile) -> Iterator[None]:
    """Names the file when it cannot be read: cut off, damaged, or no parquet."""
    try:
        yield
    except (Error, pa.ArrowInvalid) as error:
        if lacks_room(error):
            raise
        first = str(error).splitlines()[0]
        raise ValueError(f"{file.name} cannot be read as parquet: {first} Replace it, or move it away") from error


def _place(file: int) -> str:
    return f"({file}::BIGINT << {ROW_BITS})"


def _fate(rules: list[Rule]) -> str:
    """The number of the first rule that holds, counted from 1, or 0."""
    return "CASE " + " ".join(f"WHEN {rule.sql} THEN {i}" for i, rule in enumerate(rules, 1)) + " ELSE 0 END"


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
    digits = key_digits(job.what["dataset.filter_metadata"].shard_samples)
    rows = pc.utf8_lpad(pa.array(np.arange(table.num_rows)).cast(pa.string()), digits, "0")
    keys = pc.binary_join_element_wise(shard_name(shard), rows, "")
    with job.output.attempt(shard, job.fingerprint) as attempt:
        path = attempt.path / f"{shard_name(shard)}.parquet"
        # No dictionaries of keys, URLs and captions: hardly any comes twice.
        others = [name for name in table.column_names if name not in NEEDED]
        pq.write_table(table.add_column(0, "key", keys).combine_chunks(), path, compression="zstd",
                       use_dictionary=others)
        return attempt.commit(rows=table.num_rows, samples=table.num_rows, dropped={}, inputs={})
