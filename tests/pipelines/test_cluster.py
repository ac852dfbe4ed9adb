"""Shards stream through stages on a real Ray: overlap, bounds, errors, and crashed workers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from ldm.images import encode_png
from pipelines import cluster
from pipelines.config import CONF, compose
from pipelines.dag import How, Job
from pipelines.manifest import Record, StageFolder
from pipelines.settings import ClipScoreConfig, Resources
from pipelines.stages import filter_images
from tests.pipelines.known_stage import LONG, Known
from tests.pipelines.small_cache import make_cache
from tests.pipelines.unkind_server import Unkind, unkind_server

MODULE = "tests.pipelines.known_stage"


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with cluster.connect(compose([]).cluster):
        yield


def make_step(folder: Path, stage: str, shards: range, known: Known, in_flight: int = 2) -> cluster.Step:
    config = compose([])
    how = How(config.cluster, config.tracking, None, "")
    job = Job(stage, {"known": known}, "f", StageFolder(folder / stage, stage), {}, how)
    job.output.path.mkdir(parents=True)
    return cluster.Step(job, Resources(num_cpus=0.5, num_gpus=0, in_flight=in_flight), set(shards), MODULE)


def times(step: cluster.Step, shard: int) -> tuple[float, float]:
    started, ended = json.loads((step.job.output / f"{shard:06d}.times").read_text())
    return started, ended


def test_a_later_stage_works_on_early_shards_while_an_earlier_one_works_on_late_ones(
    ray_here: None, tmp_path: Path
) -> None:
    # Long enough that starting the later stage's first process, on a busy machine, is over before the earlier one ends.
    steps = [make_step(tmp_path, stage, range(12), Known(0.7, [], [])) for stage in ("a", "b")]
    seen: list[tuple[str, int | None]] = []
    cluster.stream(steps, list(range(12)), lambda stage, record: seen.append((stage, record.shard)))
    assert sorted(seen) == [(stage, shard) for stage in "ab" for shard in range(12)]
    assert times(steps[1], 0)[0] < times(steps[0], 11)[1]
    for shard in range(12):
        assert times(steps[0], shard)[1] <= times(steps[1], shard)[0] + 0.05


def test_no_more_than_the_bound_are_under_way(ray_here: None, tmp_path: Path) -> None:
    step = make_step(tmp_path, "a", range(6), Known(0.2, [], []), in_flight=2)
    cluster.stream([step], list(range(6)), lambda stage, record: None)
    spans = [times(step, shard) for shard in range(6)]
    assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) <= 2


@pytest.mark.parametrize("made", [2, 4])
def test_shards_that_are_made_go_straight_to_the_next_stage(ray_here: None, tmp_path: Path, made: int) -> None:
    steps = [make_step(tmp_path, "a", range(made, 4), Known(0, [], [])),
             make_step(tmp_path, "b", range(4), Known(0, [], []))]
    seen: list[tuple[str, int | None]] = []
    cluster.stream(steps, list(range(4)), lambda stage, record: seen.append((stage, record.shard)))
    assert sorted(seen) == [*(("a", shard) for shard in range(made, 4)), ("b", 0), ("b", 1), ("b", 2), ("b", 3)]


def test_an_error_lets_the_other_shards_finish_and_is_told_with_its_cause(ray_here: None, tmp_path: Path) -> None:
    steps = [make_step(tmp_path, "a", range(5), Known(0, [1, 3], [])),
             make_step(tmp_path, "b", range(5), Known(0, [], []))]
    records: list[Record] = []
    message = "a: shard [13] and 1 more failed.*ValueError: shard [13] cannot be made"
    with pytest.raises(cluster.ShardsFailed, match=message):
        cluster.stream(steps, list(range(5)), lambda stage, record: records.append(record))
    assert sorted(steps[0].job.output.committed()) == sorted(steps[1].job.output.committed()) == [0, 2, 4]


def test_an_error_that_says_that_all_is_broken_lets_nothing_else_begin(ray_here: None, tmp_path: Path) -> None:
    steps = [make_step(tmp_path, "a", range(40), Known(0.05, [], [], (3,))),
             make_step(tmp_path, "b", range(40), Known(0, [], []))]
    with pytest.raises(cluster.ShardsFailed, match="a stopped at shard 3: Broken: shard 3 came to nothing"):
        cluster.stream(steps, list(range(40)), lambda stage, record: None)
    made = set(steps[0].job.output.committed())
    assert {0, 1, 2} <= made <= set(range(10)) and set(steps[1].job.output.committed()) == made


def test_what_is_under_way_when_all_is_broken_is_given_up(ray_here: None, tmp_path: Path) -> None:
    """The stage before is in the middle of a long shard, whose worker ends with it."""
    steps = [make_step(tmp_path, "a", range(2), Known(0, [], [], (), slow=(1,))),
             make_step(tmp_path, "b", range(2), Known(0, [], [], (0,)))]
    started = time.monotonic()
    with pytest.raises(cluster.ShardsFailed, match="b stopped at shard 0: Broken: shard 0 came to nothing"):
        cluster.stream(steps, [0, 1], lambda stage, record: None)
    assert time.monotonic() - started < LONG / 5 and sorted(steps[0].job.output.committed()) == [0]


def test_out_of_memory_ends_the_run_with_the_setting_to_lower(ray_here: None, tmp_path: Path) -> None:
    """A real Worker on a real Ray, whose device refuses batches of more than two pictures."""
    job = make_cache(tmp_path / "whole", shards=2).statuses["precompute_latents"].job
    output = StageFolder(tmp_path / "small", "precompute_latents")
    output.path.mkdir()
    steps = [make_step(tmp_path, "a", range(40), Known(0, [], [], (), slow=tuple(range(1, 40)))),
             cluster.Step(replace(job, output=output), Resources(0.5, 0, 1), {0, 1}, "tests.pipelines.small_device")]
    with pytest.raises(cluster.ShardsFailed) as failure:
        cluster.stream(steps, [0, 1], lambda stage, record: None)
    told = time.time()
    assert str(failure.value).startswith(
        "precompute_latents stopped at shard 0: TooLarge: 4 pictures of 32x32 in float32 do not fit into the memory of "
        "cpu; dataset.precompute_latents.batch_size=2 fits; "
    )
    seconds = told - (output / "refused").stat().st_mtime
    print(f"told {seconds:.1f} s after memory ran out")
    assert not output.committed() and seconds < LONG / 5


def test_a_crashed_worker_is_replaced_and_its_shard_made(ray_here: None, tmp_path: Path) -> None:
    step = make_step(tmp_path, "a", range(4), Known(0, [], [2]))
    cluster.stream([step], list(range(4)), lambda stage, record: None)
    assert (step.job.output / ".died-2").exists()
    assert sorted(step.job.output.committed()) == [0, 1, 2, 3]
    assert step.job.output.sweep() == 1  # what the crash left


def test_a_shard_whose_every_worker_is_killed_names_what_takes_less_memory(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SYSTEM_RETRIES", 1)
    step = make_step(tmp_path, "download", range(3), Known(0, [], [], killed=(1,)))
    with pytest.raises(cluster.ShardsFailed) as failure:
        cluster.stream([step], [0, 1, 2], lambda stage, record: None)
    assert sorted(step.job.output.committed()) == [0, 2]
    assert str(failure.value).startswith("download: shard 1 failed; what else had begun is committed")
    assert str(failure.value).endswith(
        "WorkerCrashedError: its worker was killed again and again, as happens where memory runs out; a lower "
        "cluster.download.in_flight (now 2) or a higher cluster.download.num_cpus (now 0.5) lets fewer work at once"
    )


def killed_step(folder: Path, shards: range) -> cluster.Step:
    """precompute_latents, a shard at a time, in workers that are killed."""
    step, settings = make_step(folder, "precompute_latents", shards, Known(0, [], []), in_flight=1), compose([]).dataset
    what = {"dataset.precompute_latents": replace(settings.precompute_latents, batch_size=12)}
    return replace(step, job=replace(step.job, what=what), module="tests.pipelines.killed_worker")


SMALLER = "as happens where memory runs out; a lower dataset.precompute_latents.batch_size .now 12. makes it smaller"


def test_a_stage_whose_workers_are_killed_names_its_batch(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SYSTEM_RETRIES", 1)
    step = killed_step(tmp_path, range(2))
    message = f"precompute_latents: shard 0 and 1 more failed.*its worker was killed again and again, {SMALLER}, a "
    with pytest.raises(cluster.ShardsFailed, match=message):
        cluster.stream([step], [0, 1], lambda stage, record: None)
    assert (step.job.output / "tries").read_text().split() == ["0", "0", "1", "1"]


def test_a_worker_that_is_killed_while_it_loads_is_not_started_for_ever(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "RESTARTS", 1)
    step = killed_step(tmp_path, range(1))
    (step.job.output / "large").touch()
    with pytest.raises(cluster.ShardsFailed, match=SMALLER):
        cluster.stream([step], [0], lambda stage, record: None)
    assert (step.job.output / "tries").read_text().split() == ["0", "0"]


def test_filter_images_has_a_batch_where_it_scores() -> None:
    settings = compose([]).dataset.filter_images
    clip = ClipScoreConfig("ViT-B-32", "clip.safetensors", "", batch_size=48, keep_embeddings=False)
    jobs = [SimpleNamespace(what={"dataset.filter_images": each}) for each in (settings, replace(settings, clip=clip))]
    assert [filter_images.sizes(job) for job in jobs] == [{}, {"dataset.filter_images.clip.batch_size": 48}]


# -- what all workers share -------------------------------------------------------------------------------------------
def a_download(folder: Path, address: str, shards: int, rows: int, per_second: float) -> cluster.Step:
    """Shards of pictures that all come from one host, each for a worker of its own."""
    config, source = compose([]), StageFolder(folder / "filter_metadata", "filter_metadata")
    for shard in range(shards):
        with source.attempt(shard, "f") as attempt:
            names = [f"{shard:06d}{i:02d}" for i in range(rows)]
            table = {"key": names, "url": [f"http://a.test/good?{name}" for name in names], "caption": names}
            pq.write_table(pa.table(table), attempt.path / f"{shard:06d}.parquet")
            attempt.commit(rows=rows, samples=rows, dropped={}, inputs={})
    settings = replace(config.dataset.download, requests_per_second=per_second, respect_robots=False, threads=4,
                       deadline_seconds=100.0)  # fmt: skip
    how = How(config.cluster, config.tracking, address, "")
    job = Job("download", {"dataset.download": settings}, "f", StageFolder(folder / "download", "download"),
              {"filter_metadata": source}, how)  # fmt: skip
    return cluster.Step(job, Resources(num_cpus=0.5, num_gpus=0, in_flight=shards), set(range(shards)),
                        "pipelines.stages.download")


def test_workers_together_ask_a_host_no_more_often_than_its_budget_allows(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals: list[tuple[float, str]] = []
    both, noting, picture = threading.Event(), threading.Lock(), encode_png(np.full((120, 130, 3), 77, np.uint8))

    def answer(self: Unkind) -> None:
        with noting:
            arrivals.append((time.monotonic(), self.path[:12]))  # /good?000001
            if len({shard for _, shard in arrivals}) == 2:
                both.set()
        both.wait(60)  # the worker that comes first waits for the other
        self.answer(200, picture)

    monkeypatch.setattr(Unkind, "on_good", answer)
    rows, per_second = 24, 12.0
    with unkind_server() as address:
        step = a_download(tmp_path, address, 2, rows, per_second)
        records: list[Record] = []
        cluster.stream([step], [0, 1], lambda stage, record: records.append(record))
    assert [record.samples for record in records] == [rows, rows]
    second = max(min(at for at, shard in arrivals if shard == one) for _, one in arrivals)
    together = [at for at, _ in arrivals if at >= second]
    # No request comes before its turn; the first may come late, on a busy machine. Each on its own takes half the time.
    assert len(together) >= 2 * rows - 8
    assert max(together) - min(together) >= 0.75 * (len(together) - 1) / per_second


OTHER_RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from pipelines import cluster
from pipelines.config import compose
from tests.pipelines.test_cluster import a_download
folder, server, address, rows, per_second = sys.argv[1:]
with cluster.connect(replace(compose([]).cluster, address=address)):
    step = a_download(Path(folder), server, 2, int(rows), float(per_second))
    cluster.stream([step], [1], lambda stage, record: print(record.samples, flush=True))
"""


