"""Each switch of a training switches what it names, in the loop itself: equal curves alone would not tell."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.config import TrainingRunConfig
from ldm.models.blocks import ResBlock
from ldm.training.loader import TrainData
from tests.ldm.training import processes
from tests.ldm.training.test_train import work
from tests.ldm.training.tiny import RUN, settings, write_data

STEPS = 2


def watched(precision: str, data: TrainData, home: Path, run: TrainingRunConfig) -> Counter[str]:
    """What happened in a training of two steps: calls of residual blocks, dtypes of what they give, graphs compiled."""
    seen: Counter[str] = Counter()
    block, compile_ = ResBlock.forward, nn.Module.compile

    def forward(self: ResBlock, *inputs: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            seen["calls"] += 1
        output = block(self, *inputs)  # computed again, it is left as soon as all that was forgotten is there
        if not torch.compiler.is_compiling():
            seen[str(output.dtype)] += 1
        return output

    ResBlock.forward = forward
    nn.Module.compile = lambda self: compile_(self, backend="eager")  # traced for real; C++ would take a minute
    work(settings(max_steps=STEPS, warmup_steps=0, precision=precision), data, home, run)
    seen["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return seen


def train(tmp_path: Path, precision: str = "float32", **run: Any) -> Counter[str]:
    (tmp_path / "data").mkdir(parents=True)
    data = write_data(tmp_path / "data", [16])
    (seen,) = processes.run(watched, precision, data, tmp_path / "train", replace(RUN, micro_batch_size=8, **run))
    assert not isinstance(seen, Exception), seen
    return seen


def test_activation_checkpointing_computes_blocks_again(tmp_path: Path) -> None:
    once, twice = (train(tmp_path / str(on), activation_checkpointing=on) for on in (False, True))
    assert twice["calls"] == 2 * once["calls"] > 0


@pytest.mark.parametrize(("precision", "dtype"), [
    ("float32", "torch.float32"), ("bf16_autocast", "torch.bfloat16"), ("bf16", "torch.bfloat16"),
])  # fmt: skip
def test_blocks_compute_in_the_precision_that_was_asked_for(tmp_path: Path, precision: str, dtype: str) -> None:
    seen = train(tmp_path, precision)
    assert seen[dtype] == seen["calls"] > 0


def test_a_compiled_model_is_compiled_and_checkpointed(tmp_path: Path) -> None:
    assert train(tmp_path / "eager")["graphs"] == 0
    assert train(tmp_path / "compiled", compile=True, activation_checkpointing=True)["graphs"] > 0
