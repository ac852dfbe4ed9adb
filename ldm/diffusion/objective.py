"""What the network is asked for, and what its answer means.

prediction type   the network's target                      source
"eps"             eps                                       Ho et al. 2020, Eq. 14
"v"               signal * eps - noise * z0                 Salimans & Ho 2022, App. D
"z0"              z0
"flow"            eps - z0                                  Liu et al. 2022, Eq. 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule

PREDICTION_TYPES = ("eps", "v", "z0", "flow")


def check_prediction_type(prediction_type: str, schedule: Schedule) -> None:
    """Raises ValueError for a type that does not exist or that its schedule makes meaningless."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"diffusion.prediction is {prediction_type!r}; there are: {', '.join(PREDICTION_TYPES)}")
    straight = bool(((schedule.signal + schedule.noise) - 1).abs().max() < 1e-9)
    if straight != (prediction_type == "flow"):
        raise ValueError(
            f"diffusion.prediction={prediction_type} does not fit the schedule: flow belongs to schedule=flow "
            f"and to no other"
        )
    if prediction_type == "eps" and schedule.signal[-1] == 0:
        raise ValueError(
            "diffusion.zero_terminal_snr=true leaves no signal at the last timestep, from which eps cannot give z0; "
            "use diffusion.prediction=v"
        )


def target(prediction_type: str, schedule: Schedule, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network should have said: z0, eps (b, c, h, w), t (b,) -> (b, c, h, w)."""
    if prediction_type == "eps":
        return eps
    if prediction_type == "z0":
        return z0
    if prediction_type == "flow":
        return eps - z0
    signal, noise = schedule.at(t, z0)
    return signal * eps - noise * z0


def z0_and_eps(
    prediction_type: str, schedule: Schedule, prediction: Tensor, z_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """What a prediction at z_t (b, c, h, w) says of the clean latent and of the noise, each (b, c, h, w)."""
    signal, noise = schedule.at(t, z_t)
    if prediction_type == "eps":
        return (z_t - noise * prediction) / signal, prediction
    if prediction_type == "z0":
        return prediction, (z_t - signal * prediction) / noise
    if prediction_type == "flow":
        return z_t - noise * prediction, z_t + signal * prediction
    return signal * z_t - noise * prediction, noise * z_t + signal * prediction


def min_snr_weight(prediction_type: str, schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """Weight (b,) of each sample's loss (Hang et al. 2023): min(SNR, gamma) on the error in z0.

    The error in eps is sqrt(SNR) times that in z0, and the error in v sqrt(SNR + 1) times, so their weights divide by
    SNR and by SNR + 1.
    """
    snr = schedule.snr[t]
    weight = snr.clamp(max=gamma)
    if prediction_type == "eps":
        return weight / snr
    if prediction_type == "v":
        return weight / (snr + 1)
    if prediction_type == "z0":
        return weight
    raise ValueError(f"diffusion.min_snr_gamma has no meaning for diffusion.prediction={prediction_type}; set it to null")


def loss_per_sample(prediction: Tensor, wanted: Tensor, kind: str = "l2") -> Tensor:
    """Mean over (c, h, w) of the squared ("l2") or absolute ("l1") error, in float32: -> (b,)."""
    error = prediction.float() - wanted.float()
    if kind not in ("l1", "l2"):
        raise ValueError(f"diffusion.loss is {kind!r}; there are: l1, l2")
    return (error.square() if kind == "l2" else error.abs()).flatten(1).mean(1)


def offset_noise(eps: Tensor, channel_noise: Tensor, strength: float) -> Tensor:
    """eps (b, c, h, w) with a share of noise (b, c, 1, 1) that is constant over a picture."""
    return eps + strength * channel_noise if strength else eps


@torch.no_grad()
def loss_by_quarter(loss: Tensor, t: Tensor, timesteps: int) -> dict[str, float]:
    """Mean of the losses (b,) in each quarter of t, for the quarters that occur."""
    quarter = t * 4 // timesteps
    return {f"loss_t{i}": float(loss[quarter == i].mean()) for i in range(4) if bool((quarter == i).any())}
