"""diffusers' names of our tensors, and its configurations of our networks, both ways.

| ours                            | diffusers' class     | what it cannot express                                   |
|---------------------------------|----------------------|----------------------------------------------------------|
| U-Net with transformers         | UNet2DConditionModel | levels joined by ResBlocks                               |
| U-Net with attention blocks     | UNet2DModel          | one number of heads for levels of different widths       |
| autoencoder, posterior kl / vq  | AutoencoderKL, VQModel |                                                        |
| transformer trained with U-Net  | LDMBertModel         |                                                          |
| CLIP's towers                   | CLIPTextModel        | (transformers') a context that leaves out layers         |

It has no classes for class embedders, spatial rescalers, latent classifiers and small autoencoders.
What cannot be expressed raises ValueError and names the setting. Nothing here imports diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ldm.config import AutoencoderConfig, UNetConfig
from ldm.interop.entry import Entry
from ldm.models.autoencoder import make_autoencoder
from ldm.models.unet import UNet

RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
QKV = ("to_q", "to_k", "to_v")


# ---- U-Net ------------------------------------------------------------------------------------------------
def unet_entries(config: UNetConfig) -> list[Entry]:
    """Every tensor of a U-Net, ours and diffusers'."""
    with torch.device("meta"):
        keys = list(UNet(config).state_dict())
    return [_unet_entry(key, config) for key in keys]


def _unet_entry(key: str, config: UNetConfig) -> Entry:
    module, parameter = key.rsplit(".", 1)
    stem, *path = module.split(".")
    if stem == "input_blocks":
        place, rest = _input_block(int(path[0]), int(path[1]), config), path[2:]
    elif stem == "middle_block":
        place, rest = f"mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[int(path[0])]}", path[1:]
    elif stem == "output_blocks":
        place, rest = _output_block(int(path[0]), int(path[1]), config), path[2:]
    else:
        return Entry(key, (f"{OUTSIDE[module]}.{parameter}",))
    return _inside(key, place, ".".join(rest), parameter, config)


OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def _input_block(index: int, layer: int, config: UNetConfig) -> str:
    """Of a level's blocks the last one joins it to the next level; block 0 stands before all levels."""
    if index == 0:
        return "conv_in"
    level, block = divmod(index - 1, config.num_res_blocks + 1)
    if block == config.num_res_blocks:
        return f"down_blocks.{level}.downsamplers.0"
    return f"down_blocks.{level}.{('resnets', 'attentions')[layer]}.{block}"


def _output_block(index: int, layer: int, config: UNetConfig) -> str:
    """Levels come in the other order; what enlarges stands behind the last block's attention, if it has any."""
    up, block = divmod(index, config.num_res_blocks + 1)
    attends = 2 ** (len(config.channel_mult) - 1 - up) in config.attention_resolutions
    if layer == 0:
        return f"up_blocks.{up}.resnets.{block}"
    return f"up_blocks.{up}." + (f"attentions.{block}" if attends and layer == 1 else "upsamplers.0")


def _inside(key: str, place: str, rest: str, parameter: str, config: UNetConfig) -> Entry:
    """A tensor within a block; transformers have the same names in both."""
    if ".attentions." in place and config.transformer_depth is None:
        return _attention_block(key, place, rest, parameter, config)
    if rest in RES_BLOCK:
        rest = RES_BLOCK[rest]
    elif rest == "op":
        rest = "conv"
    return Entry(key, (".".join(part for part in (place, rest, parameter) if part),))


def _attention_block(key: str, place: str, rest: str, parameter: str, config: UNetConfig) -> Entry:
    if rest == "norm":
        return Entry(key, (f"{place}.group_norm.{parameter}",))
    if rest == "proj_out":
        return Entry(key, (f"{place}.to_out.0.{parameter}",), ones=1)
    interleaved = config.qkv_order == "head_first"
    heads = _heads_at(place, config) if interleaved else None
    return Entry(key, tuple(f"{place}.{name}.{parameter}" for name in QKV), ones=1, heads=heads)


