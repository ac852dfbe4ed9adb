"""What a training run will cost, before it starts: memory for each GPU, arithmetic, days, money.

Counts of parameters, arithmetic and activations are taken from the model itself, built without memory (device "meta")
and run once; what ZeRO shares out follows from Rajbhandari et al. 2020, Sec. 3, and from what ldm/training/engine.py
does. A process also needs 1 to 3 GB for CUDA, its libraries and its largest buckets: RESERVE_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import TrainingConfig, TrainingRunConfig, TrainSettings
from ldm.models.attention import AttentionBlock, SpatialTransformer
from ldm.models.blocks import ResBlock
from ldm.models.denoiser import Denoiser, make_denoiser

RESERVE_BYTES = 3e9
BLOCKS = (ResBlock, SpatialTransformer, AttentionBlock)  # what activation checkpointing computes again


@dataclass(frozen=True)
class ModelCosts:
    """What a model costs for one sample, and to keep."""

    trained: int  # parameters that the optimizer moves
    averaged: int  # of those, how many have an average
    frozen: int
    forward_flop: float  # of all, frozen parts included; a multiplication and an addition are two
    frozen_flop: float  # of the frozen parts, which have no backward pass
    activation_bytes: float  # kept for the backward pass, in float32
    checkpointed_bytes: float  # the same with activation checkpointing: inputs of blocks, and the largest block

    def step_flop(self) -> float:
        """For one sample of an optimizer step: the backward pass costs two forward passes (Kaplan et al. 2020)."""
        return 3 * (self.forward_flop - self.frozen_flop) + self.frozen_flop


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    weights: float
    gradients: float
    optimizer: float  # float32 weights and both moments
    average: float
    activations: float

    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations + RESERVE_BYTES


def costs_of(settings: TrainSettings, latent_shape: list[int]) -> ModelCosts:
    """Of the model that settings describe, on latents (c, h, w)."""
    text = settings.text_encoder
    with torch.device("meta"):
        denoiser = make_denoiser(settings.unet, text)
        z_t = torch.empty(1, *latent_shape)
        condition = {} if text is None else {"tokens": torch.zeros(1, text.length, dtype=torch.int64)}
    return model_costs(denoiser, z_t, condition, settings.training.ema_of)


def model_costs(denoiser: Denoiser, z_t: Tensor, condition: dict[str, Tensor], ema_of: str) -> ModelCosts:
    """Runs one sample z_t (1, c, h, w) through a denoiser on the device "meta"."""
    parameters = list(denoiser.named_parameters())
    trained = {name: p.numel() for name, p in parameters if p.requires_grad}
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    kept = _Kept(denoiser)
    with FlopCounterMode(display=False) as flop, kept.counted(), _FlashAttention():
        denoiser(z_t, t, condition)
    with FlopCounterMode(display=False) as frozen_flop, torch.no_grad():
        if denoiser.text_encoder is not None and not any(p.requires_grad for p in denoiser.text_encoder.parameters()):
            denoiser.encode_condition(condition)
    return ModelCosts(
        trained=sum(trained.values()),
        averaged=sum(n for name, n in trained.items() if ema_of == "all" or name.startswith("unet.")),
        frozen=sum(p.numel() for _, p in parameters if not p.requires_grad),
        forward_flop=float(flop.get_total_flops()),
        frozen_flop=float(frozen_flop.get_total_flops()),
        activation_bytes=kept.bytes,
        checkpointed_bytes=kept.bytes - sum(kept.blocks) + kept.inputs + max(kept.blocks, default=0.0),
    )


class _FlashAttention(TorchFunctionMode):
    """Attention as GPUs compute it: on the device "meta" torch would keep every score for the backward pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and not kwargs:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


class _Kept:
    """Adds up what autograd keeps of a forward pass; weights, which are there anyway, do not count."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.bytes = self.inputs = 0.0
        self.blocks: list[float] = []  # what each block keeps
        self._seen = {p.untyped_storage()._cdata for p in module.parameters()}
        self._alive: list[Tensor] = []  # so that no storage is freed and its place counted as seen

    @contextmanager
    def counted(self) -> Iterator[None]:
        handles = []
        for block in self.module.modules():
            if isinstance(block, BLOCKS):
                handles.append(block.register_forward_pre_hook(self._enter))
                handles.append(block.register_forward_hook(self._leave))
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x):
            yield
        for handle in handles:
            handle.remove()

    def _keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(x)
            self.bytes += storage.nbytes()
        return x

    def _enter(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.blocks.append(-self.bytes)
        self.inputs += inputs[0].numel() * inputs[0].element_size()

    def _leave(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.blocks[-1] += self.bytes


def memory(costs: ModelCosts, training: TrainingConfig, how: TrainingRunConfig, world_size: int) -> Memory:
    """What each of `world_size` GPUs holds while it trains.

    float32 at stage 0 updates the weights themselves; from stage 1 on each process has its share of float32 weights
    beside those that the model computes with. bf16_autocast keeps weights in float32 and half of the activations; bf16
    sums its gradients in float32. What is frozen stays whole and in float32 on every GPU. What DeepSpeed's keys offload
    counts nothing: the optimizer takes the averages with it, and at stage 3 the gradients.
    """
    n, share, stage = costs.trained, 1 / world_size, how.zero_stage
    width = 2 if training.precision in ("bf16", "fp16") else 4
    optimizer_is_here = stage == 0 or not offloaded(how, "offload_optimizer")
    weights_are_here = stage < 3 or not offloaded(how, "offload_param")
    activations = costs.checkpointed_bytes if how.activation_checkpointing else costs.activation_bytes
    gradients = _gradient_width(training, how) * n * (share if stage >= 2 else 1)
    return Memory(
        weights=weights_are_here * width * n * (share if stage == 3 else 1) + 4 * costs.frozen,
        gradients=gradients if stage < 3 or optimizer_is_here else 0.0,
        optimizer=optimizer_is_here * (8 * n if stage == 0 else 12 * n * share),
        average=optimizer_is_here * 4 * costs.averaged * (share if stage else 1),
        activations=activations * how.micro_batch_size * (1 if training.precision == "float32" else 0.5),
    )


def offloaded(how: TrainingRunConfig, part: str) -> bool:
    """Whether DeepSpeed's keys put "offload_optimizer" or "offload_param" beside the GPU."""
    zero: Any = how.deepspeed.get("zero_optimization") or {}
    return (zero.get(part) or {}).get("device", "none") != "none"


def _gradient_width(training: TrainingConfig, how: TrainingRunConfig) -> int:
    """Bytes of each number in the sum of gradients, which DeepSpeed's keys may make bf16."""
    if training.precision == "fp16":
        return 2
    types: Any = how.deepspeed.get("data_types") or {}
    return 2 if training.precision == "bf16" and types.get("grad_accum_dtype") == "bf16" else 4


def gpu_seconds(costs: ModelCosts, training: TrainingConfig, peak_flops: float, mfu: float) -> float:
    """Seconds of one GPU for the whole run, at a share `mfu` of its peak."""
    return costs.step_flop() * training.batch_size * training.max_steps / (peak_flops * mfu)
