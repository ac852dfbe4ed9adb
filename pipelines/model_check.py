"""Holds the settings of the model half against each other before the first stage starts.

A wrong channel count would otherwise be found when training begins: after the download.
"""

from __future__ import annotations

import torch

from ldm import generate
from ldm.config import TrainSettings
from ldm.models.denoiser import make_denoiser
from ldm.models.tokenizer import make_tokenizer
from ldm.training import checks
from ldm.training.engine import World, check_kept, deepspeed_config
from pipelines.config import Config


def check_model(config: Config) -> None:
    """Raises ValueError, naming the settings, where train and generate could not work with them."""
    checks.check(
        TrainSettings(
            unet=config.unet, text_encoder=config.text_encoder, diffusion=config.diffusion, training=config.training
        )
    )
    generate.check(config.generation, checks.schedule_of(config.diffusion), config.diffusion.prediction)
    resources = config.cluster.train
    check_kept(resources.run)
    device = torch.device("cuda" if resources.num_gpus else "cpu")
    deepspeed_config(config.training, resources.run, World(0, resources.workers, device))
    _try_shapes(config)


def _try_shapes(config: Config) -> None:
    """One step forward without numbers: latents of the autoencoder through text encoder and U-Net."""
    network = config.autoencoder.network
    side, channels = config.dataset.precompute_latents.resolution // network.factor, network.latent_channels
    if config.unet.out_channels != channels:
        raise ValueError(f"unet.out_channels is {config.unet.out_channels}; the autoencoder's latents have {channels}")
    condition = {}
    if config.text_encoder is not None:
        condition["tokens"] = make_tokenizer(config.text_encoder)([""]).to("meta")
    with torch.device("meta"):
        denoiser = make_denoiser(config.unet, config.text_encoder)
        z_t, t = torch.empty(1, channels, side, side), torch.empty(1)
    denoiser(z_t, t, condition)
