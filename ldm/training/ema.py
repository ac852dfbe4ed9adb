"""The average of the weights over training, which pictures are drawn from (Rombach et al. 2022 use LitEma's rule).

Each process averages the float32 stretches of the weights that it holds for the optimizer, so a step costs no
communication and, shared out by ZeRO, a fraction of the memory; only a checkpoint or a grid of samples gathers them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decay_at(decay: float, updates: int) -> float:
    """How much of the average stays at an update, counted from 1: little at first, to forget the random start."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """Averages of tensors that live elsewhere and are changed in place."""

    def __init__(self, weights: list[Tensor], decay: float, updates: int = 0) -> None:
        self.weights, self.decay, self.updates = weights, decay, updates
        self.average = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * weight, after each step of the optimizer."""
        self.updates += 1
        torch._foreach_lerp_(self.average, self.weights, 1 - decay_at(self.decay, self.updates))
