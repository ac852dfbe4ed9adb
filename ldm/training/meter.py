"""What a training run says of itself: losses over all processes, speed, waiting and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ldm.training.engine import World

# Places in the sums that the processes add up after each step: who wants to stop, losses that are no numbers, count and
# sum of the losses in each quarter of t, and who has written its part of a checkpoint.
STOP, NON_FINITE, COUNT, LOSS, WRITTEN, PLACES = 0, 1, slice(2, 6), slice(6, 10), 10, 11


class Meter:
    """Adds up losses of all processes between two reports; a step costs one small exchange between them."""

    def __init__(self, world: World, share_of_peak: float | None = None) -> None:
        """`share_of_peak`: of the FLOP that all devices could do in a second, what one sample takes; None: unknown."""
        self.world, self.share_of_peak = world, share_of_peak
        self.own_loss_is_finite = True
        self._step = torch.zeros(PLACES, dtype=torch.float64, device=world.device)
        self._clear()

    def start_step(self) -> None:
        self._step.zero_()
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around everything that waits for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @torch.no_grad()
    def add(self, loss: Tensor, quarter: Tensor) -> None:
        """Losses (b,) and the quarter of t (b,), 0 to 3, that each belongs to."""
        loss = loss.double()
        self._step[NON_FINITE] += (~loss.isfinite()).sum()
        self._step[COUNT].index_add_(0, quarter, torch.ones_like(loss))
        self._step[LOSS].index_add_(0, quarter, loss)

    def agree(self, stop: bool, written: bool) -> tuple[bool, bool, bool]:
        """(whether any process wants to stop, whether all losses of the step are finite, whether all processes have
        written), the same in all of them."""
        self.own_loss_is_finite = not self._step[NON_FINITE]
        self._step[STOP] += stop
        self._step[WRITTEN] += written
        dist.all_reduce(self._step)
        self._agreed = self._step.cpu()
        all_written = bool(self._agreed[WRITTEN] == self.world.world_size)
        return bool(self._agreed[STOP]), not self._agreed[NON_FINITE], all_written

    def end_step(self, samples: int, **latest: float) -> None:
        """The step counts."""
        self._sums += self._agreed
        self._seconds += time.perf_counter() - self._started
        self._samples += samples
        self._latest = latest

    def read(self) -> dict[str, float]:
        """Everything since the last reading."""
        count, loss = self._sums[COUNT], self._sums[LOSS]
        values = {"loss": float(loss.sum() / count.sum()), **self._latest}
        values |= {f"loss_t{i}": float(loss[i] / count[i]) for i in range(4) if count[i]}
        values["samples_per_second"] = self._samples / self._seconds
        if self.share_of_peak is not None:
            values["mfu"] = values["samples_per_second"] * self.share_of_peak
        values["input_wait"] = self._waited / self._seconds
        values["memory_bytes"] = float(self._memory())
        self._clear()
        return values

    def _clear(self) -> None:
        self._sums = torch.zeros(PLACES, dtype=torch.float64)
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0
        self._latest: dict[str, float] = {}

    def _memory(self) -> int:
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
