"""The U-Net of latent diffusion and its classifier half (Rombach et al. 2022, Sec. 3 and E; Dhariwal & Nichol 2021).

State-dict names are exactly those of the original project, so its weights need no map, only their prefix removed
(`model.diffusion_model.`): `time_embed.{0,2}`, `label_emb`, `input_blocks.N.M`, `middle_block.{0,1,2}`,
`output_blocks.N.M`, `out.{0,2}`; below those the names of ldm/models/blocks.py and attention.py. Level i of
`channel_mult` owns num_res_blocks input blocks and, but for the last, one more that halves the sides.

One class serves every released configuration (conf/unet); what differs between them stands in UNetConfig.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.config import UNetConfig
from ldm.models.attention import AttentionBlock, AttentionPool, SpatialTransformer, zeroed
from ldm.models.blocks import Downsample, Layers, ResBlock, Upsample, embed_timestep


class Encoder(nn.Module):
    """The way down and the middle of a U-Net, with the embedding of everything that is added to the timestep."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        emb = 4 * config.model_channels
        self.time_embed = embedding(config.model_channels, emb)
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, emb)
        elif config.vector_dim is not None:
            self.label_emb = nn.Sequential(embedding(config.vector_dim, emb))
        self.input_blocks = nn.ModuleList([Layers(nn.Conv2d(config.in_channels, config.model_channels, 3, padding=1))])
        self.skip_channels = [config.model_channels]  # of each input block's result
        for level in range(len(config.channel_mult)):
            self.add_level(level)
        channels = self.skip_channels[-1]
        self.middle_block = Layers(
            self.res_block(channels, channels), self.attention(channels, level), self.res_block(channels, channels)
        )

    def add_level(self, level: int) -> None:
        """Append a level's input blocks and, unless it is the last, the one that leads to the next level."""
        out = self.config.channel_mult[level] * self.config.model_channels
        for _ in range(self.config.num_res_blocks):
            layers = [self.res_block(self.skip_channels[-1], out), *self.attention_at(level, out)]
            self.input_blocks.append(Layers(*layers))
            self.skip_channels.append(out)
        if level + 1 < len(self.config.channel_mult):
            down = self.res_block(out, out, nn.AvgPool2d(2)) if self.config.resblock_updown else Downsample(out)
            self.input_blocks.append(Layers(down))
            self.skip_channels.append(out)

    def res_block(self, channels: int, out: int, resample: nn.Module | None = None) -> ResBlock:
        """A residual block as the configuration wants it."""
        config = self.config
        return ResBlock(
            channels,
            out,
            4 * config.model_channels,
            scale_shift=config.scale_shift_norm,
            dropout=config.dropout,
            groups=config.norm_groups,
            resample=resample,
        )

    def attention_at(self, level: int, channels: int) -> list[nn.Module]:
        """The attention of a level, or nothing if it has none."""
        return [self.attention(channels, level)] if 2**level in self.config.attention_resolutions else []

    def heads(self, channels: int) -> int:
        """Heads of an attention of this width."""
        return self.config.num_heads or channels // self.config.num_head_channels

    def attention(self, channels: int, level: int) -> nn.Module:
        """A transformer or an attention block as the configuration wants it."""
        config = self.config
        heads = self.heads(channels)
        if config.transformer_depth is None:
            return AttentionBlock(channels, heads, config.qkv_order, config.norm_groups)
        return SpatialTransformer(
            channels,
            heads,
            depth=config.transformer_depth[level],
            context_dim=config.context_dim,
            cross_only=2**level in config.cross_only_resolutions,
            linear=config.linear_projections,
            groups=config.norm_groups,
        )

    def embed(self, t: Tensor, class_label: Tensor | None, vector: Tensor | None) -> Tensor:
        """t (b,), class_label (b,) int64, vector (b, k) -> emb (b, 4*model_channels)."""
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(embed_timestep(t, self.config.model_channels).to(dtype))
        if class_label is not None:
            return emb + self.label_emb(class_label)
        if vector is not None:
            return emb + self.label_emb(vector)
        return emb

    def descend(self, x: Tensor, emb: Tensor, context: Tensor | None, hint: Tensor | None = None) -> list[Tensor]:
        """The result of every input block, and of the middle block last; a hint is added to the first one's."""
        results = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            if hint is not None and not results:
                x = x + hint
            results.append(x)
        return [*results, self.middle_block(x, emb, context)]


