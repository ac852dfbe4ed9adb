"""What a model costs for one sample, and to keep: parameters, arithmetic, activations.

Taken from the model itself, built without memory (device "meta") and run once. Attention and autocast are counted as
GPUs have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import AutoencoderConfig, AutoencoderTrainingConfig
from ldm.models.attention import AttentionBlock, SpatialTransformer
from ldm.models.autoencoder import make_autoencoder
from ldm.models.blocks import ResBlock
from ldm.models.denoiser import Denoiser
from ldm.training.engine_config import WEIGHTS

BLOCKS = (ResBlock, SpatialTransformer, AttentionBlock)  # what activation checkpointing computes again

# Measured: 46 minutes of a core of 65 GFLOP/s for the shipped autoencoder. It is more than 1 since the convolutions are
# counted as direct ones, and Winograd's (ldm/models/winograd.py) take a quarter of the products.
AUTOENCODER_MFU = 1.08


@dataclass(frozen=True)
class ModelCosts:
    """What a model costs for one sample, and to keep."""

    trained: int  # parameters that the optimizer moves
    averaged: int  # of those, how many have an average
    largest: int  # parameters of the largest that is trained
    frozen: int  # parameters that a training beside them keeps; none where their results are cached
    forward_flop: float  # of all, frozen parts included; a multiplication and an addition are two
    frozen_flop: float  # of the frozen parts, which have no backward pass
    blocks_flop: float  # of the blocks, which activation checkpointing computes twice
    activation_bytes: float  # kept for the backward pass, in the precision of the training
    checkpointed_bytes: float  # the same with activation checkpointing: inputs of blocks, and the largest block
    cast_bytes: float  # autocast's copies of weights, kept for the backward pass whatever the micro batch

    def step_flop(self) -> float:
        """For one sample of an optimizer step: the backward pass costs two forward passes (Kaplan et al. 2020)."""
        return 3 * (self.forward_flop - self.frozen_flop) + self.frozen_flop

    def computed_flop(self, checkpointing: bool) -> float:
        """The same with what activation checkpointing computes again, which takes time and teaches nothing."""
        return self.step_flop() + (self.blocks_flop if checkpointing else 0.0)


@dataclass(frozen=True)
class AutoencoderCosts:
    """What the training of a small autoencoder takes: ldm/training/train_autoencoder.py."""

    trained: int  # parameters
    step_flop: float  # for one picture of a step, on average over pieces and whole pictures
    total_flop: float
    memory_bytes: float  # of the process, but for the pictures of its set

    def core_seconds(self, peak_flops: float) -> float:
        return self.total_flop / (peak_flops * AUTOENCODER_MFU)


def model_costs(
    denoiser: Denoiser, z_t: Tensor, condition: dict[str, Tensor], ema_of: str, precision: str = "float32"
) -> ModelCosts:
    """Runs one sample z_t (1, c, h, w) through a denoiser on the device "meta"."""
    parameters = list(denoiser.named_parameters())
    trained = {name: p.numel() for name, p in parameters if p.requires_grad}
    frozen = denoiser.text_encoder is not None and not any(p.requires_grad for p in denoiser.text_encoder.parameters())
    with FlopCounterMode(display=False) as frozen_flop, torch.no_grad():
        if frozen:
            condition = denoiser.encode_condition(condition)
    if (dtype := WEIGHTS.get(precision)) is not None:
        denoiser.to(dtype)
        z_t = z_t.to(dtype)
        condition = {name: x.to(dtype) if x.is_floating_point() else x for name, x in condition.items()}
    t, kept, casts = torch.zeros(1, dtype=torch.int64, device="meta"), _Kept(denoiser), _Autocast()
    with FlopCounterMode(display=False) as flop, ExitStack() as modes:
        modes.enter_context(kept.counted(flop, casts))
        modes.enter_context(_FlashAttention())
        if precision == "bf16_autocast":
            modes.enter_context(casts)
        denoiser(z_t, t, condition)
    blocks = [block.bytes for block in kept.blocks]
    return ModelCosts(
        trained=sum(trained.values()),
        averaged=sum(n for name, n in trained.items() if ema_of == "all" or name.startswith("unet.")),
        largest=max(trained.values(), default=0),
        frozen=sum(p.numel() for _, p in parameters if not p.requires_grad),
        forward_flop=float(flop.get_total_flops() + frozen_flop.get_total_flops()),
        frozen_flop=float(frozen_flop.get_total_flops()),
        blocks_flop=float(sum(block.flop for block in kept.blocks)),
        activation_bytes=kept.bytes,
        checkpointed_bytes=kept.bytes - sum(blocks) + kept.inputs + max(blocks, default=0.0),
        cast_bytes=float(sum(x.untyped_storage().nbytes() for x in casts.weights.values())),
    )


class _FlashAttention(TorchFunctionMode):
    """Attention as GPUs compute it: on the device "meta" torch would keep every score for the backward pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and not kwargs:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


