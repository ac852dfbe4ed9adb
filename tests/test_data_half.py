"""The data half as commands on a real Ray: one result for any number of workers, crashes and kills."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ldm.storage import sha256_file
from pipelines.config import CONF
from pipelines.manifest import StageFolder
from tests.s3_server import BUCKET, S3Server

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))
ROWS, REST = ["filter_metadata"], ["download", "filter_images", "precompute_latents"]
ALL = [*ROWS, *REST]
KILLS = 20
QUICK = ALL[:3]  # of sixty shards; an encoder that is started anew for each death would take most of an hour
KILLS_ON_S3 = 5
NOT_DECIDED = ("run.json", "lock")  # by inputs
SIXTY = ["dataset.sample_web.rows=128", "dataset.sample_web.pictures=32", "dataset.filter_metadata.shard_samples=1"]
# The command, which knows the whole DAG and single stages only, for the stages of the data half.
CODE = "import sys\nfrom pipelines import dag, run\ndag.Dag.wanted = lambda self: {}\nsys.exit(run.main(sys.argv[1:]))"


def start(outputs: Path, stages: list[str], *arguments: str, **environment: str) -> subprocess.Popen[str]:
    small = ["+experiment=smoke", "dataset.filter_metadata.shard_samples=4", "tracking.enabled=false"]
    command = [sys.executable, "-c", CODE.format(stages), *small, f"paths.outputs={outputs}", *arguments]
    return subprocess.Popen(command, cwd=CONF.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env={**os.environ, **environment})  # fmt: skip


def run(outputs: Path, stages: list[str], *arguments: str) -> None:
    process = start(outputs, stages, *arguments)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said


def written(outputs: Path, stages: list[str]) -> dict[str, str]:
    """The hash of every file of these stages but what inputs do not decide: who ran when, whose lock it was, and what
    a worker that outlives its killed driver for a moment is still making.
    """
    files = [path for stage in stages for path in (outputs / "smoke" / stage).rglob("*")
             if path.is_file() and path.name not in NOT_DECIDED and ".attempts" not in path.parts]  # fmt: skip
    return {str(path.relative_to(outputs)): sha256_file(path) for path in files}


def committed(outputs: Path) -> int:
    return sum(len(list((outputs / "smoke" / stage).glob("[0-9]*.json"))) for stage in REST)


def check_records(outputs: Path) -> None:
    """What has a record is there, whole."""
    for stage in ALL:
        folder = StageFolder(outputs / "smoke" / stage, stage)
        for record in folder.committed().values():
            assert {name: sha256_file(folder / name) for name in record.files} == {
                name: info["sha256"] for name, info in record.files.items()
            }


def left_behind(outputs: Path) -> list[Path]:
    """What attempts have left that came to nothing."""
    return [path for path in outputs.rglob("*") if path.name.endswith(".tmp") or path.parent.name == ".attempts"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    outputs = tmp_path_factory.mktemp("undisturbed")
    run(outputs, ALL, "cluster.download.in_flight=1")
    found = written(outputs, ALL)
    assert sum(name.endswith(".tar") for name in found) >= 16 and committed(outputs) >= 24
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_writes_the_same_bytes(
    undisturbed: dict[str, str], tmp_path: Path, workers: int
) -> None:
    many = [f"cluster.{stage}.in_flight={workers}" for stage in REST]
    run(tmp_path, ALL, *many, "cluster.num_cpus=8")
    assert written(tmp_path, ALL) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_workers_that_crash_between_data_and_record_change_no_byte(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    process = start(tmp_path, ROWS)  # by the driver itself
    assert process.communicate(timeout=300) and process.returncode == 0
    for _ in range(4):  # Ray tries a shard four times; the same command goes on from there
        process = start(tmp_path, REST, LDM_CRASH_AT="before_record:0.2")
        said, _ = process.communicate(timeout=500)
        check_records(tmp_path)
        if process.returncode == 0:
            break
    assert process.returncode == 0, said
    assert written(tmp_path, ALL) == undisturbed


@pytest.fixture(scope="module")
def sixty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file of sixty shards in each of these stages."""
    outputs = tmp_path_factory.mktemp("sixty")
    run(outputs, QUICK, *SIXTY)
    assert committed(outputs) == 60 * 2
    return written(outputs, QUICK)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("point, quarantined", [("before_record", 60), ("after_record", 0)])
