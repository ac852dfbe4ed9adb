"""The average of the weights over training, which pictures are drawn from (Rombach et al. 2022 use LitEma's rule).

Each process averages the float32 stretches of the weights that it holds for the optimizer, so a step costs no
communication and, shared out by ZeRO, a fraction of the memory; only a checkpoint or a grid of samples gathers them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.training.checkpoint import Stretch


def decay_at(decay: float, updates: int) -> float:
    """How much of the average stays at an update, counted from 1: little at first, to forget the random start."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """Averages of stretches of weights that live elsewhere and are changed in place.

    Those whose name `averaged` refuses go with their newest weights.
    """

    def __init__(
        self, stretches: list[Stretch], decay: float, averaged: Callable[[str], bool] = lambda name: True
    ) -> None:
        self.decay, self.updates = decay, 0
        live = [stretch for stretch in stretches if averaged(stretch.name)]
        self._weights = [stretch.tensors["weight"].detach() for stretch in live]
        self._average = [weight.clone() for weight in self._weights]
        rest = [stretch for stretch in stretches if not averaged(stretch.name)]
        pairs = zip(live, self._average, strict=True)
        self.stretches = [Stretch(s.name, s.start, {"weight": average}) for s, average in pairs] + rest

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * weight, after each step of the optimizer."""
        self.updates += 1
        torch._foreach_lerp_(self._average, self._weights, 1 - decay_at(self.decay, self.updates))

    @torch.no_grad()
    def restore(self, read: Callable[[str], Tensor], updates: int) -> None:
        """Sets the averages from whole tensors by name, each process its own stretches of them."""
        for stretch, average in zip(self.stretches, self._average, strict=False):
            average.copy_(read(stretch.name).flatten()[stretch.start : stretch.start + average.numel()])
        self.updates = updates
