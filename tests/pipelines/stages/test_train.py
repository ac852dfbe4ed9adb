"""What is decided before training starts, and what training is then handed, on small real caches."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.training.loader import Draw, Loader, TrainData, hold_out, order_of
from pipelines.config import ConfigError
from pipelines.dag import Dag, Job, weights_path
from pipelines.journal import journal_path, read_entries
from pipelines.manifest import StageFolder, StaleError, sha256_file, shard_name, sum_funnel
from pipelines.run import tracked
from pipelines.selection import Chosen, select
from pipelines.stages import train
from pipelines.tracking import Tracker
from pipelines.training_set import caches_of, closed_records, held_out_shards, input_digests
from pipelines.verify import verify
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
    shutil.rmtree(outputs / "small/train", ignore_errors=True)
    dag = Dag(config_of(outputs, *EVERYTHING, *overrides))
    dag.refresh("train")
    job = dag.statuses["train"].job
    job.output.write_plan(dag.plan("train"))
    return job


def decided(outputs: Path, *overrides: str) -> tuple[train.Prepared, TrainData]:
    """What the stage decides, and what its workers are handed then."""
    job = job_of(outputs, *overrides)
    prepared = train.prepare(job)
    return prepared, train.train_data(job, prepared.selections)


# -- mixtures --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def two(outputs: Path) -> Path:
    """A second run beside it, of three shards; its first three shards' pictures are those of the first."""
    make_cache(outputs, "name=photos", shards=3)
    return outputs


def test_mixed_caches_are_among_the_inputs_that_are_tracked(two: Path, tmp_path: Path) -> None:
    dag = Dag(config_of(two, *EVERYTHING, "dataset.mixture={photos: 0.25}"))
    dag.refresh("train")
    tracker = Tracker(replace(dag.config.tracking, enabled=False), tmp_path)
    with tracker, tracked(dag, "train", tracker):
        pass
    told = {entry["name"]: entry["digest"] for entry in read_entries(journal_path(tmp_path, "train"))[0]
            if entry["kind"] == "dataset"}  # fmt: skip
    folders = dag.statuses["train"].job.inputs
    assert told == {name: folder.manifest()["digest"] for name, folder in folders.items()} and len(told) == 6
    assert told["precompute_latents@photos"] != told["precompute_latents"]


