"""The loss on what is not trained on."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ldm.config import TrainSettings
from ldm.diffusion.schedule import Schedule, add_noise
from ldm.training.engine import Engine
from ldm.training.frozen import Frozen
from ldm.training.loader import Loader
from ldm.training.step import loss_of


@torch.no_grad()
def validation_loss(
    engine: Engine, frozen: Frozen, loader: Loader, settings: TrainSettings, schedule: Schedule
) -> float:
    """Mean loss of the newest weights over held-out samples, always the same ones with the same noise."""
    steps = settings.training.validation_samples // settings.training.batch_size * engine.accumulation
    batches = loader.batches(0)
    total = torch.zeros(2, dtype=torch.float64, device=engine.world.device)
    engine.module.eval()
    for _ in range(steps):
        batch = next(batches).to(engine.world.device)
        z_t = add_noise(schedule, batch.z0, batch.eps, batch.t)
        prediction = engine(z_t, batch.t, frozen.encode(batch.condition))
        loss = loss_of(settings.diffusion, schedule, prediction, batch)
        total += torch.stack([loss.sum(), torch.tensor(float(len(loss)), device=loss.device)])
    engine.module.train()
    dist.all_reduce(total)
    return float(total[0] / total[1])
