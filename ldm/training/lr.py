"""Learning-rate multipliers: pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

NAMES = ("constant", "linear", "cosine", "inverse_sqrt")
FALLING = ("linear", "cosine")  # to an end at max_steps, which therefore decides every step's rate


def multiplier(name: str, step: int, warmup_steps: int, max_steps: int, end: float) -> float:
    """Share of the peak learning rate that update `step`, counted from 1, is made with.

    It rises in a straight line to 1 at `warmup_steps`; linear and cosine then fall to `end` at `max_steps` and stay
    there, inverse_sqrt falls as sqrt(warmup_steps / step) (Vaswani et al. 2017, Eq. 3) but never under `end`.
    """
    check(name, warmup_steps, max_steps, end)
    if step < warmup_steps:
        return 1 / warmup_steps * step
    if name == "constant":
        return 1.0
    if name == "inverse_sqrt":
        return max(end, inverse_sqrt(step, warmup_steps))
    after = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return linear(after, 1.0, end) if name == "linear" else cosine(after, 1.0, end)


def check(name: str, warmup_steps: int, max_steps: int, end: float) -> None:
    """Raises ValueError for settings that make no schedule."""
    if name not in NAMES:
        raise ValueError(f"training.lr_schedule is {name!r}; there are: {', '.join(NAMES)}")
    if not 0 <= warmup_steps <= max_steps:
        raise ValueError(
            f"training.warmup_steps is {warmup_steps}; it must be between 0 and training.max_steps, {max_steps}"
        )
    if not 0 <= end <= 1:
        raise ValueError(f"training.lr_end is {end}, a share of the learning rate; it must be between 0 and 1")


def linear(share: float, peak: float, end: float) -> float:
    """A straight line from `peak` at share 0 to `end` at share 1 of the way, and `end` from there on."""
    return end + (peak - end) * (1 - min(share, 1.0))


def cosine(share: float, peak: float, end: float) -> float:
    """Half a cosine from `peak` at share 0 to `end` at share 1 of the way (Loshchilov & Hutter 2017, Eq. 5)."""
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * min(share, 1.0)))


def inverse_sqrt(step: float, warmup_steps: int) -> float:
    """1 at `warmup_steps`, then falling with the square root of the step."""
    return math.sqrt(max(1, warmup_steps) / max(1, step))
