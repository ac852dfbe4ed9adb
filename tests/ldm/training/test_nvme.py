"""An optimizer in files: the same numbers as in memory, averaged, kept and restored, and nothing of it stays behind."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.config import TrainingRunConfig
from ldm.training import checkpoint, saving
from ldm.training.ema import Ema
from ldm.training.engine import Engine, NonFiniteGradient, deepspeed_config, join
from ldm.training.engine_config import World, check_kept
from ldm.training.swap_folder import PREFIX, SwapFolder
from tests.ldm.training import processes
from tests.ldm.training.test_train import weights_of, work
from tests.ldm.training.tiny import RUN, SEED, TRAINING, settings, write_data

WIDTH, BATCH, LEARNING_RATE = 600, 8, 2e-4


@pytest.fixture(scope="module")
def libaio() -> None:
    """For tests that write as DeepSpeed does. They are slow, because it compiles its way to files when first used."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed writes to NVMe with libaio: apt-get install libaio-dev")


class Network(nn.Module):
    """Two weights large enough for files, at odd places in them, and small ones that stay in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(3))  # never has a gradient, and makes the places odd
        self.first, self.middle = nn.Linear(WIDTH, 901), nn.Linear(901, WIDTH)
        self.last = nn.Linear(WIDTH, 7)

    def forward(self, z: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.last(self.middle(torch.relu(self.first(z))))


def offloaded(device: str, folder: Path, **more: Any) -> dict[str, Any]:
    """DeepSpeed's keys for an optimizer on `device`."""
    offload = {"device": device, "nvme_path": str(folder), **more}
    return {"zero_optimization": {"sub_group_size": 300_000, "offload_optimizer": offload}}


def make(stage: int, deepspeed: dict[str, Any], precision: str = "float32") -> tuple[Engine, Ema]:
    """With averages of all but the first weights."""
    world = join()
    torch.manual_seed(SEED)
    training = replace(TRAINING, batch_size=BATCH, precision=precision)
    how = replace(RUN, micro_batch_size=2, zero_stage=stage, deepspeed=deepspeed)
    engine = Engine(Network(), training, how, world)
    ema = Ema(engine.stretches(), 0.9, lambda name: not name.startswith("first."), engine.room)
    engine.show(ema.look)
    return engine, ema


def steps(engine: Engine, ema: Ema, numbers: range) -> list[tuple[float, float]]:
    """(loss of the last micro batch, gradient norm) of each step."""
    found = []
    for step in numbers:
        z = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(100 * SEED + step))
        for part in z[engine.world.rank :: engine.world.world_size].chunk(engine.accumulation):
            loss = (engine(part, torch.zeros(len(part)), {}).float() - part[:, :7]).square().mean()
            engine.backward(loss)
        found.append((loss.item(), engine.update(LEARNING_RATE)))
        ema.update()
    return found


def everything(engine: Engine, ema: Ema) -> dict[str, Tensor]:
    """Weights, optimizer states and averages, whole; empty but on the first process."""
    kinds = {kind: engine.gather(engine.states(), kind) or {} for kind in checkpoint.KINDS}
    kinds["average"] = engine.gather(ema.stretches) or {}
    return {f"{kind}/{name}": x for kind, found in kinds.items() for name, x in found.items()}


def train(
    home: Path, stage: int, deepspeed: dict[str, Any], steps_of: tuple[int, int, int], precision: str = "float32"
) -> tuple[list[tuple[float, float]], dict[str, Tensor], list[bool]]:
    """Numbers of each step, all that there is at the end, and which groups were in files.

    `steps_of` is (first, middle, end): it goes on from the checkpoint of `first`, and keeps one of `middle`.
    """
    first, middle, end = steps_of
    engine, ema = make(stage, deepspeed, precision)
    if first:
        last = checkpoint.newest(home)
        assert last is not None and last.step == first
        engine.restore(last.read, first)
        ema.restore(last.read_ema, first)
    found = steps(engine, ema, range(first, middle))
    averages = engine.gather(ema.stretches)
    saving.save(home, middle, stretches=engine.states(), ema=averages, config={}, facts={}, room=engine.room)
    found += steps(engine, ema, range(middle, end))
    at_end = everything(engine, ema)
    groups = range(len(engine.deepspeed.optimizer.fp16_groups)) if stage == 3 else range(0)
    in_files = [engine._is_in_files(group) for group in groups]
    engine.close()
    return found, at_end, in_files


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    assert [name for name, x in expected.items() if not torch.equal(x, found[name])] == []


