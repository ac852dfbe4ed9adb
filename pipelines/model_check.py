"""Holds the settings of the model half against each other before the first stage starts.

A wrong channel count would otherwise be found when training begins: after the download.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm import generate
from ldm.config import TrainingConfig, TrainSettings
from ldm.models.denoiser import Denoiser, make_denoiser
from ldm.models.tokenizer import make_tokenizer
from ldm.training import checks
from ldm.training.engine import deepspeed_config
from ldm.training.engine_config import World, check_kept
from pipelines.config import Config
from pipelines.settings import TrainResources


def check_model(config: Config) -> None:
    """Raises ValueError, naming the settings, where train and generate could not work with them."""
    check_training(config)
    generate.check(config.generation, checks.schedule_of(config.diffusion), config.diffusion.prediction)
    _try_shapes(config)


def check_training(config: Config) -> None:
    """The same for training alone, by what needs no file of the user's."""
    checks.check(
        TrainSettings(
            unet=config.unet, text_encoder=config.text_encoder, diffusion=config.diffusion, training=config.training
        )
    )
    if config.unet.out_channels != (channels := config.autoencoder.network.latent_channels):
        raise ValueError(f"unet.out_channels is {config.unet.out_channels}; the autoencoder's latents have {channels}")
    check_layout(config.training, config.cluster.train)


def check_layout(training: TrainingConfig, resources: TrainResources) -> None:
    """Raises ValueError where the engine would refuse these processes, their ZeRO stage or their micro batch."""
    check_kept(resources.run)
    device = torch.device("cuda" if resources.num_gpus else "cpu")
    deepspeed_config(training, resources.run, World(0, resources.workers, device))


def _try_shapes(config: Config) -> None:
    """One step without numbers: latents of the autoencoder through text encoder and U-Net, and back again."""
    network = config.autoencoder.network
    side, channels = config.dataset.precompute_latents.resolution // network.factor, network.latent_channels
    condition = {}
    if config.text_encoder is not None:
        condition["tokens"] = make_tokenizer(config.text_encoder)([""]).to("meta")
    with torch.device("meta"):
        denoiser = make_denoiser(config.unet, config.text_encoder)
        z_t, t = torch.empty(1, channels, side, side), torch.empty(1)
    check_all_are_trained(denoiser, denoiser(z_t, t, condition))


def check_all_are_trained(denoiser: Denoiser, prediction: Tensor) -> None:
    """Raises ValueError where a parameter has no part in a prediction, whose optimizer would only let it decay."""
    trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(prediction.sum(), trained.values(), allow_unused=True)
    if idle := [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]:
        raise ValueError(
            f"{len(idle)} trained parameters never get a gradient, {idle[0]} first: the optimizer would only let them "
            f"decay; freeze them or take them out of the model"
        )
