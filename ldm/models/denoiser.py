"""The one contract that training and sampling know: Denoiser(z_t, t, condition) -> prediction.

A condition is a dict of named tensors. Those that a U-Net reads itself (context, class_label, vector, concat) go
through as they are; the others are first encoded:

    tokens, layout (b, l) int64    -> text encoder     -> context (b, l, d)
    tokens                         -> canvas           -> concat (b, c', h, w) as well, where there is a canvas
    tokens, sizes (b, k)           -> text encoder     -> context, and vector where the U-Net reads one (SDXL)
    class_label (b,) int64         -> class embedder   -> context (b, 1, d), where there is an embedder
    segmentation (b, c, H, W)      -> spatial rescaler -> concat (b, c', h, w)

Encoding depends on neither z_t nor t, so samplers do it once for a whole trajectory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.config import ClassEmbedderConfig, SpatialRescalerConfig, TextEncoderConfig, UNetConfig
from ldm.models.conditioning import CaptionCanvas, ClassEmbedder, SpatialRescaler, embed_numbers
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
        canvas: CaptionCanvas | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.class_embedder = class_embedder
        self.spatial_rescaler = spatial_rescaler
        self.canvas = canvas

    def forward(self, z_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.unet(z_t, t, **self.encode_condition(condition))

    def encode_condition(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the U-Net reads, from what a sample is conditioned on; once encoded, a condition stays as it is."""
        unread = sorted(set(condition) - set(self.reads()))
        if unread:
            raise ValueError(f"the condition holds {unread}; this model reads {self.reads()}")
        encoded = {name: condition[name] for name in UNET_INPUTS if name in condition}
        text = condition.get("tokens", condition.get("layout"))
        if text is not None and "context" not in encoded:
            encoded |= self.encode_text(text, condition.get("sizes"))
        if self.class_embedder is not None and "class_label" in encoded:
            encoded["context"] = self.class_embedder(encoded.pop("class_label"))
        if "segmentation" in condition and "concat" not in encoded:
            encoded["concat"] = self.spatial_rescaler(condition["segmentation"])
        return encoded

    def encode_text(self, tokens: Tensor, sizes: Tensor | None) -> dict[str, Tensor]:
        """Tokens (b, l) -> context; with sizes (b, k) also the vector of SDXL: pooled output, then the sizes."""
        if sizes is None:
            context = self.text_encoder(tokens)
            return {"context": context} if self.canvas is None else {"context": context, "concat": self.canvas(context)}
        context, pooled = self.text_encoder.encode(tokens)
        return {"context": context, "vector": torch.cat([pooled, embed_numbers(sizes).to(pooled)], dim=1)}

    def reads(self) -> list[str]:
        """The names that a condition may have."""
        names = list(UNET_INPUTS)
        if self.text_encoder is not None:
            names += ["tokens", "layout"]
        if hasattr(self.text_encoder, "encode"):
            names.append("sizes")
        if self.spatial_rescaler is not None:
            names.append("segmentation")
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
        CaptionCanvas(text_encoder.width, text_encoder.canvas) if text_encoder and text_encoder.canvas else None,
    )