@pytest.mark.slow
@pytest.mark.usefixtures("libaio")
@pytest.mark.parametrize(("precision", "world_size", "more"), [
    ("float32", 1, {}),
    ("bf16", 2, {}),
    ("bf16", 1, {"pipeline_read": True, "pipeline_write": True, "buffer_count": 8}),
    ("bf16_autocast", 2, {}),
])  # fmt: skip
def test_it_is_the_same_to_the_bit_as_on_the_processor_and_goes_on_to_the_bit(
    tmp_path: Path, precision: str, world_size: int, more: dict[str, Any]
) -> None:
    files, memory = offloaded("nvme", tmp_path / "nvme", **more), offloaded("cpu", tmp_path)
    whole, rest = (0, 2, 4), (2, 4, 4)
    found = processes.run(train, tmp_path / "files", 3, files, whole, precision, world_size=world_size)
    expected = processes.run(train, tmp_path / "memory", 3, memory, whole, precision, world_size=world_size)
    assert not isinstance(found[0], Exception) and found[0][2][0] and not found[0][2][-1]  # some groups, not all
    assert [result[0] for result in found] == [result[0] for result in expected]
    at_end = found[0][1]
    check_same(at_end, expected[0][1])
    assert torch.equal(at_end["average/first.weight"], at_end["weight/first.weight"])  # is not averaged
    assert not torch.equal(at_end["average/middle.weight"], at_end["weight/middle.weight"])

    resumed = processes.run(train, tmp_path / "files", 3, files, rest, precision, world_size=world_size)
    assert [result[0] for result in resumed] == [result[0][2:] for result in found]
    check_same(resumed[0][1], at_end)
    assert list((tmp_path / "nvme").iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("libaio")
def test_checkpoints_know_nothing_of_files(tmp_path: Path) -> None:
    """From files into memory, at another stage and number of processes, and back."""
    files = offloaded("nvme", tmp_path / "nvme")
    ((straight, at_end, _),) = processes.run(train, tmp_path, 3, files, (0, 2, 6))
    in_memory, _ = processes.run(train, tmp_path, 2, {}, (2, 4, 4), world_size=2)
    ((back, moved, _),) = processes.run(train, tmp_path, 3, files, (4, 6, 6))
    norms = [norm for _, norm in in_memory[0] + back]
    assert norms == pytest.approx([norm for _, norm in straight[2:]], rel=1e-3) and len(norms) == 4
    assert norms[1:] != pytest.approx([norm for _, norm in straight[2:5]], rel=1e-3)  # a step less would be seen
    for name, x in at_end.items():
        torch.testing.assert_close(moved[name], x, rtol=1e-3, atol=1e-5, msg=name)


def poison(folder: Path) -> tuple[str, list[str], int]:
    """(what was raised, what is not as before, updates of the average) after a gradient that is no number."""
    engine, ema = make(3, offloaded("nvme", folder))
    steps(engine, ema, range(2))
    before = everything(engine, ema)
    for _ in range(engine.accumulation):
        loss = (engine(torch.randn(2, WIDTH), torch.zeros(2), {}) * 0).sum().abs().sqrt()
        engine.backward(loss)  # the loss is finite, its gradient is not: sqrt at 0
    try:
        engine.update(LEARNING_RATE)
        said = ""
    except NonFiniteGradient as error:
        said = str(error)
    after = everything(engine, ema)
    changed = [name for name, x in before.items() if not torch.equal(x, after[name])]
    steps(engine, ema, range(2, 3))
    again = everything(engine, ema)
    return said, changed, sum(not torch.equal(x, again[name]) for name, x in after.items())


@pytest.mark.slow
@pytest.mark.usefixtures("libaio")
def test_a_gradient_that_is_no_number_reaches_neither_files_nor_averages(tmp_path: Path) -> None:
    ((said, changed, after_a_good_one),) = processes.run(poison, tmp_path)
    assert "the gradient's norm is" in said and changed == [] and after_a_good_one > 12


# ---- the loop ----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.usefixtures("libaio")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world_size", [1, 2])
def test_twenty_steps_and_twenty_more_are_forty_to_the_bit(tmp_path: Path, world_size: int) -> None:
    (tmp_path / "latents").mkdir()
    data, what = write_data(tmp_path / "latents", [9, 14, 6]), settings()
    what = replace(what, unet=replace(what.unet, model_channels=96))
    run = replace(RUN, zero_stage=3, checkpoint_every_steps=100, deepspeed=offloaded("nvme", tmp_path / "nvme"))
    for home, stop_at in (("whole", None), ("parts", 20), ("parts", None)):
        results = processes.run(work, what, data, tmp_path / home, run, stop_at, world_size=world_size)
        assert [result["step"] for result in results] == [stop_at or 40] * world_size
    assert weights_of(tmp_path / "parts", 40) == weights_of(tmp_path / "whole", 40)
    in_memory = replace(run, deepspeed=offloaded("cpu", tmp_path))
    processes.run(work, what, data, tmp_path / "memory", in_memory, world_size=world_size)
    assert weights_of(tmp_path / "memory", 40) == weights_of(tmp_path / "whole", 40)
    assert list((tmp_path / "nvme").iterdir()) == []


# ---- whose files -------------------------------------------------------------------------------------------
def hold(folder: Path, seconds: float) -> list[str]:
    """Takes a step in a folder that others use too; returns what was there then."""
    engine, ema = make(3, offloaded("nvme", folder))
    steps(engine, ema, range(1))
    found = sorted(path.name for path in folder.iterdir())
    time.sleep(seconds)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("libaio")
def test_two_runs_that_were_told_the_same_folder_share_no_file(tmp_path: Path) -> None:
    """Neither removes what the other uses. A run that was killed leaves files; the next one removes them."""
    first = SwapFolder(tmp_path)
    (mine := first.path / "0_0.tensor.swp").write_bytes(b"mine")
    ((seen),) = processes.run(hold, tmp_path, 0.0)  # ends without a word, as if it had been killed
    assert len(seen) == 2 and mine.read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 2
    second = SwapFolder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {first.path.name, second.path.name}
    for folder in (first, second):
        folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        SwapFolder(tmp_path).path.joinpath("file").write_bytes(bytes(10))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [path.name.startswith(PREFIX) for path in tmp_path.iterdir()] == [True]
    SwapFolder(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_large_tensors_lie_in_files_without_a_name_and_small_ones_in_memory(tmp_path: Path) -> None:
    folder = SwapFolder(tmp_path)
    large, small = folder.tensor(2**18), folder.tensor(7)
    large.fill_(2.0), small.fill_(3.0)
    assert float(large.sum()) == 2**19 and float(small.sum()) == 21
    assert list(folder.path.iterdir()) == []  # so that nothing stays, whatever happens
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder.path) in line]
    assert len(maps) == 1 and maps[0].endswith("(deleted)")
    folder.close()


