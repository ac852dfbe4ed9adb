"""Prompt recall on latents whose neighbours are known."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from ldm.evaluation.prompt_recall import derangement, prompt_recall, shuffled_recall

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))


def latents(count: int, seed: int = SEED) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_latents_near_their_own_are_all_right() -> None:
    training, numbers = latents(64), torch.arange(64)
    recall = prompt_recall(training + 0.1 * latents(64, SEED + 1), training, numbers, numbers)
    assert recall.at(1) == 1.0 and recall.right.all()
    assert recall.nearest.tolist() == numbers.tolist()


def test_a_known_half_is_right() -> None:
    training, numbers = latents(8), torch.arange(8)
    z0 = training.clone()
    z0[4:] = training[[5, 6, 7, 4]]  # the second half draws its neighbour
    recall = prompt_recall(z0, training, numbers, numbers)
    assert recall.at(1) == 0.5
    assert recall.nearest.tolist() == [0, 1, 2, 3, 5, 6, 7, 4]
    assert recall.at(8) == 1.0


def test_prompts_may_come_in_any_order_and_more_than_once() -> None:
    training, prompt = latents(8), torch.tensor([3, 3, 0, 7])
    assert prompt_recall(training[prompt], training, prompt, torch.arange(8)).at(1) == 1.0


def test_each_picture_of_a_caption_counts_as_its_own() -> None:
    training, caption = latents(6), torch.tensor([0, 1, 2, 2, 3, 4])
    recall = prompt_recall(training[[2, 3]], training, torch.tensor([2, 2]), caption)
    assert recall.at(1) == 1.0


def test_a_model_that_ignores_its_prompt_is_right_once() -> None:
    training, numbers = latents(32), torch.arange(32)
    constant = training[5].expand(32, -1, -1, -1)
    assert prompt_recall(constant, training, numbers, numbers).at(1) == 1 / 32


def test_equally_near_candidates_are_never_right() -> None:
    numbers = torch.arange(16)
    assert prompt_recall(latents(16), torch.zeros(16, 4, 8, 8), numbers, numbers).at(1) == 0.0


def test_distances_are_exact_far_from_zero() -> None:
    """Latents far away and close together: float32 would lose the difference in the squares."""
    training, numbers = 1e3 + 1e-3 * latents(32), torch.arange(32)
    assert prompt_recall(training, training, numbers, numbers).at(1) == 1.0


@pytest.mark.parametrize("count", [2, 3, 128, 1001])
def test_derangement_moves_everything_and_is_fixed_by_its_seed(count: int) -> None:
    order = derangement(count, SEED)
    assert sorted(order.tolist()) == list(range(count))
    assert (order != torch.arange(count)).all()
    assert torch.equal(order, derangement(count, SEED))


def test_derangement_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        derangement(1, 0)


def test_shuffled_captions_are_never_right_when_all_is_learnt() -> None:
    training, numbers = latents(64), torch.arange(64)
    assert prompt_recall(training, training, numbers, numbers).at(1) == 1.0
    assert shuffled_recall(training, training, numbers, numbers, SEED).at(1) == 0.0


def test_shuffled_captions_of_random_pictures_are_right_by_chance() -> None:
    training, numbers = latents(128), torch.arange(128)
    shares = [shuffled_recall(latents(128, 100 + s), training, numbers, numbers, s).at(1) for s in range(8)]
    assert sum(shares) / 8 <= 3 / 128


def test_a_caption_with_several_pictures_is_dealt_out_as_one() -> None:
    training, caption = latents(6), torch.tensor([0, 0, 1, 1, 2, 2])
    assert shuffled_recall(training, training, caption, caption, SEED).at(1) == 0.0


@pytest.mark.parametrize(("change", "words"), [
    (lambda z, t, p, c: (z[:, :2], t, p, c), "generated latents are"),
    (lambda z, t, p, c: (z[:3], t, p, c), "each latent needs its own"),
    (lambda z, t, p, c: (z * torch.nan, t, p, c), "not finite"),
    (lambda z, t, p, c: (z, t, p + 1, c), "no candidate of their caption, the first is 4"),
])  # fmt: skip
def test_what_has_no_answer_is_refused(change: object, words: str) -> None:
    arguments = change(latents(4), latents(4), torch.arange(4), torch.arange(4))  # type: ignore[operator]
    with pytest.raises(ValueError, match=words):
        prompt_recall(*arguments)
