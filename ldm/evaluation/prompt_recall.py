"""Prompt recall: how often a generated latent lies nearest to the training latent of its own prompt.

It asks whether a model that was trained on a few pictures has learnt to draw each of them from its caption: text,
U-Net, guidance and sampler must all work for it, and a model that ignores its prompt reaches 1 / candidates. It is a
check of the machinery on a small set, no measure of quality: a model that memorises has the best one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recall:
    """What was found for each prompt."""

    nearest: Tensor  # (n,) int64: the candidate that the generated latent lies nearest to
    right: Tensor  # (n,) bool: whether that is a picture of the prompt
    rank: Tensor  # (n,) int64: candidates nearer than the nearest picture of the prompt; 0 is right

    def at(self, k: int) -> float:
        """Share of prompts that have a picture of theirs among the k nearest."""
        return (self.rank < k).double().mean().item()


def prompt_recall(z0: Tensor, training: Tensor, prompt: Tensor, caption: Tensor) -> Recall:
    """z0 (n, c, h, w) and training (m, c, h, w) latents; prompt (n,) and caption (m,) name captions by number.

    A candidate is a picture of a prompt if its caption has the prompt's number. L2 over the whole latent.
    """
    _check(z0, training, prompt, caption)
    distance = torch.cdist(z0.flatten(1).double(), training.flatten(1).double())  # (n, m)
    own = prompt[:, None] == caption[None, :]
    # Of equally near candidates those of other captions come first, so that a constant answer is never right.
    own_distance = distance.masked_fill(~own, torch.inf).amin(dim=1)
    rank = ((distance <= own_distance[:, None]) & ~own).sum(dim=1)
    return Recall(nearest=distance.argmin(dim=1), right=rank == 0, rank=rank)


def derangement(count: int, seed: int) -> Tensor:
    """A permutation (count,) of 0..count-1 that leaves nothing in its place (Sattolo 1986), fixed by the seed."""
    if count < 2:
        raise ValueError(f"{count} captions cannot be shuffled so that none keeps its place; at least 2 are needed")
    order, draw = torch.arange(count), torch.Generator().manual_seed(seed)
    for i in range(count - 1, 0, -1):
        j = int(torch.randint(i, (1,), generator=draw))
        order[[i, j]] = order[[j, i]]
    return order


def shuffled_recall(z0: Tensor, training: Tensor, prompt: Tensor, caption: Tensor, seed: int) -> Recall:
    """The control: the same pictures judged against captions that were dealt out anew, none to its own."""
    numbers, place = torch.unique(caption, return_inverse=True)
    dealt = numbers[derangement(len(numbers), seed)]
    return prompt_recall(z0, training, prompt, dealt[place])


def _check(z0: Tensor, training: Tensor, prompt: Tensor, caption: Tensor) -> None:
    if z0.shape[1:] != training.shape[1:]:
        raise ValueError(f"generated latents are {tuple(z0.shape[1:])}, training latents {tuple(training.shape[1:])}")
    if len(z0) != len(prompt) or len(training) != len(caption):
        raise ValueError(
            f"{len(z0)} latents and {len(prompt)} prompts, {len(training)} candidates and {len(caption)} captions: "
            f"each latent needs its own"
        )
    if not (torch.isfinite(z0).all() and torch.isfinite(training).all()):
        raise ValueError("a latent is not finite; such a latent has no nearest one")
    missing = set(prompt.tolist()) - set(caption.tolist())
    if missing:
        raise ValueError(f"{len(missing)} prompts have no candidate of their caption, the first is {min(missing)}")