def _heads_at(place: str, config: UNetConfig) -> int:
    """Heads of an attention, from the level that its name tells."""
    if config.num_heads is not None:
        return config.num_heads
    stem, number, *_ = place.split(".")
    last = len(config.channel_mult) - 1
    level = {"down_blocks": int, "up_blocks": lambda i: last - int(i), "mid_block": lambda _: last}[stem](number)
    return config.channel_mult[level] * config.model_channels // config.num_head_channels


def unet_to_diffusers(config: UNetConfig, latent_size: int) -> dict[str, Any]:
    """config.json of a U-Net."""
    widths = [mult * config.model_channels for mult in config.channel_mult]
    attends = [2**level in config.attention_resolutions for level in range(len(widths))]
    common = {
        "sample_size": latent_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5,
        "dropout": config.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "num_class_embeds": config.num_classes,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
    }
    if config.transformer_depth is None:
        return {"_class_name": "UNet2DModel", **common, **_plain_unet(config, widths, attends)}
    return {"_class_name": "UNet2DConditionModel", **common, **_conditional_unet(config, widths, attends)}


def _plain_unet(config: UNetConfig, widths: list[int], attends: list[bool]) -> dict[str, Any]:
    if config.vector_dim is not None:
        raise ValueError(f"unet.vector_dim is {config.vector_dim}; diffusers' UNet2DModel reads no vector")
    used = {width for width, yes in zip(widths, attends, strict=True) if yes} | {widths[-1]}
    if config.num_heads is not None and len(used) > 1:
        raise ValueError(
            f"unet.num_heads is {config.num_heads} for attention of the widths {sorted(used)}; diffusers' UNet2DModel "
            "has one width of a head for all levels and cannot express that"
        )
    plain = {True: "Resnet{}sampleBlock2D", False: "{}Block2D"}[config.resblock_updown]
    return {
        "down_block_types": ["AttnDownBlock2D" if yes else plain.format("Down") for yes in attends],
        "up_block_types": ["AttnUpBlock2D" if yes else plain.format("Up") for yes in reversed(attends)],
        "downsample_type": "resnet" if config.resblock_updown else "conv",
        "upsample_type": "resnet" if config.resblock_updown else "conv",
        "attention_head_dim": config.num_head_channels or widths[-1] // config.num_heads,
        # without it the middle's attention has no norm there when norms are scaled and shifted
        "attn_norm_num_groups": config.norm_groups,
    }


