"""What caching costs beside the bare autoencoder: pictures a second of the stage and of encode() alone.

    python -m tests.benchmarks.precompute --resolution 128 --rounds 5

The stage decodes, resizes, encodes, checks and writes real shards on disk; the bare autoencoder encodes as many
pictures that are tensors already, in the same batches. Both run once in each round, so that a busy machine slows both
alike; medians are printed, and the share of the bare autoencoder that the stage reaches (goal 0.95, where there are
processors to decode on beside the device that encodes).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.dag import Dag, Job
from pipelines.manifest import StageFolder
from pipelines.stages.precompute_latents import Worker
from tests.pipelines.small_cache import config_of, make_downloads
from tests.pipelines.small_cache import filter_images_of as judge


def prepare(outputs: Path, overrides: list[str], pictures: int) -> Job:
    """The stage's job over one shard of pictures."""
    dag = Dag(config_of(outputs, *overrides))
    make_downloads(dag, 1, pictures)
    dag.refresh("filter_images")
    images = dag.statuses["filter_images"].job
    images.output.write_plan(dag.plan("filter_images"))
    judge(images)(0)
    dag.refresh("precompute_latents")
    return dag.statuses["precompute_latents"].job


def seconds_of_stage(worker: Worker, folder: Path) -> float:
    worker.job = replace(worker.job, output=StageFolder(folder, "precompute_latents"))
    started = time.perf_counter()
    worker.run_shard(0)
    return time.perf_counter() - started


def seconds_of_encoder(worker: Worker, pictures: int) -> float:
    side, size = worker.settings.resolution, worker.settings.batch_size
    image = torch.rand(size, 3, side, side, device=worker.device) * 2 - 1
    started = time.perf_counter()
    for _ in range(-(-pictures // size)):
        worker.encoder.encode(image)
    if worker.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="of the configuration, autoencoder=kl_f8 for example")
    given = parser.parse_args()
    settings = {"resolution": given.resolution, "batch_size": given.batch, "min_psnr": 0, "check_samples": 8}
    overrides = [f"dataset.precompute_latents.{name}={value}" for name, value in settings.items()]
    stage, bare = [], []
    with tempfile.TemporaryDirectory() as name:
        worker = Worker(prepare(Path(name), overrides + given.overrides, given.pictures))
        seconds_of_encoder(worker, given.batch)  # warm
        for number in range(given.rounds):
            stage.append(given.pictures / seconds_of_stage(worker, Path(name) / f"out{number}"))
            bare.append(given.pictures / seconds_of_encoder(worker, given.pictures))
    theirs, ours = statistics.median(bare), statistics.median(stage)
    print(f"bare {theirs:.1f} pictures/s, stage {ours:.1f} pictures/s, {ours / theirs:.2f} of it")


if __name__ == "__main__":
    main()
