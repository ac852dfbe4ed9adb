"""The one contract that training and sampling know: Denoiser(z_t, t, condition) -> prediction.

A condition is a dict of named tensors. Those that a U-Net reads itself (context, class_label, vector, concat) go
through as they are; the others are first encoded:

    tokens, layout (b, l) int64    -> text encoder     -> context (b, l, d)
    class_label (b,) int64         -> class embedder   -> context (b, 1, d), where there is an embedder
    segmentation (b, c, H, W)      -> spatial rescaler -> concat (b, c', h, w)
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm.config import ClassEmbedderConfig, SpatialRescalerConfig, TextEncoderConfig, UNetConfig
from ldm.models.conditioning import ClassEmbedder, SpatialRescaler
from ldm.models.text_encoder import make_text_encoder
from ldm.models.unet import UNet

UNET_INPUTS = ("context", "class_label", "vector", "concat")


class Denoiser(nn.Module):
    """z_t (b, c, h, w), t (b,), condition -> prediction (b, c, h, w): the one module that training shards."""

    def __init__(
        self,
        unet: UNet,
        text_encoder: nn.Module | None = None,
        class_embedder: ClassEmbedder | None = None,
        spatial_rescaler: SpatialRescaler | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.class_embedder = class_embedder
        self.spatial_rescaler = spatial_rescaler

    def forward(self, z_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.unet(z_t, t, **self.encode_condition(condition))

    def encode_condition(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the U-Net reads, from what a sample is conditioned on; a condition once encoded stays as it is.

        Samplers call it once for a whole trajectory.
        """
        encoders = {
            "tokens": ("context", self.text_encoder),
            "layout": ("context", self.text_encoder),
            "class_label": ("context", self.class_embedder),
            "segmentation": ("concat", self.spatial_rescaler),
        }
        encoded = {}
        for name, value in condition.items():
            result, encoder = encoders.get(name, (name, None))
            if result in condition and result != name:
                continue  # it has been encoded already
            if encoder is not None:
                encoded[result] = encoder(value)
            elif name in UNET_INPUTS:
                encoded[name] = value
            else:
                raise ValueError(f'nothing in this model reads the condition "{name}"; it reads {self.reads()}')
        return encoded

    def reads(self) -> list[str]:
        """The names that a condition may have."""
        names = list(UNET_INPUTS)
        if self.text_encoder is not None:
            names += ["tokens", "layout"]
        if self.spatial_rescaler is not None:
            names += ["segmentation"]
        return names


def make_denoiser(
    unet: UNetConfig,
    text_encoder: TextEncoderConfig | None,
    class_embedder: ClassEmbedderConfig | None = None,
    spatial_rescaler: SpatialRescalerConfig | None = None,
) -> Denoiser:
    """A denoiser with random weights; an untrained U-Net predicts exactly 0."""
    for section, encoder in (("text_encoder", text_encoder), ("class_embedder", class_embedder)):
        if encoder is not None and encoder.width != unet.context_dim:
            raise ValueError(
                f"{section}.width is {encoder.width}, the context that it makes; unet.context_dim is {unet.context_dim}"
            )
    return Denoiser(
        UNet(unet),
        None if text_encoder is None else make_text_encoder(text_encoder),
        None if class_embedder is None else ClassEmbedder(class_embedder),
        None if spatial_rescaler is None else SpatialRescaler(spatial_rescaler),
    )
