"""What one MLflow run is told: models once, a bad line costs only itself, and a run that was deleted is made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.journal import Journal, journal_path
from pipelines.shipping import server, stage_run
from pipelines.shipping.shipper import unsent_bytes
from pipelines.shipping.stage_run import StageRun
from pipelines.tracking import Tracker, sync
from tests.pipelines.mlflow_server import all_runs_of, client, points, runs_of, settings


def test_checkpoints_are_logged_models_once_and_those_removed_are_marked(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    with Tracker.open(settings(database), output) as tracker, tracker.stage("train") as run:
        run.metrics({"loss": 1.0}, 20)
        for step in (10, 20):
            loss = {"validation_loss": 0.5} if step == 20 else None
            run.model(f"demo-step-{step}", output / f"train/step-{step}", f"{step:064}", step, loss)
        run.model_removed("demo-step-10", 10)
    for sent in output.glob("journal/*/*.sent.json"):
        sent.unlink()
    sync(settings(database), output)  # everything is told twice
    train = runs_of(database, output)["train"]
    found = client(database).search_logged_models([train.info.experiment_id], f"source_run_id = '{train.info.run_id}'")
    kept = {model.name: model for model in found}
    assert sorted(kept) == ["demo-step-10", "demo-step-20"] and len(found) == 2
    last = kept["demo-step-20"]
    assert last.params == {"step": "20", "path": str(output / "train/step-20"), "sha256": f"{20:064}"}
    assert last.status == "READY" and "removed" not in last.tags and kept["demo-step-10"].tags["removed"] == "true"
    last = client(database).get_logged_model(last.model_id)
    assert [(metric.key, metric.value, metric.step) for metric in last.metrics or []] == [
        ("checkpoint/validation_loss", 0.5, 20)]  # fmt: skip
    assert sorted(out.step for out in train.outputs.model_outputs) == [10, 20]


def test_shards_that_are_done_out_of_order_are_all_told(tmp_path: Path, database: str) -> None:
    """And one that was made again is told again: the driver tells nothing twice."""
    output = tmp_path / "demo"
    with Tracker.open(settings(database), output) as tracker, tracker.stage("download") as run:
        for shard, samples in ((0, 10), (3, 13), (1, 11), (2, 12), (1, 9)):
            run.metrics({"data/samples": samples}, step=shard)
    told = points(database, runs_of(database, output)["download"], "data/samples")
    assert sorted(told) == [(0, 10.0), (1, 9.0), (1, 11.0), (2, 12.0), (3, 13.0)]


# ---- what cannot be told -------------------------------------------------------------------------
def bad_files(output: Path) -> dict[str, str]:
    """Pictures and a file that cannot be read, each with a word of why."""
    output.mkdir()
    whole = output / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (output / "empty.png").write_bytes(b"")
    (output / "cut.png").write_bytes(whole.read_bytes()[:2000])
    (output / "text.png").write_text("no picture")
    (output / "folder.png").mkdir()
    return {"gone.png": "No such file", "empty.png": "cannot identify", "cut.png": "truncated",
            "text.png": "cannot identify", "folder.png": "Is a directory"}  # fmt: skip


def test_what_mlflow_refuses_or_this_disk_cannot_read_does_not_block_the_rest(
    tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    reasons = bad_files(output)
    with Tracker.open(settings(database), output) as tracker, tracker.stage("train") as run:
        run.metrics({"": 1.0, "good": 2.0}, 1)  # a metric without a name
        for name in reasons:
            run.image("grid", output / name, 1)
        for name in ("gone.png", "folder.png"):
            run.artifact(output / name)
        run.artifact("/proc/self/mem")  # opens, and cannot be read
        run.image("grid", output / "whole.png", 2)
        run.metrics({"later": 3.0}, 1)
    assert unsent_bytes(output) == 0
    train = runs_of(database, output)["train"]
    assert train.data.metrics == {"good": 2.0, "later": 3.0}
    images = [artifact.path for artifact in client(database).list_artifacts(train.info.run_id, "images")]
    assert len(images) == 2 and all(path.startswith("images/grid+step+2+") for path in images)
    said = capsys.readouterr().err
    assert "MLflow does not take" in said
    for name, reason in reasons.items():
        assert any(f"the picture {output / name} is left out" in line and reason in line for line in said.splitlines())
    for name in (output / "gone.png", output / "folder.png", "/proc/self/mem"):
        assert f"the file {name} is left out" in said
    assert said.count("is left out") == len(reasons) + 3 and "nothing goes to MLflow" not in said


def test_an_unreadable_picture_that_counts_as_trouble_of_mlflow_would_stop_everything(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the test above."""
    output = tmp_path / "demo"
    bad_files(output)

    def opened(path: Path) -> Any:
        with Image.open(path) as image:
            return image.convert("RGB")

    monkeypatch.setattr(stage_run, "_picture", opened)
    journal = Journal(journal_path(output, "train"))
    journal.image("grid", output / "empty.png", 1)
    journal.metrics({"later": 3.0}, 1)
    for _ in range(2):
        with pytest.raises(server.AwayError, match="cannot identify"):
            sync(settings(database), output)
    assert runs_of(database, output)["train"].data.metrics == {}


