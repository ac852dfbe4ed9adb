"""The device that a worker of a stage computes on: the one that its cluster gives it, not the one that it can see."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_of(num_gpus: float, stage: str) -> torch.device:
    """A GPU for a worker that was given a share of one, else the processor. Raises RuntimeError where there is none.

    Ray shows a worker the GPUs that it was given, so that the first one is its own; workers that were given none see
    all of them, and would all compute on the first.
    """
    import torch

    if not num_gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"cluster.{stage}.num_gpus is {num_gpus:g}, but torch {torch.__version__} sees no GPU on this "
            f"node; cluster.{stage}.num_gpus=0 computes on processors"
        )
    return torch.device("cuda")
