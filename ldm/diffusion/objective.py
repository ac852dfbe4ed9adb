"""What the network is asked for, what its answer means, and how wrong it is.

prediction type   the network's target       source
"eps"             eps                        Ho et al. 2020, Eq. 14
"v"               signal * eps - noise * z0  Salimans & Ho 2022, App. D
"z0"              z0
"flow"            eps - z0                   Liu et al. 2022, Eq. 1, on s = (t + 1) / T
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule, velocity

PREDICTION_TYPES = ("eps", "v", "z0", "flow")
LOSSES = ("l2", "l1")


def check_prediction_type(prediction_type: str, schedule: Schedule) -> None:
    """Raises ValueError for a type that does not exist or that its schedule makes meaningless."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"diffusion.prediction is {prediction_type!r}; there are: {', '.join(PREDICTION_TYPES)}")
    if schedule.straight != (prediction_type == "flow"):
        raise ValueError(
            f"diffusion.prediction={prediction_type} does not fit the schedule: flow belongs to schedule=flow "
            f"and to no other"
        )
    if prediction_type == "eps" and schedule.signal[-1] == 0:
        raise ValueError(
            "diffusion.zero_terminal_snr=true leaves no signal at the last timestep, from which eps cannot give z0; "
            "use diffusion.prediction=v"
        )


def check_loss(kind: str, min_snr_gamma: float | None) -> None:
    """Raises ValueError for a loss that does not exist, or that the weight of timesteps does not belong to."""
    if kind not in LOSSES:
        raise ValueError(f"diffusion.loss is {kind!r}; there are: {', '.join(LOSSES)}")
    if kind != "l2" and min_snr_gamma is not None:
        raise ValueError(
            f"diffusion.min_snr_gamma={min_snr_gamma:g} weighs squared errors, and diffusion.loss is {kind}; set the "
            f"one to null or the other to l2"
        )


def target(prediction_type: str, schedule: Schedule, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network should have said: z0, eps (b, c, h, w), t (b,) -> (b, c, h, w)."""
    if prediction_type == "eps":
        return eps
    if prediction_type == "z0":
        return z0
    if prediction_type == "flow":
        return eps - z0
    return velocity(schedule, z0, eps, t)


def split(
    prediction_type: str, prediction: Tensor, z_t: Tensor, signal: Tensor | float, noise: Tensor | float
) -> tuple[Tensor, Tensor]:
    """What a prediction at z_t (b, c, h, w) says of the clean latent and of the noise, each (b, c, h, w)."""
    if prediction_type == "eps":
        return (z_t - noise * prediction) / signal, prediction
    if prediction_type == "z0":
        return prediction, (z_t - signal * prediction) / noise
    if prediction_type == "flow":
        return z_t - noise * prediction, z_t + signal * prediction
    return signal * z_t - noise * prediction, noise * z_t + signal * prediction


def z0_and_eps(
    prediction_type: str, schedule: Schedule, prediction: Tensor, z_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """`split` at timesteps t (b,), each sample at its own."""
    return split(prediction_type, prediction, z_t, *schedule.at(t, z_t))


def convert(have: str, want: str, schedule: Schedule, prediction: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """A prediction of one type as the same prediction of another type, (b, c, h, w)."""
    if have == want:
        return prediction
    return target(want, schedule, *z0_and_eps(have, schedule, prediction, z_t, t), t)


def z0_error_weight(prediction_type: str, schedule: Schedule, t: Tensor) -> Tensor:
    """(b,): squared error in z0 for each unit of squared error in the prediction, at the same z_t.

    An error d in eps moves z0 by noise / signal * d, one in v or flow by noise * d; 1 / SNR, and 1 / (SNR + 1) for v.
    """
    if prediction_type == "z0":
        return torch.ones_like(schedule.noise[t])
    return schedule.sigma[t].square() if prediction_type == "eps" else schedule.noise[t].square()


def min_snr_weight(prediction_type: str, schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """Weight (b,) of each sample's loss: min(SNR, gamma) on the squared error in z0 (Hang et al. 2023, Sec. 3.4).

    That is min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v. Pure noise weighs nothing.
    """
    return schedule.snr[t].clamp(max=gamma) * z0_error_weight(prediction_type, schedule, t)


def loss_per_sample(prediction: Tensor, wanted: Tensor, kind: str = "l2") -> Tensor:
    """Mean over (c, h, w) of the squared ("l2") or absolute ("l1") error, in float32 at least: -> (b,)."""
    check_loss(kind, None)
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    error = prediction.to(dtype) - wanted.to(dtype)
    return (error.square() if kind == "l2" else error.abs()).flatten(1).mean(1)


def loss(
    prediction_type: str,
    schedule: Schedule,
    prediction: Tensor,
    z0: Tensor,
    eps: Tensor,
    t: Tensor,
    *,
    kind: str = "l2",
    min_snr_gamma: float | None = None,
) -> Tensor:
    """Loss of each sample (b,), whose mean is what training descends (Rombach et al. 2022, Eq. 2)."""
    each = loss_per_sample(prediction, target(prediction_type, schedule, z0, eps, t), kind)
    if min_snr_gamma is None:
        return each
    return each * min_snr_weight(prediction_type, schedule, t, min_snr_gamma).to(each)
