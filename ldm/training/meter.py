"""What a training run says of itself: losses over all processes, speed, waiting and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ldm.training.engine_config import World

# Places in the sums that the processes add up after each step: who wants to stop, whether the first process wants a
# checkpoint, who has written its part of one, losses that are no numbers, count and sum of the losses in each quarter
# of t; after them two for each process, which it alone fills: seconds that it waited for data, bytes that it took.
STOP, SAVE, WRITTEN, NON_FINITE, COUNT, LOSS, OWN = 0, 1, 2, 3, slice(4, 8), slice(8, 12), 12


class Agreed(NamedTuple):
    """What all processes know after a step, the same in each of them."""

    stop: bool = False  # one of them wants to
    save: bool = False  # the first of them wants to
    written: bool = False  # all of them have written
    finite: bool = True  # all losses are numbers


def any_says(word: bool, world: World) -> bool:
    """Whether any process says so; the same in each of them."""
    said = torch.tensor(float(word), device=world.device)
    dist.all_reduce(said)
    return bool(said)


class Meter:
    """Adds up losses of all processes between two reports; a step costs one small exchange between them."""

    def __init__(self, world: World, share_of_peak: float | None = None) -> None:
        """`share_of_peak`: of the FLOP that all devices could do in a second, what one sample takes; None: unknown."""
        self.world, self.share_of_peak = world, share_of_peak
        self.own_loss_is_finite = True
        self._step = torch.zeros(OWN + 2 * world.world_size, dtype=torch.float64, device=world.device)
        self._own = slice(OWN + 2 * world.rank, OWN + 2 * world.rank + 2)
        self._own_bytes = 0  # the most that this process took in its last step, the optimizer's part included
        self._clear()

    def start_step(self) -> None:
        self._step.zero_()
        self._step_waited = 0.0
        if self.world.device.type == "cuda":  # what a grid or a checkpoint took is none of a step's
            torch.cuda.reset_peak_memory_stats(self.world.device)
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around everything in a step that waits for data."""
        started = time.perf_counter()
        yield
        self._step_waited += time.perf_counter() - started

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around what checkpoints cost outside of steps."""
        started = time.perf_counter()
        yield
        self._saved += time.perf_counter() - started

    @torch.no_grad()
    def add(self, loss: Tensor, quarter: Tensor) -> None:
        """Losses (b,) and the quarter of t (b,), 0 to 3, that each belongs to."""
        loss = loss.double()
        self._step[NON_FINITE] += (~loss.isfinite()).sum()
        self._step[COUNT].index_add_(0, quarter, torch.ones_like(loss))
        self._step[LOSS].index_add_(0, quarter, loss)

    def agree(self, stop: bool, save: bool, written: bool) -> Agreed:
        """What the processes make of the step and of what each of them wants."""
        self.own_loss_is_finite = not self._step[NON_FINITE]
        said = [stop, save and self.world.rank == 0, written]
        self._step[: len(said)] += self._step.new_tensor(said)
        self._step[self._own] = self._step.new_tensor([self._step_waited, max(self._own_bytes, self._memory())])
        dist.all_reduce(self._step)
        self._agreed = self._step.cpu()
        stop, save = bool(self._agreed[STOP]), bool(self._agreed[SAVE])
        return Agreed(stop, save, bool(self._agreed[WRITTEN] == self.world.world_size), not self._agreed[NON_FINITE])

    def end_step(self, samples: int, grad_norm: float, **latest: float) -> None:
        """The step counts."""
        self._sums += self._agreed[:OWN]
        waited, memory = self._agreed[OWN:].view(-1, 2).amax(0).tolist()
        self._seconds += time.perf_counter() - self._started
        self._waited += waited
        self._bytes = max(self._bytes, memory)
        self._own_bytes = self._memory()
        self._samples += samples
        self._grad_norms.append(grad_norm)
        self._latest = latest

    def read(self) -> dict[str, float]:
        """Everything since the last reading; of waiting and memory what the worst process had."""
        count, loss = self._sums[COUNT], self._sums[LOSS]
        values = {"loss": float(loss.sum() / count.sum()), **self._latest}
        values |= {f"loss_t{i}": float(loss[i] / count[i]) for i in range(4) if count[i]}
        values["grad_norm"] = sum(self._grad_norms) / len(self._grad_norms)
        values["grad_norm_max"] = max(self._grad_norms)
        values["samples_per_second"] = self._samples / self._seconds  # of steps; what they wait for counts apart
        if self.share_of_peak is not None:
            values["mfu"] = values["samples_per_second"] * self.share_of_peak
        values["input_wait"] = self._waited / self._seconds
        values["memory_bytes"] = self._bytes
        values["outside_seconds"] = time.perf_counter() - self._cleared - self._seconds
        values["checkpoint_seconds"] = self._saved
        self._clear()
        return values

    def _clear(self) -> None:
        self._sums = torch.zeros(OWN, dtype=torch.float64)
        self._samples, self._seconds, self._waited, self._saved, self._bytes = 0, 0.0, 0.0, 0.0, 0.0
        self._grad_norms: list[float] = []
        self._latest: dict[str, float] = {}
        self._cleared = time.perf_counter()

    def _memory(self) -> int:
        """Bytes: on a GPU the most since the step began, on a processor since the process did."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
