"""What a training run will cost, before it starts: memory for each device, arithmetic, days, money.

What a model takes is counted by ldm/training/costs.py; what ZeRO shares out follows from Rajbhandari et al. 2020, Sec.
3, from what ldm/training/engine.py asks of DeepSpeed, and from what DeepSpeed 0.19 does with it.
tests/ldm/training/test_budget.py holds it against processes that train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ldm.config import TrainingConfig, TrainingRunConfig, TrainSettings
from ldm.models.denoiser import make_denoiser
from ldm.training.costs import ModelCosts, model_costs
from ldm.training.engine import deepspeed_config
from ldm.training.engine_config import WEIGHTS, World, offloaded_to

# What a process has besides its tensors: on a GPU CUDA, its libraries, their workspaces and what is lost between
# blocks; on a processor torch and DeepSpeed.
RESERVE_BYTES = {"cuda": 3e9, "cpu": 0.7e9}

# DeepSpeed's own values of reduce_bucket_size, stage3_max_live_parameters, stage3_prefetch_bucket_size, sub_group_size:
# how many numbers it exchanges, keeps gathered, gathers and updates at once.
BUCKET, LIVE, PREFETCH, SUB_GROUP = 500_000_000, 1_000_000_000, 50_000_000, 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    # Kept from step to step.
    weights: float
    gradients: float
    optimizer: float  # float32 weights and both moments
    average: float
    # While a micro batch goes forward and back, beside those.
    activations: float
    buckets: float  # in which DeepSpeed exchanges gradients
    gathered: float  # stage 3: weights of others
    # At other times.
    update: float  # beside what is kept, while the optimizer steps
    grid: float  # beside what is kept, in the first process, while it draws samples
    start: float  # all, before DeepSpeed has shared out
    # At all times.
    reserve: float

    def kept(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average

    def peaks(self) -> dict[str, float]:
        """The most at each part of a run."""
        return {
            "forward and back": self.reserve + self.kept() + self.activations + self.buckets + self.gathered,
            "update": self.reserve + self.kept() + self.update,
            "grid of samples": self.reserve + self.kept() + self.grid,
            "start": self.reserve + self.start,
        }

    def total(self) -> float:
        return max(self.peaks().values())


def costs_of(settings: TrainSettings, latent_shape: list[int], cached_context: bool = False) -> ModelCosts:
    """Of the model that settings describe, on latents (c, h, w); `cached_context`: a frozen text encoder is not run."""
    text, training = settings.text_encoder, settings.training
    with torch.device("meta"):
        denoiser = make_denoiser(settings.unet, text)
        condition = {}
        if text is not None and cached_context:
            condition = {"context": torch.empty(1, text.length, text.width)}
            denoiser.text_encoder = None
        elif text is not None:
            condition = {"tokens": torch.zeros(1, text.length, dtype=torch.int64)}
        z_t = torch.empty(1, *latent_shape)
    return model_costs(denoiser, z_t, condition, training.ema_of, training.precision)


def memory(
    costs: ModelCosts, training: TrainingConfig, how: TrainingRunConfig, world: World, autoencoder: float = 0.0
) -> Memory:
    """What one of `world.world_size` devices like `world.device` holds while it trains; `autoencoder`: bytes of its
    weights, which the first process loads to draw samples, and keeps.

    float32 at stage 0 updates the weights themselves; from stage 1 on each process has its share of float32 weights
    beside those that the model computes with. bf16_autocast keeps weights in float32; bf16 sums its gradients in
    float32. What is frozen stays whole and in float32 on every device. What DeepSpeed's keys offload counts nothing:
    the optimizer takes the averages with it, and at stage 3 the gradients. Raises ValueError where the engine refuses.
    """
    config = deepspeed_config(training, how, world)
    stage, device = how.zero_stage, world.device.type
    n, share = costs.trained, 1 / world.world_size
    width = 2 if training.precision in WEIGHTS else 4
    optimizer_is_here = stage == 0 or offloaded_to(how, "offload_optimizer") in ("none", device)
    weights_are_here = stage < 3 or offloaded_to(how, "offload_param") in ("none", device)
    activations = costs.checkpointed_bytes if how.activation_checkpointing else costs.activation_bytes
    draws = bool(training.grid.prompts and training.grid.every_steps)
    return Memory(
        weights=weights_are_here * width * n * (share if stage == 3 else 1) + 4 * costs.frozen + draws * autoencoder,
        gradients=_gradients(config, n, share) if stage < 3 or optimizer_is_here or device == "cpu" else 0.0,
        optimizer=optimizer_is_here * (8 * n if stage == 0 else _states_width(config) * n * share)
        + (_on_the_way(config, n, costs.largest) if device == "cpu" else 0.0),
        average=optimizer_is_here * 4 * costs.averaged * share,
        activations=activations * how.micro_batch_size + costs.cast_bytes,
        buckets=_buckets(config, n, device),
        gathered=_gathered(config, n) if stage == 3 else 0.0,
        update=_update(config, n, share, device) if optimizer_is_here else 0.0,
        grid=float(draws * width * (n + costs.frozen)),
        start=max(4, 2 * width if stage in (1, 2) else 0) * n + 4 * costs.frozen,
        reserve=RESERVE_BYTES[device],
    )


def _width(config: dict[str, Any]) -> int:
    """Bytes of each number that the model computes with."""
    return 2 if config["bf16"]["enabled"] or config["fp16"]["enabled"] else 4


def _sum_width(config: dict[str, Any]) -> int:
    """Bytes of each number in the sum of gradients."""
    return 4 if config.get("data_types", {}).get("grad_accum_dtype") == "fp32" else _width(config)


def _sums_apart(config: dict[str, Any]) -> bool:
    """Whether the sums of gradients lie in a row of their own, ready for the optimizer, and not in the gradients."""
    return _sum_width(config) != _width(config)


def _gradients(config: dict[str, Any], n: int, share: float) -> float:
    """The sum over micro batches, and at stage 2 the newest micro batch's share beside it."""
    stage = config["zero_optimization"]["stage"]
    if stage < 2:
        return _sum_width(config) * n
    beside = stage == 2 and config["gradient_accumulation_steps"] > 1 and not _sums_apart(config)
    return _sum_width(config) * n * share * (2 if beside else 1)


