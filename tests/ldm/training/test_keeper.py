"""When checkpoints are made: by steps, by the clock, and at once, with nothing else, where a run is asked to stop."""

from __future__ import annotations

import importlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm.config import SampleGridConfig, TrainingRunConfig, TrainSettings
from ldm.training.checkpoint import step_name
from ldm.training.loader import TrainData
from tests.ldm.training import processes
from tests.ldm.training.test_train import weights_of, work
from tests.ldm.training.tiny import RUN, settings, write_data

GRID = SampleGridConfig(every_steps=4, prompts=["0 1"], steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    return write_data(tmp_path_factory.mktemp("latents"), [9, 14, 6])


# ---- asked to stop -----------------------------------------------------------------------------------------
def told(
    stop_at: int | None, what: TrainSettings, data: TrainData, output: Path, run: TrainingRunConfig
) -> tuple[list[str], float]:
    """What a process did after its step `stop_at`, when it was asked to stop, and for how many seconds.

    Files are written slowly: the checkpoint before is still under way.
    """
    train, keeper, saving = (importlib.import_module(f"ldm.training.{name}") for name in ("train", "keeper", "saving"))
    done: list[str] = []
    asked = [-2, 0.0]

    def should_stop() -> bool:
        asked[0] += 1
        if asked[0] == 5:  # whether or not it says so
            done.clear()
            asked[1] = time.monotonic()
        return asked[0] == stop_at

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            done.append(name)
            return real(*args, **options)

        setattr(module, name, watched)

    def slowly(*args: Any, write: Any = saving.save_file) -> None:
        time.sleep(0.3)
        write(*args)

    saving.save_file = slowly
    for module, name in ((train, "validation_loss"), (train, "sample_grid"), (train, "Meter"), (keeper, "retain")):
        watch(module, name)
    watch(saving.Saving, "commit")
    train.train(
        what, data, output, run, decode=lambda z0: z0[:, [0, 1, 0]], log=lambda *a: None, log_grid=lambda *a: None,
        should_stop=should_stop,
    )  # fmt: skip
    return done, time.monotonic() - asked[1]


def test_who_is_asked_to_stop_saves_and_does_nothing_else(data: TrainData, tmp_path: Path) -> None:
    """T7: the older save, still being written, is certain first; what has to go for both of them goes last."""
    what = settings(
        max_steps=5, warmup_steps=2, grid=GRID, held_out_shards=1, validate_every_steps=5, validation_samples=8
    )
    run = replace(RUN, checkpoint_every_steps=4, keep_checkpoints=1)
    (first, seconds), (second, _) = processes.run(told, 5, what, data, tmp_path / "stopped", run, world_size=2)
    print(f"T7: after it was asked to stop: {', '.join(first)}; {seconds:.1f} s")
    assert first == ["commit", "commit", "retain"] and second == ["commit", "commit"]
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [step_name(5)]
    # The twin: nobody asks, and at the end of training all is done that is due.
    (first, _), (second, _) = processes.run(told, None, what, data, tmp_path / "ended", run, world_size=2)
    assert {"validation_loss", "sample_grid"} <= set(first) and "validation_loss" in second
    assert weights_of(tmp_path / "ended", 5) == weights_of(tmp_path / "stopped", 5)


# ---- by the clock ------------------------------------------------------------------------------------------
def with_a_clock(
    what: TrainSettings, data: TrainData, output: Path, run: TrainingRunConfig, seconds_of_a_step: list[float]
) -> dict[str, Any]:
    """A run in which a step takes so many seconds by each process's own clock."""
    keeper, now = importlib.import_module("ldm.training.keeper"), [0.0]
    is_late, mine = keeper.Keeper.is_late, seconds_of_a_step[importlib.import_module("torch.distributed").get_rank()]

    def after_a_step(self: Any) -> bool:
        now[0] += mine
        return is_late(self)

    keeper.Keeper.is_late, keeper.time.monotonic = after_a_step, lambda: now[0]
    return work(what, data, output, run)


def test_the_first_process_decides_by_its_clock_and_the_others_save_with_it(data: TrainData, tmp_path: Path) -> None:
    """Every minute, where its steps take 25 seconds and those of the other an hour. The bits are those of any run."""
    what = settings(max_steps=8, warmup_steps=2)
    run = replace(RUN, zero_stage=2, checkpoint_every_steps=100, checkpoint_every_seconds=60.0, keep_checkpoints=9)
    clocks = [25.0, 3600.0]
    results = processes.run(with_a_clock, what, data, tmp_path / "clock", run, clocks, world_size=2)
    assert [result["step"] for result in results] == [8, 8]
    assert sorted(path.name for path in (tmp_path / "clock").iterdir()) == [step_name(step) for step in (3, 6, 8)]
    # The twin: without the setting there is one at the end alone.
    plain = replace(run, checkpoint_every_seconds=None)
    processes.run(with_a_clock, what, data, tmp_path / "plain", plain, clocks, world_size=2)
    assert [path.name for path in (tmp_path / "plain").iterdir()] == [step_name(8)]
    assert weights_of(tmp_path / "clock", 8) == weights_of(tmp_path / "plain", 8)
