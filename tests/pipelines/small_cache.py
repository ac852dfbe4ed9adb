"""A run that has come to the end of precompute_latents, small and real but for its web: pictures are made here."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ldm.images import encode_png
from pipelines.config import Config, compose
from pipelines.dag import Dag, Job
from pipelines.manifest import StageFolder, shard_name, sum_funnel
from pipelines.stages import filter_images, precompute_latents

SIZES = [(40, 40), (32, 64), (48, 36), (64, 32), (36, 36), (56, 40)]  # height, width


def overrides_of(outputs: Path) -> list[str]:
    """The default job on pictures of 32 x 32, in latents of 4 x 4."""
    settings = ["resolution=32", "batch_size=4", "check_samples=2", "min_psnr=3.0"]
    return [f"paths.outputs={outputs}", "name=small", "dataset.filter_images.min_size=16",
            *(f"dataset.precompute_latents.{setting}" for setting in settings)]  # fmt: skip


def config_of(outputs: Path, *overrides: str) -> Config:
    return compose([*overrides_of(outputs), *overrides])


def picture(shard: int, row: int) -> np.ndarray:
    """A smooth drawing, (h, w, 3) uint8; of six samples in a shard each has another shape."""
    height, width = SIZES[row % len(SIZES)]
    y, x = np.mgrid[0:height, 0:width] / 16.0
    waves = [np.sin(x * (1 + row % 3) + channel + shard) + np.cos(y * (1 + shard % 3) + row) for channel in range(3)]
    return np.uint8(127.5 + 60 * np.stack(waves, -1))


def make_downloads(dag: Dag, shards: int, rows: int) -> None:
    """filter_metadata and download, as those stages leave them."""
    metadata, downloads = dag.job("filter_metadata").output, None
    for stage in ("filter_metadata", "download"):
        dag.refresh(stage)
        folder = dag.statuses[stage].job.output
        folder.write_plan(dag.plan(stage))
        records = []
        for shard in range(shards):
            name, keys = shard_name(shard), [f"{shard:06d}{row:02d}" for row in range(rows)]
            with folder.attempt(shard, dag.fingerprints[stage]) as attempt:
                if stage == "filter_metadata":
                    table = {"key": keys, "url": [f"http://pictures.example/{key}" for key in keys],
                             "caption": [f"a picture of waves {key}" for key in keys]}  # fmt: skip
                    pq.write_table(pa.table(table), attempt.path / f"{name}.parquet")
                    inputs = {}
                else:
                    write_tar(attempt.path / f"{name}.tar", shard, keys)
                    inputs = {f"filter_metadata/{name}": metadata.record(shard).digest}
                records.append(attempt.commit(rows=rows, samples=rows, dropped={}, inputs=inputs))
        folder.close(dag.fingerprints[stage], records, sum_funnel(records))
        downloads = folder
        dag.refresh(stage)
    assert downloads is not None


def write_tar(path: Path, shard: int, keys: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for row, key in enumerate(keys):
            for end, data in (("png", encode_png(picture(shard, row))), ("txt", f"a picture of waves {key}".encode())):
                member = tarfile.TarInfo(f"{key}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def make_cache(outputs: Path, *overrides: str, shards: int = 6, rows: int = 6) -> Dag:
    """The run's folder is outputs/small; filter_images and precompute_latents are made by the stages themselves."""
    dag = Dag(config_of(outputs, *overrides))
    make_downloads(dag, shards, rows)
    for stage in ("filter_images", "precompute_latents"):
        dag.refresh(stage)
        job = dag.statuses[stage].job
        job.output.write_plan(dag.plan(stage))
        run_shard = filter_images_of(job) if stage == "filter_images" else precompute_latents.Worker(job).run_shard
        records = [run_shard(shard) for shard in range(shards)]
        job.output.close(job.fingerprint, records, sum_funnel(records))
        dag.refresh(stage)
    return dag


def filter_images_of(job: Job):
    return lambda shard: filter_images.run_shard(job, shard)


def latents_of(outputs: Path) -> StageFolder:
    return StageFolder(outputs / "small" / "precompute_latents", "precompute_latents")
