"""A run keeps its token for ever, wherever its journals are sent to; at each place it is told by runs of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipelines.journal import Journal, journal_path
from pipelines.shipping.notes import Notes, place_of
from pipelines.shipping.server import Server
from pipelines.tracking import sync
from tests.pipelines.mlflow_server import all_runs_of, points, runs_of, settings


def told(output: Path, *steps: int) -> None:
    journal = Journal(journal_path(output, "train", "rank0"))
    for step in steps:
        journal.metrics({"loss": float(step)}, step)
    journal.close()


def ids(runs: Iterable[Any]) -> set[str]:
    return {run.info.run_id for run in runs}


def test_there_and_elsewhere_and_back_makes_no_run_twice(tmp_path: Path, database: str) -> None:
    """Local, then a server by `python -m pipelines.sync`, then local again."""
    output, other = tmp_path / "demo", f"sqlite:///{tmp_path}/other.db"
    told(output, 1, 2)
    sync(settings(database), output)
    here = ids(runs_of(database, output).values())
    sync(settings(other), output)
    assert points(other, runs_of(other, output)["train"], "loss") == [(1, 1.0), (2, 2.0)]
    told(output, 3)
    sync(settings(database), output)
    assert ids(all_runs_of(database, output)) == here and len(here) == 2, "one of the DAG and one of the stage"
    assert points(database, runs_of(database, output)["train"], "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_the_same_database_by_another_path_is_the_same_place(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is searched for nothing: not even the token is needed."""
    output, path = tmp_path / "demo", Path(database.removeprefix("sqlite:///"))
    told(output, 1)
    sync(settings(database), output)
    here = ids(runs_of(database, output).values())
    monkeypatch.setattr(Server, "_create_run", lambda *_: pytest.fail("a run is made a second time"))
    (tmp_path / "link").symlink_to(path.parent)
    for other in (path.parent / ".." / path.parent.name / path.name, tmp_path / "link" / path.name):
        assert sync(settings(f"sqlite:///{other}"), output) == 0
        assert ids(runs_of(database, output).values()) == here


def test_runs_and_their_database_may_be_moved_together(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "demo").mkdir(parents=True)
    notes = Notes(old / "demo", f"sqlite:///{old}/mlflow.db")
    notes.runs["train"] = "abc"
    notes.write()
    old.rename(new)
    moved = Notes(new / "demo", f"sqlite:///{new}/mlflow.db")
    assert (moved.token, moved.runs) == (notes.token, {"train": "abc"})


def test_the_token_alone_finds_the_runs_again(tmp_path: Path, database: str) -> None:
    """Where the notes know nothing of a place, as those of another machine that mounts it elsewhere."""
    output = tmp_path / "demo"
    told(output, 1)
    sync(settings(database), output)
    notes = json.loads((output / "tracking.json").read_text())
    (output / "tracking.json").write_text(json.dumps({**notes, "uri": "http://elsewhere", "runs": {}}))
    sync(settings(database), output)
    assert ids(all_runs_of(database, output)) == set(notes["runs"].values())


def test_notes_of_before_places_were_told_apart_are_read(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    output.mkdir()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    old = {"format": 1, "uri": uri, "token": "abc", "runs": {"train": "1"},
           "rewinds": {"train": [{"step": 2, "journal": "rank0.jsonl", "run": "0"}]}}  # fmt: skip
    (output / "tracking.json").write_text(json.dumps(old))
    notes = Notes(output, uri)
    assert (notes.token, notes.runs, notes.token_of("train")) == ("abc", {"train": "1"}, "abc/train/1")
    away = Notes(output, "http://a")
    assert (away.token, away.runs, away.token_of("train")) == ("abc", {}, "abc/train")
    back = Notes(output, uri)
    assert (back.runs, back.rewinds_of("train")[0]["run"]) == ({"train": "1"}, "0")


def test_place_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "outputs/demo"
    assert place_of("http://a:5000", output) == "http://a:5000"
    assert place_of(f"sqlite:///{tmp_path}/outputs/mlflow.db", output) == "sqlite:///mlflow.db"
    assert place_of(f"sqlite:///{tmp_path}/db/x.db", output) == f"sqlite:///..{os.sep}db/x.db"
    monkeypatch.chdir(tmp_path)
    assert place_of("sqlite:///outputs/mlflow.db", output) == "sqlite:///mlflow.db"
