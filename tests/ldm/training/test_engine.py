"""DeepSpeed behind one face: even batches, equal numbers for every ZeRO stage, and no weight is ever poisoned."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.training import checkpoint, saving
from ldm.training.engine import Engine, NonFiniteGradient, deepspeed_config, join
from ldm.training.engine_config import WEIGHTS, World, accumulation
from tests.ldm.training import processes
from tests.ldm.training.tiny import RUN, SEED, TRAINING

ALONE = World(0, 1, torch.device("cpu"))
BATCH, STEPS = 8, 6


class Network(nn.Module):
    """Convolution, norm and embedding, odd sizes, and a parameter that never has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 7, 3, padding=1), nn.Conv2d(7, 4, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(1, 7), nn.Embedding(5, 7)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, z_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        h = nn.functional.silu(self.norm(self.first(z_t))) + self.time(t % 5)[:, :, None, None]
        return self.last(h)


def samples(step: int) -> Tensor:
    return torch.randn(BATCH, 4, 6, 6, generator=torch.Generator().manual_seed(100 * SEED + step))


def make(world: World, micro_batch_size: int, seed: int = SEED, precision: str = "float32", **run: Any) -> Engine:
    torch.manual_seed(seed)
    how = replace(RUN, micro_batch_size=micro_batch_size, **run)
    training = replace(TRAINING, batch_size=BATCH, learning_rate=1e-2, precision=precision)
    return Engine(Network(), training, how, world)


def steps(engine: Engine, numbers: range) -> list[tuple[float, float]]:
    """(mean loss of this process, gradient norm) of each step."""
    found, rank, world_size = [], engine.world.rank, engine.world.world_size
    for step in numbers:
        mine = samples(step)[rank::world_size].chunk(engine.accumulation)
        times = torch.arange(BATCH)[rank::world_size].chunk(engine.accumulation)
        total = 0.0
        for z, t in zip(mine, times, strict=True):
            loss = (engine(z, t, {}).float() - z.flip(1)).square().mean()
            engine.backward(loss)
            total += loss.item() / engine.accumulation
        found.append((total, engine.update(1e-2)))
    return found


def plain(network: nn.Module, numbers: range) -> list[tuple[float, float]]:
    """The same in plain PyTorch, in one process and in whole batches."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)
    found = []
    for step in numbers:
        z = samples(step)
        optimizer.zero_grad()
        loss = (network(z, torch.arange(BATCH), {}) - z.flip(1)).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


# ---- settings ----------------------------------------------------------------------------------------------
def test_batches_come_out_even_or_are_refused() -> None:
    assert accumulation(680, 17, 8) == 5 and accumulation(8, 8, 1) == 1
    with pytest.raises(ValueError, match="batch_size is 681, which 8 .* for a new run: 680 and 688"):
        accumulation(681, 17, 8)
    with pytest.raises(ValueError, match="batch_size is 3, which 8 .* for a new run: 8"):
        accumulation(3, 1, 8)
    with pytest.raises(ValueError, match="micro_batch_size is 16, .* 85 samples .* these do: 1, 5, 17, 85"):
        accumulation(680, 16, 8)


def test_a_number_of_processes_that_does_not_fit_names_the_nearest_that_do() -> None:
    """A run that goes on keeps its batch: what it may change is how many share it, and how much at a time."""
    with pytest.raises(ValueError) as error:
        accumulation(680, 17, 16)
    named = [(10, 17), (17, 10)]  # 68 samples each, or 40: of those shares the largest parts up to 17
    for processes_, micro in named:
        assert f"workers={processes_} with cluster.train.run.micro_batch_size={micro}" in str(error.value)
        assert 680 // processes_ % micro == 0 and accumulation(680, micro, processes_)
    with pytest.raises(ValueError, match=r"can: cluster.train.workers=3 with .*_size=1; the nearest batch sizes"):
        accumulation(3, 2, 8)  # no more than one sample each


def test_further_keys_reach_deepspeed_and_ours_cannot_be_contradicted() -> None:
    run = replace(
        RUN, deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}, "comms_logger": {"enabled": False}}
    )
    config = deepspeed_config(TRAINING, replace(run, micro_batch_size=8), ALONE)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000 and config["zero_optimization"]["stage"] == 1
    assert config["comms_logger"] == {"enabled": False}
    for theirs, mend in (
        ({"zero_optimisation": {}}, "zero_optimisation is nothing .*; did you mean zero_optimization?"),
        ({"activation_checkpointing": {}}, "activation_checkpointing is nothing that is passed on .*; there are: aio,"),
        ({"zero_optimization": None}, "zero_optimization is None; it is a section of keys and values"),
        ({"zero_optimization": {"reduce_bucket_sise": 1}}, "which DeepSpeed refuses: (?s:.*)reduce_bucket_sise"),
        ({"train_batch_size": 4}, "train_batch_size is decided by training.batch_size"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is decided by cluster.train.run.zero_stage"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is decided by training.precision"),
    ):
        with pytest.raises(ValueError, match=mend):
            deepspeed_config(TRAINING, replace(run, micro_batch_size=8, deepspeed=theirs), ALONE)


def test_precisions_that_do_not_exist_or_fit_are_refused() -> None:
    run = replace(RUN, micro_batch_size=8, zero_stage=0)
    with pytest.raises(ValueError, match="precision is 'fp8'; there are: float32, bf16_autocast, bf16"):
        deepspeed_config(replace(TRAINING, precision="fp8"), run, ALONE)
    with pytest.raises(ValueError, match="zero_stage=1 on; set that"):
        deepspeed_config(replace(TRAINING, precision="bf16"), run, ALONE)


def test_numbers_that_mean_nothing_are_refused() -> None:
    run = replace(RUN, micro_batch_size=8)
    with pytest.raises(ValueError, match="zero_stage is 5; there are: 0, 1, 2, 3"):
        deepspeed_config(TRAINING, replace(run, zero_stage=5), ALONE)
    for clipping in (0.0, -1.0):
        with pytest.raises(ValueError, match="gradient_clipping is -?[01].0; it is above 0, or null for none"):
            deepspeed_config(replace(TRAINING, gradient_clipping=clipping), run, ALONE)
    with pytest.raises(ValueError, match="training.batch_size is 0, cluster.train.workers is -1; it is at least 1"):
        accumulation(0, 1, -1)
    with pytest.raises(ValueError, match="cluster.train.run.micro_batch_size is 0; it is at least 1"):
        accumulation(8, 0, 1)


# ---- who computes where ------------------------------------------------------------------------------------
def joined_beside_a_gpu() -> str:
    torch.cuda.is_available = lambda: True  # as on a machine whose GPUs others were given
    return join().device.type


def joined_without_one() -> str:
    dist.destroy_process_group()
    torch.cuda.is_available = lambda: False
    return join(cuda=True).device.type


def test_the_group_says_where_its_processes_compute() -> None:
    assert processes.run(joined_beside_a_gpu) == ["cpu"]


def test_a_gpu_that_is_not_there_is_missed_by_name() -> None:
    (error,) = processes.run(joined_without_one)
    assert isinstance(error, RuntimeError)
    assert "sees none on this node; cluster.train.num_gpus=0 computes on processors" in str(error)


# ---- where DeepSpeed keeps the float32 weights -------------------------------------------------------------
def laid_out(stage: int, check: bool) -> bool:
    """Whether what checkpoints would hold is what the model computes with, under a key that changes the order."""
    if not check:
        Engine._check_layout = lambda engine: None
    engine = make(join(), 4, zero_stage=stage, deepspeed={"zero_optimization": {"round_robin_gradients": True}})
    whole = engine.gather(engine.stretches()) or {}
    return all(torch.equal(x, engine.parameters[name].detach()) for name, x in whole.items())


@pytest.mark.parametrize("stage", [1, 2])
def test_an_order_of_weights_that_is_not_known_here_is_refused(stage: int) -> None:
    for error in processes.run(laid_out, stage, True, world_size=2):
        assert isinstance(error, ValueError) and "weights in another order than is known here" in str(error)
    assert processes.run(laid_out, stage, False, world_size=2)[0] is False


# ---- many micro batches in bf16 ---------------------------------------------------------------------------
MICRO_BATCHES = 40


def whole_batch() -> Tensor:
    return torch.randn(MICRO_BATCHES, 4, 6, 6, generator=torch.Generator().manual_seed(SEED))


def micro_batch_loss(network: Any, z: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (network(z.to(dtype), torch.zeros(len(z), dtype=torch.int64), {}).float() - z.flip(1)).square().mean()


def summed(stage: int, deepspeed: dict[str, Any], precision: str = "bf16") -> dict[str, Tensor]:
    """The gradient of one step of forty micro batches, from the first average that AdamW makes of it."""
    world = join()
    torch.manual_seed(SEED)
    training = replace(TRAINING, batch_size=MICRO_BATCHES, precision=precision, gradient_clipping=None)
    engine = Engine(Network(), training, replace(RUN, micro_batch_size=1, zero_stage=stage, deepspeed=deepspeed), world)
    for z in whole_batch()[world.rank :: world.world_size].split(1):
        engine.backward(micro_batch_loss(engine, z))
    engine.update(1e-2)
    whole = engine.gather(engine.states(), "exp_avg")
    return {name: x / (1 - TRAINING.beta1) for name, x in (whole or {}).items() if name != "idle"}


def error_of(found: dict[str, Tensor], precision: str = "bf16") -> float:
    """Of a gradient, as a share of the one that plain PyTorch finds in the same micro batches and sums in float64."""
    torch.manual_seed(SEED)
    dtype = WEIGHTS.get(precision, torch.float32)
    network = Network().to(dtype)
    parameters = {name: p for name, p in network.named_parameters() if name != "idle"}
    expected = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    for z in whole_batch().split(1):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
            loss = micro_batch_loss(network, z, dtype)
        loss.div(MICRO_BATCHES).backward()
        for name, p in parameters.items():
            expected[name] += p.grad
        network.zero_grad()
    error = sum((found[name] - x).square().sum() for name, x in expected.items())
    return math.sqrt(error / sum(x.square().sum() for x in expected.values()))


@pytest.mark.parametrize(("stage", "world_size", "offload"), [
    (1, 2, "none"),
    *(pytest.param(stage, 1, offload, marks=pytest.mark.slow)
      for stage, offload in ((2, "none"), (3, "none"), (1, "cpu"), (2, "cpu"), (3, "cpu"))),
])  # fmt: skip
def test_forty_micro_batches_in_bf16_are_summed_in_float32(stage: int, world_size: int, offload: str) -> None:
    deepspeed = {"zero_optimization": {"offload_optimizer": {"device": offload}}}
    assert error_of(processes.run(summed, stage, deepspeed, world_size=world_size)[0]) < 1e-6


@pytest.mark.parametrize("stage", [
    1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))
])  # fmt: skip
def test_gradients_under_autocast_cross_the_wire_in_float32(stage: int) -> None:
    whole = processes.run(summed, stage, {}, "bf16_autocast", world_size=2)[0]
    rounded = {name: x for name, x in whole.items() if torch.equal(x.bfloat16().float(), x)}
    assert error_of(whole, "bf16_autocast") < 1e-6 and not rounded


def test_who_asks_for_sums_in_bf16_has_them() -> None:
    (found,) = processes.run(summed, 1, {"data_types": {"grad_accum_dtype": "bf16"}})
    error = error_of(found)
    print(f"sums in bf16 are {error:.2%} off")
    assert error > 1e-3


# ---- a gradient that is no number --------------------------------------------------------------------------
def poison(stage: int, precision: str) -> tuple[str, bool, float]:
    """(message, whether the weights stayed, norm of a good step after it)"""
    engine = make(join(), BATCH, precision=precision, zero_stage=stage)
    steps(engine, range(2))
    before = engine.gather(engine.stretches())
    z = samples(2)
    # The loss is finite, its gradient is not: sqrt at 0.
    loss = (engine(z, torch.arange(BATCH), {}).float() * 0).sum().abs().sqrt()
    engine.backward(loss)
    try:
        engine.update(1e-2)
        message = "was applied"
    except NonFiniteGradient as error:
        message = str(error)
    after = engine.gather(engine.stretches())
    assert before is not None and after is not None
    same = all(torch.equal(before[name], after[name]) for name in before)
    return message, same, steps(engine, range(3, 4))[0][1]


@pytest.mark.parametrize(("stage", "precision"), [
    (0, "float32"), (1, "float32"), (1, "bf16"),
    *(pytest.param(stage, precision, marks=pytest.mark.slow)
      for stage in (2, 3) for precision in ("float32", "bf16")),
])  # fmt: skip
def test_a_gradient_that_is_no_number_never_reaches_the_weights(stage: int, precision: str) -> None:
    (result,) = processes.run(poison, stage, precision)
    message, same, norm = result
    assert "the gradient's norm is" in message and same and math.isfinite(norm)


class WithBuffer(Network):
    """A network whose state is more than its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))


