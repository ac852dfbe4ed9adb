"""Where a run stands, said without touching it; and which checkpoints saw samples that must go."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import extend, status
from pipelines.dag import Dag
from pipelines.lock import lock
from tests.pipelines.test_extend import address, config_of, contents, finish, write

__all__ = ["address"]  # a fixture


def test_every_stage_has_a_state_and_its_losses(tmp_path: Path, address: str) -> None:
    config = config_of(tmp_path)
    write(tmp_path, "part-0", ["good?1", "missing?1", "missing?2", "failing?1"])
    assert [line.split()[1:3] for line in status.describe(config)[2:]][:2] == [["not", "begun"], ["not", "begun"]]
    finish(config, address)
    before = contents(tmp_path / "outputs")
    lines = status.describe(config)
    assert lines[2].split() == ["filter_metadata", "done", "4", "4", "0"]
    assert lines[3].split() == ["download", "done", "4", "1", "3"] and lines[4] == "    http_404 2, http_500 1"
    assert lines[5].split() == ["filter_images", "not", "begun"]

    write(tmp_path, "part-1", ["good?2"])
    extend.extend(config, set())
    lines = status.describe(config)
    assert lines[2].split() == ["filter_metadata", "done,", "edition", "2", "5", "5", "0"]
    assert lines[3].split()[:5] == ["download", "open", "1", "of", "2"]
    with lock(Dag(config).home("download") / "lock", "download of mine"):
        lines = status.describe(config)
    assert lines[3].split()[:5] == ["download", "running", "1", "of", "2"]
    assert any("held by download of mine, process" in line for line in lines)
    after = contents(tmp_path / "outputs")
    assert {name: after[name] for name in before} == before


def test_what_is_stale_is_said_and_what_comes_after_is_not_known(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "part-0", ["good?1"])
    finish(config_of(tmp_path), address)
    given = [f"paths.outputs={tmp_path}/outputs", f"dataset.source.metadata={tmp_path}/*.parquet"]
    assert status.main(given) == 0
    said = capsys.readouterr().out
    assert "filter_metadata     stale" in said and "was made from other settings" in said
    assert "download            not known" in said and "because of filter_metadata" in said
    assert status.main(["nonsense"]) == 2
