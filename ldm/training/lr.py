"""Learning-rate multipliers: pure functions of the step, so that a resume needs no state."""

from __future__ import annotations

import math

NAMES = ("constant", "cosine", "linear", "inverse_sqrt")


def multiplier(name: str, step: int, *, warmup_steps: int, max_steps: int, end: float) -> float:
    """What the learning rate is multiplied with in update `step`, counted from 0.

    All rise linearly over `warmup_steps`. Then "constant" stays at 1, "cosine" and "linear" fall to `end` at
    `max_steps`, "inverse_sqrt" falls as sqrt(warmup_steps / step) (Vaswani et al. 2017, Sec. 5.3).
    """
    if name not in NAMES:
        raise ValueError(f"training.lr_schedule is {name!r}; there are: {', '.join(NAMES)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    if name == "inverse_sqrt":
        return math.sqrt(max(warmup_steps, 1) / max(step, 1))
    done = min(1.0, (step - warmup_steps) / max(max_steps - warmup_steps, 1))
    left = 1 - done if name == "linear" else (1 + math.cos(math.pi * done)) / 2
    return end + (1 - end) * left
