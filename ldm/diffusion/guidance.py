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
    rescale: float = 0.0,
) -> Predict:
    """(z_t, t) -> prediction, pushed away from the null condition: null + scale * (conditional - null).

    Both run in one batch, [null, conditional]. At scale 1 only the conditional one runs. What guidance must leave
    alone (concat, say) stands in both conditions. `rescale` brings the spread of a guided prediction that far back to
    the conditional one's (Lin et al. 2023, Eq. 15 and 16); they use 0.7 with zero terminal SNR.
    """
    if guidance_scale == 1 or not condition:
        return lambda z_t, t: denoiser(z_t, t, condition).to(z_t)
    if set(condition) != set(null_condition):
        raise ValueError(f"condition has {sorted(condition)}, null_condition {sorted(null_condition)}; both need both")
    both = {name: torch.cat([null_condition[name], value]) for name, value in condition.items()}

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        # In the dtype of z_t, whatever the denoiser computes in: guidance multiplies what bf16 would round here.
        null, conditional = denoiser(torch.cat([z_t, z_t]), torch.cat([t, t]), both).to(z_t).chunk(2)
        prediction = null + guidance_scale * (conditional - null)
        return rescaled(prediction, conditional, rescale) if rescale else prediction

    return predict


def rescaled(prediction: Tensor, conditional: Tensor, share: float) -> Tensor:
    """prediction (b, c, h, w) with its standard deviation brought a share of the way to that of `conditional`."""
    dims = tuple(range(1, prediction.ndim))
    ratio = conditional.std(dims, keepdim=True) / prediction.std(dims, keepdim=True)
    return prediction * (share * ratio + (1 - share))
