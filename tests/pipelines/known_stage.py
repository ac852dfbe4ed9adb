"""A stage of known cost for tests of the stream: sleeps, notes when it ran, and fails or dies where it is told to."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass

from pipelines.dag import Job
from pipelines.manifest import Record, shard_name

LONG = 500.0  # seconds: nobody waits for it


@dataclass(frozen=True)
class Known:
    seconds: float
    fail: list[int]  # shards that raise an error every time
    die: list[int]  # shards whose first try kills its process
    broken: tuple[int, ...] = ()  # shards whose error says that all others would fail too
    slow: tuple[int, ...] = ()  # shards that take LONG
    killed: tuple[int, ...] = ()  # shards whose every try is killed, as by the kernel when memory is short


class Broken(RuntimeError):
    stops_the_run = True


def run_shard(job: Job, shard: int) -> Record:
    known: Known = job.what["known"]
    started = time.time()
    if shard in known.fail:
        raise ValueError(f"shard {shard} cannot be made")
    if shard in known.broken:
        raise Broken(f"shard {shard} came to nothing")
    if shard in known.killed:
        os.kill(os.getpid(), signal.SIGKILL)
    with job.output.attempt(shard, job.fingerprint) as attempt:
        (attempt.path / f"{shard_name(shard)}.txt").write_text(str(shard))
        flag = job.output / f".died-{shard}"
        if shard in known.die and not flag.exists():
            flag.touch()
            os._exit(9)
        time.sleep(LONG if shard in known.slow else known.seconds)
        record = attempt.commit(rows=1, samples=1, dropped={}, inputs={})
    (job.output / f"{shard_name(shard)}.times").write_text(json.dumps([started, time.time()]))
    return record