class UNet(Encoder):
    """(z_t, t, condition) -> prediction (b, out_channels, h, w): eps or v, whichever it is trained for."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.output_blocks = nn.ModuleList()
        skips = list(self.skip_channels)
        channels = skips[-1]
        for level in reversed(range(len(config.channel_mult))):
            out = config.channel_mult[level] * config.model_channels
            for i in range(config.num_res_blocks + 1):
                layers = [self.res_block(channels + skips.pop(), out), *self.attention_at(level, out)]
                if level > 0 and i == config.num_res_blocks:
                    resample = nn.UpsamplingNearest2d(scale_factor=2)
                    layers.append(self.res_block(out, out, resample) if config.resblock_updown else Upsample(out))
                self.output_blocks.append(Layers(*layers))
                channels = out
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, channels),
            nn.SiLU(),
            zeroed(nn.Conv2d(channels, config.out_channels, 3, padding=1)),
        )

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        class_label: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
        control: list[Tensor] | None = None,
    ) -> Tensor:
        """z_t (b, c, h, w), t (b,); context (b, l, d), class_label (b,), vector (b, k), concat (b, c', h, w).

        `control` is what a ControlNet says (ldm/models/controlnet.py): added to what comes from the way down.
        """
        check_inputs(self.config, z_t, context, class_label, vector, concat)
        if control is not None and len(control) != len(self.input_blocks) + 1:
            raise ValueError(f"control is {len(control)} tensors; this U-Net takes {len(self.input_blocks) + 1}")
        x = z_t if concat is None else torch.cat([z_t, concat], dim=1)
        emb = self.embed(t, class_label, vector)
        results = self.descend(x, emb, context)
        if control is not None:
            results = [result + part for result, part in zip(results, control, strict=True)]
        *skips, x = results
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)


class LatentClassifier(Encoder):
    """z_t (b, c, h, w), t (b,) -> logits (b, out_channels): its gradient steers a sampler (Dhariwal & Nichol 2021).

    Latents have the one side that it is made for, `latent_size`.
    """

    def __init__(self, config: UNetConfig, latent_size: int) -> None:
        super().__init__(config)
        channels = self.skip_channels[-1]
        side = latent_size // 2 ** (len(config.channel_mult) - 1)
        self.latent_size = latent_size
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, channels),
            nn.SiLU(),
            AttentionPool(channels, self.heads(channels), config.out_channels, side**2),
        )

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        check_inputs(self.config, z_t, None, None, None, None)
        if z_t.shape[2:] != (self.latent_size, self.latent_size):
            raise ValueError(
                f"latents are {z_t.shape[2]} x {z_t.shape[3]}; this classifier's latent_size is {self.latent_size}"
            )
        return self.out(self.descend(z_t, self.embed(t, None, None), None)[-1])


def embedding(width: int, emb: int) -> nn.Sequential:
    """(b, width) -> (b, emb)."""
    return nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))


def check(config: UNetConfig) -> None:
    """Refuse settings that describe no network, naming the values found and the keys to change."""
    levels = len(config.channel_mult)
    for name in ("in_channels", "out_channels", "model_channels", "num_res_blocks", "norm_groups"):
        if getattr(config, name) < 1:
            raise ValueError(f"unet.{name} is {getattr(config, name)}; it must be a positive integer")
    if levels == 0 or min(config.channel_mult) < 1:
        raise ValueError(f"unet.channel_mult is {config.channel_mult}; it needs a positive integer for each level")
    if (config.num_heads is None) == (config.num_head_channels is None):
        raise ValueError(
            f"unet.num_heads is {config.num_heads} and unet.num_head_channels {config.num_head_channels}; "
            "exactly one of them must be a number"
        )
    if config.transformer_depth is not None and len(config.transformer_depth) != levels:
        raise ValueError(
            f"unet.transformer_depth has {len(config.transformer_depth)} entries; unet.channel_mult has {levels}"
        )
    if config.transformer_depth is None and config.context_dim is not None:
        raise ValueError(
            f"unet.context_dim is {config.context_dim} but unet.transformer_depth is null: "
            "attention blocks read no context"
        )
    if config.num_classes is not None and config.vector_dim is not None:
        raise ValueError(
            f"unet.num_classes is {config.num_classes} and unet.vector_dim {config.vector_dim}; one must be null"
        )
    if config.qkv_order not in ("head_first", "qkv_first"):
        raise ValueError(f'unet.qkv_order is "{config.qkv_order}"; it is "head_first" or "qkv_first"')
    for mult in config.channel_mult:
        check_level(config, mult * config.model_channels)


def check_level(config: UNetConfig, channels: int) -> None:
    """Refuse a level whose channels do not divide into groups and heads."""
    for name in ("norm_groups", "num_heads", "num_head_channels"):
        value = getattr(config, name)
        if value is not None and channels % value:
            raise ValueError(
                f"a level of {channels} channels (unet.model_channels times unet.channel_mult) "
                f"does not divide by unet.{name}, {value}"
            )


def check_inputs(
    config: UNetConfig,
    z_t: Tensor,
    context: Tensor | None,
    class_label: Tensor | None,
    vector: Tensor | None,
    concat: Tensor | None,
) -> None:
    """Refuse tensors that do not fit the configuration, before anything is computed."""
    extra = 0 if concat is None else concat.shape[1]
    if z_t.shape[1] + extra != config.in_channels:
        raise ValueError(
            f"z_t has {z_t.shape[1]} channels and the concatenated condition {extra}; "
            f"unet.in_channels is {config.in_channels}"
        )
    if concat is not None and concat.shape[2:] != z_t.shape[2:]:
        raise ValueError(f"concat is {tuple(concat.shape[2:])} and z_t {tuple(z_t.shape[2:])}; their sides must agree")
    least = 2 ** (len(config.channel_mult) - 1)
    if z_t.shape[2] % least or z_t.shape[3] % least:
        raise ValueError(
            f"latents of {z_t.shape[2]} x {z_t.shape[3]} cannot be halved {len(config.channel_mult) - 1} times: "
            f"both sides must divide by {least} (the levels of unet.channel_mult); change the image size"
        )
    check_width("context", context, 2, "context_dim", config.context_dim)
    check_width("vector", vector, 1, "vector_dim", config.vector_dim)
    if (class_label is None) != (config.num_classes is None):
        found = "no class_label was given" if class_label is None else "a class_label was given"
        raise ValueError(f"{found}; unet.num_classes is {config.num_classes}")


def check_width(name: str, value: Tensor | None, dim: int, key: str, width: int | None) -> None:
    """Refuse a condition that is missing, unasked for, or of another width than the configuration says."""
    found = None if value is None else value.shape[dim]
    if found != width:
        raise ValueError(f"the {name}'s width is {found} (None: not given); unet.{key} is {width}")
