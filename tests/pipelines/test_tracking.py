"""Tracking with the real MLflow on sqlite: complete, nothing twice, opened and continued without a trace too many."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from pipelines.journal import Journal, journal_path
from pipelines.shipping.shipper import unsent_bytes
from pipelines.tracking import Tracker, database_uri
from tests.pipelines.mlflow_server import client, points, runs_of, settings


def test_opening_leaves_no_trace(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from pipelines.settings import TrackingConfig
        from pipelines.tracking import Tracker
        with Tracker.open(TrackingConfig(True, None, "test", 1.0, 1.0), Path({str(tmp_path / "demo")!r})):
            pass
        print([name for name in ("mlflow", "torch", "ray", "pyarrow") if name in sys.modules])
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_everything_arrives(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    picture = output / "train/grid.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (64, 32), "orange").save(picture)
    card = tmp_path / "card.txt"
    card.write_text("a card")
    with Tracker.open(settings(database), output) as tracker:
        tracker.run.table("funnel", [{"stage": "train", "in": 3, "out": 2}])
        with tracker.stage("train", {"unet": {"width": 64}, "long": "x" * 9000}, {"code": "abc"}) as run:
            worker = Journal(journal_path(output, "train", "rank0"))
            for step in range(1, 2001):
                worker.metrics({"train/loss": 1 / step, "perf/images": step}, step)
            worker.metrics({"bad": math.nan, "huge": math.inf}, 1)
            worker.image("../grid", picture, 100)
            run.dataset("openmoji", "d" * 64, output / "precompute_latents/manifest.parquet")
            run.artifact(card)
            run.text("notes/readme.md", "hello")
    assert unsent_bytes(output) == 0
    runs = runs_of(database, output)
    parent, train = runs["run"], runs["train"]
    assert (parent.info.run_name, train.info.run_name) == ("demo", "train")
    assert train.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, train.info.status) == ("FINISHED", "FINISHED")
    assert train.data.params["unet.width"] == "64" and "9000 characters" in train.data.params["long"]
    assert train.data.tags["code"] == "abc"
    assert parent.data.tags["mlflow.note.content"].splitlines()[2] == "| train | 3 | 2 |"
    assert points(database, train, "train/loss") == [(step, 1 / step) for step in range(1, 2001)]
    assert math.isnan(train.data.metrics["bad"]) and train.data.metrics["huge"] > 1e308
    data = train.inputs.dataset_inputs[0].dataset
    assert (data.name, data.digest) == ("openmoji", "d" * 36) and "d" * 64 in data.profile
    mlflow = client(database)
    assert {a.path for a in mlflow.list_artifacts(train.info.run_id)} == {"card.txt", "images", "notes"}
    assert [a.path for a in mlflow.list_artifacts(parent.info.run_id)] == ["funnel.csv"]
    images = [a.path for a in mlflow.list_artifacts(train.info.run_id, "images")]
    assert len(images) == 2 and all(path.startswith("images/grid+step+100+") for path in images)


def test_a_continued_run_goes_on_in_the_same_runs(tmp_path: Path, database: str) -> None:
    output = tmp_path / "demo"
    open_tracker, worker = Tracker.open(settings(database), output), Journal(journal_path(output, "train", "rank0"))
    with pytest.raises(ValueError, match="the disk is full"), open_tracker as tracker:
        with tracker.stage("train", {"lr": 1, "steps": 10}):
            worker.metrics({"loss": 1.0}, 1)
            worker.metrics({"loss": 2.0}, 2)
            raise ValueError("the disk is full")
    before = runs_of(database, output)
    assert before["train"].info.status == before["run"].info.status == "FAILED"
    assert before["train"].data.tags["reason"] == "ValueError: the disk is full"
    with Tracker.open(settings(database), output) as tracker:
        with tracker.stage("train", {"lr": 1, "steps": 20}):
            worker.metrics({"loss": 2.0}, 2)  # told before
            worker.metrics({"loss": 3.0}, 3)
    after = runs_of(database, output)
    assert [run.info.run_id for run in after.values()] == [run.info.run_id for run in before.values()]
    assert points(database, after["train"], "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert after["train"].data.params["steps"] == "10" and after["train"].data.tags["changed/steps"] == "20"
    assert after["train"].info.status == after["run"].info.status == "FINISHED"


def test_two_runs_share_one_database(tmp_path: Path, database: str) -> None:
    """Two drivers at once in one sqlite file: nothing is lost, whoever finds it locked tries again."""
    trackers = [Tracker.open(settings(database), tmp_path / name) for name in ("a", "b")]
    for tracker in trackers:
        with tracker.stage("train") as run:
            for step in range(1000):
                run.metrics({f"m{i}": step for i in range(3)}, step)
    assert [tracker.close() for tracker in trackers] == [0, 0]
    for name in ("a", "b"):
        train = runs_of(database, tmp_path / name)["train"]
        assert [len(points(database, train, f"m{i}")) for i in range(3)] == [1000] * 3


def test_without_a_setting_the_database_lies_beside_the_runs(tmp_path: Path) -> None:
    assert database_uri(settings(), tmp_path / "outputs/demo") == f"sqlite:///{tmp_path}/outputs/mlflow.db"
    assert database_uri(settings("http://a"), tmp_path / "outputs/demo") == "http://a"