def test_caches_are_mixed_by_weight_under_one_selection_and_resumed_to_the_sample(two: Path) -> None:
    prepared, data = decided(two, "dataset.mixture={photos: 0.25}")
    assert (prepared.used, prepared.known, sorted(prepared.selections)) == (54, 54, ["", "@photos"])
    assert data.caches == [0] * 6 + [1] * 3 and data.weights == (1.0, 0.25)

    def sequence(start: int, count: int, rank: int = 0, world_size: int = 1) -> dict[int, tuple[str, bytes]]:
        loader = Loader(data, Draw(0, 10, 0.0), None, lanes=4, window_shards=2, batch_size=10,
                        micro_batch_size=10 // world_size, rank=rank, world_size=world_size)  # fmt: skip
        batches = islice(loader.batches(start), count)
        return {position: (key, z0.numpy().tobytes()) for batch in batches
                for position, key, z0 in zip(batch.positions.tolist(), batch.keys, batch.z0, strict=True)}  # fmt: skip

    whole = sequence(0, 100)
    assert len(whole) == 1000
    assert sequence(0, 40) | sequence(400, 60, 0, 2) | sequence(400, 60, 1, 2) == whole
    order = order_of(data, 0, 4, 2, 10)
    assert Counter(data.caches[order.locate(position)[0]] for position in whole) == {0: 800, 1: 200}
    # Of pictures that both have, this run's stay.
    _, data = decided(two, "dataset.mixture={photos: 1}", "dataset.selection.exact_duplicates=true")
    assert data.counts() == [6] * 6 + [0] * 3


def test_the_record_says_what_was_mixed_and_a_cache_made_again_makes_it_stale(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    given = "dataset.mixture={photos: 0.5}"
    job = job_of(tmp_path, given)
    prepared = train.prepare(job)
    with job.output.attempt(None, job.fingerprint) as attempt:
        selections = [cache.selection for cache in caches_of(job)]
        keep = {name: {"bytes": (job.output / name).stat().st_size, "sha256": sha256_file(job.output / name)}
                for name in selections}  # fmt: skip
        attempt.commit(rows=prepared.known, samples=prepared.used, dropped={}, inputs=input_digests(job.inputs),
                       facts={"training.max_steps": 10**6}, keep=keep)  # fmt: skip
    photos = StageFolder(tmp_path / "photos/precompute_latents", "precompute_latents")
    assert job.output.record().inputs["precompute_latents@photos"] == photos.manifest()["digest"]
    assert selections == ["selection.parquet", "selection@photos.parquet"]
    assert not verify(job.output.path, workers=1).findings
    config = config_of(tmp_path, *EVERYTHING, given)
    assert Dag(config).refresh("train").done
    records = list(photos.committed().values())
    photos.close(records[0].fingerprint, records[:2], sum_funnel(records[:2]))
    with pytest.raises(StaleError, match="was made from precompute_latents@photos with digest"):
        Dag(config).refresh("train")


def test_what_comes_after_training_reads_what_was_mixed_in(two: Path) -> None:
    def job(stage: str, *overrides: str) -> Job:
        return Dag(config_of(two, *EVERYTHING, *overrides)).refresh(stage).job

    shutil.rmtree(two / "small/train", ignore_errors=True)
    mixed, alone = job("evaluate", "dataset.mixture={photos: 0.5}"), job("evaluate")
    assert mixed.inputs.keys() - alone.inputs.keys() == {"precompute_latents@photos"}
    assert mixed.inputs["precompute_latents@photos"].path == two / "photos/precompute_latents"


@pytest.mark.parametrize("mixture, words", [
    ("{nobody: 1}", "names nobody, whose filter_metadata in .* is not finished; make it with: .* name=nobody"),
    ("{photos: 0}", "has photos: 0.0; expected another run with a weight above 0"),
    ("{small: 1}", "has small: 1.0; expected another run"),
])  # fmt: skip
def test_mixtures_that_cannot_be_made_are_refused_at_once(two: Path, mixture: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Dag(config_of(two, f"dataset.mixture={mixture}")).refresh("train")


def test_caches_of_another_autoencoder_or_size_are_not_mixed_in(outputs: Path) -> None:
    make_cache(outputs, "name=large", "dataset.precompute_latents.resolution=48", shards=1)
    with pytest.raises(ValueError, match=r"must be of one size; their sides are 4 in .*small/.*, 6 in .*large/"):
        decided(outputs, "dataset.mixture={large: 1}")
    weights = outputs / "other.safetensors"
    autoencoder = Dag(config_of(outputs)).config.autoencoder
    changed = {name: x + 0.001 for name, x in load_file(weights_path(autoencoder.weights)).items()}
    save_file(changed, weights)
    make_cache(outputs, "name=other", f"autoencoder.weights={weights}", shards=1)
    with pytest.raises(ValueError, match=r"other/precompute_latents was made with weights \w{12}; autoencoder.w"):
        decided(outputs, "dataset.mixture={other: 1}")


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


def test_no_cache_of_a_mixture_is_held_out_as_a_whole(outputs: Path) -> None:
    make_cache(outputs, "name=single", shards=1)
    caches = caches_of(job_of(outputs, "dataset.mixture={single: 1}"))
    records = {cache.name: closed_records(cache.latents) for cache in caches}
    (name, shard), = held_out_shards(caches, records, 1)
    alone = {**records, name: {shard: records[name][shard]}}  # the shard of lowest hash is all that a cache has
    with pytest.raises(ValueError, match="held_out_shards=1 leaves no shard of (this run|@single) to be trained on"):
        held_out_shards(caches, alone, 1)


def test_too_many_held_out_shards_are_refused_before_a_worker_starts(outputs: Path) -> None:
    with pytest.raises(ValueError, match="held_out_shards is 3 of 6 shards; give at most 1"):
        train.prepare(job_of(outputs, "training.held_out_shards=3"))


# -- what was decided before ------------------------------------------------------------------------------------------
def test_a_run_that_goes_on_decides_again_only_where_something_changed(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(outputs / "small", tmp_path / "small")
    job, asked = job_of(tmp_path, "training.held_out_shards=1", f"{APART}=30"), Counter[str]()

    def counting(*given: Any) -> Chosen:
        asked["times"] += 1
        return select(*given)

    monkeypatch.setattr("pipelines.selecting.decided.select", counting)
    prepared = train.prepare(job)
    assert prepared.reasons and train.prepare(job) == prepared and asked["times"] == 1
    for name in ("selection.parquet", "reasons.parquet", "selected.json"):
        (job.output / name).unlink()
        assert train.prepare(job) == prepared and (job.output / name).exists()
    assert asked["times"] == 4
    (job.output / "reasons.parquet").write_bytes(b"damaged")
    assert train.prepare(job) == prepared and train.prepare(job) == prepared and asked["times"] == 5

    def again(what: dict[str, Any]) -> None:
        before = asked["times"]
        with pytest.raises(ValueError, match="was made from other samples or rules than there are now"):
            train.prepare(replace(job, what={**job.what, **what}))
        assert asked["times"] == before + 1

    rules = job.what["dataset.selection"]
    again({"dataset.selection": replace(rules, held_out_near_duplicate_bits=None)})
    (tmp_path / "removed.txt").write_text("nothing of these")
    removing = {"dataset.selection": replace(rules, removed=str(tmp_path / "removed.txt"))}
    assert train.prepare(replace(job, what={**job.what, **removing})) == prepared  # whatever else it names
    (tmp_path / "removed.txt").write_text("00000001")
    again(removing)


def test_only_the_columns_that_decide_are_read_and_a_score_that_is_nowhere_is_named(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()

    class Looking(pq.ParquetFile):
        def read(self, columns: list[str] | None = None, **given: Any) -> Any:
            read.update(columns or [])
            return super().read(columns, **given)

    monkeypatch.setattr(pq, "ParquetFile", Looking)
    decided(outputs, "dataset.selection.near_duplicate_bits=3")
    assert read == {"key", "verdict", "phash"}
    decided(outputs, "dataset.selection.thresholds={width: [null, 99]}")
    assert read == {"key", "verdict", "phash", "width"}
    with pytest.raises(ValueError, match="'beauty', which is not stored; there are: caption, .*phash, .*url"):
        decided(outputs, "dataset.selection.thresholds={beauty: [5, null]}")
