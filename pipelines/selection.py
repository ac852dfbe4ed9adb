"""Which of the encoded samples are used: removals, thresholds on stored scores, duplicates, the best per cent.

A selection is decided from the parquet files alone. It is read by `train` and later stages, never by
`precompute_latents`: changing it downloads and encodes nothing. On disk it is one row for each shard, with a mask of
one bit for each sample in the order of the latent shard:

    shard, samples, used, mask

Beside it lies a file of reasons, one for each sample, which nothing but reports reads.

A sample that is not used has one reason, the first of: removed, <score>_out_of_bounds, exact_duplicate, near_duplicate,
below_top_percent, near_duplicate_of_trained. Of duplicates the lowest key stays, whichever shard it is in; the last
reason is for samples of held-out shards that look like one that is trained on.
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
from pipelines.near_duplicates import near_any, near_duplicates
from pipelines.settings import SelectionConfig

if TYPE_CHECKING:
    import pyarrow as pa

REASONS = "reasons.parquet"  # of this run's own samples, beside selection.parquet
READ_AT_ONCE = 64  # shards of a file of reasons
READERS = 16  # shards whose parquet is read at once: an object store takes long to answer, and answers many at a time
Shard = Any  # a shard's number, or (cache, number) where several caches are mixed
# What a line of a removal list may be: the sample's name, its address, or a hash of the file as it came or is stored.
REMOVED_BY = ("key", "url", "md5_of_source", "sha256_of_source", "sha256", "hash")


def samples(metadata: StageFolder, images: StageFolder, shard: int) -> pa.Table:
    """What is known of the samples of a latent shard, in its order: url, scores and hashes by key."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    name = f"{shard_name(shard)}.parquet"
    with pq.ParquetFile(images.readable(name)) as verdicts:
        names = [name for name in verdicts.schema_arrow.names if name != "embedding"]
        kept = verdicts.read(names, use_threads=False).filter(pc.field("verdict") == "")
    with pq.ParquetFile(metadata.readable(name)) as rows:
        known = rows.read(use_threads=False)
    known = known.take(pc.index_in(kept["key"], known["key"]))
    for column in known.column_names:
        if column not in names:
            kept = kept.append_column(column, known[column])
    return kept


def removal_list(path: str | Path) -> set[str]:
    """Keys, URLs and hashes, one a line; hashes in either case."""
    lines = {line.strip() for line in Path(path).read_text().splitlines()} - {""}
    return lines | {line.lower() for line in lines}


def is_removed(table: pa.Table, removed: set[str]) -> np.ndarray:
    """(n,) bool: the samples that a removal list names by key, URL or hash."""
    import pyarrow as pa
    import pyarrow.compute as pc

    words, found = pa.array(sorted(removed), pa.string()), np.zeros(table.num_rows, bool)
    for name in REMOVED_BY:
        if name in table.column_names:
            found |= pc.is_in(table[name].cast(pa.string()), value_set=words).to_numpy()
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

    def __init__(self, sizes: dict[Shard, int]) -> None:
        self.sizes, self.reasons = sizes, ["used"]
        self.why = np.zeros(sum(sizes.values()), np.uint8)

    def drop(self, where: np.ndarray, reason: str) -> None:
        """Gives a reason to those samples of `where` (bool, or their numbers) that have none yet."""
        chosen = np.zeros(len(self.why), bool)
        chosen[where] = True
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.why[chosen & (self.why == 0)] = self.reasons.index(reason)

    @property
    def used(self) -> np.ndarray:
        """The numbers of the samples that are used so far."""
        return np.flatnonzero(self.why == 0)

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


