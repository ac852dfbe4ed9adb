"""What is decided before training starts, and what training is then handed, on small real caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ldm.training.loader import TrainData, hold_out
from pipelines.dag import Dag, Job
from pipelines.manifest import shard_name
from pipelines.stages import train
from tests.pipelines.small_cache import config_of, make_cache

# Every sample counts: the waves of the small cache look much alike.
EVERYTHING = ["dataset.selection.exact_duplicates=false", "dataset.selection.near_duplicate_bits=null"]
APART = "dataset.selection.held_out_near_duplicate_bits"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of six pictures."""
    torch.set_num_threads(1)
    outputs = tmp_path_factory.mktemp("train")
    make_cache(outputs)
    return outputs


def job_of(outputs: Path, *overrides: str) -> Job:
    """The job of `train`, its plan written, in a folder without an earlier one's."""
    dag = Dag(config_of(outputs, *EVERYTHING, *overrides))
    dag.refresh("train")
    job = dag.statuses["train"].job
    for path in job.output.path.glob("*.parquet"):
        path.unlink()
    job.output.write_plan(dag.plan("train"))
    return job


def decided(outputs: Path, *overrides: str) -> tuple[train.Prepared, TrainData]:
    """What the stage decides, and what its workers are handed then."""
    job = job_of(outputs, *overrides)
    prepared = train.prepare(job)
    data = train.train_data(job, prepared.selection)
    (job.output / "plan.json").unlink()
    return prepared, data


# -- held-out shards -------------------------------------------------------------------------------------------------
def hashes_of(outputs: Path, data: TrainData) -> np.ndarray:
    """The perceptual hashes of the samples in use."""
    found = []
    for info, bits in zip(data.shards, data.used, strict=True):
        name = f"{shard_name(int(Path(info.tar).stem))}.parquet"
        known = pq.read_table(outputs / "small/filter_images" / name)["phash"].to_numpy().astype(np.uint64)
        found.append(known[np.unpackbits(np.frombuffer(bits, np.uint8), count=len(known)).astype(bool)])
    return np.concatenate(found)


def nearest(outputs: Path, data: TrainData) -> tuple[int, int, int]:
    """(bits between the nearest two of what is trained on and what is held out, how many are trained on, held out)."""
    trained, held = hold_out(data, 1)
    ours, theirs = hashes_of(outputs, trained), hashes_of(outputs, held)
    return int(np.bitwise_count(ours[:, None] ^ theirs[None]).min()), len(ours), len(theirs)


def test_held_out_samples_that_look_like_trained_ones_are_left_out_and_counted(outputs: Path) -> None:
    prepared, data = decided(outputs, "training.held_out_shards=1", f"{APART}=null")
    assert nearest(outputs, data) == (near := nearest(outputs, data)[0], 30, 6) and not prepared.reasons
    prepared, data = decided(outputs, "training.held_out_shards=1", f"{APART}={near}")
    found, trained, held = nearest(outputs, data)
    assert found > near and trained == 30 and 0 < held < 6
    assert prepared.reasons == {"near_duplicate_of_trained": 6 - held} and prepared.used == trained + held
    prepared, _ = decided(outputs, f"{APART}={near}")
    assert prepared.used == 36  # nothing is held out, so nothing is near it


def test_too_many_held_out_shards_are_refused_before_a_worker_starts(outputs: Path) -> None:
    with pytest.raises(ValueError, match="held_out_shards is 3 of 6 shards; give at most 1"):
        train.prepare(job_of(outputs, "training.held_out_shards=3"))