class _Autocast(TorchFunctionMode):
    """bf16 autocast as GPUs have it, where norms are computed in float32; the device "meta" has none."""

    LOW, HIGH = (F.linear, F.conv2d, F.scaled_dot_product_attention), (F.group_norm, F.layer_norm)

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, Tensor] = {}  # storage of a weight -> its copy
        self.storages: set[int] = set()  # of these copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.LOW:
            args, kwargs = [self._low(x) for x in args], {name: self._low(x) for name, x in kwargs.items()}
        elif func in self.HIGH:
            args, kwargs = [_high(x) for x in args], {name: _high(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)

    def _low(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not isinstance(x if x._base is None else x._base, nn.Parameter):
            return x.to(torch.bfloat16)
        copy = self.weights.setdefault(x.untyped_storage()._cdata, x.to(torch.bfloat16))
        self.storages.add(copy.untyped_storage()._cdata)
        return copy


def _high(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) else x


@dataclass
class _Block:
    """What a block keeps and computes; less what there was before it, until it is left."""

    bytes: float
    flop: int


class _Kept:
    """Adds up what autograd keeps of a forward pass; weights, which are there anyway, do not count."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.bytes = self.inputs = 0.0
        self.blocks: list[_Block] = []
        self._seen = {p.untyped_storage()._cdata for p in module.parameters()}
        self._alive: list[Tensor] = []  # so that no storage is freed and its place counted as seen

    @contextmanager
    def counted(self, flop: FlopCounterMode, casts: _Autocast) -> Iterator[None]:
        self._flop, self._casts = flop, casts
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
        if storage._cdata not in self._seen | self._casts.storages:
            self._seen.add(storage._cdata)
            self._alive.append(x)
            self.bytes += storage.nbytes()
        return x

    def _enter(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.blocks.append(_Block(-self.bytes, -self._flop.get_total_flops()))
        self.inputs += inputs[0].numel() * inputs[0].element_size()

    def _leave(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.blocks[-1].bytes += self.bytes
        self.blocks[-1].flop += self._flop.get_total_flops()


def autoencoder_costs(network: AutoencoderConfig, training: AutoencoderTrainingConfig) -> AutoencoderCosts:
    """Arithmetic is counted as direct convolutions have it."""
    flop = 0.0
    with torch.device("meta"):
        model = make_autoencoder(network)
    for side, share in ((training.crop_size, 1 - training.whole_share), (training.image_size, training.whole_share)):
        kept = _Kept(model)
        with FlopCounterMode(display=False) as counter, kept.counted(counter, _Autocast()):
            moments = model.encode(torch.empty(1, 3, side, side, device="meta"))
            model.decode(moments[:, : network.latent_channels])
        flop += 3 * share * counter.get_total_flops()
    trained = sum(p.numel() for p in model.parameters())
    states = 4 * 4 * trained  # weights, gradients, momentum, average
    return AutoencoderCosts(trained, flop, flop * training.batch_size * training.max_steps,
                            states + kept.bytes * training.batch_size)  # fmt: skip
