"""Latents whose inputs were made again with other bytes, by equal settings: exactly those are stale, by name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.dag import Dag, weights_path
from pipelines.manifest import StageFolder, StaleError, shard_name, sum_funnel
from pipelines.stages import filter_images, precompute_latents
from pipelines.training_set import check_cache, input_digests
from tests.pipelines.small_cache import config_of, make_downloads

TRAINED = "autoencoder.weights=null"  # by train_autoencoder
SHARDS = 3


def make(outputs: Path) -> Dag:
    """A run to the end of precompute_latents whose autoencoder comes from its stage, as that leaves it."""
    torch.set_num_threads(1)
    dag = Dag(config_of(outputs, TRAINED))
    make_downloads(dag, SHARDS, 6)
    for stage in ("filter_images", "train_autoencoder", "precompute_latents"):
        dag.refresh(stage)
        job = dag.statuses[stage].job
        job.output.write_plan(dag.plan(stage))
        if stage == "train_autoencoder":
            given = config_of(outputs).autoencoder.weights
            put_autoencoder(dag, weights_path(given))
        else:
            worker = precompute_latents.Worker(job).run_shard if stage == "precompute_latents" else None
            records = [worker(shard) if worker else filter_images.run_shard(job, shard) for shard in range(SHARDS)]
            job.output.close(job.fingerprint, records, sum_funnel(records))
        dag.refresh(stage)
    return dag


def put_autoencoder(dag: Dag, weights: Path) -> None:
    """What train_autoencoder commits."""
    job = dag.statuses["train_autoencoder"].job
    with job.output.attempt(None, job.fingerprint) as attempt:
        shutil.copy(weights, attempt.path / "autoencoder.safetensors")
        attempt.commit(rows=18, samples=18, dropped={}, inputs=input_digests(job.inputs))


def train_again(dag: Dag, folder: Path) -> None:
    """Equal settings, other numbers: another machine, say."""
    weights = load_file(dag.statuses["train_autoencoder"].job.output / "autoencoder.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] + 1e-3}, folder / "again.safetensors")
    (dag.statuses["train_autoencoder"].job.output / "record.json").unlink()
    put_autoencoder(dag, folder / "again.safetensors")


def stale(outputs: Path) -> StaleError:
    with pytest.raises(StaleError) as error:
        Dag(config_of(outputs, TRAINED)).refresh("train")
    return error.value


def test_an_autoencoder_that_was_trained_again_makes_all_latents_stale_and_nothing_else(tmp_path: Path) -> None:
    dag = make(tmp_path)
    Dag(config_of(tmp_path, TRAINED)).refresh("train")  # the twin: as they are, they count
    latents = dag.statuses["precompute_latents"].job.output
    job = replace(dag.job("train"), inputs={"train_autoencoder": dag.statuses["train_autoencoder"].job.output})
    check_cache(latents, latents.committed(), job)
    train_again(dag, tmp_path)
    error = stale(tmp_path)
    assert error.folder.stage == "precompute_latents" and error.shards == [0, 1, 2]
    assert "was made from train_autoencoder with digest" in str(error) and "2 more shards like it" in str(error)
    with pytest.raises(ValueError, match=r"made by train_autoencoder \w{12}; asked for is train_autoencoder \w{12}"):
        check_cache(latents, latents.committed(), job)
    with pytest.raises(ValueError, match=r"was made by train_autoencoder \w{12}; asked for is given weights"):
        given = replace(job.what["autoencoder"], weights=config_of(tmp_path).autoencoder.weights)
        check_cache(latents, latents.committed(), replace(job, what={**job.what, "autoencoder": given}))


def test_a_shard_that_was_downloaded_again_makes_its_own_verdicts_stale_and_no_others(tmp_path: Path) -> None:
    dag = make(tmp_path)
    folder = StageFolder(tmp_path / "small" / "download", "download")
    record = folder.record(1)
    with folder.attempt(1, record.fingerprint) as attempt:
        tar = attempt.path / f"{shard_name(1)}.tar"
        tar.write_bytes((folder / tar.name).read_bytes() + bytes(512))  # the same pictures in other bytes
        folder.record_path(1).unlink()
        attempt.commit(rows=record.rows, samples=record.samples, dropped={}, inputs=record.inputs)
    records = list(folder.committed().values())
    folder.close(dag.fingerprints["download"], records, sum_funnel(records))
    error = stale(tmp_path)
    assert error.folder.stage == "filter_images" and error.shards == [1]
    assert "000001.json was made from download/000001 with digest" in str(error) and "more shards" not in str(error)
