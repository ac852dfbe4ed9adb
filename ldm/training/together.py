"""What the processes of a training tell each other: small values, and errors, which are then errors of all."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Result) -> list[Result]:
    """The values of all processes, on every one of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Result) -> Result:
    return gather(value)[0]


def outcomes(work: Callable[[], Result]) -> tuple[list[Result], dict[int, Exception]]:
    """What every process makes of it, and the errors of those that fail, by rank; the same on every one of them."""
    result, own = None, None
    try:
        result = work()
    except Exception as raised:  # whatever it is, the others would wait for this process
        own = raised
    made = gather((result, None if own is None else _portable(own)))
    errors = {who: error for who, (_, error) in enumerate(made) if error is not None}
    if own is not None:
        errors[rank()] = own
    return [result for result, _ in made], errors  # type: ignore[misc]


def each(work: Callable[[], Result]) -> list[Result]:
    """What every process makes of it, on every one of them; where one meets an error, all of them raise one."""
    results, errors = outcomes(work)
    if errors:
        raise errors.get(rank(), errors[min(errors)])
    return results


def _portable(error: Exception) -> Exception:
    """The error as others can be sent it: some kinds cannot be made again from what they were made of."""
    try:
        pickle.dumps(error)
        return copy.deepcopy(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def by_first(work: Callable[[], Result]) -> Result:
    """What the first process makes of it, in all of them."""
    return each(lambda: work() if rank() == 0 else None)[0]  # type: ignore[return-value]
