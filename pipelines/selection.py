"""Which of the encoded samples are used: removals, thresholds on stored scores, duplicates, the best per cent.

A selection is decided from the parquet files alone. It is read by `train` and later stages, never by
`precompute_latents`: changing it downloads and encodes nothing. On disk it is one row for each shard, with a mask of
one bit for each sample in the order of the latent shard:

    shard, samples, used, mask

Beside it lies a file of reasons, one for each sample, which nothing but reports reads.

A sample that is not used has one reason, the first of: removed, <score>_out_of_bounds, exact_duplicate, near_duplicate,
below_top_percent, near_duplicate_of_trained. Of duplicates the lowest key stays, whichever shard it is in; the last
reason is for samples of held-out shards that look like one that is trained on.

What one sample decides for itself is decided shard by shard. What needs the whole set (duplicates, the best per cent)
is left to a database that spills: memory holds a few bytes for each sample, and what the database is allowed.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.dag import weights_path
from pipelines.manifest import StageFolder, sha256_file, shard_name
from pipelines.selecting.near_duplicates import HASH_BITS, near_any, near_duplicates, store_places
from pipelines.settings import SelectionConfig, TableResources
from pipelines.spilling import Tables, database

if TYPE_CHECKING:
    import pyarrow as pa

REASONS = "reasons.parquet"  # of this run's own samples, beside selection.parquet
READ_AT_ONCE = 64  # shards of a file of reasons
READERS = 16  # shards whose parquet is read at once: an object store takes long to answer, and answers many at a time
SELECTION = 1  # raised by hand when equal rules let other samples through
ROWS_AT_ONCE = 1 << 18  # that the database takes
OTHERS_AT_ONCE = 1 << 22  # hashes that held-out samples are compared with
Shard = Any  # a shard's number, or (cache, number) where several caches are mixed
# What a line of a removal list may be: the sample's name, its address, or a hash of the file as it came or is stored.
REMOVED_BY = ("key", "url", "md5_of_source", "sha256_of_source", "sha256", "hash")


def samples(
    metadata: StageFolder, images: StageFolder, shard: int, columns: Collection[str] | None = None
) -> pa.Table:
    """What is known of the samples of a latent shard, in its order: key, and all else or these columns of it.

    Where one of them is in neither file all columns are read, for the error that names those that there are.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    name = f"{shard_name(shard)}.parquet"
    with pq.ParquetFile(images.readable(name)) as verdicts:
        seen = [name for name in verdicts.schema_arrow.names if name != "embedding"]
        first = [name for name in seen if columns is None or name in {"key", "verdict", *columns}]
        kept = verdicts.read(first, use_threads=False).filter(pc.field("verdict") == "")
    if columns is not None and set(columns) <= {*seen}:
        return kept
    with pq.ParquetFile(metadata.readable(name)) as rows:
        others = [name for name in rows.schema_arrow.names if name not in seen]
        if columns is not None:
            if set(columns) - {*seen, *others, *REMOVED_BY}:
                return samples(metadata, images, shard)
            others = [name for name in others if name in columns]
        known = rows.read(["key", *others], use_threads=False)
    known = known.take(pc.index_in(kept["key"], known["key"]))
    for column in others:
        kept = kept.append_column(column, known[column])
    return kept


def removal_list(path: str | Path) -> set[str]:
    """Keys, URLs and hashes, one a line; hashes in either case."""
    lines = {line.strip() for line in Path(path).read_text().splitlines()} - {""}
    return lines | {line.lower() for line in lines}


def is_removed(table: pa.Table, removed: set[str]) -> np.ndarray:
    """(n,) bool: the samples that a removal list names by key, URL or hash."""
    import pyarrow as pa

    found = np.zeros(table.num_rows, bool)
    for name in REMOVED_BY:
        if name in table.column_names:
            words = table[name].cast(pa.string()).to_pylist()
            found |= np.fromiter((word in removed for word in words), bool, len(words))
    return found