def select(
    shards: Iterable[tuple[Shard, pa.Table]], settings: SelectionConfig, held_out: Collection[Shard] = ()
) -> Chosen:
    """Which samples are used, and why the others are not; of duplicates the one that comes first stays.

    In the shards that are `held_out` no sample stays that looks like one of the others.
    """
    removed = removal_list(weights_path(settings.removed)) if settings.removed else set()
    sizes: dict[Shard, int] = {}
    columns: dict[str, list[np.ndarray]] = {}  # of what the whole set is needed for
    for shard, table in shards:
        sizes[shard] = table.num_rows
        for name, values in _columns(table, settings, removed, bool(held_out)).items():
            columns.setdefault(name, []).append(values)
    known = {name: np.concatenate(parts) for name, parts in columns.items()}
    chosen = Chosen(sizes)
    if sizes and len(chosen.why):
        _decide(chosen, known, settings)
        _keep_apart(chosen, known, settings, held_out)
    return chosen


def _columns(table: pa.Table, settings: SelectionConfig, removed: set[str], apart: bool) -> dict[str, np.ndarray]:
    """What the whole set must know of a shard: a few numbers for each sample."""
    found = {"removed": is_removed(table, removed)} if removed else {}
    for score, (low, high) in settings.thresholds.items():
        value = score_of(table, score, "thresholds")
        found[score] = ~((value >= (-np.inf if low is None else low)) & (value <= (np.inf if high is None else high)))
    if settings.exact_duplicates:
        found["content"] = np.array([digest[:32] for digest in table["sha256"].to_pylist()], "S32")
    if settings.near_duplicate_bits is not None or apart and settings.held_out_near_duplicate_bits is not None:
        found["phash"] = table["phash"].to_numpy().astype(np.uint64)
    if settings.top_score:
        found["top_score"] = score_of(table, settings.top_score, "top_score")
    return found


def _decide(chosen: Chosen, known: dict[str, np.ndarray], settings: SelectionConfig) -> None:
    """Applies the rules in their order, each to what the ones before it left."""
    if "removed" in known:
        chosen.drop(known["removed"], "removed")
    for score in settings.thresholds:
        chosen.drop(known[score], f"{score}_out_of_bounds")
    if "content" in known:
        used = chosen.used
        _, first = np.unique(known["content"][used], return_index=True)
        chosen.drop(np.delete(used, first), "exact_duplicate")
    if settings.near_duplicate_bits is not None:
        used = chosen.used
        chosen.drop(used[near_duplicates(known["phash"][used], settings.near_duplicate_bits)], "near_duplicate")
    if settings.top_score and settings.top_percent is not None:
        used = chosen.used
        scores = np.nan_to_num(known["top_score"][used], nan=-np.inf)
        best_first = used[np.argsort(-scores, kind="stable")]  # of equal scores the lowest key
        chosen.drop(best_first[round(len(used) * settings.top_percent / 100) :], "below_top_percent")


def _keep_apart(
    chosen: Chosen, known: dict[str, np.ndarray], settings: SelectionConfig, held_out: Collection[Shard]
) -> None:
    """Leaves out those held-out samples that look like one that is trained on."""
    if not held_out or settings.held_out_near_duplicate_bits is None:
        return
    is_held_out = np.repeat([shard in held_out for shard in chosen.sizes], list(chosen.sizes.values()))
    held, trained = (chosen.used[is_held_out[chosen.used] == wanted] for wanted in (True, False))
    phash, bits = known["phash"], settings.held_out_near_duplicate_bits
    chosen.drop(held[near_any(phash[held], phash[trained], bits)], "near_duplicate_of_trained")


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


def all_samples(metadata: StageFolder, images: StageFolder, shards: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """(shard, what is known of its samples), in the order of the shards; READERS of them are read at once."""
    with ThreadPoolExecutor(READERS) as readers:
        coming = deque[tuple[int, Future[Any]]]()
        for shard in shards:
            coming.append((shard, readers.submit(samples, metadata, images, shard)))
            if len(coming) > READERS:
                first, table = coming.popleft()
                yield first, table.result()
        for shard, table in coming:
            yield shard, table.result()
