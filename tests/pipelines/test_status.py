"""Where a run stands, said without touching it; and which checkpoints saw samples that must go."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ldm.images import encode_png
from pipelines import extend, status
from pipelines.config import Config
from pipelines.dag import Dag
from pipelines.lock import lock
from pipelines.manifest import StageFolder, write_json
from pipelines.run import _close
from pipelines.selection import all_samples, select, write_selection
from pipelines.stages import filter_images
from tests.pipelines.test_extend import address, config_of, contents, finish, write

__all__ = ["address"]  # a fixture


def with_images(config: Config, address: str) -> Dag:
    dag = finish(config, address)
    job = dag.refresh("filter_images").job
    job.output.write_plan(dag.plan("filter_images"))
    for shard in dag.statuses["filter_images"].todo:
        filter_images.run_shard(job, shard)
    assert _close(dag, "filter_images")
    return dag


def with_checkpoints(dag: Dag, seen: dict[int, int]) -> None:
    """A selection, and checkpoints by step and samples seen, as training leaves them."""
    folders = [dag.statuses[stage].job.output for stage in ("filter_metadata", "filter_images")]
    masks = select(all_samples(*folders, sorted(folders[1].committed())), dag.config.dataset.selection).masks()
    train = StageFolder(dag.home("train"), "train")
    train.path.mkdir()
    write_selection(train / "selection.parquet", masks)
    for step, samples in seen.items():
        write_json(train / f"step-{step:08d}/manifest.json", {"step": step, "samples_seen": samples})
        (train / f"step-{step:08d}/COMMITTED").touch()


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


def test_checkpoints_that_saw_removed_samples_are_named(tmp_path: Path, address: str) -> None:
    write(tmp_path, "part-0", [f"good?{i}" for i in range(3)] + ["missing?1"])
    selection = ("near_duplicate_bits=null", "exact_duplicates=false")
    config = config_of(tmp_path, *(f"dataset.selection.{setting}" for setting in selection))
    dag = with_images(config, address)
    with_checkpoints(dag, {1: 0, 2: 2, 3: 3, 4: 30})
    picture = encode_png(np.full((120, 130, 3), 77, np.uint8))
    stored = pq.read_table(dag.statuses["filter_images"].job.output / "000000.parquet")["sha256"][0].as_py()
    for words in (["http://a.test/good?1"], ["0000001"], [hashlib.md5(picture).hexdigest()], [stored, "nothing else"]):
        (tmp_path / "removed.txt").write_text("\n".join(words))
        lines = status.describe_removed(config, tmp_path / "removed.txt")
        count = 1 if "good?1" in words[0] or words == ["0000001"] else 3
        assert f"names {count} samples" in lines[0] and lines[1].startswith(f"{count} of them")
        verdicts = [line.partition(": ")[2] for line in lines[2:6]]
        assert verdicts == ["saw none of them", "may have seen them: 2 samples of a first epoch of 3", "saw them",
                            "saw them"]  # fmt: skip
        assert "step-00000003" in lines[4] and "leaves them out" in lines[6]
    (tmp_path / "removed.txt").write_text("http://a.test/missing?1\n")
    lines = status.describe_removed(config, tmp_path / "removed.txt")
    assert "names 0 samples" in lines[0] and all("saw none" in line for line in lines[2:])
