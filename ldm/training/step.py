"""What a step is made of, and validation too: batches, dropout, loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm.config import DiffusionConfig, TrainingRunConfig, TrainSettings
from ldm.diffusion import objective
from ldm.diffusion.schedule import Schedule
from ldm.models.tokenizer import Tokenizer
from ldm.training.engine_config import World
from ldm.training.frozen import Frozen
from ldm.training.loader import Batch, Draw, Loader, TrainData


def make_loader(
    settings: TrainSettings,
    data: TrainData,
    tokenizer: Tokenizer | None,
    null_context: np.ndarray | None,
    run: TrainingRunConfig,
    world: World,
    validation: bool = False,
) -> Loader:
    """The loader of this process; for validation captions are never dropped."""
    training, diffusion = settings.training, settings.diffusion
    return Loader(
        data,
        Draw(
            training.seed, diffusion.timesteps, 0.0 if validation else training.caption_dropout, diffusion.offset_noise
        ),
        tokenizer,
        lanes=training.lanes,
        window_shards=training.window_shards,
        batch_size=training.batch_size,
        micro_batch_size=run.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        workers=0 if validation else run.loader_workers,
        cache_bytes=run.loader_cache_bytes,
        pin=world.device.type == "cuda",
        null_context=null_context,
    )


def null_context(frozen: Frozen, tokenizer: Tokenizer, device: torch.device) -> np.ndarray:
    """What the frozen text encoder makes of the empty caption (l, d), as a cache holds it of the others."""
    context = frozen.encode({"tokens": tokenizer.null[None].to(device)})["context"]
    return context[0].to("cpu", torch.float16).numpy()


def seed_dropout(seed: int, batch: Batch) -> None:
    """Dropout inside the network depends on where in the run we are, not on what this process did before."""
    torch.manual_seed(hash((seed, int(batch.positions[0]))) & (2**63 - 1))


def loss_of(diffusion: DiffusionConfig, schedule: Schedule, prediction: Tensor, batch: Batch) -> Tensor:
    """Loss of each sample, (b,)."""
    return objective.loss(
        diffusion.prediction,
        schedule,
        prediction,
        batch.z0,
        batch.eps,
        batch.t,
        kind=diffusion.loss,
        min_snr_gamma=diffusion.min_snr_gamma,
    )
