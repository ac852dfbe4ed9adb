"""Records and whole-or-nothing commits: nothing half-written is ever taken for whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.node_cache import NodeCache
from ldm.storage import is_remote, put, sizes
from pipelines.bucket import stage_folder
from pipelines.manifest import Record, StageFolder, fingerprint, read_record, sum_funnel, write_whole


def folder_in(home: Any, cache: str) -> StageFolder:
    return stage_folder(home, "download", NodeCache(cache, 10**9))


def names(home: Any) -> list[str]:
    """Every file in a folder."""
    if is_remote(home):
        return sorted(sizes(home))
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def write(path: Any, data: bytes) -> None:
    put(path, data) if is_remote(path) else path.write_bytes(data)


def commit(folder: StageFolder, shard: int, data: bytes = b"picture") -> Record:
    with folder.attempt(shard, "f") as attempt:
        (attempt.path / f"{shard:06d}.tar").write_bytes(data)
        return attempt.commit(rows=3, samples=2, dropped={"http_404": 1}, inputs={"source": "d"})


def test_a_commit_leaves_data_and_record_and_nothing_else(home: Any, tmp_path: Path) -> None:
    folder = folder_in(home, str(tmp_path))
    record = commit(folder, 42)
    assert names(home) == ["000042.json", "000042.tar"]
    assert [path for attempts in tmp_path.rglob("*attempts") for path in attempts.iterdir()] == []
    assert folder.record(42) == record and folder.committed() == {42: record} and folder.record(43) is None
    assert (home / "000042.json").stat().st_size < 2048
    assert folder.data("000042.tar").read_bytes() == b"picture"


def test_a_record_that_loses_a_row_is_refused(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path, "download")
    with pytest.raises(ValueError, match="1 unaccounted for"), folder.attempt(0, "f") as attempt:
        attempt.commit(rows=3, samples=1, dropped={"http_404": 1}, inputs={})
    assert folder.record(0) is None


def test_a_record_with_an_altered_figure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StageFolder(tmp_path, "download")
    commit(folder, 0)
    path = folder.record_path(0)
    path.write_text(path.read_text().replace('"source": "d"', '"source": "e"'))
    with pytest.raises(ValueError, match=r"000000.json was altered after it was written: its seal is \w+, expected"):
        folder.record(0)
    # The twin: without seals the altered record counts.
    monkeypatch.setattr("pipelines.manifest.seal_of", lambda value: json.loads(path.read_text())["seal"])
    assert folder.record(0).inputs == {"source": "e"}


def test_the_digest_is_of_content_and_not_of_settings(home: Any, tmp_path: Path) -> None:
    a, b = folder_in(home, str(tmp_path)), StageFolder(tmp_path / "b", "download")
    assert commit(a, 0).digest == commit(b, 0).digest
    assert commit(a, 1, b"other").digest != commit(b, 1).digest


@pytest.mark.parametrize("point, files", [("before_rename", []), ("before_record", ["000000.tar"]),
                                          ("after_record", ["000000.json", "000000.tar"])])
def test_a_kill_at_any_point_leaves_a_record_only_with_its_data(
    home: Any, tmp_path: Path, point: str, files: list[str]
) -> None:
    cache = str(tmp_path / "cache")
    code = (
        "from tests.pipelines.test_manifest import commit, folder_in; from ldm.storage import place; "
        f"commit(folder_in(place({str(home)!r}), {cache!r}), 0)"
    )
    died = subprocess.run([sys.executable, "-c", code], env={**os.environ, "LDM_CRASH_AT": point}, check=False)
    assert died.returncode == 137
    folder = folder_in(home, cache)
    left = [name for name in names(home) if not name.startswith(".attempts/")]
    assert left == files
    assert (folder.record(0) is not None) == (point == "after_record")
    assert len([path for attempts in tmp_path.rglob("*attempts") for path in attempts.iterdir()]) == 1
    folder.sweep()
    assert commit(folder, 0).digest == commit(folder, 0).digest
    assert [path for attempts in tmp_path.rglob("*attempts") for path in attempts.iterdir()] == []
    assert names(home) == ["000000.json", "000000.tar"]


@pytest.mark.parametrize("text", ["", "{", '{"format": 2}', '{"format": 1, "stage": "x"}'])
def test_a_damaged_record_is_an_error_and_never_absence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "000000.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="000000.json"):
        read_record(path)


def test_a_lost_or_shortened_file_is_noticed(home: Any, tmp_path: Path) -> None:
    folder = folder_in(home, str(tmp_path))
    record = commit(folder, 0)
    assert folder.missing_files([record]) == {}
    write(home / "000000.tar", b"pic")
    assert folder.missing_files([record]) == {0: ["000000.tar"]}


def test_the_manifest_lists_every_shard_and_sums_the_funnel(home: Any, tmp_path: Path) -> None:
    folder = folder_in(home, str(tmp_path))
    records = [commit(folder, shard, str(shard).encode()) for shard in range(3)]
    digest = folder.close("f", records, sum_funnel(records))
    manifest = folder.manifest()
    assert manifest["digest"] == digest
    assert manifest["funnel"] == {"rows": 9, "samples": 6, "dropped": {"http_404": 3}}
    assert [row["digest"] for row in manifest["shards"]] == [record.digest for record in records]
    again = StageFolder(tmp_path / "again", "download")
    again.close("f", records, sum_funnel(records))
    assert (home / "manifest.parquet").read_bytes() == (tmp_path / "again/manifest.parquet").read_bytes()


def test_what_is_cleared_is_gone_and_nothing_else(home: Any, tmp_path: Path) -> None:
    folder = folder_in(home, str(tmp_path))
    folder.close("f", [commit(folder, shard) for shard in range(2)], {})
    write(home / "lock", b"held")
    folder.clear([1])
    assert names(home) == ["000000.json", "000000.tar", "000001.tar", "lock"]
    folder.clear()
    assert names(home) == ["lock"]


def test_a_cut_manifest_is_an_error(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path, "download")
    folder.close("f", [commit(folder, 0)], {})
    path = tmp_path / "manifest.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a manifest"):
        folder.manifest()


def test_reading_a_manifest_starts_no_thread(tmp_path: Path) -> None:
    """Seen: Arrow's thread let go of our buffer while the interpreter ended, and the process aborted, 1 time in 100."""
    folder = StageFolder(tmp_path, "download")
    folder.close("f", [commit(folder, 0)], {})
    code = ("import os, sys, pyarrow.parquet; from pipelines.manifest import StageFolder; from pathlib import Path;"
            "before = os.listdir('/proc/self/task');"
            "assert StageFolder(Path(sys.argv[1]), 'download').manifest()['shards'];"
            "assert os.listdir('/proc/self/task') == before")  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


def test_a_fingerprint_moves_with_everything_that_decides() -> None:
    base = fingerprint("download", 1, {"size": 1}, {"a": "b"})
    assert base == fingerprint("download", 1, {"size": 1}, {"a": "b"})
    others = [("train", 1, {"size": 1}, {"a": "b"}), ("download", 2, {"size": 1}, {"a": "b"}),
              ("download", 1, {"size": 2}, {"a": "b"}), ("download", 1, {"size": 1}, {"a": "c"})]
    assert base not in {fingerprint(*other) for other in others}


def test_write_whole_keeps_the_old_file_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, b"old")
    code = (
        "import resource, signal; from pipelines.manifest import write_whole; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); write_whole({str(path)!r}, b'x' * 5000)"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and "OSError" in failed.stderr
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
