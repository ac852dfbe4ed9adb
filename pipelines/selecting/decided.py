"""The selection of a training: decided once, placed beside its checkpoints, taken as it lies by a run that goes on.

    train/selection.parquet     a bit for each sample of this run's own latents; selection@photos.parquet: of others
    train/reasons.parquet       why each sample that is left out is left out
    train/selected.json         what it was decided from, the hashes of those files, and its figures
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from pipelines.dag import Job, weights_path
from pipelines.manifest import Record, canonical, read_json, sha256_bytes, sha256_file, write_json, write_whole
from pipelines.selection import (
    REASONS,
    SELECTION,
    Chosen,
    all_samples,
    columns_read,
    reasons_file,
    select,
    write_selection,
)
from pipelines.settings import SelectionConfig
from pipelines.training_set import Cache, held_out_shards, input_digests

SELECTED = "selected.json"


@dataclass(frozen=True)
class Prepared:
    """What was decided before training starts."""

    selections: dict[str, str]  # cache -> digest
    known: int  # samples there are
    used: int  # samples trained on
    reasons: dict[str, int]  # of those that are not


def decide(job: Job, caches: list[Cache], records: dict[str, dict[int, Record]]) -> Prepared:
    """Decides which samples are used. What was decided of the same samples by the same rules is taken as it lies."""
    held = held_out_shards(caches, records, job.what["training"].held_out_shards)
    made_of = _made_of(job, held)
    if (kept := _kept_selection(job, made_of)) is not None:
        return kept
    chosen = _select(job, caches, records, held)
    masks, whys = chosen.masks(), chosen.whys()
    selections = {
        cache.name: _place_selection(job, cache, {shard: masks[cache.name, shard] for shard in records[cache.name]})
        for cache in caches
    }
    own = {shard: why for (cache, shard), why in whys.items() if not cache}
    write_whole(job.output / REASONS, reasons_file(chosen.reasons, own))
    used, known = sum(int(mask.sum()) for mask in masks.values()), sum(len(mask) for mask in masks.values())
    prepared = Prepared(selections, known, used, dict(chosen.counts()))
    files = {name: sha256_file(job.output / name) for name in (*(cache.selection for cache in caches), REASONS)}
    write_json(job.output / SELECTED, {"format": 1, "made_of": made_of, "files": files, **asdict(prepared)})
    return prepared


def _made_of(job: Job, held: set[tuple[str, int]]) -> str:
    """Identity of all that a selection is decided from."""
    settings: SelectionConfig = job.what["dataset.selection"]
    removed = sha256_file(weights_path(settings.removed)) if settings.removed else None
    decided_by = {"version": SELECTION, "rules": {**asdict(settings), "removed": removed}, "held_out": sorted(held),
                  "inputs": input_digests(job.inputs)}  # fmt: skip
    return sha256_bytes(canonical(decided_by))


def _kept_selection(job: Job, made_of: str) -> Prepared | None:
    """What was decided before, where it was decided from the same and its files are as they were written."""
    if not (job.output / SELECTED).exists():
        return None
    kept = read_json(job.output / SELECTED)
    places = {job.output / name: sha256 for name, sha256 in kept["files"].items()}
    if kept["made_of"] != made_of or any(not p.is_file() or sha256_file(p) != sha256 for p, sha256 in places.items()):
        return None
    return Prepared(kept["selections"], kept["known"], kept["used"], kept["reasons"])


def _select(
    job: Job, caches: list[Cache], records: dict[str, dict[int, Record]], held: set[tuple[str, int]]
) -> Chosen:
    settings: SelectionConfig = job.what["dataset.selection"]
    columns = columns_read(settings, bool(held))
    known_of = (
        ((cache.name, shard), table) for cache in caches
        for shard, table in all_samples(cache.metadata, cache.images, sorted(records[cache.name]), columns)
    )  # fmt: skip
    with job.output.attempt(None, job.fingerprint) as scratch:
        return select(known_of, settings, job.how.cluster.filter_metadata, scratch.path, held)


def _place_selection(job: Job, cache: Cache, masks: dict[int, np.ndarray]) -> str:
    """Writes train/selection.parquet and returns its digest. A run that goes on must find the same one."""
    with job.output.attempt(None, job.fingerprint) as attempt:
        path = attempt.path / cache.selection
        digest, place = write_selection(path, masks), job.output / cache.selection
        if place.exists() and sha256_file(place) != digest:
            raise ValueError(
                f"{place} was made from other samples or rules than there are now; start a new run with name=OTHER, "
                f"or +stage=train overwrite=true"
            )
        write_whole(place, path.read_bytes())
    return digest
