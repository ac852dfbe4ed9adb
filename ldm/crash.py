"""Named points at which a test can make the process die, as a power cut would."""

from __future__ import annotations

import os
import random


def crash_point(name: str) -> None:
    """Kills this process if LDM_CRASH_AT is "name" or "name:probability"; otherwise does nothing.

    The file LDM_CRASHES, where one is named, gets a line for each time.
    """
    point, _, probability = os.environ.get("LDM_CRASH_AT", "").partition(":")
    if point == name and random.random() < float(probability or 1):
        if crashes := os.environ.get("LDM_CRASHES"):
            with open(crashes, "a") as file:
                file.write(f"{name}\n")
        os._exit(137)
