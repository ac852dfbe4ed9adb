"""A Ray that is too slow to come up is started again; a run without one ends in a sentence."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipelines import cluster
from pipelines.config import compose
from pipelines.run import main


class SlowMachine:
    """Ray's own processes are real; their node is not known for 31 seconds, by a clock that runs ahead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, late_starts: int) -> None:
        from ray._private import node, services

        self.late_starts, self.ahead, self.get_node = late_starts, 0.0, services.get_node
        self.left_behind: list[psutil.Process] = []
        clock = SimpleNamespace(sleep=time.sleep, time=time.time, monotonic=lambda: time.monotonic() + self.ahead)
        monkeypatch.setattr(node, "time", clock)
        monkeypatch.setattr(services, "get_node", self.ask)

    def ask(self, *arguments: object) -> object:
        if len(self.left_behind) >= self.late_starts:
            return self.get_node(*arguments)
        children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
        raylets = [child for child in children if child.name() == "raylet"]
        assert len(raylets) == 1, "that of the last start has ended"
        self.left_behind += raylets
        self.ahead += 31
        raise RuntimeError("the node is not known yet")


@pytest.mark.slow
def test_a_ray_that_is_not_up_in_time_is_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = SlowMachine(monkeypatch, late_starts=1)
    with cluster.connect(compose([]).cluster):
        import ray

        assert ray.get(ray.remote(lambda: 7).remote()) == 7
        assert not any(raylet.is_running() for raylet in machine.left_behind)
    assert capsys.readouterr().out == "Ray was not up within its 30 seconds, at start 1 of 3\n"


def test_a_ray_that_never_comes_up_ends_the_run_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "STARTS", 2)
    machine = SlowMachine(monkeypatch, late_starts=99)
    before = psutil.Process().children(recursive=True)
    assert main(["+stage=filter_metadata", f"paths.outputs={tmp_path}", "tracking=journal"]) == 1
    said = capsys.readouterr()
    assert said.err.strip().startswith("Ray, started here 2 times, was never up within its 30 seconds: the load is ")
    assert "Traceback" not in said.out + said.err and len(machine.left_behind) == 2
    assert not set(psutil.Process().children(recursive=True)) - set(before)


def test_where_no_cluster_is_found_the_setting_that_starts_one_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import services

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where a cluster that was started by hand is noted
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", functools.cache(set))  # those of others are not ours
    settings = ["+stage=filter_metadata", f"paths.outputs={tmp_path}", "tracking=journal", "cluster.address=auto"]
    assert main(settings) == 1
    said = capsys.readouterr().err
    assert said.strip().startswith("cluster.address is auto, where no Ray is found: Could not find any running Ray")
    assert "cluster.address=local starts one here" in said
