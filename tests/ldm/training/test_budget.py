"""What training takes, as ldm/training/budget.py reckons it, held against processes that train."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ldm.config import TextEncoderConfig, TrainingConfig, TrainingRunConfig, UNetConfig
from ldm.models.attention import SpatialTransformer
from ldm.models.blocks import ResBlock, checkpoint_activations
from ldm.models.denoiser import Denoiser, make_denoiser
from ldm.training.budget import BUCKET, RESERVE_BYTES, Memory, gpu_seconds, memory
from ldm.training.costs import ModelCosts, model_costs
from ldm.training.ema import Ema
from ldm.training.engine import Engine, join
from ldm.training.engine_config import World
from tests.ldm.models import settings
from tests.ldm.training import processes
from tests.ldm.training.resident import forget_peak, measure_tensors, resident_bytes
from tests.ldm.training.tiny import RUN, TRAINING

COSTS = ModelCosts(trained=1000, averaged=600, largest=50, frozen=100, forward_flop=50.0, frozen_flop=10.0,
                   blocks_flop=30.0, activation_bytes=64.0, checkpointed_bytes=16.0, cast_bytes=20.0)  # fmt: skip
PAPER = settings.read(UNetConfig, "unet", "txt2img_1p45b")
MIDDLE = replace(PAPER, model_channels=96, context_dim=256)  # 78M parameters
SMALL = replace(PAPER, model_channels=32, context_dim=64)
BERT = replace(settings.read(TextEncoderConfig, "text_encoder", "bert_1p45b"), layers=2, width=64, vocab_size=300)


def memory_of(precision: str, device: str = "cuda", prompts: bool = False, **run: Any) -> Memory:
    """Of each of four devices, with micro batches of two."""
    grid = replace(TRAINING.grid, every_steps=10, prompts=["a"]) if prompts else TRAINING.grid
    training = replace(TRAINING, precision=precision, grid=grid)
    return memory(COSTS, training, replace(RUN, micro_batch_size=2, **run), World(0, 4, torch.device(device)), 7.0)


# ---- held against processes that train ---------------------------------------------------------------------------
def peak(training: TrainingConfig, how: TrainingRunConfig, latents: list[int]) -> int:
    """Bytes that training takes at its peak in this process, beside what the process has anyway."""
    measure_tensors()
    world = join()
    forget_peak()
    before = resident_bytes()
    denoiser = make_denoiser(MIDDLE, None)
    if how.activation_checkpointing:
        checkpoint_activations(denoiser, (ResBlock, SpatialTransformer))
    model = Engine(denoiser, training, how, world)
    averages = Ema(model.stretches(), 0.9)
    shape = [how.micro_batch_size, *latents]
    for _ in range(2):
        for _ in range(model.accumulation):
            z_t, t = torch.randn(shape), torch.full(shape[:1], 500)
            context = torch.randn(shape[0], 77, MIDDLE.context_dim)
            model.backward((model(z_t, t, {"context": context}).float() - z_t).square().mean())
        model.update(1e-4)
        averages.update()
    return resident_bytes("VmHWM") - before


# As on GPUs: gradients are exchanged in buckets, here so small that a model of this size fills several.
BUCKETS = {
    "zero_optimization": {"contiguous_gradients": True, "reduce_scatter": True, "reduce_bucket_size": 20_000_000}
}
# (precision, ZeRO stage, processes, micro batches of a step, DeepSpeed's keys)
MEASURED = [
    ("float32", 1, 2, 2, BUCKETS),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        *(("float32", stage, world, 1, {}) for stage in range(4) for world in (1, 2)),
        *(("float32", stage, 2, 2, BUCKETS) for stage in (2, 3)),
        *(("float32", stage, 1, 2, BUCKETS) for stage in (1, 2)),
        *(("bf16", stage, world, 1, {}) for stage in (1, 2, 3) for world in (1, 2)),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("precision, stage, world_size, accumulation, keys", MEASURED)
def test_memory_is_what_processes_take(
    precision: str, stage: int, world_size: int, accumulation: int, keys: dict[str, object]
) -> None:
    """Within a tenth; it would not be, were the optimizer's states counted half."""
    size, latents = (1, [4, 8, 8]) if precision == "bf16" else (2, [4, 16, 16])  # bf16 is emulated
    training = replace(TRAINING, precision=precision, batch_size=size * accumulation * world_size, ema_of="all")
    how = replace(RUN, zero_stage=stage, micro_batch_size=size, deepspeed=keys)
    with torch.device("meta"):
        condition = {"context": torch.empty(1, 77, MIDDLE.context_dim)}
        costs = model_costs(make_denoiser(MIDDLE, None), torch.empty(1, *latents), condition, "all", precision)
    expected = memory(costs, training, how, World(0, world_size, torch.device("cpu")))
    found = processes.run(peak, training, how, latents, world_size=world_size)
    print(f"measured {[round(bytes / 1e6) for bytes in found]} MB, reckoned {expected}")
    for bytes in found:
        assert expected.total() - expected.reserve == pytest.approx(bytes, rel=0.1)
        wrong = replace(expected, optimizer=expected.optimizer / 2)
        if stage < 3:  # where less is there for a while only
            assert wrong.total() - wrong.reserve != pytest.approx(bytes, rel=0.1)