def test_a_file_that_finds_no_room_is_named_with_the_way_to_mend(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    folder = SwapFolder(tmp_path)
    try:
        with pytest.raises(OSError, match=r"for 1,048,580 bytes .*offload_optimizer.nvme_path: '.*swap-") as error:
            folder.tensor(2**18 + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        folder.close()
    assert error.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []


# ---- no room -----------------------------------------------------------------------------------------------
def fill(folder: Path, when: str) -> None:
    """The disk takes no more than a megabyte of any file: from the start, or once the weights are there."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if when == "start":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    engine, ema = make(3, offloaded("nvme", folder))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    steps(engine, ema, range(2))


@pytest.mark.slow
@pytest.mark.usefixtures("libaio")
@pytest.mark.parametrize("when", ["start", "step"])
def test_a_disk_without_room_is_named_and_no_weight_is_lost_without_a_word(tmp_path: Path, when: str) -> None:
    (error,) = processes.run(fill, tmp_path, when)
    assert isinstance(error, OSError) and str(tmp_path / PREFIX) in str(error)
    assert "for 2,1" in str(error) and "offload_optimizer.nvme_path" in str(error)


def test_a_checkpoint_that_cannot_be_copied_beside_the_states_says_so(tmp_path: Path) -> None:
    def full(numel: int) -> Tensor:
        raise OSError(28, "No space left on device", "/nvme")

    stretch = checkpoint.Stretch("w", 0, {"weight": torch.zeros(3)})
    with pytest.raises(saving.DiskFull, match=r"No space left on device: '/nvme'.*older checkpoints stay"):
        saving.save(tmp_path, 1, stretches=[stretch], ema=None, config={}, facts={}, room=full)
    assert list(tmp_path.iterdir()) == []


# ---- what is refused ---------------------------------------------------------------------------------------
def how(stage: int, **offload: Any) -> TrainingRunConfig:
    return replace(RUN, zero_stage=stage, deepspeed={"zero_optimization": offload})


def test_what_cannot_lie_in_files_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    nvme = {"device": "nvme", "nvme_path": "states"}
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    good, alone = replace(how(3, offload_optimizer=nvme), micro_batch_size=8), World(0, 1, torch.device("cpu"))
    check_kept(good)
    deepspeed_config(TRAINING, good, alone)
    for wrong, reason in (
        (how(2, offload_optimizer=nvme), "offload_optimizer.device is nvme, which needs .*zero_stage=3, not 2"),
        (how(3, offload_optimizer={"device": "nvme"}), "set .*offload_optimizer.nvme_path to a folder on a local disk"),
        (how(3, offload_param=nvme), "offload_param.device is nvme: .* set it to cpu"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_kept(wrong)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(ValueError, match="libaio, which is not installed: apt-get install libaio-dev"):
        deepspeed_config(TRAINING, good, alone)