def score_of(table: pa.Table, score: str, setting: str) -> np.ndarray:
    """(n,) float64 of a stored score; NaN where it is missing."""
    if score not in table.column_names:
        raise ValueError(
            f"dataset.selection.{setting} names {score!r}, which is not stored; "
            f"there are: {', '.join(sorted(table.column_names))}"
        )
    return table[score].to_numpy().astype(np.float64)


class Chosen:
    """All samples in the order of their keys, and for each why it is not used (0: it is)."""

    def __init__(self, sizes: dict[Shard, int], reasons: list[str], why: np.ndarray) -> None:
        self.sizes, self.reasons, self.why = sizes, reasons, why

    def drop(self, places: np.ndarray, reason: str) -> None:
        """Gives a reason to samples that have none yet."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.why[places] = self.reasons.index(reason)

    def whys(self) -> dict[Shard, np.ndarray]:
        """For each shard (n,) uint8: which of `reasons` each sample has."""
        ends = np.cumsum(list(self.sizes.values()))[:-1]
        return dict(zip(self.sizes, np.split(self.why, ends), strict=True)) if self.sizes else {}

    def masks(self) -> dict[Shard, np.ndarray]:
        """For each shard (n,) bool: the samples that are used."""
        return {shard: why == 0 for shard, why in self.whys().items()}

    def counts(self) -> Counter[str]:
        """Samples that are not used, by reason."""
        counts = np.bincount(self.why, minlength=len(self.reasons)).tolist()
        return Counter({reason: n for reason, n in zip(self.reasons[1:], counts[1:], strict=True) if n})


def columns_read(settings: SelectionConfig, apart: bool) -> set[str]:
    """The columns that a selection reads; `apart`: held-out samples are compared with the others."""
    columns = {"key", *settings.thresholds, *(REMOVED_BY if settings.removed else ())}
    columns |= {"sha256"} if settings.exact_duplicates else set()
    columns |= {"phash"} if _asks_for_looks(settings, apart) else set()
    return columns | ({settings.top_score} if settings.top_score else set())


def _asks_for_looks(settings: SelectionConfig, apart: bool) -> bool:
    return settings.near_duplicate_bits is not None or apart and settings.held_out_near_duplicate_bits is not None


def select(
    shards: Iterable[tuple[Shard, pa.Table]], settings: SelectionConfig, limits: TableResources, scratch: Path,
    held_out: Collection[Shard] = (),
) -> Chosen:  # fmt: skip
    """Which samples are used, and why the others are not; of duplicates the one that comes first stays.

    In the shards that are `held_out` no sample stays that looks like one of the others. What is more than the limits
    allow spills into the folder `scratch`.
    """
    with database(scratch, limits) as tables:
        chosen = _read(tables, shards, settings, bool(held_out))
        _decide(tables, chosen, settings)
        _keep_apart(tables, chosen, settings, held_out)
    return chosen


def _read(
    tables: Tables, shards: Iterable[tuple[Shard, pa.Table]], settings: SelectionConfig, apart: bool
) -> Chosen:
    """Applies the rules on single samples; fills the table `samples` with what else must be known of all others."""
    import pyarrow as pa

    tables.execute("CREATE TABLE samples (place BIGINT, content UHUGEINT, phash UBIGINT, top_score DOUBLE)")
    removed = removal_list(weights_path(settings.removed)) if settings.removed else set()
    sizes: dict[Shard, int] = {}
    whys, waiting, count = [], [], 0
    for shard, table in shards:
        why = _at_sight(table, settings, removed)
        sizes[shard] = len(why)
        stay = np.flatnonzero(why == 0)
        waiting.append(_of_all(table, settings, apart).take(stay).append_column("place", pa.array(count + stay)))
        whys.append(why)
        count += len(why)
        if sum(part.num_rows for part in waiting) >= ROWS_AT_ONCE:
            _add(tables, waiting)
            waiting = []
    _add(tables, waiting)
    return Chosen(sizes, ["used", *_rules_at_sight(settings)], np.concatenate([np.zeros(0, np.uint8), *whys]))


def _rules_at_sight(settings: SelectionConfig) -> list[str]:
    return ["removed", *(f"{score}_out_of_bounds" for score in settings.thresholds)]


def _at_sight(table: pa.Table, settings: SelectionConfig, removed: set[str]) -> np.ndarray:
    """(n,) uint8: the first rule that holds for each sample, counted from 1, or 0."""
    falls = [is_removed(table, removed) if removed else np.zeros(table.num_rows, bool)]
    for score, (low, high) in settings.thresholds.items():
        value = score_of(table, score, "thresholds")
        falls.append(~((value >= (-np.inf if low is None else low)) & (value <= (np.inf if high is None else high))))
    return np.where(np.any(falls, 0), 1 + np.argmax(falls, 0), 0).astype(np.uint8)


def _of_all(table: pa.Table, settings: SelectionConfig, apart: bool) -> pa.Table:
    """What must be known of all samples at once: content, looks, the score by which the best are taken."""
    import pyarrow as pa

    found = {"content": pa.nulls(table.num_rows, pa.string()), "phash": pa.nulls(table.num_rows, pa.uint64()),
             "top_score": pa.nulls(table.num_rows, pa.float64())}  # fmt: skip
    if settings.exact_duplicates:
        found["content"] = table["sha256"]
    if _asks_for_looks(settings, apart):
        found["phash"] = table["phash"].cast(pa.uint64())
    if settings.top_score:
        score = np.nan_to_num(score_of(table, settings.top_score, "top_score"), nan=-np.inf)
        found["top_score"] = pa.array(score + 0.0)  # there is no -0.0, which would sort below 0.0
    return pa.table(found)


def _add(tables: Tables, parts: list[pa.Table]) -> None:
    import pyarrow as pa

    if parts:
        tables.register("parts", pa.concat_tables(parts))
        tables.execute("INSERT INTO samples SELECT place, md5_number(content), phash, top_score FROM parts")
        tables.unregister("parts")


def _decide(tables: Tables, chosen: Chosen, settings: SelectionConfig) -> None:
    """Applies the rules on the whole set in their order, each to what the ones before it left."""
    if settings.exact_duplicates:
        first = "SELECT content, min(place) AS first FROM samples GROUP BY content HAVING count(*) > 1"
        repeated = f"SELECT place FROM samples JOIN ({first}) USING (content) WHERE place > first"
        _drop(tables, chosen, repeated, "exact_duplicate")
    if settings.near_duplicate_bits is not None:
        falls = near_duplicates(tables, len(chosen.why), settings.near_duplicate_bits)
        store_places(tables, "falling", falls)
        _drop(tables, chosen, "SELECT place FROM falling", "near_duplicate")
    if settings.top_score and settings.top_percent is not None:
        ((left,),) = tables.execute("SELECT count(*) FROM samples").fetchall()
        stay = round(left * settings.top_percent / 100)  # of equal scores the lowest key
        others = f"SELECT place FROM samples ORDER BY top_score DESC, place OFFSET {stay}"
        _drop(tables, chosen, others, "below_top_percent")


def _drop(tables: Tables, chosen: Chosen, query: str, reason: str) -> None:
    """Drops the places that a query names, here and in the table."""
    tables.execute(f"CREATE TABLE dropped AS {query}")
    for batch in tables.sql("SELECT place FROM dropped").to_arrow_reader(ROWS_AT_ONCE):
        chosen.drop(batch["place"].to_numpy(), reason)
    tables.execute("DELETE FROM samples WHERE place IN (SELECT place FROM dropped)")
    tables.execute("DROP TABLE dropped")


def _keep_apart(
    tables: Tables, chosen: Chosen, settings: SelectionConfig, held_out: Collection[Shard]
) -> None:
    """Leaves out those held-out samples that look like one that is trained on."""
    bits = settings.held_out_near_duplicate_bits
    if not held_out or bits is None:
        return
    if not 0 <= bits < HASH_BITS:
        raise ValueError(f"dataset.selection.held_out_near_duplicate_bits={bits}; expected 0 to {HASH_BITS - 1}")
    held, ends = np.array([shard in held_out for shard in chosen.sizes]), np.cumsum(list(chosen.sizes.values()))

    def parts(wanted: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places and hashes of the samples that are held out, or of those that are not."""
        for batch in tables.sql("SELECT place, phash FROM samples").to_arrow_reader(OTHERS_AT_ONCE):
            places, hashes = batch["place"].to_numpy(), batch["phash"].to_numpy()
            those = held[np.searchsorted(ends, places, "right")] == wanted
            yield places[those], hashes[those]

    asked = list(parts(True))
    if not asked:
        return
    places, hashes = (np.concatenate(each) for each in zip(*asked, strict=True))
    for _, others in parts(False):
        near = near_any(hashes, others, bits)
        chosen.drop(places[near], "near_duplicate_of_trained")
        places, hashes = places[~near], hashes[~near]


