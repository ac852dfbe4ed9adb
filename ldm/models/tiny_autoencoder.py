"""A small autoencoder of plain ReLU convolutions, in the spirit of TAESD (Ollin Boer Bohan, 2023).

It is the autoencoder of the default job: a few hundred MFLOP for a picture where kl-f8 needs hundreds of GFLOP.
Three things make it cheap on a processor: no norms, most width at low resolution, and pixels folded into channels
("patch") so that nothing is convolved at full resolution. TAESD and its relatives are configurations of it:
patch 1, widths 64, blocks 1, 3, 3, 3, posterior "none", images in [0, 1], clamp 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import AutoencoderConfig, TinyConfig


class TinyAutoencoder(nn.Module):
    """Image (b, 3, H, W) in [-1, 1] -> moments or latent -> image; the clamp and the range are the network's own."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.factor = config.factor
        self.latent_channels = config.latent_channels
        outputs = 2 * config.latent_channels if config.posterior == "kl" else config.latent_channels
        self.encoder = _encoder(config.tiny, outputs)
        self.decoder = _decoder(config.tiny, config.latent_channels)

    def encode(self, image: Tensor) -> Tensor:
        """Image (b, 3, H, W) in [-1, 1] -> moments (b, 2c, h, w) for posterior "kl", else latent (b, c, h, w)."""
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"an image of {height}x{width} cannot be encoded: both sides must be multiples of {self.factor}"
            )
        low = self.config.tiny.image_low
        return self.encoder((image + 1) * ((1 - low) / 2) + low)

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latent (b, c, h, w) -> image (b, 3, H, W), near [-1, 1] but not cut to it."""
        clamp, low = self.config.tiny.latent_clamp, self.config.tiny.image_low
        if clamp is not None:
            z = clamp * torch.tanh(z / clamp)
        return (self.decoder(z) - low) * (2 / (1 - low)) - 1

    def forward(self, image: Tensor) -> Tensor:
        """Image -> image through the mean of the posterior."""
        return self.decode(self.encode(image)[:, : self.latent_channels])


def check(config: AutoencoderConfig) -> None:
    """Refuse settings that describe no network, naming the value found and the one expected."""
    tiny = config.tiny
    if config.posterior not in ("kl", "none"):
        raise ValueError(f'autoencoder.network.posterior is "{config.posterior}"; a tiny one has "kl" or "none"')
    if tiny is None:
        raise ValueError('autoencoder.network.tiny is null; kind "tiny" needs its sizes')
    levels = len(tiny.encoder_widths)
    for name in ("encoder_blocks", "decoder_widths", "decoder_blocks"):
        found = len(getattr(tiny, name))
        if found != levels:
            raise ValueError(f"autoencoder.network.tiny.{name} has {found} levels; encoder_widths has {levels}")
    made = tiny.patch * 2 ** (levels - 1)
    if made != config.factor:
        raise ValueError(
            f"autoencoder.network.factor is {config.factor}; tiny.patch {tiny.patch} and {levels} levels make {made}"
        )


class Block(nn.Module):
    """Convolutions with ReLU between, added to what came in, ReLU: (b, c, h, w) -> the same."""

    def __init__(self, width: int, convs: int, norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(convs):
            layers += [_conv(width, width), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])
        self.pool = _pool(width) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(x + self.conv(x))


def _pool(width: int) -> nn.Sequential:
    # The norm's statistics are the only way in which such a network sees the whole picture.
    inner = 4 * width
    return nn.Sequential(
        nn.Conv2d(width, inner, 1, bias=False),
        nn.GroupNorm(4, inner),
        nn.ReLU(),
        nn.Conv2d(inner, width, 1, bias=False),
    )


def _encoder(config: TinyConfig, outputs: int) -> nn.Sequential:
    widths, last = config.encoder_widths, len(config.encoder_widths) - 1
    layers: list[nn.Module] = [nn.PixelUnshuffle(config.patch)] if config.patch > 1 else []
    layers.append(_conv(3 * config.patch**2, widths[0]))
    for level, blocks in enumerate(config.encoder_blocks):
        if level > 0:
            layers.append(nn.Conv2d(widths[level - 1], widths[level], 3, stride=2, padding=1, bias=False))
        norm = config.lowest_norm and level == last
        layers += [Block(widths[level], config.block_convs, norm) for _ in range(blocks)]
    layers.append(_conv(widths[-1], outputs))
    return nn.Sequential(*layers)


def _decoder(config: TinyConfig, latent_channels: int) -> nn.Sequential:
    widths, last = config.decoder_widths, len(config.decoder_widths) - 1
    layers: list[nn.Module] = [_conv(latent_channels, widths[-1]), nn.ReLU()]
    for level in range(last, -1, -1):
        norm = config.lowest_norm and level == last
        layers += [Block(widths[level], config.block_convs, norm) for _ in range(config.decoder_blocks[level])]
        if level > 0:
            layers += [nn.Upsample(scale_factor=2), _conv(widths[level], widths[level - 1], bias=False)]
    layers.append(_conv(widths[0], 3 * config.patch**2))
    if config.patch > 1:
        layers.append(nn.PixelShuffle(config.patch))
    return nn.Sequential(*layers)


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
