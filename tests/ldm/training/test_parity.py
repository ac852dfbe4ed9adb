"""Every way of training follows the curve of one plain PyTorch loop with diffusers' U-Net on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.config import TrainSettings
from ldm.models.denoiser import Denoiser, make_denoiser
from ldm.models.tokenizer import make_tokenizer
from ldm.training.engine import World
from ldm.training.loader import TrainData
from ldm.training.train import make_loader, schedule_of
from tests.benchmarks.unet_step import make_theirs
from tests.ldm.training import processes
from tests.ldm.training.test_train import work
from tests.ldm.training.tiny import RUN, SEED, UNET, settings, write_data

STEPS, WARMUP = 8, 3
SMALL = replace(UNET, model_channels=16, channel_mult=[1, 1], transformer_depth=[1, 1], attention_resolutions=[1, 2],
                norm_groups=8, dropout=0.0)  # fmt: skip


def make(what: TrainSettings) -> Denoiser:
    """With random numbers where training starts at zero, so that every block has a gradient from the start."""
    torch.manual_seed(SEED)
    denoiser = make_denoiser(what.unet, what.text_encoder)
    for parameter in denoiser.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return denoiser


def plain_losses(what: TrainSettings, data: TrainData) -> list[float]:
    """v-prediction in its closed form (Salimans & Ho 2022), AdamW, clipping, warm-up: nothing of ours but the data."""
    denoiser = make(what)
    theirs, text = make_theirs(what.unet, denoiser.unet), denoiser.text_encoder
    parameters = [*text.parameters(), *theirs.parameters()]
    training = what.training
    optimizer = torch.optim.AdamW(parameters, betas=(training.beta1, training.beta2), eps=training.epsilon,
                                  weight_decay=training.weight_decay)  # fmt: skip
    alpha_bar = schedule_of(what.diffusion).alpha_bar
    loader = make_loader(what, data, make_tokenizer(what.text_encoder), replace(RUN, micro_batch_size=8),
                         World(0, 1, torch.device("cpu")))  # fmt: skip
    batches, losses = loader.batches(0), []
    for step in range(1, STEPS + 1):
        batch = next(batches)
        signal, noise = (x.sqrt().float()[:, None, None, None] for x in (alpha_bar[batch.t], 1 - alpha_bar[batch.t]))
        z_t, v = signal * batch.z0 + noise * batch.eps, signal * batch.eps - noise * batch.z0
        loss = (theirs(z_t, batch.t, text(batch.condition["tokens"])).sample - v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, training.gradient_clipping)
        optimizer.param_groups[0]["lr"] = training.learning_rate * min(1.0, step / WARMUP)
        optimizer.step()
        losses.append(loss.item())
    loader.close()
    return losses


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSettings, TrainData, list[float]]:
    folder = tmp_path_factory.mktemp("parity")
    what = settings(max_steps=STEPS, lr_schedule="constant", lr_end=1.0, warmup_steps=WARMUP, log_every_steps=1)
    what = replace(what, unet=SMALL)
    save_file(make(what).state_dict(), folder / "start.safetensors")
    what = replace(what, training=replace(what.training, start_from=str(folder / "start.safetensors")))
    data = write_data(folder, [9, 14])
    return what, data, plain_losses(what, data)


def check(curve: tuple[TrainSettings, TrainData, list[float]], output: Path, **run: object) -> None:
    what, data, expected = curve
    results = processes.run(work, what, data, output, replace(RUN, **run), world_size=2)
    assert not isinstance(results[0], Exception), results[0]
    found = [values["loss"] for _, values in results[0]["logged"]]
    assert found == pytest.approx(expected, rel=1e-3), run
    assert expected[-1] < 0.99 * expected[0] or max(expected) - min(expected) > 0.05  # a curve, not a line


def test_two_processes_follow_the_plain_loop(
    curve: tuple[TrainSettings, TrainData, list[float]], tmp_path: Path
) -> None:
    check(curve, tmp_path, zero_stage=1, micro_batch_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch_size", [4, 1])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_with_and_without_accumulation_and_activation_checkpointing(
    curve: tuple[TrainSettings, TrainData, list[float]],
    tmp_path: Path,
    stage: int,
    micro_batch_size: int,
    checkpointing: bool,
) -> None:
    check(curve, tmp_path, zero_stage=stage, micro_batch_size=micro_batch_size, activation_checkpointing=checkpointing)


def test_weights_of_another_model_are_refused(
    curve: tuple[TrainSettings, TrainData, list[float]], tmp_path: Path
) -> None:
    what, data, _ = curve
    state = {name: x for name, x in make(what).state_dict().items() if name != "unet.out.2.bias"}
    save_file(state, tmp_path / "other.safetensors")
    what = replace(what, training=replace(what.training, start_from=str(tmp_path / "other.safetensors")))
    (error,) = processes.run(work, what, data, tmp_path / "train", replace(RUN, micro_batch_size=8))
    assert isinstance(error, ValueError) and "it differs in 1 of" in str(error) and "unet.out.2.bias" in str(error)
