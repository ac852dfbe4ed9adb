"""Training goes back to a checkpoint once, nothing is deleted, and curves follow the new way."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import TrainingConfig
from ldm.training import copies, fetching
from ldm.training.checkpoint import Stretch, newest, step_name
from ldm.training.saving import save
from pipelines.config import compose
from pipelines.dag import Dag
from pipelines.journal import Journal, journal_path, read_images, read_metrics
from pipelines.manifest import StaleError
from pipelines.rewind import go_back, is_due
from pipelines.run import begin as begin_stage
from tests.pipelines.small_cache import config_of, make_cache

TRAINING = compose([]).training


def asked(resume: str | None, skip_samples: list[int] | None = None, **others: Any) -> TrainingConfig:
    return replace(TRAINING, resume=resume, skip_samples=skip_samples, **others)


def put(folder: Path, *steps: int, made_with: TrainingConfig = TRAINING) -> None:
    for step in steps:
        x = torch.full((3,), float(step))
        config = {"settings": {"training": asdict(made_with)}}
        facts = {"samples_seen": step * made_with.batch_size}
        save(folder, step, stretches=[Stretch("x", 0, {"weight": x})], ema={"x": x}, config=config, facts=facts)


def journal(run: Path) -> Journal:
    return Journal(journal_path(run, "train", "rank0"))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob("**/step-*"))


def test_it_goes_back_once_for_a_request_and_keeps_what_is_later(tmp_path: Path) -> None:
    train = tmp_path / "train"
    put(train, 10, 20, 30)
    (train / "record.json").write_text("{}")
    assert is_due(train, asked("step-10")) and not is_due(train, asked(None))
    go_back(train, asked("step-10"), journal(tmp_path))
    last = newest(train)
    assert last is not None and last.step == 10
    moved = [f"aside/001/{step_name(step)}" for step in (20, 30)]
    assert names(train) == [*moved, step_name(10)]
    assert (train / "aside/001/record.json").exists() and not (train / "record.json").exists()
    # The same command again goes on from where the new way has got to.
    put(train, 15)
    assert not is_due(train, asked("step-10"))
    go_back(train, asked("step-10"), journal(tmp_path))
    assert names(train) == [*moved, step_name(10), step_name(15)]
    # Another request is another one.
    assert is_due(train, asked("step-00000010", [80, 160]))
    go_back(train, asked("step-00000010", [80, 160]), journal(tmp_path))
    assert names(train) == [*moved, f"aside/002/{step_name(15)}", step_name(10)]


def test_nobody_goes_on_from_a_copy_of_the_way_that_was_left(tmp_path: Path) -> None:
    train, there = tmp_path / "train", tmp_path / "there"
    put(train, 10, 20)
    shutil.copytree(train, there)
    go_back(train, asked("step-10"), journal(tmp_path), there)
    assert list(copies.committed(there)) == [step_name(10)]
    shutil.rmtree(train)
    last = fetching.newest(train, there)
    assert last is not None and last.step == 10


def test_a_checkpoint_that_is_not_there_or_not_whole_is_refused_and_nothing_moves(tmp_path: Path) -> None:
    put(tmp_path, 10, 20)
    for resume in ("step-11", "10", "latest"):
        with pytest.raises(ValueError, match=f"training.resume is '{resume}'; in .* there are: {step_name(10)}, "):
            go_back(tmp_path, asked(resume), journal(tmp_path))
    (tmp_path / step_name(10) / "config.json").write_text("other")
    with pytest.raises(ValueError, match="which is not whole: config.json has 5 bytes"):
        go_back(tmp_path, asked("step-10"), journal(tmp_path))
    assert names(tmp_path) == [step_name(10), step_name(20)] and not (tmp_path / "aside").exists()


def test_a_crash_on_the_way_back_is_made_good_by_the_same_command(tmp_path: Path) -> None:
    put(tmp_path, 10, 20, 30)
    (tmp_path / "aside/001").mkdir(parents=True)
    (tmp_path / step_name(30)).rename(tmp_path / "aside/001" / step_name(30))
    go_back(tmp_path, asked("step-10"), journal(tmp_path))
    assert names(tmp_path) == [f"aside/001/{step_name(30)}", f"aside/002/{step_name(20)}", step_name(10)]


def test_curves_follow_the_new_way(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    told = journal(tmp_path)
    for step in (1, 2, 3, 4):
        told.metrics({"loss": 10.0 + step}, step=step)
    told.image("samples", tmp_path / "four.png", 4)
    told.rewind(2)
    told.metrics({"loss": 3.5}, step=3)
    told.close()
    assert [(step, value) for step, value, _ in read_metrics(tmp_path, "train")["loss"]] == [(1, 11), (2, 12), (3, 3.5)]
    assert read_images(tmp_path, "train") == {}


# ---- what decides the stage --------------------------------------------------------------------------------
def dag_of(outputs: Path, *overrides: str) -> Dag:
    return Dag(config_of(outputs, *overrides))


def begin(outputs: Path, *overrides: str) -> Dag:
    """The stage's plan is written, as before a training."""
    dag = dag_of(outputs, *overrides)
    dag.refresh("train")
    begin_stage(dag, "train")
    return dag


def test_requests_are_not_part_of_the_fingerprint(tmp_path: Path) -> None:
    base = dag_of(tmp_path).fingerprints
    for request in ("training.resume=step-10", "training.skip_samples=[16,32]", "training.accept=[training.beta1]"):
        assert dag_of(tmp_path, request).fingerprints == base


def test_other_settings_are_refused_unless_they_are_accepted(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(StaleError, match="training.learning_rate: 0.001 there, 0.5 now"):
        dag_of(tmp_path, "training.learning_rate=0.5").refresh("train")
    with pytest.raises(StaleError):
        dag_of(tmp_path, "training.learning_rate=0.5", "unet.dropout=0.5",
               "training.accept=[training.learning_rate]").refresh("train")  # fmt: skip
    begin(tmp_path, "training.learning_rate=0.5", "training.accept=[training.learning_rate]")
    assert not dag_of(tmp_path, "training.learning_rate=0.5").refresh("train").done  # these are its settings now
    with pytest.raises(StaleError):
        dag_of(tmp_path).refresh("train")
    assert (tmp_path / "small/train/aside/001/plan.json").exists()


def test_a_finished_training_is_open_again_when_it_shall_go_back(tmp_path: Path) -> None:
    dag = make_cache(tmp_path, shards=1, rows=2)
    train = begin(tmp_path).statuses["train"].job.output
    inputs = {read: dag.statuses[read].digest for read in ("filter_metadata", "filter_images", "precompute_latents")}
    with train.attempt(None, dag.fingerprints["train"]) as attempt:
        attempt.commit(rows=1, samples=1, dropped={}, inputs=inputs, facts={"training.max_steps": 1200})
    assert dag_of(tmp_path).refresh("train").done
    assert not dag_of(tmp_path, "training.resume=step-10").refresh("train").done
