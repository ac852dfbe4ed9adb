"""Ways of running the same training, compiled or with the optimizer beside the device: the same curve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm.training import checkpoint
from ldm.training.engine import deepspeed_config, join
from tests.ldm.training import processes
from tests.ldm.training.test_engine import ALONE, BATCH, STEPS, check_same, make, reference, steps
from tests.ldm.training.tiny import RUN, TRAINING

OPTIMIZER = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
WEIGHTS = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}


def run(home: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Half of the steps, a checkpoint, the other half; then that half again from the checkpoint."""
    world = join()
    micro_batch_size = BATCH // world.world_size // 2
    engine = make(world, micro_batch_size, **how)
    found = steps(engine, range(STEPS // 2))
    whole = engine.gather(engine.stretches())
    checkpoint.save(home, STEPS // 2, stretches=engine.states(), ema=whole, config={}, facts={})
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


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled(tmp_path: Path, stage: int) -> None:
    results = processes.run(run, tmp_path, {"zero_stage": stage, "compile": True}, world_size=2)
    assert not isinstance(results[0], Exception), results[0]
    check_same(results, *reference())


def test_compiled_at_stage_three_is_refused() -> None:
    with pytest.raises(ValueError, match="compile does not go with cluster.train.run.zero_stage=3"):
        deepspeed_config(TRAINING, replace(RUN, micro_batch_size=8, compile=True, zero_stage=3), ALONE)

