"""Shards that keep failing, given up by name, so that the rest of a data set can be finished.

cluster.max_quarantined_shards says how many of a stage may be; with 0 a single shard that fails fails the stage. A
shard is quarantined when it failed twice in one command, the second time after all others were made, by an error of its
own: not one that stops the run, and not for what the machine lacks (files, weights, memory, disk, network). It has a
record like any other: no samples, all its rows dropped by the reason "quarantined", and in its facts why. Its files are
those of an empty shard, which is what later stages find.

    python -m pipelines.run +stage=download overwrite=true      tries the quarantined shards of a stage again
    python -m pipelines.extend retry=quarantined                rows of downloads, in new shards of the next edition
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pipelines.manifest import Record, shard_name

if TYPE_CHECKING:
    from pipelines.dag import Job

QUARANTINED = "quarantined"  # reason of the rows, and fact of the record
REASON_CHARS = 500  # a record stays small


def quarantined(records: Iterable[Record]) -> dict[int, str]:
    """Why shards were quarantined, by shard."""
    return {record.shard: record.facts[QUARANTINED] for record in records
            if record.shard is not None and QUARANTINED in record.facts}  # fmt: skip


def has_room(most: int, records: dict[str, Iterable[Record]], failed: Iterable[tuple[str, int]]) -> bool:
    """Whether all of these (stage, shard) may be quarantined beside what is; there must be some."""
    counts = Counter(stage for stage, _ in failed)
    return bool(counts) and all(len(quarantined(records[stage])) + count <= most for stage, count in counts.items())


def give_up(job: Job, shard: int, reason: str) -> Record:
    """Commits a shard without samples, with the reason."""
    from pipelines.dag import STAGES

    name, rows = shard_name(shard), 0
    inputs: dict[str, str] = {}
    for read in job.inputs:
        whole = STAGES[read].kind == "whole"
        record = job.inputs[read].record(None if whole else shard)
        if record is None:
            raise FileNotFoundError(f"{read} has no shard {name}; run +stage={read} first")
        inputs[read if whole else f"{read}/{name}"] = record.digest
        rows = rows if whole else record.samples  # of the stage before, which is the last of those that are read
    module = importlib.import_module(f"pipelines.stages.{job.stage}")
    with job.output.attempt(shard, job.fingerprint) as attempt:
        facts: dict[str, Any] = {**module.write_empty(job, shard, attempt.path), QUARANTINED: reason[:REASON_CHARS]}
        return attempt.commit(rows=rows, samples=0, dropped={QUARANTINED: rows}, inputs=inputs, facts=facts)


def describe(stage: str, records: Iterable[Record]) -> list[str]:
    """A line for each quarantined shard of a stage, and what tries them again."""
    found = quarantined(records)
    lines = [f"shard {shard_name(shard)} is quarantined: {reason}" for shard, reason in sorted(found.items())]
    return [*lines, f"+stage={stage} overwrite=true tries them again"] if lines else []
