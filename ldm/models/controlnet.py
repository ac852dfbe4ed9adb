"""A second way down that tells a U-Net what a picture shall look like: edges, poses, depths (Zhang et al. 2023).

It is a copy of the U-Net's way down and middle, whose results go through convolutions that begin as zeros and are added
to the U-Net's own. State-dict names are those of the original (`control_model.`): those of the U-Net's half, and
`input_hint_block.N`, `zero_convs.N.0`, `middle_block_out.0`.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm.config import UNetConfig
from ldm.models.attention import zeroed
from ldm.models.unet import Encoder, check_inputs

# Channels and strides of the hint's convolutions: eight pixels become one position of the latents.
HINT = ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2))
HINT_FACTOR = 8


class ControlNet(Encoder):
    """(z_t, t, hint, condition) -> what a U-Net of the same configuration takes as `control`."""

    def __init__(self, config: UNetConfig, hint_channels: int) -> None:
        super().__init__(config)
        self.hint_channels = hint_channels
        self.input_hint_block = hint_layers(hint_channels, config.model_channels)
        self.zero_convs = nn.ModuleList(nn.Sequential(zero_conv(channels)) for channels in self.skip_channels)
        self.middle_block_out = nn.Sequential(zero_conv(self.skip_channels[-1]))

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        hint: Tensor,
        context: Tensor | None = None,
        class_label: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> list[Tensor]:
        """z_t (b, c, h, w), hint (b, k, 8h, 8w) -> a tensor for each input block, and for the middle block last."""
        check_inputs(self.config, z_t, context, class_label, vector, None)
        expected = (self.hint_channels, HINT_FACTOR * z_t.shape[2], HINT_FACTOR * z_t.shape[3])
        found = tuple(hint.shape[1:])
        if found != expected:
            raise ValueError(f"the hint is {found}; for latents {tuple(z_t.shape[1:])} it must be {expected}")
        emb = self.embed(t, class_label, vector)
        results = self.descend(z_t, emb, context, self.input_hint_block(hint))
        convs = [*self.zero_convs, self.middle_block_out]
        return [conv(result) for conv, result in zip(convs, results, strict=True)]


def hint_layers(channels: int, out: int) -> nn.Sequential:
    """(b, channels, 8h, 8w) -> (b, out, h, w), zero before training."""
    layers: list[nn.Module] = []
    for width, stride in HINT:
        layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, zeroed(nn.Conv2d(channels, out, 3, padding=1)))


def zero_conv(channels: int) -> nn.Module:
    """A convolution of size 1, zero before training."""
    return zeroed(nn.Conv2d(channels, channels, 1))
