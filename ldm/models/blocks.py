"""What U-Nets are built of: residual blocks, changes of resolution, the timestep embedding, checkpointing.

Module names are those of the original state dicts (see ldm/models/unet.py).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm.models.attention import Pointwise, SpatialTransformer, to_map, to_tokens, zeroed


class ResBlock(nn.Module):
    """Two norm-SiLU-convolution layers, told the timestep, added to what came in (Dhariwal & Nichol 2021).

    x (b, c, h, w), emb (b, e) -> (b, out, h, w); with `resample` both branches go through it first, between the
    first SiLU and the first convolution.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        emb: int,
        *,
        scale_shift: bool,
        dropout: float,
        groups: int,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out), nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(out, out, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if out == channels else Pointwise(channels, out, 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        h = silu(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)  # (b, out, h, w)
        step = self.emb_layers(emb)[:, :, None, None]  # (b, out or 2*out, 1, 1)
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = step.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + step)
        for layer in rest:
            h = layer(h)
        return h + to_map(self.skip_connection(to_tokens(x)), x)


class Downsample(nn.Module):
    """(b, c, h, w) -> (b, c, h/2, w/2) by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """(b, c, h, w) -> (b, c, 2h, 2w): nearest, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Layers(nn.Sequential):
    """Layers run in order, each handed what it reads: x (b, c, h, w), emb (b, e), context (b, l, d) or None."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def embed_timestep(t: Tensor, width: int) -> Tensor:
    """t (b,) -> (b, width): cosines, then sines, of t at frequencies from 1 down to 1/10000 (Vaswani et al. 2017)."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, width - 2 * half))


def checkpoint_activations(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Have every block of these kinds forget its activations and compute them again in the backward pass.

    Same numbers, less memory, a third more work. State-dict names do not change.
    """
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