def test_workers_that_are_killed_lose_no_shard_change_no_byte_and_leave_nothing_behind(
    sixty: dict[str, str], tmp_path: Path, point: str, quarantined: int
) -> None:
    """One try in five dies. A shard is quarantined for eight deaths in a row in one command, and not before."""
    run(tmp_path, ROWS, *SIXTY)  # by the driver itself
    given, crashes = [*SIXTY, f"cluster.max_quarantined_shards={quarantined}"], tmp_path / "crashes"
    for _ in range(4):  # Ray tries a shard four times; the same command goes on from there
        process = start(tmp_path, QUICK[1:], *given, LDM_CRASH_AT=f"{point}:0.2", LDM_CRASHES=str(crashes))
        said, _ = process.communicate(timeout=900)
        check_records(tmp_path)
        if process.returncode == 0:
            break
    assert process.returncode == 0, said
    kills = crashes.read_text().split()
    print(f"{len(kills)} workers killed {point}")
    assert set(kills) == {point} and len(kills) > 10
    assert written(tmp_path, QUICK) == sixty and left_behind(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_kills_at_random_moments_change_no_byte(undisturbed: dict[str, str], tmp_path: Path) -> None:
    chance, rounds = random.Random(SEED), 0
    outputs, kills = tmp_path / "0", 0
    while kills < KILLS:
        process = start(outputs, ALL)
        _wait(process, partial(committed, outputs), chance)
        ended = process.poll()
        if ended is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        said, _ = process.communicate()
        check_records(outputs)
        print(f"round {rounds}, kill {kills}, exit code {ended}: {committed(outputs)} records", flush=True)
        assert ended in (None, 0), said
        if ended == 0 or written(outputs, ALL).keys() == undisturbed.keys():  # all was made: the next round begins
            assert written(outputs, ALL) == undisturbed
            rounds += 1
            outputs = tmp_path / str(rounds)
    run(outputs, ALL)
    assert written(outputs, ALL) == undisturbed
    assert left_behind(outputs) == []


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_kills_at_random_moments_change_no_byte_of_a_bucket(
    undisturbed: dict[str, str], s3: S3Server, tmp_path: Path
) -> None:
    """What is in the bucket in the end is what a disk holds."""
    chance = random.Random(SEED)
    there = [f"paths.shards=s3://{BUCKET}/shards", f"cluster.cache.folder={tmp_path / 'cache'}"]

    def records() -> int:
        return sum(key.endswith(".json") for key in s3.keys("shards/"))

    for kill in range(KILLS_ON_S3):
        process = start(tmp_path, ALL, *there)
        _wait(process, records, chance)
        ended = process.poll()
        if ended is None:
            os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        print(f"kill {kill}, exit code {ended}: {records()} plans and records", flush=True)
        assert ended in (None, 0), said
    run(tmp_path, ALL, *there)
    held = {key: s3.client().get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in s3.keys("shards/")}
    found = {key.removeprefix("shards/"): hashlib.sha256(data).hexdigest() for key, data in held.items()}
    assert {name: digest for name, digest in found.items() if Path(name).name not in NOT_DECIDED} == undisturbed


def _wait(process: subprocess.Popen[str], records: Callable[[], int], chance: random.Random) -> None:
    """Waits for a moment by chance: in the first seconds, or soon after so many shards more were committed."""
    more, later = chance.randrange(4), chance.random()
    goal, deadline = records() + more, time.monotonic() + 120
    while more and records() < goal and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    until = time.monotonic() + later * (0.5 if more else 12)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
