"""Which of the encoded samples are used: thresholds on stored scores, near-duplicates, the best per cent, removals.

A selection is decided from the parquet files alone. It is read by `train` and later stages, never by
`precompute_latents`: changing it downloads and encodes nothing. On disk it is one row for each shard, with a mask of
one bit for each sample in the order of the latent shard:

    shard, samples, used, mask
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.manifest import StageFolder, sha256_file, shard_name
from pipelines.settings import SelectionConfig

HASH_BITS = 64


def samples(metadata: StageFolder, images: StageFolder, shard: int) -> list[dict[str, Any]]:
    """What is known of the samples of a latent shard, in its order: scores, url and perceptual hash by key."""
    import pyarrow.parquet as pq

    name = f"{shard_name(shard)}.parquet"
    known = {row["key"]: row for row in pq.read_table(metadata / name).to_pylist()}
    kept = [row for row in pq.read_table(images / name).to_pylist() if not row["verdict"]]
    return [{**known[row["key"]], **row} for row in kept]


def out_of_bounds(sample: dict[str, Any], settings: SelectionConfig) -> str:
    """The first score that lies outside its bounds, or that is missing; empty when all are inside."""
    for score, (low, high) in settings.thresholds.items():
        if score not in sample:
            raise ValueError(
                f"dataset.selection.thresholds names {score!r}, which is not stored; "
                f"there are: {', '.join(sorted(sample))}"
            )
        value = sample[score]
        if value is None or (low is not None and value < low) or (high is not None and value > high):
            return score
    return ""


class NearDuplicates:
    """Perceptual hashes seen so far. Two hashes that differ in at most k of 64 bits are equal in one of k + 1 bands."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        edges = np.linspace(0, HASH_BITS, bits + 2).astype(int)
        self.bands = [(int(a), (1 << int(b - a)) - 1) for a, b in zip(edges, edges[1:], strict=False)]
        self.seen: list[dict[int, list[int]]] = [{} for _ in self.bands]

    def add(self, phash: int) -> bool:
        """True when the hash is new; False when it lies near one that was added before."""
        slots = [(table, (phash >> at) & mask) for table, (at, mask) in zip(self.seen, self.bands, strict=True)]
        if any((phash ^ other).bit_count() <= self.bits for table, band in slots for other in table.get(band, ())):
            return False
        for table, band in slots:
            table.setdefault(band, []).append(phash)
        return True


def select(
    shards: Iterable[tuple[int, list[dict[str, Any]]]], settings: SelectionConfig
) -> tuple[dict[int, np.ndarray], Counter[str]]:
    """(a mask for each shard, samples that are not used by reason); of near-duplicates the lowest key wins."""
    removed = set(Path(settings.removed).read_text().split()) if settings.removed else set()
    near = NearDuplicates(settings.near_duplicate_bits) if settings.near_duplicate_bits is not None else None
    masks, reasons, scores = {}, Counter[str](), []
    for shard, rows in shards:
        mask = np.zeros(len(rows), bool)
        for i, row in enumerate(rows):
            if row["key"] in removed or row["url"] in removed:
                reasons["removed"] += 1
            elif score := out_of_bounds(row, settings):
                reasons[f"{score}_out_of_bounds"] += 1
            elif near and not near.add(row["phash"]):
                reasons["near_duplicate"] += 1
            else:
                mask[i] = True
                scores.append((row[settings.top_score], shard, i) if settings.top_score else None)
        masks[shard] = mask
    if settings.top_score and settings.top_percent is not None:
        # Best first; of equal scores the lowest key.
        ranked = sorted(scores, key=lambda item: (-item[0], item[1], item[2]))
        for _, shard, i in ranked[round(len(ranked) * settings.top_percent / 100) :]:
            masks[shard][i] = False
            reasons["below_top_percent"] += 1
    return masks, reasons


def write_selection(path: Path, masks: dict[int, np.ndarray]) -> str:
    """Writes the masks as parquet; returns the file's digest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"shard": shard, "samples": len(mask), "used": int(mask.sum()), "mask": np.packbits(mask).tobytes()}
            for shard, mask in sorted(masks.items())]
    schema = pa.schema([("shard", pa.int64()), ("samples", pa.int64()), ("used", pa.int64()), ("mask", pa.binary())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")
    return sha256_file(path)


def read_selection(path: Path) -> dict[int, np.ndarray]:
    """The masks of a selection file, a bool for each sample of each latent shard."""
    import pyarrow.parquet as pq

    return {row["shard"]: np.unpackbits(np.frombuffer(row["mask"], np.uint8), count=row["samples"]).astype(bool)
            for row in pq.read_table(path).to_pylist()}


def all_samples(
    metadata: StageFolder, images: StageFolder, shards: Iterable[int]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(shard, what is known of its samples), shard by shard."""
    for shard in shards:
        yield shard, samples(metadata, images, shard)