@pytest.mark.slow
def test_two_runs_together_ask_a_host_no_more_often_than_its_budget_allows(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals: list[tuple[float, str]] = []
    first, both = threading.Event(), threading.Event()
    noting, picture = threading.Lock(), encode_png(np.full((120, 130, 3), 77, np.uint8))

    def answer(self: Unkind) -> None:
        with noting:
            arrivals.append((time.monotonic(), self.path[:12]))  # /good?000001
            first.set()
            if len({shard for _, shard in arrivals}) == 2:
                both.set()
        both.wait(90)  # the run that comes first waits for the other
        self.answer(200, picture)

    monkeypatch.setattr(Unkind, "on_good", answer)
    theirs, ours, per_second = 20, 28, 10.0
    with unkind_server() as server:
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-c", OTHER_RUN, tmp_path / "other", server, address, str(theirs), str(per_second)]
        with subprocess.Popen(command, cwd=CONF.parent, stdout=subprocess.PIPE, text=True) as other:
            assert first.wait(120)  # so that it is the other run that makes the budgets, and ends before this one
            records: list[Record] = []
            step = a_download(tmp_path, server, 1, ours, per_second)
            cluster.stream([step], [0], lambda stage, record: records.append(record))
            assert other.communicate(timeout=120)[0] == f"{theirs}\n" and other.returncode == 0
    assert [record.samples for record in records] == [ours]
    began = max(min(at for at, shard in arrivals if shard == one) for _, one in arrivals)
    together = [at for at, _ in arrivals if at >= began]
    # As above; a budget for each run would make it two thirds of the time.
    assert len(together) >= theirs + ours - 8
    assert max(together) - min(together) >= 0.8 * (len(together) - 1) / per_second


class Tally:
    """Counts its questions."""

    def __init__(self) -> None:
        self.asked = 0

    def ask(self, busy: float) -> int:
        self.asked, self.busy_until = self.asked + 1, time.monotonic() + busy
        return self.asked

    def busy_seconds(self) -> float:
        return self.busy_until - time.monotonic() if self.asked else 0.0


def names() -> list[str]:
    return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]


