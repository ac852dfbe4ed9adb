"""The pictures that training draws of itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.config import GenerationConfig, TrainingConfig, TrainSettings
from ldm.diffusion.schedule import Schedule
from ldm.generate import Painter, draw_latents
from ldm.models.denoiser import make_denoiser
from ldm.models.tokenizer import Tokenizer
from ldm.sheet import Tile, draw_sheet
from ldm.training.engine_config import WEIGHTS
from ldm.training.frozen import Frozen, arithmetic
from ldm.training.loader import TrainData

Decode = Callable[[Tensor], Tensor]  # scaled z0 (b, c, h, w) -> image (b, 3, H, W) in [-1, 1]


def grid_config(training: TrainingConfig) -> GenerationConfig:
    """How the sample grids are drawn: without chance after the start, so that they differ by training alone."""
    grid = training.grid
    return GenerationConfig(
        prompts=grid.prompts,
        unseen_prompts=[],
        sampler="ddim",
        steps=grid.steps,
        spacing="trailing",
        guidance_scale=grid.guidance_scale,
        eta=0.0,
        seed=training.seed,
        batch_size=max(1, len(grid.prompts)),
        grid_pictures=len(grid.prompts),
    )


def sample_grid(
    settings: TrainSettings,
    data: TrainData,
    weights: dict[str, Tensor],
    frozen: Frozen,
    schedule: Schedule,
    tokenizer: Tokenizer | None,
    decode: Decode,
    step: int,
) -> bytes:
    """A PNG of one picture for each fixed prompt, from fixed noise, drawn by the averaged weights."""
    prompts, precision, device = settings.training.grid.prompts, settings.training.precision, schedule.signal.device
    with torch.device("meta"):  # the weights are there: none are drawn at random, and none held twice
        denoiser = make_denoiser(settings.unet, settings.text_encoder if frozen.text_encoder is None else None)
    denoiser.load_state_dict(weights, assign=True)
    denoiser.eval().to(device=device, dtype=WEIGHTS.get(precision))
    denoiser.text_encoder = frozen.text_encoder or denoiser.text_encoder
    c, h, w = data.latent_shape
    painter = Painter(denoiser, tokenizer, schedule, settings.diffusion.prediction, (c, h, w))
    with torch.no_grad():
        with arithmetic(precision, device.type):
            z0 = draw_latents(painter, prompts, grid_config(settings.training))
        image = decode(z0)
    tiles = [Tile([picture], prompt) for picture, prompt in zip(image.float().cpu(), prompts, strict=True)]
    return draw_sheet([(f"Step {step}", tiles)], math.ceil(math.sqrt(len(tiles))))
