"""Named points at which a test can make the process die, as a power cut would."""

from __future__ import annotations

import os
import random


def crash_point(name: str) -> None:
    """Kills this process if LDM_CRASH_AT is "name" or "name:probability"; otherwise does nothing."""
    point, _, probability = os.environ.get("LDM_CRASH_AT", "").partition(":")
    if point == name and random.random() < float(probability or 1):
        os._exit(137)
