"""Which checkpoints saw samples that must go: exactly, in every training that read these latents, and never too few."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ldm.shards import read_index
from ldm.training.loader import TrainData, hold_out, order_of
from pipelines import status
from pipelines.config import Config
from pipelines.dag import Dag
from pipelines.manifest import StageFolder, edition_digest, sha256_file, write_json
from pipelines.selecting.removed import describe_removed
from pipelines.selection import write_selection
from pipelines.stages.train import train_data
from tests.pipelines.small_cache import config_of, make_cache
from tests.s3_server import BUCKET, S3Server

SHARDS, ROWS = 4, 6
TRAINING = ["training.held_out_shards=1", "training.lanes=4", "training.window_shards=2", "training.batch_size=4"]
KEYS = [f"{shard:06d}{row:02d}" for shard in range(SHARDS) for row in range(ROWS)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("removed")
    make_cache(outputs, *TRAINING, shards=SHARDS, rows=ROWS)
    return outputs


@pytest.fixture
def outputs(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "outputs"))


def plan_training(config: Config) -> tuple[Dag, TrainData]:
    """A training that has a plan and a selection, which leaves every fifth sample out; and what it is trained on."""
    dag = Dag(config)
    dag.refresh("train")
    train, selections = StageFolder(dag.home("train"), "train"), {}
    train.write_plan(dag.plan("train"))
    for name in ("", *(f"@{run}" for run in config.dataset.mixture)):
        masks = {shard: np.arange(ROWS) % 5 != shard % 5 for shard in range(SHARDS)}
        selections[name] = write_selection(train / f"selection{name}.parquet", masks)
    return dag, train_data(dag.job("train"), selections)


def checkpoint(train: Path, step: int, seen: int, config: Config, data: TrainData, **facts: Any) -> Path:
    """A checkpoint as far as it tells of itself; its weights are its name."""
    folder = train / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "ema.safetensors").write_text(str(folder))
    files = {"ema.safetensors": {"sha256": sha256_file(folder / "ema.safetensors")}}
    write_json(folder / "manifest.json", {"step": step, "samples_seen": seen, "files": files, **facts})
    known = {"edition": data.edition, "selection": data.selection}
    write_json(folder / "config.json", {"settings": {"training": asdict(config.training)}, "data": known})
    (folder / "COMMITTED").touch()
    return folder


def keys_by_position(config: Config, data: TrainData, positions: int) -> list[str]:
    """The key at each position, found as the loader finds it."""
    training = config.training
    trained, _ = hold_out(data, training.held_out_shards)
    order = order_of(trained, training.seed, training.lanes, training.window_shards, training.batch_size)
    found = []
    for shard, place in map(order.locate, range(positions)):
        info, bits = trained.shards[shard], trained.used[shard]
        used = np.flatnonzero(np.unpackbits(np.frombuffer(bits or b"", np.uint8), count=info.samples))
        run = "@photos" if "/photos/" in info.tar else ""
        found.append(read_index(info)["key"][used[place]].decode() + run)
    return found


def answers(config: Config, named: list[str], folder: Path) -> dict[str, str]:
    """Checkpoint, from the folder of runs on -> what is said of it."""
    (folder / "removed.txt").write_text("\n".join(named))
    lines = describe_removed(config, folder / "removed.txt")
    said = [line.strip().partition(": ") for line in lines if line.startswith("  ")]
    return {path.removeprefix(f"{config.paths.outputs}/"): words for path, _, words in said}


def saw(keys: set[str]) -> str:
    shown = ", ".join(sorted(keys)[:8]) + (" ..." if len(keys) > 8 else "")
    return f"saw {len(keys)} of them: {shown}" if keys else "saw none of them"


def test_within_an_epoch_it_is_known_to_the_sample_what_was_seen(outputs: Path, tmp_path: Path) -> None:
    config = config_of(outputs, *TRAINING)
    dag, data = plan_training(config)
    train = dag.home("train")
    seen = [0, 1, 4, 9, 13, 40]
    for step, samples in enumerate(seen, 1):
        checkpoint(train, step, samples, config, data)
    order = keys_by_position(config, data, max(seen))
    assert len(set(order)) == 14, "a fifth of three shards is not used, and one is held out"
    for named in (KEYS, [order[3]], order[10:12]):
        found = answers(config, named, tmp_path)
        assert list(found) == [f"small/train/step-{step:08d}" for step in range(1, len(seen) + 1)]
        assert list(found.values()) == [saw(set(order[:samples]) & set(named)) for samples in seen]


def test_what_is_held_out_or_not_selected_was_not_trained_on(outputs: Path, tmp_path: Path) -> None:
    config = config_of(outputs, *TRAINING)
    dag, data = plan_training(config)
    checkpoint(dag.home("train"), 1, 10**6, config, data)
    _, held = hold_out(data, 1)
    shard = int(Path(held.shards[0].tar).stem)
    here = [key for key in KEYS if key.startswith(f"{shard:06d}")]
    (tmp_path / "removed.txt").write_text("\n".join(here))
    lines = describe_removed(config, tmp_path / "removed.txt")
    used = [key for row, key in enumerate(here) if row % 5 != shard % 5]
    assert lines[0].endswith(f"names 6 samples of this run: {', '.join(here)}")
    assert lines[1] == f"{len(used)} of them are in the selection that train uses: {', '.join(used)}"
    assert lines[2] == f"{len(used)} of them are held out, so that no weight learns from them: {', '.join(used)}"
    assert "saw none of them" in lines[3] and "leaves them out" in lines[-1]


def test_positions_that_were_left_out_were_not_seen_until_they_come_again(outputs: Path, tmp_path: Path) -> None:
    config = config_of(outputs, *TRAINING)
    dag, data = plan_training(config)
    train, skipped = dag.home("train"), {"history": [{"step": 1, "skipped_samples": [4, 12]}, {"step": 2}]}
    checkpoint(train, 1, 4, config, data)
    checkpoint(train, 2, 16, config, data, **skipped)
    checkpoint(train, 3, 40, config, data, **skipped)
    order = keys_by_position(config, data, 40)
    found = list(answers(config, KEYS, tmp_path).values())
    assert found == [saw(set(order[:4])), saw(set(order[:4] + order[12:16])), saw(set(order[:4] + order[12:40]))]
    assert found[1] != saw(set(order[:16]))


def test_checkpoints_that_were_set_aside_are_named(outputs: Path, tmp_path: Path) -> None:
    config = config_of(outputs, *TRAINING)
    dag, data = plan_training(config)
    folder = checkpoint(dag.home("train"), 7, 5, config, data)
    shutil.copytree(folder, dag.home("train") / "aside/001/step-00000009")
    found, order = answers(config, KEYS, tmp_path), keys_by_position(config, data, 5)
    assert found == dict.fromkeys(["small/train/step-00000007", "small/train/aside/001/step-00000009"], saw(set(order)))


def test_copies_are_named_whether_or_not_the_checkpoint_is_still_here(outputs: Path, tmp_path: Path) -> None:
    config = config_of(outputs, *TRAINING, f"cluster.train.run.copy_to={tmp_path / 'copies'}")
    dag, data = plan_training(config)
    folder = checkpoint(dag.home("train"), 3, 5, config, data)
    copy = Path(shutil.copytree(folder, tmp_path / "copies/small/train/step-00000003"))
    order = keys_by_position(config, data, 5)
    assert answers(config, KEYS, tmp_path) == dict.fromkeys(["small/train/step-00000003", str(copy)], saw(set(order)))
    shutil.rmtree(folder)
    assert answers(config, KEYS, tmp_path) == {str(copy): saw(set(order))}


@pytest.mark.slow
def test_copies_in_a_bucket_too(s3: S3Server, outputs: Path, tmp_path: Path) -> None:
    config = config_of(outputs, *TRAINING, f"cluster.train.run.copy_to=s3://{BUCKET}/copies")
    dag, data = plan_training(config)
    folder = checkpoint(dag.home("train"), 3, 5, config, data)
    s3.put_folder(folder, "copies/small/train/step-00000003")
    shutil.rmtree(folder)
    (tmp_path / "removed.txt").write_text("\n".join(KEYS))
    said = "\n".join(describe_removed(config, tmp_path / "removed.txt"))
    seen = saw(set(keys_by_position(config, data, 5)))
    assert f"s3://{BUCKET}/copies/small/train/step-00000003: {seen}" in said


def test_other_runs_on_these_latents_are_named_and_those_that_began_from_them(outputs: Path, tmp_path: Path) -> None:
    config = config_of(outputs, *TRAINING)
    dag, data = plan_training(config)
    own = checkpoint(dag.home("train"), 1, 6, config, data)
    order = keys_by_position(config, data, 6)

    reuse = "{filter_metadata: small, download: small, filter_images: small, precompute_latents: small}"
    other = config_of(outputs, *TRAINING, "name=other", f"paths.reuse={reuse}", "training.seed=5")
    borrowed, other_data = plan_training(other)
    checkpoint(borrowed.home("train"), 1, 6, other, other_data)
    other_order = keys_by_position(other, other_data, 6)
    assert set(order) != set(other_order)

    apart = make_cache(outputs, *TRAINING, "name=apart", shards=2, rows=ROWS)  # what others train on
    foreign = replace(data, edition=apart.statuses["precompute_latents"].digest)
    for name, start in (("child", own / "ema.safetensors"), ("apart", None), ("orphan", tmp_path / "gone.safetensors")):
        heir = replace(config, training=replace(config.training, start_from=start and str(start)))
        checkpoint(outputs / name / "train", 1, 8, heir, foreign)
    shutil.copy(own / "ema.safetensors", tmp_path / "copy.safetensors")
    heir = replace(config, training=replace(config.training, start_from=str(tmp_path / "copy.safetensors")))
    child = checkpoint(outputs / "cousin/train", 1, 8, heir, foreign)
    heir = replace(config, training=replace(config.training, start_from=str(child / "ema.safetensors")))
    checkpoint(outputs / "grandchild/train", 1, 0, heir, foreign)

    found = answers(config, KEYS, tmp_path)
    inherited = {name: words for name, words in found.items() if name not in ("small/train/step-00000001",
                                                                              "other/train/step-00000001")}
    assert found["small/train/step-00000001"] == saw(set(order))
    assert found["other/train/step-00000001"] == saw(set(other_order))
    assert {name.partition("/")[0] for name in inherited} == {"child", "cousin", "grandchild", "orphan"}
    for name in ("child", "cousin"):
        assert inherited[f"{name}/train/step-00000001"] == f"{saw(set(order))}; began from {own}"
    assert inherited["grandchild/train/step-00000001"] == f"{saw(set(order))}; began from {child}"
    assert inherited["orphan/train/step-00000001"].startswith("must be taken to have seen them: began from")


def test_in_a_mixture_every_cache_has_its_own_pace(outputs: Path, tmp_path: Path) -> None:
    make_cache(outputs, *TRAINING, "name=photos", shards=SHARDS - 1, rows=ROWS)
    config = config_of(outputs, *TRAINING, "dataset.mixture={photos: 0.25}")
    dag, data = plan_training(config)
    seen = [8, 32, 300]
    for step, samples in enumerate(seen, 1):
        checkpoint(dag.home("train"), step, samples, config, data)
    order = keys_by_position(config, data, max(seen))
    assert {key.partition("@")[2] for key in order} == {"", "photos"}
    found = answers(config, KEYS, tmp_path)  # most of them both runs have
    assert list(found.values()) == [saw(set(order[:samples])) for samples in seen]
    lent = config_of(outputs, *TRAINING, "name=photos")
    found = answers(lent, KEYS, tmp_path)  # asked of the run whose latents were mixed in
    expected = [{key.removesuffix("@photos") for key in order[:samples] if "@" in key} for samples in seen]
    assert found == {f"small/train/step-{step:08d}": saw(keys) for step, keys in enumerate(expected, 1)}


def test_what_cannot_be_known_counts_as_seen(outputs: Path, tmp_path: Path) -> None:
    config = config_of(outputs, *TRAINING)
    dag, data = plan_training(config)
    folder = checkpoint(dag.home("train"), 1, 2, config, data)
    assert answers(config, KEYS, tmp_path)["small/train/step-00000001"].startswith("saw 2 of them")
    assert answers(config, ["99999999"], tmp_path) == {"small/train/step-00000001": "saw none of them"}
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:40])
    assert "cannot be read" in answers(config, KEYS, tmp_path)["small/train/step-00000001"]
    (folder / "config.json").write_text(text)
    (dag.home("train") / "selection.parquet").rename(tmp_path / "away")
    words = answers(config, KEYS, tmp_path)["small/train/step-00000001"]
    assert words.startswith("must be taken to have seen them") and "selection.parquet is not the selection" in words
    (tmp_path / "away").rename(dag.home("train") / "selection.parquet")
    again = replace(data, edition=edition_digest(["before they were made again"]))
    checkpoint(dag.home("train"), 2, 2, config, again)
    checkpoint(outputs / "other/train", 1, 2, config, again)
    found = answers(config, KEYS, tmp_path)
    assert found.pop("small/train/step-00000001").startswith("saw 2 of them") and len(found) == 2
    assert all("are of no run in" in words and "must be taken to have seen them" in words for words in found.values())


def test_an_autoencoder_that_was_trained_on_the_pictures_is_named(outputs: Path, tmp_path: Path) -> None:
    config = config_of(outputs, *TRAINING)
    digest = Dag(config).refresh("download").digest
    made = StageFolder(outputs / "other/train_autoencoder", "train_autoencoder")
    with made.attempt(None, "f") as attempt:
        attempt.commit(rows=1, samples=1, dropped={}, inputs={"download": digest})
    found = answers(config, KEYS[:1], tmp_path)
    assert found["other/train_autoencoder"].startswith("must be taken to have seen them")
    assert answers(config, ["99999999"], tmp_path) == {}


def test_samples_are_named_by_key_by_url_or_by_hash(outputs: Path, tmp_path: Path) -> None:
    config = config_of(outputs, *TRAINING)
    stored = pq.read_table(outputs / "small/filter_images/000002.parquet")["sha256"][3].as_py()
    for line, key in (("00000005", "00000005"), ("http://pictures.example/00000101", "00000101"),
                      (stored.upper(), "00000203")):  # fmt: skip
        (tmp_path / "removed.txt").write_text(f"{line}\nnothing else\n")
        assert describe_removed(config, tmp_path / "removed.txt")[0].endswith(f"names 1 samples of this run: {key}")


def test_the_command_says_it(outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.pipelines.small_cache import overrides_of

    (tmp_path / "removed.txt").write_text("00000005\n")
    assert status.main([*overrides_of(outputs), *TRAINING, f"removed={tmp_path / 'removed.txt'}"]) == 0
    said = capsys.readouterr().out
    assert "names 1 samples" in said and "there is no checkpoint" in said and "precompute_latents  done" in said
