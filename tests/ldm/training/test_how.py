"""Ways of running the same training, compiled or with the optimizer beside the device: the same curve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm.training import checkpoint, saving
from ldm.training.engine import deepspeed_config, join
from tests.ldm.training import processes
from tests.ldm.training.test_engine import ALONE, BATCH, STEPS, check_same, make, reference, steps
from tests.ldm.training.test_train import work
from tests.ldm.training.tiny import RUN, TRAINING, settings, write_data

OPTIMIZER = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
# What a GPU takes by default: gradients copied into buckets, small ones here so that there are several, and each bucket
# handed to those who own its parts.
BUCKETS = {"contiguous_gradients": True, "reduce_scatter": True, "reduce_bucket_size": 260}
WEIGHTS = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}


def run(home: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Half of the steps, a checkpoint, the other half; then that half again from the checkpoint."""
    world = join()
    micro_batch_size = BATCH // world.world_size // 2
    engine = make(world, micro_batch_size, **how)
    found = steps(engine, range(STEPS // 2))
    whole = engine.gather(engine.stretches())
    saving.save(home, STEPS // 2, stretches=engine.states(), ema=whole, config={}, facts={})
    found += steps(engine, range(STEPS // 2, STEPS))
    weights = engine.gather(engine.stretches())
    last = checkpoint.newest(home)
    assert last is not None
    engine.restore(last.read, last.step)
    return {"steps": found, "weights": weights, "again": steps(engine, range(STEPS // 2, STEPS))}


@pytest.mark.parametrize(("stage", "deepspeed"), [
    (2, OPTIMIZER),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, OPTIMIZER), (3, OPTIMIZER), (3, WEIGHTS))),
])  # fmt: skip
def test_with_the_optimizer_on_the_processor(tmp_path: Path, stage: int, deepspeed: dict[str, Any]) -> None:
    results = processes.run(run, tmp_path, {"zero_stage": stage, "deepspeed": deepspeed}, world_size=2)
    assert not isinstance(results[0], Exception), results[0]
    check_same(results, *reference())
    assert all(result["again"] == result["steps"][STEPS // 2 :] for result in results)


@pytest.mark.parametrize(("stage", "overlap_comm"), [
    (2, False),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, False), (1, True), (2, True))),
])  # fmt: skip
def test_with_the_buckets_of_a_gpu(tmp_path: Path, stage: int, overlap_comm: bool) -> None:
    deepspeed = {"zero_optimization": {**BUCKETS, "overlap_comm": overlap_comm}}
    results = processes.run(run, tmp_path, {"zero_stage": stage, "deepspeed": deepspeed}, world_size=2)
    assert not isinstance(results[0], Exception), results[0]
    check_same(results, *reference())
    assert all(result["again"] == result["steps"][STEPS // 2 :] for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled(tmp_path: Path, stage: int) -> None:
    results = processes.run(run, tmp_path, {"zero_stage": stage, "compile": True}, world_size=2)
    assert not isinstance(results[0], Exception), results[0]
    check_same(results, *reference())


def test_compiled_at_stage_three_is_refused() -> None:
    with pytest.raises(ValueError, match="compile does not go with cluster.train.run.zero_stage=3"):
        deepspeed_config(TRAINING, replace(RUN, micro_batch_size=8, compile=True, zero_stage=3), ALONE)


@pytest.mark.parametrize(("deepspeed", "reason"), [
    ({"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "weights"}}},
     "zero_optimization.offload_param.device is nvme: the weights that the model computes with can be on the "
     "processor, not in files; set it to cpu. The larger part, float32 weights and optimizer states, can: "
     "offload_optimizer.device=nvme"),
    ({"bf16": {"bf16_master_weights_and_grads": True}},
     "bf16.bf16_master_weights_and_grads is true: averaged weights and checkpoints are float32, and so must be the "
     "weights that they are made of; set it to false"),
])  # fmt: skip
def test_states_that_no_checkpoint_could_keep_are_refused_before_they_are_made(
    tmp_path: Path, deepspeed: dict[str, Any], reason: str
) -> None:
    data, how = write_data(tmp_path, [8]), replace(RUN, zero_stage=3, deepspeed=deepspeed)
    (refusal,) = processes.run(work, settings(), data, tmp_path / "train", how)
    assert isinstance(refusal, ValueError) and str(refusal) == f"cluster.train.run.deepspeed.{reason}"
    assert not (tmp_path / "train").exists()
