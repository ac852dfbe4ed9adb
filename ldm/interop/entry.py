"""One of our tensors and those of another layout that it is made of. Only shapes change, so there and back is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """Our key and theirs: one, or several whose rows ours stacks (query, key and value of one projection)."""

    own: str
    theirs: tuple[str, ...]
    ones: int = 0  # last dimensions, of size 1, that only our tensor has: what is a convolution here, linear there
    heads: int | None = None  # ours keeps the stacked rows head by head: (head, qkv, channel)
    turned: bool = False  # theirs is the transposed matrix

    def to_own(self, tensors: list[Tensor]) -> Tensor:
        """Their tensors, in the order of `theirs`, as ours."""
        if len(tensors) == 1:
            tensor = tensors[0].t().contiguous() if self.turned else tensors[0]
        elif self.heads is None:
            tensor = torch.cat(tensors)
        else:
            tensor = torch.stack([x.unflatten(0, (self.heads, -1)) for x in tensors], 1).flatten(0, 2)
        return tensor.reshape(*tensor.shape, *[1] * self.ones) if tensor.ndim > 1 else tensor

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        """Ours as their tensors, in the order of `theirs`."""
        if tensor.ndim > 1 and self.ones:
            tensor = tensor.flatten(tensor.ndim - self.ones - 1)
        parts = len(self.theirs)
        if parts == 1:
            return [tensor.t().contiguous() if self.turned else tensor]
        if self.heads is None:
            return [part.contiguous() for part in tensor.chunk(parts)]
        rows = tensor.unflatten(0, (self.heads, parts, -1))
        return [rows[:, i].flatten(0, 1).contiguous() for i in range(parts)]


def to_own(entries: Iterable[Entry], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Their tensors, read by key, as our state dict."""
    return {entry.own: entry.to_own([read(key) for key in entry.theirs]) for entry in entries}


def to_theirs(entries: Iterable[Entry], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in their layout."""
    written = {}
    for entry in entries:
        written.update(zip(entry.theirs, entry.to_theirs(state[entry.own]), strict=True))
    return written


Shapes = Mapping[str, tuple[int, ...]]


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Key -> shape."""
    return {key: tuple(value.shape) for key, value in state.items()}


def misfits(found: Shapes, expected: Shapes) -> list[str]:
    """Every key that is missing, unexpected or of another shape, in words; nothing where all fits."""
    problems = [f"{key} is missing" for key in expected.keys() - found.keys()]
    problems += [f"{key} is unexpected" for key in found.keys() - expected.keys()]
    problems += [
        f"{key} is {found[key]}, expected {expected[key]}"
        for key in found.keys() & expected.keys()
        if tuple(found[key]) != tuple(expected[key])
    ]
    return sorted(problems)


def require_fit(found: Shapes, expected: Shapes, where: str) -> None:
    """Raises ValueError that names what does not fit."""
    problems = misfits(found, expected)
    if problems:
        raise ValueError(f"{where}: {some(problems)}")


def load(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Puts weights into a network; where one is missing, too many or of another shape, none is changed."""
    require_fit(shapes(state), shapes(network.state_dict()), f"{where} does not fit this network")
    network.load_state_dict(state)


def some(words: list[str], most: int = 8) -> str:
    """The first of many, and how many more."""
    return "; ".join(words[:most]) + (f"; and {len(words) - most} more" if len(words) > most else "")
