"""Batches whose loss or gradient is no number: found before they touch a weight, reported, and left out or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldm.config import TrainingConfig


class TooManyBadBatches(RuntimeError):
    """More losses or gradients were no numbers than may be."""

    stops_the_run = True  # a restart would meet the same batches


def refusable(loss: Tensor) -> Tensor:
    """Mean of the losses (b,). Where one is no number, so is the gradient of all weights, and the engine refuses it."""
    return loss.mean() * torch.where(loss.detach().isfinite().all(), 1.0, math.nan)


def non_finite(output: Path, what: str, step: int, samples_seen: int, keys: list[str], own_is_finite: bool) -> str:
    """What, where, and on which samples: the same words in every process, and a file of keys beside the checkpoints."""
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (own_is_finite, keys))
    guilty = [rank for rank, (finite, _) in enumerate(reports) if not finite] or list(range(len(reports)))
    found = {f"process {rank}": reports[rank][1] for rank in guilty}
    path = output / "skipped" / f"samples-{samples_seen:012d}.json"
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"format": 1, "reason": what, "step": step, "samples_seen": samples_seen, "keys": found}
        path.write_text(json.dumps(facts, indent=1) + "\n")
    lines = "\n".join(f"  {who}: {', '.join(keys)}" for who, keys in found.items())
    return (
        f"{what} at step {step}; the weights are still those of step {step - 1}. Keys of the samples, also in "
        f"{path}:\n{lines}"
    )


def refusal(skipped: int, training: TrainingConfig, samples_seen: int) -> str:
    """Why a run ends instead of leaving out one more batch, which begins after `samples_seen` samples."""
    return (
        f"this is batch {skipped} that is no good, and training.max_skipped_batches is {training.max_skipped_batches}. "
        f"What was learned before it is kept. If it is the samples, the same command goes on without them with "
        f"training.skip_samples=[{samples_seen},{samples_seen + training.batch_size}]; if the loss rose before, go "
        f"back with training.resume=step-N, or lower training.learning_rate"
    )
