"""fp16 with a loss scale that follows its overflows: no fault of a batch, and part of what a checkpoint keeps.

DeepSpeed wants a processor that multiplies fp16 quickly. All can do it slowly, so that one question is answered for it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import TrainingRunConfig, TrainSettings
from ldm.training.checkpoint import newest
from ldm.training.engine import GradientOverflow, NonFiniteGradient, join
from ldm.training.loader import TrainData
from tests.ldm.training import processes
from tests.ldm.training.test_engine import BATCH, STEPS, make, reference, samples, steps
from tests.ldm.training.test_train import weights_of, work
from tests.ldm.training.tiny import RUN, settings, write_data


def allow_fp16() -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def overflowing(stage: int) -> dict[str, Any]:
    """Good steps, one whose gradient overflows, good ones again, and an overflow that no smaller scale would mend."""
    world = join()
    allow_fp16()
    engine = make(world, BATCH // world.world_size, precision="fp16", zero_stage=stage)
    found: dict[str, Any] = {"steps": steps(engine, range(3)), "scales": [engine.loss_scale], "errors": []}
    before = engine.gather(engine.stretches())
    for scale in (None, 1.0):
        if scale is not None:
            engine.restore_scaler({**(engine.scaler_state() or {}), "cur_scale": scale})
        z = samples(3)[world.rank :: world.world_size]
        engine.backward((engine(z, torch.arange(len(z)), {}).float() * 1e9).square().mean())
        try:
            engine.update(1e-2)
        except NonFiniteGradient as error:
            found["errors"].append((type(error), str(error)))
        found["scales"].append(engine.loss_scale)
    after = engine.gather(engine.stretches())
    found["same"] = before is None or after is None or all(torch.equal(before[name], after[name]) for name in before)
    found["steps"] += steps(engine, range(3, STEPS))
    return found


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_an_overflow_lowers_the_scale_and_leaves_the_weights(stage: int) -> None:
    results = processes.run(overflowing, stage, world_size=2)
    expected, _ = reference()
    for result in results:
        assert not isinstance(result, Exception), result
        assert result["scales"] == [2.0**16, 2.0**15, 1.0] and result["same"]
        assert result["errors"] == [(GradientOverflow, "a gradient overflowed at loss scale 65536"),
                                    (NonFiniteGradient, "the gradient's norm is inf")]  # fmt: skip
    for i, (loss, _) in enumerate(expected):
        assert sum(result["steps"][i][0] for result in results) / 2 == pytest.approx(loss, rel=0.02)


def fp16_work(what: TrainSettings, data: TrainData, output: Path, run: TrainingRunConfig) -> dict[str, Any]:
    join()
    allow_fp16()
    return work(what, data, output, run)


def test_overflows_are_no_faults_and_the_scale_goes_on_to_the_bit(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    data = write_data(tmp_path / "latents", [9, 14])
    what = settings(max_steps=6, warmup_steps=2, log_every_steps=1, precision="fp16", lr_schedule="constant")
    high = {"fp16": {"initial_scale_power": 30, "loss_scale_window": 2}}  # the first steps overflow
    run = replace(RUN, micro_batch_size=8, checkpoint_every_steps=3, deepspeed=high)
    (whole,) = processes.run(fp16_work, what, data, tmp_path / "whole", run)
    assert not isinstance(whole, Exception), whole
    assert whole["step"] == 6 and [step for step, _ in whole["logged"]] == [1, 2, 3, 4, 5, 6]
    last = newest(tmp_path / "whole")
    assert last is not None and last.manifest["skipped_batches"] == 0 and last.manifest["samples_seen"] > 6 * 8
    scales = [values["loss_scale"] for _, values in whole["logged"]]
    assert scales[-1] == last.manifest["loss_scale"]["cur_scale"] and 1 < scales[0] < 2**30
    first = replace(what, training=replace(what.training, max_steps=3))
    for part in (first, what):
        processes.run(fp16_work, part, data, tmp_path / "parts", run)
    assert weights_of(tmp_path / "parts", 6) == weights_of(tmp_path / "whole", 6)
    again = newest(tmp_path / "parts")
    assert again is not None and again.manifest["loss_scale"] == last.manifest["loss_scale"]
