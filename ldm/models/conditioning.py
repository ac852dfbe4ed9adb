"""What turns a condition that is no text into something that the U-Net reads."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import ClassEmbedderConfig, SpatialRescalerConfig
from ldm.models.blocks import embed_timestep


class ClassEmbedder(nn.Module):
    """class_label (b,) int64 -> context (b, 1, d): a class is a caption of one token (Rombach et al. 2022, E.2)."""

    def __init__(self, config: ClassEmbedderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.classes, config.width)

    def forward(self, class_label: Tensor) -> Tensor:
        return self.embedding(class_label)[:, None, :]


class SpatialRescaler(nn.Module):
    """segmentation (b, c, H, W) -> concat (b, c', h, w): resized in stages, then mapped to fewer channels."""

    def __init__(self, config: SpatialRescalerConfig) -> None:
        super().__init__()
        self.config = config
        if config.out_channels is not None:
            self.channel_mapper = nn.Conv2d(config.in_channels, config.out_channels, 1, bias=config.bias)

    def forward(self, segmentation: Tensor) -> Tensor:
        if segmentation.shape[1] != self.config.in_channels:
            raise ValueError(
                f"the segmentation has {segmentation.shape[1]} channels; "
                f"spatial_rescaler.in_channels is {self.config.in_channels}"
            )
        x = segmentation
        for _ in range(self.config.stages):
            x = F.interpolate(x, scale_factor=self.config.multiplier, mode=self.config.method)
        return x if self.config.out_channels is None else self.channel_mapper(x)


def embed_numbers(numbers: Tensor, width: int = 256) -> Tensor:
    """Sizes, crops or scores (b, k) -> (b, k * width), embedded as timesteps are (Podell et al. 2023, Sec. 2.2)."""
    return embed_timestep(numbers.flatten(), width).view(len(numbers), -1)
