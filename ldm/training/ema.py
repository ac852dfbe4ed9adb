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
        self,
        stretches: list[Stretch],
        decay: float,
        averaged: Callable[[str], bool] = lambda name: True,
        room: Callable[[int], Tensor] = torch.empty,
    ) -> None:
        self.decay, self.updates = decay, 0
        live = [stretch for stretch in stretches if averaged(stretch.name)]
        rest = [stretch for stretch in stretches if not averaged(stretch.name)]
        self._averages = {stretch.name: _copy(stretch, room) for stretch in live}
        self._weights = {s.name: s.tensors["weight"].detach() for s in live if not s.in_files}
        self.stretches = [Stretch(s.name, s.start, {"weight": self._averages[s.name]}) for s in live] + rest

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * weight, after each step of the optimizer."""
        self._add(self._weights)
        self.updates += 1

    @torch.no_grad()
    def look(self, stretches: list[Stretch]) -> None:
        """The same for weights that lie in files, while a step of the optimizer has them in memory: before `update`."""
        self._add({s.name: s.tensors["weight"] for s in stretches if s.name in self._averages})

    def _add(self, weights: dict[str, Tensor]) -> None:
        averages = [self._averages[name] for name in weights]
        if averages:
            torch._foreach_lerp_(averages, [*weights.values()], 1 - decay_at(self.decay, self.updates + 1))

    @torch.no_grad()
    def restore(self, read: Callable[[str], Tensor], updates: int) -> None:
        """Sets the averages from whole tensors by name, each process its own stretches of them."""
        for stretch in self.stretches:
            if (average := self._averages.get(stretch.name)) is not None:
                average.copy_(read(stretch.name).flatten()[stretch.start : stretch.start + average.numel()])
        self.updates = updates


def _copy(stretch: Stretch, room: Callable[[int], Tensor]) -> Tensor:
    weight = stretch.tensors["weight"].detach()
    return room(weight.numel()).copy_(weight) if stretch.in_files else weight.clone()
