"""Asked to stop before it has begun: a process that has to go soon neither loads nor steps."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from ldm.training.checkpoint import newest
from ldm.training.loader import TrainData
from tests.ldm.training import processes
from tests.ldm.training.test_train import weights_of, work
from tests.ldm.training.tiny import RUN, settings, write_data


@pytest.fixture
def data(tmp_path: Path) -> TrainData:
    (tmp_path / "latents").mkdir()
    return write_data(tmp_path / "latents", [9])


def counted(unasked: bool, *args: Any) -> tuple[int, int, int]:
    """(last checkpoint, models made, steps told) of one process, which `unasked` nobody asks but after steps."""
    train, made = importlib.import_module("ldm.training.train"), []
    make_denoiser = train.make_denoiser
    train.make_denoiser = lambda *a: made.append(1) or make_denoiser(*a)
    if unasked:
        train.any_says = lambda word, world: False
    result = work(*args)
    return result["step"], len(made), len(result["logged"])


def test_who_is_asked_before_it_loads_or_steps_does_neither(data: TrainData, tmp_path: Path) -> None:
    """Only the last process is asked, and both leave. The twin, which asks after steps alone, makes all of them."""
    what, output = settings(max_steps=9, log_every_steps=1), tmp_path / "run"

    def two(*args: Any) -> list[Any]:
        return processes.run(counted, args[0], what, data, output, RUN, *args[1:], world_size=2)

    assert two(False, -1) == [(0, 0, 0)] * 2 and newest(output) is None
    assert [each[:2] for each in two(False, 3)] == [(3, 1)] * 2
    before = weights_of(output, 3)
    assert two(False, 0)[0] == (3, 1, 0) and weights_of(output, 3) == before  # nothing is saved a second time
    assert two(True, 0)[0] == (9, 1, 6)
