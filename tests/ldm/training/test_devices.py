"""What training does on a GPU, and the same on a processor, which shows that these tests can be passed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.training.arithmetic import choose_arithmetic
from ldm.training.checkpoint import KINDS
from ldm.training.engine import Engine, World, join
from ldm.training.loader import Batch
from tests.ldm.training import processes
from tests.ldm.training.test_engine import BATCH, STEPS, Network, plain, samples
from tests.ldm.training.tiny import RUN, SEED, TRAINING

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def on(device: str, function: Any, *args: Any) -> Any:
    """function(*args) in a process of its own, alone in its group."""
    (result,) = processes.run(function, *args, backend="nccl" if device == "cuda" else "gloo")
    return result


def engine_of(stage: int) -> Engine:
    world, training = join(), replace(TRAINING, batch_size=BATCH, learning_rate=1e-2, deterministic=True)
    choose_arithmetic(training)
    torch.manual_seed(SEED)
    how = replace(RUN, micro_batch_size=BATCH // 2, zero_stage=stage)
    return Engine(Network().to(world.device), training, how, world)


def take_steps(engine: Engine, numbers: range) -> list[tuple[float, float]]:
    """(mean loss, gradient norm) of each step, on batches that come as a loader's do."""
    found = []
    for step in numbers:
        total = 0.0
        for z, t in zip(samples(step).chunk(2), torch.arange(BATCH).chunk(2), strict=True):
            batch = Batch([], t, z, z.flip(1), t, {})
            batch = (batch.pin() if engine.world.device.type == "cuda" else batch).to(engine.world.device)
            loss = (engine(batch.z0, batch.t, batch.condition).float() - batch.eps).square().mean()
            engine.backward(loss)
            total += loss.item() / 2
        found.append((total, engine.update(1e-2)))
    return found


def gathered(engine: Engine) -> dict[str, dict[str, Tensor]]:
    return {kind: engine.gather(engine.states(), kind) for kind in KINDS}


def joined() -> World:
    return join()


def trained(stage: int) -> list[tuple[float, float]]:
    return take_steps(engine_of(stage), range(STEPS))


def gone_back(stage: int) -> tuple[bool, bool]:
    """Whether steps move what is gathered, and whether going back and taking them again ends in the same bits."""
    engine = engine_of(stage)
    take_steps(engine, range(3))
    kept = gathered(engine)
    take_steps(engine, range(3, 5))
    first = gathered(engine)
    engine.restore(lambda kind, name, start, stop: kept[kind][name].flatten()[start:stop].to(engine.world.device), 3)
    take_steps(engine, range(3, 5))
    again = gathered(engine)
    moved = any(not torch.equal(first[kind][name], kept[kind][name]) for kind in KINDS for name in engine.shapes)
    same = all(torch.equal(first[kind][name], again[kind][name]) for kind in KINDS for name in engine.shapes)
    return moved, same


@pytest.mark.parametrize("device", DEVICES)
def test_a_process_joins_on_its_own_device(device: str) -> None:
    world = on(device, joined)
    assert (world.rank, world.world_size, world.device.type) == (0, 1, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stage", range(4))
def test_each_stage_follows_plain_pytorch(device: str, stage: int) -> None:
    torch.manual_seed(SEED)
    found = torch.tensor(on(device, trained, stage))
    torch.testing.assert_close(found, torch.tensor(plain(Network(), range(STEPS))), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stage", range(4))
def test_what_is_gathered_restores_to_the_bit(device: str, stage: int) -> None:
    assert on(device, gone_back, stage) == (True, True)


def precisions(precision: str, deterministic: bool) -> tuple[str, str, bool]:
    choose_arithmetic(replace(TRAINING, precision=precision, deterministic=deterministic))
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark


def test_float32_is_float32_and_other_precisions_are_quick() -> None:
    """In a process of its own: these are settings of a whole process."""
    assert on("cpu", precisions, "float32", False) == ("ieee", "ieee", True)
    assert on("cpu", precisions, "bf16_autocast", False) == ("tf32", "tf32", True)
    assert on("cpu", precisions, "bf16_autocast", True) == ("tf32", "tf32", False)
