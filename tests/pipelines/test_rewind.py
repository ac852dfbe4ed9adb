"""Training goes back to a checkpoint once, nothing is deleted, and curves follow the new way."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import TrainingConfig
from ldm.training import copies, fetching, may_change
from ldm.training.checkpoint import Stretch, newest, step_name
from ldm.training.saving import save
from pipelines.config import ConfigError, compose
from pipelines.dag import STAGES, Dag
from pipelines.journal import Journal, journal_path, read_entries, read_images, read_metrics
from pipelines.manifest import StaleError
from pipelines.rewind import go_back, is_due
from pipelines.run import _check_begin, _statuses
from pipelines.run import begin as begin_stage
from pipelines.stages.train import teller_of_checkpoints
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


# ---- what is told of checkpoints ----------------------------------------------------------------------------
def told(run: Path) -> list[tuple[str, int]]:
    """What the journal says of checkpoints, in order."""
    entries = read_entries(journal_path(run, "train", "rank0"))[0]
    return [(entry["kind"], entry["step"]) for entry in entries if entry["kind"].startswith("model")]


def test_checkpoints_are_told_of_before_others_go_and_by_the_next_start_where_that_was_too_late(tmp_path: Path) -> None:
    train, said = tmp_path / "train", journal(tmp_path)
    tell = teller_of_checkpoints(said, train)
    put(train, 10, 20)
    tell()
    tell()
    assert told(tmp_path) == [("model", 10), ("model", 20)]
    # Killed after a save and a removal, before anything was said of them.
    put(train, 30)
    shutil.rmtree(train / step_name(10))
    said.close()
    again = journal(tmp_path)
    teller_of_checkpoints(again, train)()
    assert told(tmp_path)[2:] == [("model", 30), ("model_removed", 10)]
    # One that is damaged is set aside, and is no model any more; the same step saved anew is another one.
    (train / step_name(30) / "config.json").write_text("{}")
    last = newest(train, finish=True)
    assert last is not None and last.step == 20 and (train / "aside/001" / step_name(30)).exists()
    tell = teller_of_checkpoints(again, train)
    tell()
    put(train, 30)
    tell()
    assert told(tmp_path)[4:] == [("model_removed", 30), ("model", 30)]
    # Those of a way that is left are gone from the run that is left with it, and the next one knows what stands.
    go_back(train, asked("step-20"), again)
    assert told(tmp_path)[6:] == [("model_removed", 30)]
    after = journal(tmp_path)
    teller_of_checkpoints(after, train)()
    assert len(told(tmp_path)) == 7
    sayings = [entry["values"] for entry in read_entries(after.path)[0] if entry["kind"] == "tags"]
    assert "step-00000030" in sayings[-1]["set_aside/002"]
    after.close()


def test_a_checkpoint_is_told_of_with_its_loss(tmp_path: Path) -> None:
    x = torch.zeros(3)
    for step, loss in ((10, 0.5), (20, float("nan")), (30, None)):
        save(tmp_path / "train", step, stretches=[Stretch("x", 0, {"weight": x})], ema={}, config={},
             facts={"validation_loss": loss})  # fmt: skip
    said = journal(tmp_path)
    teller_of_checkpoints(said, tmp_path / "train")()
    said.close()
    assert [entry["values"] for entry in read_entries(said.path)[0]] == [{"validation_loss": 0.5}, {}, {}]


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


def test_what_decides_no_weight_is_not_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Nor does a plan that counts it, as those of earlier versions do, refuse another value."""
    base = dag_of(tmp_path).fingerprints
    shown = ("training.log_every_steps=7", "training.grid.steps=3", "training.validate_every_steps=11",
             "training.validation_samples=64", "training.max_skipped_batches=5")  # fmt: skip
    assert {one.partition("=")[0].removesuffix(".steps") for one in shown} == {*may_change.SHOWN}
    assert dag_of(tmp_path, *shown).fingerprints == base
    assert dag_of(tmp_path, "training.seed=5").fingerprints["train"] != base["train"]
    old = replace(STAGES["train"], how=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STAGES, "train", old)
        counted = begin(tmp_path).fingerprints["train"]
        with pytest.raises(StaleError, match="training.log_every_steps"):  # the twin
            dag_of(tmp_path, *shown).refresh("train")
    assert counted != base["train"]
    assert dag_of(tmp_path, *shown).refresh("train").job.fingerprint == counted
    with pytest.raises(StaleError, match="training.seed"):
        dag_of(tmp_path, "training.seed=5").refresh("train")


def test_overwrite_leaves_no_copy_to_go_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk of a training that was made anew is lost: it does not come back as the one before it."""
    there, train = tmp_path / "there/small/train", tmp_path / "small/train"
    asked_for = (f"cluster.train.run.copy_to={tmp_path / 'there'}", "training.seed=5", "+stage=train")
    for overwrites in (False, True):
        begin(tmp_path)
        put(train, 10, 20)
        shutil.copytree(train, there, ignore=shutil.ignore_patterns("plan.json"))
        if overwrites:
            with ExitStack() as stack:
                _statuses(dag_of(tmp_path, *asked_for, "overwrite=true"), ["train"], stack)
            said = capsys.readouterr().out
            assert f"the copies {step_name(10)}, {step_name(20)} in {there} are set aside" in said
        assert any(train.glob("step-*")) != overwrites
        shutil.rmtree(tmp_path / "small")
        last = fetching.newest(train, there)
        print(f"after the loss of the disk, copies set aside {overwrites}: {last and last.path.name}")
        assert (last is None) == overwrites
        shutil.rmtree(tmp_path / "small", ignore_errors=True)
        if not overwrites:  # the twin
            shutil.rmtree(there)
    assert (there / step_name(20) / "SET_ASIDE").exists() and (there / step_name(20) / "ema.safetensors").exists()


def test_a_training_that_could_not_be_kept_is_refused_before_anything_runs(tmp_path: Path) -> None:
    for override, words in (
        ("cluster.train.run.copy_to=/proc/copies", "copy_to=/proc/copies: checkpoints cannot be copied there"),
        ("cluster.train.run.keep_best=true", "nothing says which is the best"),
        ("training.start_from=no/such/file", "training.start_from: no file at .*no/such/file"),
    ):
        with pytest.raises(ConfigError, match=words):
            _check_begin(dag_of(tmp_path, override))
    _check_begin(dag_of(tmp_path))
    put(tmp_path / "small/train", 10)
    _check_begin(dag_of(tmp_path, "training.start_from=no/such/file"))  # it began from there, and goes on


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
