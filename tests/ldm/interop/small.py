"""Small networks of every kind, with random weights where training starts at zero."""

from __future__ import annotations

import gzip
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.config import AutoencoderConfig, CompvisConfig, TextEncoderConfig, UNetConfig
from tests.ldm.models import settings

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))
GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def key_list(name: str) -> dict[str, tuple[int, ...]]:
    """A released model's keys and shapes."""
    with gzip.open(GOLDEN / "keys" / f"{name}.txt.gz", "rt") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    return {key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape, _ in rows}


def check_digests(state: dict[str, Tensor], name: str) -> None:
    """That tensors are those that others converted, by the digests of their float32 numbers."""
    with gzip.open(GOLDEN / "keys" / f"{name}_sha256.txt.gz", "rt") as file:
        expected = {key: digest for key, _, digest in (line.rstrip("\n").split("\t") for line in file)}
    found = {key: hashlib.sha256(value.float().contiguous().numpy().tobytes()).hexdigest()[:16]
             for key, value in state.items()}  # fmt: skip
    assert found == expected


def conf(kind: type, section: str, name: str):
    return settings.read(kind, section, name)


TEXT = replace(
    conf(UNetConfig, "unet", "txt2img_1p45b"), model_channels=16, channel_mult=[1, 2, 2], num_res_blocks=1,
    attention_resolutions=[4, 2], num_heads=4, transformer_depth=[1, 1, 1], context_dim=24, norm_groups=8,
)  # fmt: skip
PLAIN = replace(TEXT, transformer_depth=None, context_dim=None, num_heads=None, num_head_channels=8)
UNETS: dict[str, UNetConfig] = {
    "text": TEXT,
    "text_like_1p45b": replace(TEXT, attention_resolutions=[4, 2, 1], num_res_blocks=2, channel_mult=[1, 2, 4]),
    "sd2": replace(TEXT, num_heads=None, num_head_channels=8, linear_projections=True),
    "class_token": replace(TEXT, num_heads=1),
    "inpainting": replace(TEXT, in_channels=9),
    "layout": replace(TEXT, transformer_depth=[3, 3, 3], num_heads=None, num_head_channels=8),
    "sdxl": replace(
        TEXT, attention_resolutions=[4, 2], transformer_depth=[1, 2, 3], num_heads=None, num_head_channels=8,
        linear_projections=True, vector_dim=20,
    ),  # fmt: skip
    "upscaler": replace(TEXT, attention_resolutions=[4, 2], cross_only_resolutions=[1, 2], num_classes=7),
    "scale_shift_text": replace(TEXT, scale_shift_norm=True),
    "unconditional": PLAIN,
    "unconditional_new_order": replace(PLAIN, qkv_order="qkv_first"),
    "labelled": replace(PLAIN, num_classes=5),
    "semantic": replace(PLAIN, in_channels=6, attention_resolutions=[8], num_heads=4, num_head_channels=None),
    "churches_like": replace(PLAIN, scale_shift_norm=True, resblock_updown=True, num_res_blocks=2),
    "inpainting_big_like": replace(PLAIN, in_channels=7, resblock_updown=True, attention_resolutions=[4]),
}  # fmt: skip


def autoencoder(posterior: str, mult: list[int], attention: list[int], middle: bool = True) -> AutoencoderConfig:
    sizes = CompvisConfig(32, mult, 1, attention, middle, 11 if posterior == "vq" else None)
    return AutoencoderConfig("compvis", posterior, 2 ** (len(mult) - 1), 4, sizes, None)


AUTOENCODERS = {
    "kl_f8": autoencoder("kl", [1, 1, 2, 1], []),
    "kl_f16": autoencoder("kl", [1, 1, 1, 1, 2], [16]),
    "kl_f32": autoencoder("kl", [1, 1, 1, 1, 1, 1], [16, 32]),
    "vq_f4": autoencoder("vq", [1, 2, 1], []),
    "vq_f4_noattn": autoencoder("vq", [1, 2, 1], [], middle=False),
    "vq_f8": autoencoder("vq", [1, 1, 2, 1], [8]),
    "inner_attention": autoencoder("kl", [1, 2, 1], [2]),
}
BERT = replace(conf(TextEncoderConfig, "text_encoder", "bert_1p45b"), vocab_size=50, length=9, width=24, layers=2,
               heads=3, head_width=8)  # fmt: skip


def clip(name: str, width: int = 24, layers: int = 2) -> TextEncoderConfig:
    """A released CLIP encoder, made small."""
    config = conf(TextEncoderConfig, "text_encoder", name)
    towers = {
        tower: replace(sizes, width=width, layers=layers, heads=3, projection=16 if sizes.projection else None)
        for tower, sizes in config.towers.items()
    }
    return replace(config, width=width * len(towers), towers=towers, vocab_size=60, length=9)


def trained(network: nn.Module) -> nn.Module:
    """As if it were: nothing is zero, so that every tensor shows in the result."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            spread = 0.05 if parameter.ndim < 2 else max(0.05, 1.5 * parameter[0].numel() ** -0.5)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return network.eval()
