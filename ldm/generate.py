"""Prompts -> pictures: text encoder, guided denoiser, sampler and autoencoder put together.

    caption -> tokens -> context;  noise z_T -> sampler(guided denoiser) -> z0;  z0 / scale_factor -> decode -> image

The starting noise of a picture depends on (seed, its place in the list of prompts) and on nothing else: neither on the
caption or a sample's key, nor on the batch that it happens to be drawn in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.config import AutoencoderSettings, GenerationConfig, TrainSettings, from_plain
from ldm.diffusion.guidance import guided
from ldm.diffusion.sampler import SAMPLERS, check_sampler
from ldm.diffusion.schedule import Schedule, make_schedule
from ldm.models.autoencoder import load_autoencoder
from ldm.models.denoiser import Denoiser, make_denoiser
from ldm.models.tokenizer import Tokenizer, make_tokenizer
from ldm.storage import sha256_file
from ldm.training.checkpoint import Checkpoint
from ldm.training.frozen import digest_of
from ldm.training.order import philox


@dataclass(frozen=True)
class Painter:
    """A trained denoiser with all that it needs to draw."""

    denoiser: Denoiser
    tokenizer: Tokenizer | None  # None: the model reads no captions
    schedule: Schedule
    prediction_type: str
    latent_shape: tuple[int, int, int]  # (c, h, w)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device


def load_painter(checkpoint: Checkpoint, device: torch.device) -> Painter:
    """The averaged weights of a checkpoint, ready to draw latents of the size that they were trained on."""
    settings = from_plain(TrainSettings, checkpoint.config["settings"])
    diffusion, text = settings.diffusion, settings.text_encoder
    denoiser = make_denoiser(settings.unet, text)
    path = checkpoint.path / "ema.safetensors"
    weights, expected = load_file(path), denoiser.state_dict()
    if text is not None and text.kind == "clip":  # comes from its own file, and is in no checkpoint
        expected = {name: weight for name, weight in expected.items() if not name.startswith("text_encoder.")}
    found, wanted = ({name: w.shape for name, w in state.items()} for state in (weights, expected))
    if found != wanted:
        wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise ValueError(
            f"{path} does not hold the weights of the config.json beside it: {len(wrong)} of {len(wanted)} are "
            f"missing, too many or of another shape: {', '.join(wrong[:5])}"
        )
    denoiser.load_state_dict(weights, strict=False)
    trained_beside = checkpoint.config.get("frozen", {}).get("text_encoder")
    if trained_beside is not None and text is not None and digest_of(denoiser.text_encoder) != trained_beside:
        raise ValueError(
            f"the text encoder that text_encoder.weights={text.weights} holds is not the one that {path} was trained "
            f"beside: its digest is not {trained_beside}, which config.json names"
        )
    return Painter(
        denoiser=denoiser.to(device).eval().requires_grad_(False),
        tokenizer=None if text is None else make_tokenizer(text),
        schedule=make_schedule(
            diffusion.schedule, diffusion.timesteps, diffusion.beta_start, diffusion.beta_end,
            diffusion.zero_terminal_snr,
        ),
        prediction_type=diffusion.prediction,
        latent_shape=tuple(checkpoint.config["data"]["latent_shape"]),
    )  # fmt: skip


def load_decoder(checkpoint: Checkpoint, weights: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Scaled z0 (b, c, h, w) -> image (b, 3, H, W) in [-1, 1], by the autoencoder that a checkpoint's latents are of.

    config.json has its settings and knows its weights by their sha256.
    """
    known = checkpoint.config.get("autoencoder")
    if known is None:
        raise ValueError(f"{checkpoint.path / 'config.json'} is from before it named an autoencoder: give its settings")
    if (found := sha256_file(weights)) != known["sha256"]:
        raise ValueError(f"{weights} has sha256 {found}; the latents were made by weights with {known['sha256']}")
    settings = replace(from_plain(AutoencoderSettings, known["settings"]), weights=str(weights))
    autoencoder = load_autoencoder(settings, device)
    return lambda z0: decode(autoencoder, z0, settings.scale_factor, len(z0))


def check(config: GenerationConfig, schedule: Schedule, prediction_type: str) -> None:
    """Refuses settings that cannot be followed, before anything is drawn."""
    check_sampler(
        config.sampler, schedule, config.steps, prediction_type, spacing=config.spacing, eta=config.eta
    )
    if config.batch_size < 1:
        raise ValueError(f"generation.batch_size is {config.batch_size}; it must be 1 or more")


def noise(seed: int, places: Sequence[int], step: int, shape: tuple[int, ...]) -> Tensor:
    """Noise (b, c, h, w) for the prompts at these places, each from (seed, place, step) alone, on the CPU.

    Step -1 is the start, z_T; the others are the sampler's own, where eta is not 0.
    """
    drawn = [
        np.random.Generator(philox("generate", seed, place, step)).standard_normal(shape, np.float32)
        for place in places
    ]
    return torch.from_numpy(np.stack(drawn))


@torch.inference_mode()
def draw_latents(painter: Painter, prompts: Sequence[str], config: GenerationConfig) -> Tensor:
    """Prompts -> scaled latents z0 (n, c, h, w), float32 on the CPU."""
    check(config, painter.schedule, painter.prediction_type)
    drawn = []
    for start in range(0, len(prompts), config.batch_size):
        places = range(start, min(start + config.batch_size, len(prompts)))
        drawn.append(_sample(painter, [prompts[place] for place in places], places, config).float().cpu())
    return torch.cat(drawn) if drawn else torch.zeros(0, *painter.latent_shape)


def _sample(painter: Painter, prompts: list[str], places: range, config: GenerationConfig) -> Tensor:
    """Prompts and their places in the list -> z0 (b, c, h, w)."""

    def draw(step: int, like: Tensor) -> Tensor:
        return noise(config.seed, places, step, painter.latent_shape).to(like)

    condition, null_condition = _conditions(painter, prompts)
    return SAMPLERS[config.sampler](
        guided(painter.denoiser, condition, null_condition, config.guidance_scale),
        noise(config.seed, places, -1, painter.latent_shape).to(painter.device),
        painter.schedule,
        config.steps,
        painter.prediction_type,
        spacing=config.spacing,
        draw=draw,
        **({"eta": config.eta} if config.sampler == "ddim" else {}),
    )


def _conditions(painter: Painter, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The prompts and as many empty captions, encoded once for the whole trajectory."""
    if painter.tokenizer is None:
        return {}, {}
    tokens = painter.tokenizer([*prompts, ""]).to(painter.device)
    encoded = painter.denoiser.encode_condition({"tokens": tokens})
    condition = {name: value[:-1] for name, value in encoded.items()}
    return condition, {name: value[-1:].expand(len(prompts), *value.shape[1:]) for name, value in encoded.items()}


@torch.inference_mode()
def decode(autoencoder: nn.Module, z0: Tensor, scale_factor: float, batch_size: int) -> Tensor:
    """Scaled latents z0 (n, c, h, w) -> image (n, 3, H, W) in [-1, 1], float32 on the CPU."""
    device = next(autoencoder.parameters()).device
    parts = [autoencoder.decode(part.to(device) / scale_factor).float().cpu() for part in z0.split(batch_size)]
    return torch.cat(parts).clamp(-1, 1)
