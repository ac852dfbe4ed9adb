"""Results on S3 are checked by the bytes in the bucket, whatever the node keeps, and shown without being changed."""

from __future__ import annotations

import hashlib
import random
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.node_cache import DamagedFile, NodeCache
from ldm.storage import place
from pipelines import inspect, selection, status, verify
from pipelines.bucket import Bucket
from pipelines.checking import latent_sheet
from pipelines.config import compose
from pipelines.dag import Dag
from pipelines.manifest import Record, StageFolder, sum_funnel, write_json
from pipelines.selection import all_samples
from pipelines.stages.precompute_latents import Worker
from tests.pipelines.small_cache import make_cache, overrides_of
from tests.pipelines.test_verify import MUTATIONS, SEED, alter_the_record, flip_a_byte, spoil_the_plan
from tests.s3_server import BUCKET, S3Server

SHARDS, ROWS = 6, 3
STAGES = ["download", "filter_images", "filter_metadata", "precompute_latents"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on disk; what lies where decides nothing, so that its files are those of a run on S3 too."""
    torch.set_num_threads(1)
    outputs = tmp_path_factory.mktemp("made")
    make_cache(outputs, shards=SHARDS, rows=ROWS)
    return outputs


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What commands without a configuration keep on this node."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture(scope="module")
def sound(s3: S3Server, made: Path) -> str:
    """The run on S3, which is only looked at: its address."""
    s3.put_folder(made / "small", "sound/small")
    return f"s3://{BUCKET}/sound/small"


@pytest.fixture
def run(s3: S3Server, made: Path, tmp_path: Path) -> str:
    """A copy of the run on S3, to be spoilt: its address."""
    s3.put_folder(made / "small", f"{tmp_path.name}/small")
    return f"s3://{BUCKET}/{tmp_path.name}/small"


def latents_of(run: str, node: Path) -> Bucket:
    return Bucket(f"{run}/precompute_latents", "precompute_latents", NodeCache(str(node / "cache"), 10**9))


def findings(folder: Bucket) -> list[str]:
    return [str(finding) for _, finding in verify.verify(folder.path, workers=1).findings]


# -- verify -----------------------------------------------------------------------------------------------------------
def test_a_sound_run_is_sound_and_counted(sound: str, capsys: pytest.CaptureFixture[str], node: Path) -> None:
    assert verify.main([f"path={sound}", "workers=1"]) == 0
    assert f"sound: {4 * SHARDS} shards of {', '.join(STAGES)}" in capsys.readouterr().out
    assert verify.main([f"path={sound}/precompute_latents/32/000003.index"]) == 0
    assert "sound: 1 shards of precompute_latents" in capsys.readouterr().out
    assert not [path for path in node.rglob("*") if path.is_file() and path.name != "lock"], "nothing is left behind"


@pytest.mark.parametrize("mutations", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_mutations_are_found(s3: S3Server, made: Path, run: str, node: Path, mutations: int) -> None:
    folder, chance, client = latents_of(run, node), random.Random(SEED), s3.client()
    home = f"{node.name}/small/precompute_latents/"
    whole = {home + str(path.relative_to(made / "small/precompute_latents")): path.read_bytes()
             for path in (made / "small/precompute_latents").rglob("*") if path.is_file()}  # fmt: skip
    assert not findings(folder)
    for number in range(mutations):
        MUTATIONS[number % len(MUTATIONS)](folder, chance.randrange(SHARDS), chance)
        assert findings(folder), f"number {number} of seed {SEED}"
        listed = client.list_objects_v2(Bucket=BUCKET, Prefix=home)["Contents"]
        there = {found["Key"]: found["ETag"] for found in listed}
        for key, data in whole.items():
            if there.get(key) != f'"{hashlib.md5(data).hexdigest()}"':
                client.put_object(Bucket=BUCKET, Key=key, Body=data)
    assert not findings(folder)


def test_a_missing_object_and_a_damaged_one_are_told_from_a_store_that_is_gone(
    s3: S3Server, run: str, node: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = latents_of(run, node)
    (folder / "32/000001.tar").unlink()
    said = findings(folder)
    assert said[0].startswith("precompute_latents shard 000001, 32/000001.tar: found nothing, expected ")
    assert len(said) == 1
    monkeypatch.setattr(s3, "spoil", lambda method, name: name == "000002.index")  # and the store's checksum knows it
    assert any("shard 000002, 32/000002.index: found sha256 " in line for line in findings(folder))
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unheard.getsockname()[1]}")
        assert verify.main([f"path={run}"]) == 2
    assert f"path={run}: " in (said := capsys.readouterr().err) and "Could not connect" in said


def test_what_the_node_keeps_is_not_taken_for_what_the_bucket_holds(
    run: str, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = latents_of(run, node)
    names = [name for name in folder.committed()[3].files]
    kept = {name: folder.data(name).read_bytes() for name in names}
    flip_a_byte(folder, 3, random.Random(SEED))
    assert {name: folder.data(name).read_bytes() for name in names} == kept, "the node has not seen the damage"
    assert findings(folder)

    @contextmanager
    def from_the_node(self: Bucket, record: Record) -> Iterator[Path]:
        for name in record.files:
            (node / "copies" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder.data(name), node / "copies" / name)
        yield node / "copies"

    monkeypatch.setattr(Bucket, "as_it_lies", from_the_node)  # the twin: who looks there finds nothing wrong
    assert not findings(folder)


def test_a_record_that_names_files_elsewhere_makes_none_there(run: str, node: Path) -> None:
    folder = latents_of(run, node)
    record = folder.committed()[0]
    place(f"{folder.path.parent}/outside.txt").write_bytes(b"x")
    hostile = Record(**{**record.__dict__, "files": {"../../../outside.txt": {"bytes": 1, "sha256": "0"}}})
    with folder.as_it_lies(hostile) as files:
        assert not list(files.rglob("*"))
    assert not list(node.rglob("outside.txt"))


# -- repair -----------------------------------------------------------------------------------------------------------
def config_of(run: str, node: Path) -> list[str]:
    return [*overrides_of(node / "outputs"), f"paths.shards={run.rpartition('/')[0]}",
            f"cluster.cache.folder={node / 'cache'}"]  # fmt: skip


def test_a_repair_makes_the_damaged_shards_again_and_no_other(s3: S3Server, run: str, node: Path) -> None:
    folder, chance = latents_of(run, node), random.Random(SEED)
    whole = {path: path.read_bytes() for path in folder.path.glob("32/*")}
    flip_a_byte(folder, 1, chance)
    alter_the_record(folder, 4, chance)
    puts = {n: s3.requests["PUT", f"{n:06d}.json"] for n in range(SHARDS)}

    def make_again(damaged: StageFolder) -> None:
        dag = Dag(compose(config_of(run, node)))
        worker = Worker(dag.refresh("precompute_latents").job)
        for shard in dag.statuses["precompute_latents"].todo:
            worker.run_shard(shard)
        records = list(damaged.committed().values())
        damaged.close(dag.fingerprints["precompute_latents"], records, sum_funnel(records))

    verify.repair(verify.verify(folder.path, workers=1), make_again)
    assert not findings(folder) and {path: path.read_bytes() for path in whole} == whole
    assert [n for n in range(SHARDS) if s3.requests["PUT", f"{n:06d}.json"] > puts[n]] == [1, 4]


def test_a_damaged_plan_is_written_anew_from_the_command_and_where_its_shards_lie_is_kept(
    run: str, node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = latents_of(run, node)
    before, command = (folder / "plan.json").read_bytes(), shlex.join(config_of("s3://elsewhere/x/small", node))
    write_json(folder / "run.json", {"format": 1, "runs": [{"command": command}]})
    assert verify.rerun_arguments(folder)[-3:] == [
        "+stage=precompute_latents", "name=small", f"paths.shards={run.rpartition('/')[0]}"]  # fmt: skip
    assert f"paths.outputs={node / 'outputs'}" in verify.rerun_arguments(folder)
    spoil_the_plan(folder / "plan.json", "cut")
    assert verify.main([f"path={folder.path}", "repair=true", "workers=1"]) == 0
    assert "repair: precompute_latents, its plan" in capsys.readouterr().out
    assert (folder / "plan.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_run_is_repaired_by_command(s3: S3Server, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR")  # Ray's sockets lie there, and their names may have 107 bytes

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)

    places = [f"paths.outputs={node}", f"paths.shards=s3://{BUCKET}/real", f"cluster.cache.folder={node / 'cache'}"]
    for stage in ("filter_metadata", "download"):
        done = command("pipelines.run", "+experiment=smoke", f"+stage={stage}", *places)
        assert done.returncode == 0, done.stdout + done.stderr
    shards = place(f"s3://{BUCKET}/real/smoke/download")
    before = {path: path.read_bytes() for path in shards.glob("0*")}
    damaged = next(path for path in before if path.suffix == ".tar")
    damaged.write_bytes(before[damaged][:-1] + b"x")
    broken = command("pipelines.verify", f"path=s3://{BUCKET}/real/smoke")
    assert broken.returncode == 1 and f"{damaged.name}: found sha256" in broken.stdout, broken.stdout + broken.stderr
    puts = Counter(s3.requests)
    mended = command("pipelines.verify", f"path=s3://{BUCKET}/real/smoke", "repair=true")
    assert mended.returncode == 0 and "sound: " in mended.stdout, mended.stdout + mended.stderr
    assert {path: path.read_bytes() for path in before} == before
    made_again = {name for method, name in (s3.requests - puts) if method == "PUT" and name.endswith(".tar")}
    assert made_again == {damaged.name}


# -- looking ----------------------------------------------------------------------------------------------------------
def test_inspect_shows_what_it_shows_on_disk_and_puts_nothing_there(
    s3: S3Server, made: Path, sound: str, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(node)
    keys = s3.keys("sound/")
    on_disk, on_s3 = inspect.describe(made / "small"), inspect.describe(place(sound))
    assert on_s3 == [f"{sound}: results of", *on_disk[1:]] and len(on_s3) == 5
    lines = inspect.describe(place(f"{sound}/precompute_latents"))
    assert lines[1:-1] == inspect.describe(made / "small/precompute_latents")[1:-1]
    assert lines[-1].endswith(str(node / "sheet.png")) and (node / "sheet.png").stat().st_size > 1000
    one = inspect.describe(place(f"{sound}/precompute_latents/32/000002.tar"))
    assert f"32: {ROWS} samples in 1 shards" in one[1] and (node / "sheet-000002.png").exists()
    monkeypatch.setattr(latent_sheet, "FETCHED", 2)
    lines = inspect.describe(place(f"{sound}/precompute_latents"))
    assert f"2 of {SHARDS} shards are fetched" in (said := "\n".join(lines)) and f"{2 * ROWS} samples in 2 shar" in said
    assert s3.keys("sound/") == keys
    assert inspect.main([f"path={sound}/nothing"]) == 2 and inspect.main(["path=s3://nowhere/x"]) == 2


def test_status_of_a_run_whose_shards_are_on_s3(
    sound: str, node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    removed = node / "removed.txt"
    removed.write_text("http://pictures.example/00000302\nnothing else\n")
    assert status.main([*config_of(sound, node), f"removed={removed}"]) == 0
    said = capsys.readouterr().out
    for stage in STAGES:
        assert f"{stage:<20}{'done':<24}{SHARDS * ROWS:>12}{SHARDS * ROWS:>12}{0:>12}" in said
    assert "names 1 samples of this run: 00000302" in said and "there is no checkpoint" in said
    assert status.main([*config_of("s3://nowhere/x/small", node)]) == 2
    assert "paths.shards=s3://nowhere/x: " in capsys.readouterr().err


# -- selection --------------------------------------------------------------------------------------------------------
def folders_of(run: Any, node: Path) -> tuple[StageFolder, StageFolder]:
    kinds = ("filter_metadata", "filter_images")
    if isinstance(run, Path):
        return tuple(StageFolder(run / stage, stage) for stage in kinds)  # type: ignore[return-value]
    return tuple(Bucket(f"{run}/{stage}", stage, NodeCache(str(node), 10**9)) for stage in kinds)  # type: ignore[return-value]


def test_what_a_selection_reads_comes_many_at_once_in_order_and_past_the_node_s_cache(
    s3: S3Server, made: Path, sound: str, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, open_now, most = [4, 0, 1, 5, 2, 3], [0], [0]
    counting = threading.Lock()

    def look(method: str, name: str) -> bool:
        with counting:
            open_now[0] += 1
            most[0] = max(most[0], open_now[0])
        time.sleep(0.1)
        with counting:
            open_now[0] -= 1
        return False

    monkeypatch.setattr(selection, "READERS", 4)
    on_disk = list(all_samples(*folders_of(made / "small", node), order))
    monkeypatch.setattr(s3, "refuse", look)
    before = s3.requests.total()
    on_s3 = list(all_samples(*folders_of(sound, node), order))
    assert [shard for shard, _ in on_s3] == order and on_s3 == on_disk
    assert s3.requests.total() - before == 4 * SHARDS, "a record and a file of two stages for each shard"
    assert 1 < most[0] <= 4
    assert not list(node.rglob("*.parquet")), "what is read once does not push out what is read again"


def test_a_selection_is_not_made_from_damaged_files(run: str, node: Path) -> None:
    folders = folders_of(run, node)
    path = folders[1] / "000002.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedFile, match="filter_images/000002.parquet has sha256 .*pipelines.verify path=s3://"):
        list(all_samples(*folders, range(SHARDS)))