# ---- runs that somebody deletes ------------------------------------------------------------------
def test_journals_are_sent_anew_to_a_database_that_forgot_them(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    with Tracker.open(settings(database), output) as tracker, tracker.stage("train") as run:
        run.metrics({"loss": 1.0}, 1)
    before = runs_of(database, output)
    for run in before.values():
        client(database).delete_run(run.info.run_id)
    journals = [path.stat().st_size for path in output.glob("journal/*/*.jsonl")]
    assert sync(settings(database), output) == sum(journals)
    after = runs_of(database, output)
    assert after["train"].info.run_id != before["train"].info.run_id
    assert points(database, after["train"], "loss") == [(1, 1.0)]


def sent_while_it_is_deleted(
    database: str, output: Path, what: list[str], silent: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The runs, of which some are deleted in the page while the driver sends; some stages say no more after that."""
    journals = {stage: Journal(journal_path(output, stage)) for stage in ("run", "train")}
    with server.sending(database, "test", output, alive=True) as receiver:
        for step in (1, 2, 3):
            for stage in journals:
                if step == 1 or stage not in silent:
                    journals[stage].metrics({"loss": float(step)}, step)
            while receiver.ship():
                pass
            if step == 1:
                before = runs_of(database, output)
                for stage in what:
                    client(database).delete_run(before[stage].info.run_id)
    return before


@pytest.mark.parametrize("what", [["train"], ["run"], ["run", "train"]])
def test_a_run_deleted_while_the_driver_sends_is_made_again_with_all_points(
    tmp_path: Path, database: str, what: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    before = sent_while_it_is_deleted(database, output, what)
    after = runs_of(database, output)
    said = capsys.readouterr().err
    assert unsent_bytes(output) == 0 and said.count("was deleted; its journals are sent") == len(what)
    for stage in ("run", "train"):
        assert (before[stage].info.run_id == after[stage].info.run_id) == (stage not in what)
        assert points(database, after[stage], "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    if "train" in what:
        assert after["train"].data.tags["mlflow.parentRunId"] == after["run"].info.run_id
    assert len(all_runs_of(database, output)) == 2


def test_a_run_made_again_stands_below_a_parent_that_is_there(tmp_path: Path, database: str) -> None:
    """Deleted together, of which the parent, whose journal is silent while training goes on, does not know yet."""
    before = sent_while_it_is_deleted(database, tmp_path / "demo", ["run", "train"], silent=("run",))
    after = runs_of(database, tmp_path / "demo")
    assert after["train"].data.tags["mlflow.parentRunId"] == after["run"].info.run_id != before["run"].info.run_id
    assert after["run"].info.lifecycle_stage == "active" and points(database, after["run"], "loss") == [(1, 1.0)]


def test_points_for_a_deleted_run_that_count_as_refused_would_be_lost(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the test above."""
    monkeypatch.setattr(StageRun, "refuses", lambda self, error: error.error_code in stage_run.REFUSALS)
    sent_while_it_is_deleted(database, tmp_path / "demo", ["train"])
    assert unsent_bytes(tmp_path / "demo") == 0
    assert points(database, runs_of(database, tmp_path / "demo")["train"], "loss") == [(1, 1.0)]


# ---- drivers that are gone -----------------------------------------------------------------------
def test_a_run_says_when_its_driver_was_last_heard(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One killed outright leaves RUNNING in MLflow; whoever sends for it later does not speak for it."""
    monkeypatch.setattr(stage_run, "HEARD_SECONDS", 0.0)
    output = tmp_path / "demo"
    journals = {stage: Journal(journal_path(output, stage)) for stage in ("run", "train", "download")}
    for stage, journal in journals.items():
        journal.status("RUNNING")
        if stage == "download":
            journal.status("FINISHED")
    sync(settings(database), output)
    assert not any("last_heard" in run.data.tags for run in runs_of(database, output).values())
    for sent in output.glob("journal/*/*.sent.json"):
        sent.unlink()
    heard = []
    with server.sending(database, "test", output, alive=True) as receiver:
        for now in ("12:00", "12:01"):
            monkeypatch.setattr(stage_run.time, "strftime", lambda *_, now=now: now)
            receiver.ship()
            heard.append({stage: run.data.tags.get("last_heard") for stage, run in runs_of(database, output).items()})
    assert heard == [{"run": now, "train": now, "download": None} for now in ("12:00", "12:01")]
    assert json.loads(journals["train"].path.read_text().splitlines()[-1])["status"] == "RUNNING"