def _buckets(config: dict[str, Any], n: int, device: str) -> float:
    """What gradients are exchanged in during the backward pass: as large as it is set, whatever the model's size."""
    zero, stage = config["zero_optimization"], config["zero_optimization"]["stage"]
    if stage == 0 or (stage == 1 and _sums_apart(config)) or not zero.get("contiguous_gradients", True):
        return 0.0
    bucket = zero.get("reduce_bucket_size", BUCKET)
    # On a processor memory that nothing is written to takes no place.
    size = min(n, bucket) if device == "cpu" else bucket
    if stage == 3:
        return _width(config) * (size + min(n, bucket))  # and once more, sorted by process
    return (_sum_width(config) if stage == 1 else _width(config)) * size * (2 if zero.get("overlap_comm") else 1)


def _gathered(config: dict[str, Any], n: int) -> float:
    """Weights that are whole, and those that arrive, which are there twice for a moment."""
    zero = config["zero_optimization"]
    live, arriving = zero.get("stage3_max_live_parameters", LIVE), zero.get("stage3_prefetch_bucket_size", PREFETCH)
    return float(_width(config) * (min(n, live) + min(n, arriving)))


def _on_the_way(config: dict[str, Any], n: int, largest: int) -> float:
    """Memory through which an optimizer in files comes and goes: a group's weights, states and gradients each have a
    buffer, and a group grows until it has reached its size."""
    zero = config["zero_optimization"]
    offload, group = zero.get("offload_optimizer") or {}, min(n, zero.get("sub_group_size", SUB_GROUP) + largest)
    return 4.0 * group * (1 + offload.get("buffer_count", 4)) if offload.get("device") == "nvme" else 0.0


def _states_width(config: dict[str, Any]) -> int:
    """Bytes of each weight's master and moments, which DeepSpeed's keys may make bf16."""
    bf16 = config["bf16"]
    return (2 if bf16.get("bf16_master_weights_and_grads") else 4) + (4 if bf16.get("bf16_optimizer_states") else 8)


def _update(config: dict[str, Any], n: int, share: float, device: str) -> float:
    """What a step of the optimizer takes beside what is kept, the exchange of gradients before it included."""
    zero, stage = config["zero_optimization"], config["zero_optimization"]["stage"]
    bucket = min(n, zero.get("reduce_bucket_size", BUCKET))
    if stage == 0:
        return _sum_width(config) * bucket
    if stage == 3:
        return 4.0 * min(n * share, zero.get("sub_group_size", SUB_GROUP))
    if stage == 1 and _sums_apart(config):
        return _width(config) * n if device == "cpu" else 0.0  # gloo gathers weights into a copy
    contiguous = zero.get("contiguous_gradients", True)
    if stage == 1:  # a share of the gradients in a row, after those of the others have gone
        return max(4 * n * (2 * share - 1), _buckets(config, n, device) if contiguous else _sum_width(config) * bucket)
    # Gradients that wait for their exchange, and the same in a row.
    exchange = 0.0 if contiguous else _width(config) * bucket * (2.0 if _sums_apart(config) else 2 - share)
    return max(exchange, 0.0 if _sums_apart(config) else 4 * n * share)


def gpu_seconds(costs: ModelCosts, training: TrainingConfig, how: TrainingRunConfig, flops: float) -> float:
    """Seconds of one device for the whole run, at `flops` a second."""
    return costs.computed_flop(how.activation_checkpointing) * training.batch_size * training.max_steps / flops
