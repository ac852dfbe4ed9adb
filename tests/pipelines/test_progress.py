from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import progress
from pipelines.journal import Journal, journal_path


def test_what_the_journals_say_is_shown_and_what_they_said_before_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.02)
    download = Journal(journal_path(tmp_path, "download"))
    download.metrics({"data/samples": 99, "data/rows": 99}, step=0)
    with progress.following(tmp_path, {"download": 2, "train": 1600}):
        for shard in (1, 2):
            download.metrics({"data/samples": 10, "data/rows": 16}, step=shard)
        train = Journal(journal_path(tmp_path, "train", "rank0"))
        train.metrics({"funnel/rows": 20})
        train.metrics({"loss": 0.4717, "samples_per_second": 65.5}, step=340)
    shown = [line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()]
    assert ["download", "2 of 2 shards, 20 samples of 32 rows"] in shown
    assert ["train", "step 340 of 1600, loss 0.472, 66 samples/s"] in shown


def test_a_stage_that_says_nothing_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.following(tmp_path, {"generate": 1}):
        pass
    assert capsys.readouterr().out == ""