def test_what_nobody_asks_ends_when_nothing_is_lost_by_it_and_the_next_question_begins_it_anew(
    ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "IDLE_SECONDS", 0.2)
    ask, other = cluster._asking(Tally), cluster._asking(Tally)
    begun = time.monotonic()
    assert ask(8.0) == 1 and other(8.0) == 2  # the second comes within that time on a busy machine too
    while True:  # longer than nobody asks, but what it knows still matters
        there = "Tally" in names()
        if time.monotonic() > begun + 7:
            break
        assert there
        time.sleep(0.1)
    until = time.monotonic() + 60
    while "Tally" in names() and time.monotonic() < until:
        time.sleep(0.1)
    assert "Tally" not in names()
    assert other(0.0) == 1


def test_a_cluster_too_small_for_training_is_told_before_anything_waits_for_it(
    ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([]).cluster
    cluster.check_room(config)
    assert capsys.readouterr().out == ""
    wide = replace(config, train=replace(config.train, workers=64, num_gpus=1))
    with pytest.raises(cluster.StageFailed, match="64 GPUs where there are 0: cluster.train.workers is 64; a lower"):
        cluster.check_room(wide)
    cluster.check_room(replace(wide, address="auto"))  # it may grow
    assert "64 GPUs where there are 0" in (said := capsys.readouterr().out) and "once the cluster has them" in said