def _conditional_unet(config: UNetConfig, widths: list[int], attends: list[bool]) -> dict[str, Any]:
    if config.resblock_updown:
        raise ValueError("unet.resblock_updown is true; diffusers' UNet2DConditionModel joins levels by convolutions")
    heads = config.num_heads or [width // config.num_head_channels for width in widths]
    vector = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    vector["projection_class_embeddings_input_dim"] = config.vector_dim
    return {
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
        "attention_head_dim": heads,  # by an old mistake there it is the number of heads
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": config.transformer_depth,
        "only_cross_attention": [2**level in config.cross_only_resolutions for level in range(len(widths))],
        "mid_block_only_cross_attention": 2 ** (len(widths) - 1) in config.cross_only_resolutions,
        "use_linear_projection": config.linear_projections,
        **(vector if config.vector_dim is not None else {}),
    }


PLAIN_BLOCKS = {"DownBlock2D", "UpBlock2D", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"}
ATTENTION_BLOCKS = {"AttnDownBlock2D", "AttnUpBlock2D", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}
# Settings that our U-Net has no choice of, and what they must be.
UNET_FIXED = {
    "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "center_input_sample": False,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "dual_cross_attention": False, "encoder_hid_dim": None,
    "class_embed_type": None, "time_embedding_type": "positional", "time_embedding_dim": None,
    "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default", "class_embeddings_concat": False, "cross_attention_norm": None,
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "add_attention": True,
    "reverse_transformer_layers_per_block": None, "time_embedding_act_fn": None,
}  # fmt: skip


def unet_from_diffusers(settings: dict[str, Any]) -> UNetConfig:
    """A U-Net's config.json as our configuration; what ours does not have is refused by name."""
    _require_fixed(settings, UNET_FIXED, "unet/config.json")
    widths, depth = settings["block_out_channels"], settings.get("transformer_layers_per_block", 1)
    kinds = settings["down_block_types"]
    unknown = set(kinds) - PLAIN_BLOCKS - ATTENTION_BLOCKS
    if unknown or any(width % widths[0] for width in widths):
        raise ValueError(f"unet/config.json has blocks {sorted(unknown)}, widths {widths}; our U-Net has none such")
    levels = range(len(widths))
    crossed = settings["_class_name"] == "UNet2DConditionModel"
    _require_middle_norm(settings, crossed)
    heads, head_channels = _heads_from(settings, widths, crossed)
    only = settings.get("only_cross_attention", False)
    vector = settings.get("projection_class_embeddings_input_dim")
    return UNetConfig(
        in_channels=settings["in_channels"],
        out_channels=settings["out_channels"],
        model_channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=settings.get("layers_per_block", 2),
        attention_resolutions=[2**i for i in reversed(levels) if kinds[i] in ATTENTION_BLOCKS],
        num_heads=heads,
        num_head_channels=head_channels,
        transformer_depth=(_list(depth, levels) if crossed else None),
        context_dim=settings.get("cross_attention_dim", 1280) if crossed else None,
        cross_only_resolutions=[2**i for i, yes in enumerate(_list(only, levels)) if yes],
        linear_projections=settings.get("use_linear_projection", False),
        qkv_order="head_first",
        scale_shift_norm=settings.get("resnet_time_scale_shift", "default") == "scale_shift",
        resblock_updown=settings.get("downsample_type", "conv") == "resnet",
        num_classes=settings.get("num_class_embeds"),
        vector_dim=vector if settings.get("addition_embed_type") == "text_time" else None,
        norm_groups=settings.get("norm_num_groups", 32),
        dropout=settings.get("dropout", 0.0),
    )


def _require_middle_norm(settings: dict[str, Any], crossed: bool) -> None:
    groups = settings.get("norm_num_groups", 32)
    default = groups if settings.get("resnet_time_scale_shift", "default") == "default" else None
    if not crossed and (settings.get("attn_norm_num_groups") or default) != groups:
        raise ValueError(
            f"unet/config.json: attn_norm_num_groups is {settings.get('attn_norm_num_groups')}; the middle's attention "
            f"has a norm of {groups} groups here"
        )


def _heads_from(settings: dict[str, Any], widths: list[int], crossed: bool) -> tuple[int | None, int | None]:
    """(number of heads, channels of a head), of which one is None."""
    found = settings.get("attention_head_dim", 8)
    if not crossed:
        return None, found
    heads = settings.get("num_attention_heads") or found
    if isinstance(heads, int):
        return heads, None
    channels = {width // n for width, n in zip(widths, heads, strict=True)}
    if len(channels) > 1:
        raise ValueError(f"unet/config.json has {heads} heads for widths {widths}; ours have one width of a head")
    return None, channels.pop()


def _list(value: Any, levels: Iterable[int]) -> list[Any]:
    """One value for each level."""
    return list(value) if isinstance(value, list | tuple) else [value for _ in levels]


def _require_fixed(settings: dict[str, Any], fixed: dict[str, Any], where: str) -> None:
    wrong = [f"{key} is {settings[key]!r}, not {value!r}" for key, value in fixed.items()
             if key in settings and settings[key] != value]  # fmt: skip
    if wrong:
        raise ValueError(f"{where} describes a network that is not built here: {'; '.join(wrong)}")


# ---- autoencoders -----------------------------------------------------------------------------------------
def autoencoder_entries(config: AutoencoderConfig) -> list[Entry]:
    """Every tensor of an autoencoder, ours and diffusers'."""
    _require_compvis(config)
    with torch.device("meta"):
        keys = list(make_autoencoder(config).state_dict())
    return [_autoencoder_entry(key, len(config.compvis.channel_mult)) for key in keys]


AUTOENCODER_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _autoencoder_entry(key: str, levels: int) -> Entry:
    """down.i.block.j, up.i.attn.j, mid.block_1, ...: levels on the way up are counted from the other end."""
    half, *path, parameter = key.split(".")
    if half not in ("encoder", "decoder"):
        return Entry(key, (key,))
    if path[0] in ("down", "up"):
        level = int(path[1]) if path[0] == "down" else levels - 1 - int(path[1])
        place, rest = _level_place(path[2:]), path[-1]
        place = f"{path[0]}_blocks.{level}.{place}"
    elif path[0] == "mid":
        place = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}[path[1]]
        place, rest = f"mid_block.{place}", path[-1]
    else:
        return Entry(key, (f"{half}.{ {'norm_out': 'conv_norm_out'}.get(path[0], path[0]) }.{parameter}",))
    if "attentions" in place:
        matrix = 2 if rest != "norm" else 0
        return Entry(key, (f"{half}.{place}.{AUTOENCODER_ATTENTION[rest]}.{parameter}",), ones=matrix)
    return Entry(key, (f"{half}.{place}.{ {'nin_shortcut': 'conv_shortcut'}.get(rest, rest) }.{parameter}",))


def _level_place(path: list[str]) -> str:
    kinds = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
    return kinds[path[0]] + (f".{path[1]}" if path[0] in ("block", "attn") else "")


def autoencoder_to_diffusers(config: AutoencoderConfig, scale_factor: float, image_size: int) -> dict[str, Any]:
    """config.json of an autoencoder."""
    _require_compvis(config)
    sizes = config.compvis
    attends = [2**level in sizes.attention_factors for level in range(len(sizes.channel_mult))]
    kl = config.posterior == "kl"
    return {
        "_class_name": "AutoencoderKL" if kl else "VQModel",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [mult * sizes.channels for mult in sizes.channel_mult],
        "layers_per_block": sizes.num_res_blocks,
        "down_block_types": ["AttnDownEncoderBlock2D" if yes else "DownEncoderBlock2D" for yes in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if yes else "UpDecoderBlock2D" for yes in reversed(attends)],
        "latent_channels": config.latent_channels,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": image_size,
        "scaling_factor": scale_factor,
        "mid_block_add_attention": sizes.middle_attention,
        **({} if kl else {"num_vq_embeddings": sizes.codes, "vq_embed_dim": config.latent_channels}),
    }


AUTOENCODER_FIXED = {
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_num_groups": 32, "shift_factor": None,
    "latents_mean": None, "latents_std": None, "use_quant_conv": True, "use_post_quant_conv": True,
    "norm_type": "group", "lookup_from_codebook": False,
}  # fmt: skip


def autoencoder_from_diffusers(settings: dict[str, Any]) -> tuple[AutoencoderConfig, float]:
    """An autoencoder's config.json as our configuration and its scale factor."""
    from ldm.config import CompvisConfig

    _require_fixed(settings, AUTOENCODER_FIXED, "vae/config.json")
    widths, kinds = settings["block_out_channels"], settings["down_block_types"]
    kl, channels = settings["_class_name"] == "AutoencoderKL", settings.get("latent_channels", 4)
    unknown = set(kinds) - {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"}
    if unknown or any(width % widths[0] for width in widths) or settings.get("vq_embed_dim") not in (None, channels):
        raise ValueError(f"vae/config.json describes a network that is not built here: {sorted(unknown)}, {widths}")
    sizes = CompvisConfig(
        channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=settings.get("layers_per_block", 1),
        attention_factors=[2**i for i, kind in enumerate(kinds) if kind.startswith("Attn")],
        middle_attention=settings.get("mid_block_add_attention", True),
        codes=None if kl else settings.get("num_vq_embeddings", 256),
    )
    posterior = "kl" if kl else "vq"
    config = AutoencoderConfig("compvis", posterior, 2 ** (len(widths) - 1), channels, sizes, None)
    return config, float(settings.get("scaling_factor", 0.18215))


def _require_compvis(config: AutoencoderConfig) -> None:
    if config.kind != "compvis" or config.posterior == "none":
        raise ValueError(
            f'autoencoder.network is of kind "{config.kind}", posterior "{config.posterior}"; '
            'what diffusers has classes for is kind "compvis" with posterior "kl" or "vq"'
        )


# Names that older published files have.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def current_name(key: str) -> str:
    """diffusers' name today of a key that an older version may have written."""
    for old, new in OLD_ATTENTION.items():
        key = key.replace(old, new)
    return key
