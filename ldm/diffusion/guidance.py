"""Classifier-free guidance as a wrapper of the denoiser (Ho & Salimans 2022, Eq. 6)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Condition = dict[str, Tensor]
Predict = Callable[[Tensor, Tensor], Tensor]


def guided(
    denoiser: Callable[[Tensor, Tensor, Condition], Tensor],
    condition: Condition,
    null_condition: Condition,
    guidance_scale: float,
) -> Predict:
    """(z_t, t) -> prediction, pushed away from the null condition: null + scale * (conditional - null).

    Both run in one batch, [null, conditional]. At scale 1 only the conditional one runs.
    """
    if guidance_scale == 1 or not condition:
        return lambda z_t, t: denoiser(z_t, t, condition)
    both = {name: torch.cat([null_condition[name], value]) for name, value in condition.items()}

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        null, conditional = denoiser(torch.cat([z_t, z_t]), torch.cat([t, t]), both).chunk(2)
        return null + guidance_scale * (conditional - null)

    return predict