def write_selection(path: Path, masks: dict[int, np.ndarray]) -> str:
    """Writes the masks as parquet; returns the file's digest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"shard": shard, "samples": len(mask), "used": int(mask.sum()), "mask": np.packbits(mask).tobytes()}
            for shard, mask in sorted(masks.items())]
    schema = pa.schema([("shard", pa.int64()), ("samples", pa.int64()), ("used", pa.int64()), ("mask", pa.binary())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")
    return sha256_file(path)


def read_selection(path: Path, shards: Collection[int] | None = None) -> dict[int, np.ndarray]:
    """The masks of a selection file, a bool for each sample of these latent shards, or of all."""
    import pyarrow.parquet as pq

    return {row["shard"]: np.unpackbits(np.frombuffer(row["mask"], np.uint8), count=row["samples"]).astype(bool)
            for row in pq.read_table(path).to_pylist() if shards is None or row["shard"] in shards}


def reasons_file(reasons: list[str], whys: dict[int, np.ndarray]) -> bytes:
    """A parquet file of which of the reasons each sample has, a byte for each; the first is for those that are used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"shard": shard, "why": why.tobytes()} for shard, why in sorted(whys.items())]
    schema = pa.schema([("shard", pa.int64()), ("why", pa.binary())], {"format": "1", "reasons": json.dumps(reasons)})
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, sink, compression="zstd", row_group_size=READ_AT_ONCE)
    return sink.getvalue().to_pybytes()


def read_reasons(path: Path, shards: Collection[int]) -> dict[int, list[str]]:
    """Shard -> the reason of each of its samples, "" where it is used."""
    import pyarrow.parquet as pq

    found = {}
    with pq.ParquetFile(path) as file:
        names = ["", *json.loads(file.schema_arrow.metadata[b"reasons"])[1:]]
        for batch in file.iter_batches(READ_AT_ONCE, use_threads=False):
            found |= {row["shard"]: [names[i] for i in row["why"]]
                      for row in batch.to_pylist() if row["shard"] in shards}  # fmt: skip
    return found


def all_samples(
    metadata: StageFolder, images: StageFolder, shards: Iterable[int], columns: Collection[str] | None = None
) -> Iterator[tuple[int, Any]]:
    """(shard, what is known of its samples), in the order of the shards; READERS of them are read at once."""
    with ThreadPoolExecutor(READERS) as readers:
        coming = deque[tuple[int, Future[Any]]]()
        for shard in shards:
            coming.append((shard, readers.submit(samples, metadata, images, shard, columns)))
            if len(coming) > READERS:
                first, table = coming.popleft()
                yield first, table.result()
        for shard, table in coming:
            yield shard, table.result()