def kept_names() -> set[str]:
    engine = Engine(WithBuffer(), replace(TRAINING, batch_size=BATCH), replace(RUN, micro_batch_size=BATCH), join())
    steps(engine, range(1))
    return set(engine.gather(engine.stretches()) or {}) | set(engine.buffers())


def test_weights_and_buffers_are_kept() -> None:
    (names,) = processes.run(kept_names)
    assert names == {name for name, _ in Network().named_parameters()} | {"scale"}


def test_a_frozen_weight_has_no_place_in_the_engine() -> None:
    network = Network()
    network.last.requires_grad_(False)
    with pytest.raises(ValueError, match="2 parameters are frozen, last.weight first; they belong outside the engine"):
        Engine(network, replace(TRAINING, batch_size=BATCH), RUN, ALONE)


# ---- all stages --------------------------------------------------------------------------------------------
def run_stage(stage: int, micro_batch_size: int, home: Path, precision: str = "float32") -> dict[str, Any]:
    """Half of the steps, a checkpoint, and the other half."""
    engine = make(join(), micro_batch_size, precision=precision, zero_stage=stage)
    found = steps(engine, range(STEPS // 2))
    whole = engine.gather(engine.stretches())
    saving.save(home, STEPS // 2, stretches=engine.states(), ema=whole, config={}, facts={})
    found += steps(engine, range(STEPS // 2, STEPS))
    return {"steps": found, "weights": engine.gather(engine.stretches())}


def resume_stage(stage: int, micro_batch_size: int, home: Path, precision: str = "float32") -> dict[str, Any]:
    engine = make(join(), micro_batch_size, seed=SEED + 1, precision=precision, zero_stage=stage)
    last = checkpoint.newest(home)
    assert last is not None
    engine.restore(last.read, last.step)
    found = steps(engine, range(STEPS // 2, STEPS))
    return {"steps": found, "weights": engine.gather(engine.stretches())}


def check_same(results: list[dict[str, Any]], expected: list[tuple[float, float]], weights: dict[str, Tensor]) -> None:
    losses = [sum(r["steps"][i][0] for r in results) / len(results) for i in range(len(expected))]
    for (loss, norm), (found, found_norm) in zip(
        expected, zip(losses, (n for _, n in results[0]["steps"]), strict=True), strict=True
    ):
        assert found == pytest.approx(loss, rel=1e-5) and found_norm == pytest.approx(norm, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(results[0]["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)


def reference() -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    torch.manual_seed(SEED)
    network = Network()
    expected = plain(network, range(STEPS))
    # A parameter without a gradient: ZeRO has it in its flat weights and lets it decay.
    return expected, {name: x.detach() for name, x in network.named_parameters() if name != "idle"}


def test_two_processes_under_zero_follow_plain_pytorch(tmp_path: Path) -> None:
    results = processes.run(run_stage, 1, 4, tmp_path, world_size=2)
    check_same(results, *reference())


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_all_stages_follow_plain_pytorch_and_go_on_from_each_other(tmp_path: Path, micro_batch_size: int) -> None:
    expected, weights = reference()
    for stage in range(4):
        check_same(
            processes.run(run_stage, stage, micro_batch_size, tmp_path / str(stage), world_size=2), expected, weights
        )
    for stage in range(4):
        for then in range(4):
            resumed = processes.run(resume_stage, then, micro_batch_size, tmp_path / str(stage), world_size=2)
            check_same(resumed, expected[STEPS // 2 :], weights)
    for stage in (0, 3):
        alone = processes.run(resume_stage, 2, micro_batch_size, tmp_path / str(stage), world_size=1)
        check_same(alone, expected[STEPS // 2 :], weights)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16_autocast", "bf16"])
def test_bf16_stays_near_and_goes_on_to_the_bit(tmp_path: Path, precision: str) -> None:
    expected, _ = reference()
    for stage in (1, 2, 3):
        home = tmp_path / str(stage)
        results = processes.run(run_stage, stage, 2, home, precision, world_size=2)
        for i, (loss, _) in enumerate(expected):
            assert sum(r["steps"][i][0] for r in results) / 2 == pytest.approx(loss, rel=0.03)
        resumed = processes.run(resume_stage, stage, 2, home, precision, world_size=2)
        assert resumed[0]["steps"] == results[0]["steps"][STEPS // 2 :]
        assert all(torch.equal(resumed[0]["weights"][name], x) for name, x in results[0]["weights"].items())
