"""The data stages write to S3 what they write to disk: every plan, shard, record and manifest, byte for byte."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import pytest

from pipelines.config import compose
from pipelines.dag import Dag, connected, reads
from pipelines.manifest import sha256_bytes, sha256_file, sum_funnel
from pipelines.sample_web import serving
from tests.s3_server import BUCKET, S3Server

STAGES = ["filter_metadata", "download", "filter_images", "precompute_latents"]


def make(outputs: Path, address: str | None, *overrides: str) -> dict[str, str]:
    """Runs the data half shard by shard; returns the digest of every stage's edition."""
    dag = Dag(compose(["+experiment=smoke", f"paths.outputs={outputs}", *overrides]))
    for stage in STAGES:
        dag.refresh(stage)
        job, module = connected(dag.job(stage), address), importlib.import_module(f"pipelines.stages.{stage}")
        job.output.write_plan(dag.plan(stage))
        if stage == "filter_metadata":
            funnel = module.run(job)
            records = list(job.output.committed().values())
        else:
            run_shard = module.Worker(job).run_shard if hasattr(module, "Worker") else partial(module.run_shard, job)
            records = [run_shard(shard) for shard in sorted(dag.statuses[reads(dag.config, stage)[0]].records)]
            funnel = sum_funnel(records)
        job.output.close(job.fingerprint, records, funnel)
        dag.refresh(stage)
    return {stage: dag.statuses[stage].digest or "open" for stage in STAGES}


@pytest.mark.slow
def test_disk_and_s3_hold_the_same_bytes(s3: S3Server, tmp_path: Path) -> None:
    with serving(compose(["+experiment=smoke"]).dataset) as address:
        on_disk = make(tmp_path / "disk", address)
        cache = f"cluster.cache.folder={tmp_path / 'cache'}"
        on_s3 = make(tmp_path / "s3", address, "paths.shards=s3://bucket/shards", cache)
    assert on_disk == on_s3 and "open" not in on_s3.values()
    files = [path for stage in STAGES for path in (tmp_path / "disk/smoke" / stage).rglob("*") if path.is_file()]
    hashes = {str(path.relative_to(tmp_path / "disk")): sha256_file(path) for path in files}
    read = {key: s3.client().get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in s3.keys("shards/")}
    assert {key.removeprefix("shards/"): sha256_bytes(data) for key, data in read.items()} == hashes
    assert not list((tmp_path / "s3").rglob("*.tar")) and len(hashes) > 30
