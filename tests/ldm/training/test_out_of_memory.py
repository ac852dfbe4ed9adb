"""A device whose memory ran out: what is said, and that it is said once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import TrainingRunConfig
from ldm.models.blocks import ResBlock
from ldm.training.loader import TrainData
from ldm.training.out_of_memory import TooLittleMemory, ways_to_take_less
from tests.ldm.training import processes
from tests.ldm.training.test_train import work
from tests.ldm.training.tiny import RUN, TRAINING, settings, write_data


def starve(data: TrainData, home: Path, run: TrainingRunConfig) -> None:
    """Training whose blocks take more than there is from a micro batch of 4 on."""
    block = ResBlock.forward

    def forward(self: ResBlock, h: torch.Tensor, *inputs: Any) -> torch.Tensor:
        if len(h) >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 139 GiB")
        return block(self, h, *inputs)

    ResBlock.forward = forward
    work(settings(max_steps=2, warmup_steps=0), data, home, run)


def test_the_setting_that_is_named_fits(tmp_path: Path) -> None:
    data, run = write_data(tmp_path, [16]), replace(RUN, micro_batch_size=4)
    (error,) = processes.run(starve, data, tmp_path / "train", run)
    assert isinstance(error, TooLittleMemory) and error.stops_the_run
    assert "CUDA out of memory. What takes less: cluster.train.run.micro_batch_size=2 (now 4); " in str(error)
    assert processes.run(starve, data, tmp_path / "train", replace(run, micro_batch_size=2)) == [None]


@pytest.mark.parametrize(("changed", "world_size", "ways"), [
    ({}, 1, ["micro_batch_size=2 (now 4)", "activation_checkpointing=true (now false)"]),
    ({"micro_batch_size": 1, "activation_checkpointing": True}, 1, []),
    ({"micro_batch_size": 1, "activation_checkpointing": True}, 2, ["zero_stage=2 (now 1)"]),
    ({"micro_batch_size": 1, "activation_checkpointing": True, "zero_stage": 2, "compile": True}, 2, []),
])  # fmt: skip
def test_only_ways_that_there_are_are_named(changed: dict[str, Any], world_size: int, ways: list[str]) -> None:
    assert ways_to_take_less(TRAINING, replace(RUN, **changed), world_size) == [f"cluster.train.run.{w}" for w in ways]
