"""The floor under the yield: asked for where there is enough to judge, and what its error advises works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm.images import encode_png
from pipelines import dag as dags
from pipelines import extend
from pipelines.config import CONF
from pipelines.dag import STAGES, Dag
from pipelines.stages import download
from pipelines.stages.download import YieldError
from tests.pipelines.test_extend import COLUMNS, config_of, contents, finish, write
from tests.pipelines.unkind_server import Unkind, unkind_server


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    picture = encode_png(np.full((120, 130, 3), 77, np.uint8))
    monkeypatch.setattr(Unkind, "on_good", lambda self: self.answer(200, picture))
    monkeypatch.setattr(Unkind, "robots", {"status": 404})
    monkeypatch.setattr(download, "NOT_JUDGED", {})
    Unkind.hits.clear()
    with unkind_server() as address:
        yield address


def paths(good: int, missing: int, start: int = 0) -> list[str]:
    return [f"{'good' if i < good else 'missing'}?{start + i}" for i in range(good + missing)]


def floor(share: float, after: int, samples: int) -> list[str]:
    return [f"dataset.download.min_yield={share}", f"dataset.download.yield_after={after}",
            f"dataset.filter_metadata.shard_samples={samples}", "dataset.download.threads=1"]  # fmt: skip


def test_with_a_lower_floor_the_same_run_goes_on_from_where_it_stopped(tmp_path: Path, address: str) -> None:
    write(tmp_path, "part-0", [*paths(8, 0), *paths(1, 7, 8), *paths(8, 0, 16)])
    with pytest.raises(YieldError, match="1 of 8 pictures arrived, .* a lower dataset.download.min_yield goes on"):
        finish(config_of(tmp_path, *floor(0.2, 8, 8)), address)
    before = contents(tmp_path / "outputs")
    assert sorted(name for name in before if name.startswith("openmoji/download")) == [
        f"openmoji/download/{name}" for name in ("000000.json", "000000.parquet", "000000.tar", "plan.json")
    ]
    dag = finish(config_of(tmp_path, *floor(0.1, 8, 8), "dataset.download.threads=2"), address)
    assert [record.samples for record in dag.statuses["download"].records.values()] == [8, 1, 8]
    assert before.items() <= contents(tmp_path / "outputs").items()
    assert Unkind.hits["/good?0"] == 1, "what was there was fetched again"
    assert Dag(config_of(tmp_path, *floor(0.9, 3, 8))).refresh("download").done


def test_urls_that_failed_before_are_not_judged(tmp_path: Path, address: str) -> None:
    write(tmp_path, "part-0", paths(6, 6))
    config = config_of(tmp_path, *floor(0.4, 4, 12))
    finish(config, address)
    write(tmp_path, "part-1", paths(4, 2, 50))  # they share a shard with those that are tried again
    assert "Edition 2: 12 rows in 1 new shards" in extend.extend(config, {"all"})
    records = finish(config, address).statuses["download"].records
    assert [(record.rows, record.samples) for record in records.values()] == [(12, 6), (12, 4)]
    write(tmp_path, "part-2", paths(1, 5, 100))
    assert "Edition 3: 14 rows in 2 new shards" in extend.extend(config, {"all"})
    with pytest.raises(YieldError, match=r"of \d pictures arrived, fewer"):
        finish(config, address)


def test_a_shard_of_few_urls_is_judged_with_others_and_not_alone(tmp_path: Path, address: str) -> None:
    write(tmp_path, "part-0", [*paths(12, 0), *paths(0, 2, 12)])
    finish(config_of(tmp_path / "tail", f"dataset.source.metadata={tmp_path}/*.parquet", *floor(0.3, 8, 12)), address)
    write(tmp_path, "part-0", paths(2, 20))
    config = config_of(tmp_path, *floor(0.3, 8, 2))
    with pytest.raises(YieldError, match="2 of 8 pictures arrived"):
        finish(config, address)
    assert len(Dag(config).refresh("filter_metadata").records) == 11
    assert sorted(Dag(config).refresh("download").records) == [0, 1, 2]
    mended = encode_png(np.full((120, 130, 3), 9, np.uint8))
    with pytest.MonkeyPatch.context() as patch:  # once the cause is mended, what failed because of it says nothing
        patch.setattr(Unkind, "on_missing", lambda self: self.answer(200, mended))
        finish(config, address)


def test_plans_that_count_the_floor_still_count_it_as_they_do(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a version that had min_yield in its fingerprint is neither stale nor bound to that value."""
    write(tmp_path, "part-0", paths(8, 0))
    now = STAGES["download"]
    monkeypatch.setitem(dags.STAGES, "download", replace(now, how=()))
    old = finish(config_of(tmp_path, *floor(0.5, 8, 8)), address)
    monkeypatch.setitem(dags.STAGES, "download", now)
    lower = Dag(config_of(tmp_path, *floor(0.1, 8, 8)))
    assert lower.refresh("download").done and lower.fingerprints == old.fingerprints
    assert lower.plan("download") == old.plan("download")
    elsewhere = Dag(config_of(tmp_path, *floor(0.1, 8, 8), "name=elsewhere"))
    assert elsewhere.fingerprints["download"] != old.fingerprints["download"]
    assert "min_yield" not in elsewhere.plan("download")["what"]["dataset.download"]


@pytest.mark.slow
def test_the_command_with_a_lower_floor_goes_on(tmp_path: Path, address: str) -> None:
    write(tmp_path, "part-0", [*paths(8, 0), *paths(1, 7, 8), *paths(8, 0, 16)])

    def run(share: float) -> tuple[int, str]:
        given = [f"paths.outputs={tmp_path}/outputs", f"dataset.source.metadata={tmp_path}/*.parquet",
                 f"dataset.source.columns={COLUMNS}", "dataset.sample_web=null", f"dataset.connect={address}",
                 "dataset.download.respect_robots=false", "dataset.download.retries=0", "cluster.download.in_flight=1",
                 "tracking.enabled=false", *floor(share, 8, 8)]  # fmt: skip
        said = ""
        for stage in ("filter_metadata", "download"):
            command = [sys.executable, "-m", "pipelines.run", f"+stage={stage}", *given]
            done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True)
            said += done.stdout + done.stderr
            if done.returncode:
                break
        return done.returncode, said

    code, said = run(0.2)
    assert code == 1 and "a lower dataset.download.min_yield goes on from here" in said, said
    code, said = run(0.1)
    assert code == 0 and "Traceback" not in said, said
    assert Unkind.hits["/good?0"] == 1
