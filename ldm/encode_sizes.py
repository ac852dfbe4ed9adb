"""How many pictures to encode at once: what each number takes of a device's memory, and how fast it goes there."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.encode import Encoder, Stored, TooLarge

SHARE = 0.85  # of the memory that there is; the rest is for decoding back, for other kernels, and for what others take
SECONDS = 1.0  # for which each batch size is timed, after a first call that is not
NO_FASTER = 1.03  # times as many pictures a second are worth a larger batch
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Tried:
    batch_size: int
    pictures_per_second: float
    bytes: int  # that the process held at its peak


def try_sizes(encoder: Encoder, height: int, width: int, limit: int) -> Iterator[Tried]:
    """Doubles the batch while a share of `limit` bytes is enough for it and it goes faster; then half as much again.

    What a batch will take follows from the two before it, so that none is tried for which a machine would kill us.
    """
    tried: list[Tried] = []
    size = 1
    while expected_bytes(tried, size) <= SHARE * limit and (found := _try(encoder, size, height, width)):
        tried.append(found)
        yield found
        if len(tried) > 2 and best(tried).batch_size < tried[-2].batch_size:
            return
        size *= 2
    half_more = size * 3 // 4
    if size > 2 and expected_bytes(tried, half_more) <= SHARE * limit:
        found = _try(encoder, half_more, height, width)
        if found:
            yield found


def best(tried: list[Tried]) -> Tried:
    """The smallest batch that is as good as the fastest one: less is padded where a shard ends."""
    fastest = max(each.pictures_per_second for each in tried)
    return min((each for each in tried if NO_FASTER * each.pictures_per_second >= fastest), key=lambda x: x.batch_size)


def expected_bytes(tried: list[Tried], size: int) -> float:
    """On the straight line through the last two batches; nothing is known before the first."""
    if len(tried) < 2:
        return sum(2 * each.bytes for each in tried)
    (low, high) = tried[-2:]
    return high.bytes + (high.bytes - low.bytes) / (high.batch_size - low.batch_size) * (size - high.batch_size)


def _try(encoder: Encoder, size: int, height: int, width: int) -> Tried | None:
    """None where it does not fit."""
    encoder.batch_size = size
    image = torch.rand(size, 3, height, width) * 2 - 1
    _forget_peak(encoder.device)
    try:
        Stored(encoder.encode(image)).wait()
        started, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - started < SECONDS:
            Stored(encoder.encode(image)).wait()
            calls += 1
    except TooLarge:
        return None
    return Tried(size, size * calls / (time.perf_counter() - started), _peak(encoder.device))


# -- memory ------------------------------------------------------------------------------------------------------------
def memory_limit(device: torch.device) -> int:
    """Bytes that this process may come to hold on a device: what it holds now, and what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return _in_proc("self/status", "VmRSS") + min(_in_proc("meminfo", "MemAvailable"), free_in_cgroup(PROC, CGROUPS))


def free_in_cgroup(proc: Path, cgroups: Path) -> int:
    """Bytes that are left below the limits of this process's cgroup and of those above it (version 2)."""
    own = re.search(r"^0::/(.*)$", (proc / "self/cgroup").read_text(), re.MULTILINE)
    folder, free = cgroups / (own[1] if own else ""), 2**62
    for each in (folder, *folder.parents):
        if (each / "memory.max").is_file() and (most := (each / "memory.max").read_text().strip()) != "max":
            cached = re.search(r"^inactive_file (\d+)$", (each / "memory.stat").read_text(), re.MULTILINE)
            held = int((each / "memory.current").read_text()) - (int(cached[1]) if cached else 0)
            free = min(free, int(most) - held)
    return free


def _in_proc(name: str, line: str) -> int:
    return 1024 * int(re.search(rf"^{line}:\s+(\d+) kB$", (PROC / name).read_text(), re.MULTILINE)[1])


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL(None).malloc_trim(0)
    (PROC / "self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _in_proc("self/status", "VmHWM")
