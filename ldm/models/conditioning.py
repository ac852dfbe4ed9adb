"""What turns a condition that is no text into something that the U-Net reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import ClassEmbedderConfig, SpatialRescalerConfig
from ldm.models.blocks import embed_timestep

Box = tuple[float, float, float, float]  # left, top, width, height, as shares of the picture's sides


class ClassEmbedder(nn.Module):
    """class_label (b,) int64 -> context (b, 1, d): a class is a caption of one token (Rombach et al. 2022, E.2)."""

    def __init__(self, config: ClassEmbedderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.classes, config.width)

    def forward(self, class_label: Tensor) -> Tensor:
        return self.embedding(class_label)[:, None, :]


class CaptionCanvas(nn.Module):
    """context (b, l, d) -> concat (b, c', h, w): the mean of a caption's states, drawn by one linear map.

    Cross-attention alone gives a small U-Net no place to start from: it must first learn where in the picture it is.
    With a canvas a caption's rough picture is one matrix product away, which a run of minutes can learn.
    """

    def __init__(self, width: int, shape: list[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.draw = nn.Linear(width, math.prod(shape))

    def forward(self, context: Tensor) -> Tensor:
        return self.draw(context.mean(1)).unflatten(1, self.shape)


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


def layout_tokens(objects: list[tuple[int, Box]], crop: Box, vocab_size: int, length: int) -> Tensor:
    """Objects (kind, box) and the part of the picture that is shown -> tokens (length,) (Rombach et al. 2022, 4.3.1).

    Three tokens for each object, its kind and two corners of its box, then two for the crop's corners; objects that
    are not there have the last token of the vocabulary three times. A corner is one number: its cell, counted row by
    row, on the largest square grid that the vocabulary can number.
    """
    most = (length - 2) // 3
    if len(objects) > most:
        raise ValueError(f"{len(objects)} objects; text_encoder.length, {length}, has room for {most}")
    grid = math.isqrt(vocab_size)
    tokens = [token for kind, box in objects for token in (kind, *corners(box, grid))]
    if any(not 0 <= kind < vocab_size - 1 for kind, _ in objects):
        raise ValueError(f"kinds of objects are numbers from 0 to {vocab_size - 2} (text_encoder.vocab_size)")
    tokens += [vocab_size - 1] * (length - 2 - len(tokens))
    return torch.tensor([*tokens, *corners(crop, grid)])


def corners(box: Box, grid: int) -> tuple[int, int]:
    """The cells of a box's top left and bottom right corners on a square grid."""
    left, top, width, height = box
    if min(box) < 0 or max(left + width, top + height) > 1 + 1e-6:  # sums of shares round
        raise ValueError(f"the box {box} leaves the picture: left, top, width and height are shares of its sides")
    points = (left, top), (left + width, top + height)
    first, last = (round(y * (grid - 1)) * grid + round(x * (grid - 1)) for x, y in points)
    return first, last
