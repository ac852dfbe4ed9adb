"""How much memory a process takes (Linux)."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from ldm.training import engine


def resident_bytes(name: str = "VmRSS") -> int:
    """Of this process, now; "VmHWM": the most since `forget_peak`."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_tensors() -> None:
    """Has glibc give back what is freed, where the engine keeps it for speed: what is then lost between blocks, up to
    half of everything, is no part of what is measured."""

    def own_pages() -> None:
        mmap_threshold = -3
        ctypes.CDLL(None).mallopt(mmap_threshold, 65536)

    engine._keep_freed_memory = own_pages