class NormsInFloat32(TorchFunctionMode):
    """What autocast does to norms on GPUs, and not on processors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.group_norm, F.layer_norm):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*(x.float() if isinstance(x, Tensor) else x for x in args), **(kwargs or {}))


def kept_by_autograd(denoiser: Denoiser, precision: str) -> int:
    """Bytes, with real tensors on the processor."""
    known = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    autocast = precision == "bf16_autocast"
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(),
        NormsInFloat32() if autocast else nullcontext(),
    ):
        denoiser(torch.randn(1, 4, 16, 16), torch.zeros(1), {"tokens": torch.zeros(1, 77, dtype=torch.int64)})
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["float32", "bf16_autocast"])
def test_activations_are_what_autograd_keeps(precision: str) -> None:
    """Under autocast with copies of nearly all weights, and norms that keep their input in float32."""
    tokens = {"tokens": torch.zeros(1, 77, dtype=torch.int64, device="meta")}
    with torch.device("meta"):
        costs = model_costs(make_denoiser(SMALL, BERT), torch.empty(1, 4, 16, 16), tokens, "all", precision)
    found = kept_by_autograd(make_denoiser(SMALL, BERT), precision)
    assert costs.activation_bytes + costs.cast_bytes == pytest.approx(found, rel=0.01)
    if precision == "bf16_autocast":
        assert 1.9 * costs.trained < costs.cast_bytes < 2 * costs.trained


# ---- what no processor shows -------------------------------------------------------------------------------------
def test_autocast_keeps_copies_of_weights_whatever_the_micro_batch() -> None:
    world = World(0, 1, torch.device("cuda"))
    found = [memory(COSTS, TRAINING, replace(RUN, micro_batch_size=n), world).activations for n in (1, 2)]
    assert found == [64 + 20, 2 * 64 + 20]


def test_a_gpu_holds_whole_buckets_whatever_the_size_of_the_model() -> None:
    assert memory_of("float32").buckets == memory_of("bf16_autocast").buckets == 4 * BUCKET
    assert memory_of("bf16", zero_stage=2).buckets == 2 * BUCKET
    assert memory_of("bf16", zero_stage=1).buckets == 0  # DeepSpeed's optimizer for it has none
    both = memory_of("float32", deepspeed={"zero_optimization": {"overlap_comm": True}})
    assert both.buckets == 2 * 4 * BUCKET
    assert memory_of("float32", "cpu", zero_stage=3).buckets == 2 * 4 * COSTS.trained


def test_the_grid_and_the_start_count_where_they_are_the_most() -> None:
    plain, drawing = memory_of("float32", "cpu"), memory_of("float32", "cpu", prompts=True)
    assert (plain.grid, drawing.grid) == (0, 4 * 1100)  # another network
    assert drawing.weights - plain.weights == 7  # the autoencoder, which stays
    assert plain.start == 8 * 1000 + 400  # the model, and all its weights once more in a row
    assert drawing.total() == drawing.reserve + max(
        drawing.kept() + 4400, drawing.kept() + drawing.activations + drawing.buckets, drawing.kept() + drawing.update
    )
    alone = replace(drawing, activations=0.0, buckets=0.0, gathered=0.0, update=0.0)
    assert alone.total() == drawing.kept() + 4400 + RESERVE_BYTES["cpu"]
    assert replace(alone, start=1e9).total() == 1e9 + RESERVE_BYTES["cpu"]


def test_activation_checkpointing_keeps_less_and_computes_more() -> None:
    assert memory_of("float32", activation_checkpointing=True).activations == 2 * 16 + 20
    assert COSTS.step_flop() == 3 * 40 + 10  # a frozen part has no backward pass
    assert (COSTS.computed_flop(False), COSTS.computed_flop(True)) == (130, 160)
    training = replace(TRAINING, batch_size=8, max_steps=5)
    assert gpu_seconds(COSTS, training, RUN, 50.0) == 130 * 8 * 5 / 50
    assert gpu_seconds(COSTS, training, replace(RUN, activation_checkpointing=True), 50.0) == 160 * 8 * 5 / 50


def test_what_is_offloaded_counts_nothing_on_a_gpu() -> None:
    optimizer = {"offload_optimizer": {"device": "cpu"}}
    both = {**optimizer, "offload_param": {"device": "cpu"}}
    here = memory_of("bf16", zero_stage=2)
    found = memory_of("bf16", zero_stage=2, deepspeed={"zero_optimization": optimizer})
    assert found == replace(here, optimizer=0, average=0, update=0)
    here = memory_of("bf16", zero_stage=3)
    found = memory_of("bf16", zero_stage=3, deepspeed={"zero_optimization": optimizer})
    assert found == replace(here, optimizer=0, average=0, gradients=0, update=0)
    found = memory_of("bf16", zero_stage=3, deepspeed={"zero_optimization": both})
    assert found == replace(here, optimizer=0, average=0, gradients=0, update=0, weights=4 * COSTS.frozen)
    none = {"offload_optimizer": {"device": "none"}}
    assert memory_of("bf16", zero_stage=3, deepspeed={"zero_optimization": none}) == here
    on_a_processor = memory_of("bf16", "cpu", zero_stage=3, deepspeed={"zero_optimization": optimizer})
    assert on_a_processor == memory_of("bf16", "cpu", zero_stage=3)


def test_what_the_engine_refuses_has_no_memory() -> None:
    with pytest.raises(ValueError, match="zero_stage=1"):
        memory_of("bf16", zero_stage=0)
