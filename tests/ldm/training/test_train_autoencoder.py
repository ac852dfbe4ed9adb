"""Training of the small autoencoder: the split, exact resumption, refusals, and that it learns."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm.config import AutoencoderConfig, AutoencoderTrainingConfig, TinyConfig
from ldm.training.autoencoder_loss import kl_divergence, psnr, reconstruction
from ldm.training.train_autoencoder import (
    make_network,
    orthogonal,
    perceptual_hash,
    reconstruction_psnr,
    split_pictures,
    train_autoencoder,
)

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))

NETWORK = AutoencoderConfig(
    kind="tiny", posterior="kl", factor=8, latent_channels=4, compvis=None,
    tiny=TinyConfig(
        image_low=-1.0, latent_clamp=None, patch=8, encoder_widths=[24], encoder_blocks=[1],
        decoder_widths=[24], decoder_blocks=[1], block_convs=2, lowest_norm=False,
    ),
)  # fmt: skip
TRAINING = AutoencoderTrainingConfig(
    image_size=32, crop_size=24, whole_share=0.5, held_out_share=0.2, same_picture=" (light|dark)$",
    near_duplicate_bits=4, batch_size=4, max_steps=8, warmup_steps=2, learning_rate=0.02, bias_learning_rate=0.002,
    momentum=0.95, ema_decay=0.9, kl_weight=3e-4, checkpoint_every_steps=4, log_every_steps=4, threads=1, seed=SEED,
)  # fmt: skip


def pictures(count: int) -> np.ndarray:
    """Squares and stripes of a few colours over white, (count, 32, 32, 3) uint8."""
    random = np.random.default_rng(SEED)
    images = np.full((count, 32, 32, 3), 255, np.uint8)
    for image in images:
        for _ in range(3):
            top, left = random.integers(0, 24, 2)
            height, width = random.integers(6, 20, 2)
            image[top : top + height, left : left + width] = random.integers(0, 256, 3)
    return images


def captions(count: int) -> list[str]:
    return [f"drawing number {number}" for number in range(count)]


def silent(figures: dict[str, float], step: int) -> None:
    del figures, step


def run(folder: Path, training: AutoencoderTrainingConfig, should_stop: Callable[[], bool] = lambda: False) -> object:
    return train_autoencoder(NETWORK, training, pictures(40), captions(40), folder, log=silent, should_stop=should_stop)


# ---- losses -----------------------------------------------------------------------------------------------
def test_losses_in_closed_form() -> None:
    image = torch.full((2, 3, 4, 4), 0.5)
    torch.testing.assert_close(reconstruction(image - 0.5, image), torch.full((2,), 1.0))
    torch.testing.assert_close(psnr(image - 0.02, image), torch.full((2,), 40.0), rtol=0, atol=1e-3)
    mean, logvar = torch.full((2, 4, 2, 2), 3.0), torch.zeros(2, 4, 2, 2)
    torch.testing.assert_close(kl_divergence(mean, logvar), torch.full((2,), 4.5))
    standard = torch.distributions.Normal(0.0, 1.0)
    other = torch.distributions.Normal(0.3, 0.7)
    ours = kl_divergence(torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.7).square().log())
    torch.testing.assert_close(ours[0], torch.distributions.kl_divergence(other, standard))


# ---- optimizer --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (64, 4, 1, 1)])
def test_updates_are_nearly_orthogonal_and_of_known_size(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(SEED)
    update = orthogonal(torch.randn(shape, generator=generator) * 1e-4)
    scale = max(1.0, shape[0] / (shape[1] * shape[2] * shape[3])) ** 0.5
    values = torch.linalg.svdvals(update.flatten(1)) / scale
    assert update.shape == shape
    assert values.min() > 0.5 and values.max() < 1.3


# ---- the split --------------------------------------------------------------------------------------------
def test_split_is_fixed_by_the_caption_alone() -> None:
    images, names = pictures(40), captions(40)
    split = split_pictures(images, names, TRAINING)
    order = np.random.default_rng(SEED).permutation(40)
    again = split_pictures(images[order], [names[row] for row in order], TRAINING)
    assert {names[row] for row in split.held_out} == {names[order[row]] for row in again.held_out}
    assert sorted([*split.trained, *split.held_out, *split.near]) == list(range(40))


def test_a_motif_is_held_out_as_a_whole_and_its_likes_are_not_trained_on() -> None:
    images, names = pictures(40), captions(40)
    held_out = split_pictures(images, names, TRAINING).held_out[0]
    # Another colour of the held-out motif; the same picture under another name, a little noisy; that name's variant.
    noisy = np.clip(images[held_out].astype(int) + np.random.default_rng(SEED).integers(-6, 7, (32, 32, 3)), 0, 255)
    images = np.concatenate([images, pictures(3)[:1], noisy[None].astype(np.uint8), pictures(6)[5:]])
    names = [*names, f"{names[held_out]} dark", "copy", "copy light"]
    split = split_pictures(images, names, TRAINING)
    assert 40 in split.held_out
    assert {41, 42} <= set(split.near)
    # Sabotage: with no distance allowed and nothing taken for the same motif, all three would be trained on.
    blind = dataclasses.replace(TRAINING, near_duplicate_bits=-1, same_picture="(?!)", held_out_share=0.2)
    assert {41, 42} <= set(split_pictures(images, names, blind).trained)


def test_hash_forgives_brightness_and_tells_pictures_apart() -> None:
    images = pictures(12)
    hashes = perceptual_hash(images)
    dimmed = perceptual_hash((images * 0.9).astype(np.uint8))
    assert (hashes != dimmed).sum(1).max() <= 4
    others = (hashes[:, None] != hashes[None]).sum(2)[np.triu_indices(12, 1)]
    assert np.median(others) > 12


def test_a_share_that_holds_out_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="held_out_share"):
        split_pictures(pictures(40), captions(40), dataclasses.replace(TRAINING, held_out_share=0.0))


# ---- training ---------------------------------------------------------------------------------------------
def test_stopped_and_resumed_equals_not_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", TRAINING)
    assert run(tmp_path / "parts", TRAINING, should_stop=lambda: True) is None  # after one step
    assert run(tmp_path / "parts", TRAINING) == whole
    expected, found = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["state.safetensors", "weights.safetensors"]
    # Sabotage: a run of another seed is not the same run.
    other = run(tmp_path / "other", dataclasses.replace(TRAINING, seed=SEED + 1))
    assert other != whole


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path, TRAINING, should_stop=lambda: True)
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path, dataclasses.replace(TRAINING, learning_rate=0.01))


def test_a_loss_that_is_not_finite_never_reaches_the_weights(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"step \d+.*learning_rate"):
        run(tmp_path, dataclasses.replace(TRAINING, learning_rate=1e20, warmup_steps=1, max_steps=50))
    saved = tmp_path / "weights.safetensors"
    assert not saved.exists() or all(weight.isfinite().all() for weight in load_file(saved).values())


def test_it_learns(tmp_path: Path) -> None:
    images = pictures(40)
    before = reconstruction_psnr(make_network(NETWORK, SEED), images).mean()
    figures = run(tmp_path, dataclasses.replace(TRAINING, max_steps=80, checkpoint_every_steps=80))
    assert figures["train_psnr"] > before + 2
    assert figures["scale_factor"] == pytest.approx(1 / figures["latent_std"])
    assert figures["trained_pictures"] + figures["held_out_pictures"] + figures["near_pictures"] == 40
