"""What a run tells of itself however it ends: the funnel as table and plot in MLflow, and the report."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import report
from pipelines.config import CONF, Config
from pipelines.dag import Dag, Job, connected
from pipelines.journal import journal_path, read_entries
from pipelines.manifest import read_json
from pipelines.run import accounted
from pipelines.stages import download
from pipelines.stopping import Stopped
from pipelines.tracking import Tracker
from tests.pipelines.test_extend import address, config_of, finish, write

__all__ = ["address"]  # a fixture
WANTED = ["filter_metadata", "download"]


def told(config: Config) -> list[dict[str, Any]]:
    return read_entries(journal_path(Dag(config).run_folder, "run"))[0]


def broken(folder: Path, address: str) -> tuple[Config, Dag, Job]:
    """A run whose second shard is not made yet, and a download with a floor that the shard cannot reach."""
    write(folder, "part-0", [f"good?{i}" for i in range(4)] + ["good?4", "missing?1", "missing?2", "missing?3"])
    config = config_of(folder, "tracking=journal")
    dag = finish(config, address)
    dag.statuses["download"].job.output.clear([1])
    job = connected(dag.statuses["download"].job, address)
    floor = replace(job.what["dataset.download"], min_yield=0.5, yield_after=4)
    return config, dag, replace(job, what={"dataset.download": floor})


def test_a_run_that_fails_gives_an_account_and_its_own_error(tmp_path: Path, address: str) -> None:
    config, dag, job = broken(tmp_path, address)
    with pytest.raises(download.YieldError), Tracker.open(config.tracking, dag.run_folder) as tracker:
        with accounted(dag, WANTED, tracker.run):
            download.run_shard(job, 1)
    text = (dag.run_folder / "report.html").read_text()
    head = text.partition("Where every row went")[0]
    assert "This run stopped before its end" in head and "YieldError: shard 000001: 1 of 4 pictures arrived" in head
    assert "4 in = 4 out + 0 dropped" in text
    said = told(config)
    (funnel,) = [entry["rows"] for entry in said if entry["kind"] == "table"]
    assert [(row["stage"], row["in"], row["out"], row["done"]) for row in funnel] == [
        ("filter_metadata", 8, 8, True), ("download", 4, 4, False)
    ]  # fmt: skip
    assert [entry["path"] for entry in said if entry["kind"] == "artifact"] == ["funnel.png", "report.html"]
    assert said[-1]["status"] == "FAILED" and said[-1]["reason"].startswith("YieldError")
    assert (dag.run_folder / "funnel.png").read_bytes().startswith(b"\x89PNG")


def test_a_signal_too(tmp_path: Path, address: str) -> None:
    config, dag, _ = broken(tmp_path, address)
    with pytest.raises(Stopped), Tracker.open(config.tracking, dag.run_folder) as tracker:
        with accounted(dag, WANTED, tracker.run):
            raise Stopped(15)
    assert "Stopped: stopped by SIGTERM" in (dag.run_folder / "report.html").read_text()


def test_an_account_that_cannot_be_given_hides_nothing(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, dag, _ = broken(tmp_path, address)

    def full(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(report, "write_report", full)
    with pytest.raises(ZeroDivisionError), Tracker.open(config.tracking, dag.run_folder) as tracker:
        with accounted(dag, WANTED, tracker.run):
            raise ZeroDivisionError
    assert "no report of the stopped run: OSError: the disk is full" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mlflow_holds_the_account_of_a_run_that_missed_its_floor_and_then_of_its_end(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    given = ["+experiment=smoke", f"paths.outputs={tmp_path}", "dataset.download.retries=0"]
    command = [sys.executable, "-m", "pipelines.run", "+stage=filter_metadata", *given]
    done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    floor = ["dataset.download.min_yield=0.99", "dataset.download.yield_after=8"]
    command = [sys.executable, "-m", "pipelines.run", "+stage=download", *given, *floor]
    done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1 and "dataset.download.min_yield=0.99" in done.stderr, done.stdout + done.stderr
    assert "This run stopped before its end" in (tmp_path / "smoke/report.html").read_text()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(read_json(tmp_path / "smoke/tracking.json")["runs"]["run"])
    assert run.info.status == "FAILED" and "YieldError" in run.data.tags["reason"]
    assert run.data.tags["mlflow.note.content"].splitlines()[2].startswith("| download |")
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"funnel.csv", "funnel.png", "report.html"} <= names
