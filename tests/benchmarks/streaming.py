"""What streaming costs: the wall time of a chain of stages over that of the slowest alone, and the driver's own share.

    python -m tests.benchmarks.streaming                         both parts
    ... part=overlap shards=40                                   three stages of known cost, in a chain and each alone
    ... part=driver shards=1000,40000      so many shards of no cost at all, one size after another

Shards go through pipelines/cluster.py on a real Ray. The stages only wait (goal: the chain takes at most 1.15 times the
slowest of them) or return at once; then what is left is the driver's and Ray's share of every shard, and how much
memory the driver keeps of it (goal: none that grows with the shards).
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from pathlib import Path

from pipelines import cluster
from pipelines.config import compose
from pipelines.dag import How, Job
from pipelines.manifest import Record, StageFolder, shard_name
from pipelines.settings import Resources

# Seconds a shard takes, and how many are under way: like a download of 64 threads, a look at every picture, an encoder.
CHAIN = {"download": (1.6, 2), "filter_images": (0.4, 1), "precompute_latents": (1.0, 1)}


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    parts = {"overlap": (overlap, "40"), "driver": (driver, "1000,4000,16000")}
    for name in [given["part"]] if "part" in given else list(parts):
        measure, sizes = parts[name]
        with tempfile.TemporaryDirectory() as folder, cluster.connect(compose([]).cluster):
            _run(Path(folder), dict.fromkeys(CHAIN, (0.0, 2)), 20)  # starts processes and imports
            for size in given.get("shards", sizes).split(","):
                measure(Path(folder), int(size))


def overlap(folder: Path, shards: int) -> None:
    alone = {stage: _run(folder, {stage: cost}, shards) for stage, cost in CHAIN.items()}
    together, slowest = _run(folder, CHAIN, shards), max(alone.values())
    each = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in alone.items())
    print(f"{shards} shards alone: {each}; in a chain {together:.1f} s, {together / slowest:.3f} times the slowest "
          f"(goal 1.15), {together / sum(alone.values()):.2f} of their sum", flush=True)  # fmt: skip


def driver(folder: Path, shards: int) -> None:
    """Memory is taken when a tenth of the shards is through and again at the end, so that a first growth is none."""
    seen = 0
    early = before = _resident()

    def note(stage: str, record: Record) -> None:
        nonlocal seen, early
        seen += 1
        if seen == len(CHAIN) * shards // 10:
            early = _resident()

    cpu = time.process_time()
    seconds = _run(folder, dict.fromkeys(CHAIN, (0.0, 4)), shards, note)
    cpu, after = time.process_time() - cpu, _resident()
    print(f"{shards} shards through {len(CHAIN)} stages: {1000 * seconds / shards:.2f} s for 1,000 shards, of them "
          f"{1000 * cpu / shards:.2f} s of the driver's processor time; driver {before:.1f} MB before, {early:.1f} MB "
          f"after a tenth, {after:.1f} MB at the end: {(after - early) * 1000 / (0.9 * shards):+.3f} MB for 1,000 "
          f"shards", flush=True)  # fmt: skip


def _run(folder: Path, costs: dict[str, tuple[float, int]], shards: int, note=lambda stage, record: None) -> float:
    """Seconds that a stream of stages with these costs takes."""
    config = compose([])
    how = How(config.cluster, config.tracking, None, "")
    steps = []
    for stage, (seconds, in_flight) in costs.items():
        job = Job(stage, {"seconds": seconds}, "f" * 64, StageFolder(folder / stage, stage), {}, how)
        needs = Resources(num_cpus=0.5, num_gpus=0, in_flight=in_flight)
        steps.append(cluster.Step(job, needs, set(range(shards)), "tests.benchmarks.streaming"))
    begun = time.monotonic()
    cluster.stream(steps, list(range(shards)), note)
    return time.monotonic() - begun


def run_shard(job: Job, shard: int) -> Record:
    """What a worker does: it waits, and returns a record as long as real ones are."""
    time.sleep(job.what["seconds"])
    name, sha256 = shard_name(shard), f"{shard:064x}"
    files = {f"{name}.{suffix}": {"bytes": 1 << 28, "sha256": sha256} for suffix in ("tar", "parquet")}
    return Record(job.stage, shard, job.fingerprint, rows=10_000, samples=9_000, dropped={"timeout": 1_000},
                  files=files, inputs={f"before/{name}": sha256})


def _resident() -> float:
    """MB of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
