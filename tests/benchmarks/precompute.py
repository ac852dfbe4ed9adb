"""What caching costs beside the bare autoencoder: pictures a second of the stage and of encode() alone.

    python -m tests.benchmarks.precompute --rounds 5                                     # the default job's small one
    python -m tests.benchmarks.precompute --first-stage kl_f8 --pictures 16 --batch 4    # random weights: the real cost

The stage decodes, resizes, encodes and writes real shards on disk; the bare autoencoder encodes the same pictures,
which are tensors already, in the same batches. Both run once in each round, in turn first, so that a busy machine
slows both alike; what both made is compared, to the bit. Medians are printed, and the share of the bare autoencoder
that the stage reaches (goal 0.95, where there is a processor to decode on beside what encodes). Decoding back is timed
on its own: the stage does it for 8 samples of a shard, which are many of the few here and next to none of 10,000.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.encode import to_stored
from ldm.models.autoencoder import make_autoencoder
from ldm.shards import decode_array, iterate_tar
from pipelines.dag import Dag, Job
from pipelines.manifest import StageFolder
from pipelines.stages.precompute_latents import Group, Worker
from tests.pipelines.small_cache import config_of, make_downloads
from tests.pipelines.small_cache import filter_images_of as judge

SHARD, CHECKED = 10_000, 8  # samples of a shard of conf/dataset/base, and how many of them are decoded back


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


def random_weights(path: Path, name: str) -> list[str]:
    """The overrides for an autoencoder of conf/autoencoder whose weights are random, in a file."""
    torch.manual_seed(0)
    save_file(make_autoencoder(config_of(path, f"autoencoder={name}").autoencoder.network).state_dict(), path)
    return [f"autoencoder={name}", f"autoencoder.weights={path}"]


def seconds_of_stage(worker: Worker, folder: Path) -> float:
    worker.job = replace(worker.job, output=StageFolder(folder, "precompute_latents"))
    started = time.perf_counter()
    worker.run_shard(0)
    return time.perf_counter() - started


def seconds_of_encoder(worker: Worker, groups: list[Group]) -> tuple[float, dict[str, Tensor]]:
    """(seconds, key -> what was encoded)"""
    started = time.perf_counter()
    encoded = [worker.encoder.encode(group.image) for group in groups]
    if worker.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    stored = [to_stored(group.keys, each) for group, each in zip(groups, encoded, strict=True)]
    return seconds, {key: row for group, rows in zip(groups, stored, strict=True)
                     for key, row in zip(group.keys, rows, strict=True)}  # fmt: skip


def check_equal(folder: Path, worker: Worker, encoded: dict[str, Tensor]) -> None:
    """Raises AssertionError when the stage wrote anything but what the bare autoencoder said."""
    (tar,) = folder.glob("*/000000.tar")
    written = {key: decode_array(fields[worker.field]) for key, fields in iterate_tar(tar)}
    assert written.keys() == encoded.keys()
    assert all(np.array_equal(array, encoded[key].numpy()) for key, array in written.items())


def seconds_of_check(worker: Worker, group: Group) -> float:
    """Of decoding one sample back."""
    stored = to_stored(group.keys, worker.encoder.encode(group.image))
    started = time.perf_counter()
    worker.encoder.psnr(group.image[:1], stored[:1])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-stage", help="an autoencoder of conf/autoencoder, with random weights")
    parser.add_argument("overrides", nargs="*", help="of the configuration")
    given = parser.parse_args()
    settings = {"resolution": given.resolution, "batch_size": given.batch, "check_samples": 0}
    overrides = [f"dataset.precompute_latents.{name}={value}" for name, value in settings.items()] + given.overrides
    stage, bare = [], []
    with tempfile.TemporaryDirectory() as name:
        if given.first_stage:
            overrides += random_weights(Path(name) / "weights.safetensors", given.first_stage)
        worker = Worker(prepare(Path(name), overrides, given.pictures))
        groups = list(worker._groups(0))
        check = seconds_of_check(worker, groups[0])  # warm, too
        for number in range(given.rounds):
            folder = Path(name) / f"out{number}"
            if number % 2:
                stage.append(seconds_of_stage(worker, folder))
            seconds, encoded = seconds_of_encoder(worker, groups)
            bare.append(seconds)
            if not number % 2:
                stage.append(seconds_of_stage(worker, folder))
            check_equal(folder, worker, encoded)
    theirs, ours = given.pictures / statistics.median(bare), given.pictures / statistics.median(stage)
    rounds = ", ".join(f"{b / s:.2f}" for b, s in zip(bare, stage, strict=True))
    print(f"{given.first_stage or 'small'} at {given.resolution} px, equal to the bit: bare {theirs:.2f} pictures/s, "
          f"stage {ours:.2f} pictures/s, {ours / theirs:.3f} of it (round by round {rounds})")  # fmt: skip
    print(f"decoding back {CHECKED} of a shard of {SHARD:,} takes {CHECKED * check * theirs / SHARD:.2%} of its time")


if __name__ == "__main__":
    main()
