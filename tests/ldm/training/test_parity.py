"""Every way of training follows the curve of one plain PyTorch loop with diffusers' U-Net on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.config import TrainSettings
from ldm.models.denoiser import Denoiser, make_denoiser
from ldm.models.tokenizer import make_tokenizer
from ldm.training.checks import schedule_of
from ldm.training.engine_config import World
from ldm.training.loader import Batch, TrainData
from ldm.training.step import make_loader
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


def by_hand(what: TrainSettings, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(z_t, what the network should say of it, weight of each sample), in closed form and with nothing of ours.

    The weight is min(SNR, gamma) on the error in z0 (Hang et al. 2023): that is the error in the prediction times
    noise^2 / signal^2 for eps, noise^2 for v (signal^2 + noise^2 = 1), and noise^2 for flow (signal + noise = 1).
    """
    diffusion, z0, eps = what.diffusion, batch.z0, batch.eps
    if diffusion.prediction == "flow":
        noise = ((batch.t + 1) / diffusion.timesteps)[:, None, None, None]
        signal, wanted = 1 - noise, eps - z0
    else:
        alpha_bar = schedule_of(diffusion).alpha_bar[batch.t]
        signal, noise = (x.sqrt().float()[:, None, None, None] for x in (alpha_bar, 1 - alpha_bar))
        wanted = eps if diffusion.prediction == "eps" else signal * eps - noise * z0
    weight = torch.ones(len(z0))
    if diffusion.min_snr_gamma is not None:
        weight = (signal / noise).square().clamp(max=diffusion.min_snr_gamma) * noise.square()
        weight = (weight / signal.square() if diffusion.prediction == "eps" else weight).flatten()
    return signal * z0 + noise * eps, wanted, weight


def plain_losses(what: TrainSettings, data: TrainData) -> list[dict[str, float]]:
    """Losses of each step, as training logs them, with AdamW, clipping, warm-up: nothing of ours but the data."""
    denoiser = make(what)
    theirs, text = make_theirs(what.unet, denoiser.unet), denoiser.text_encoder
    parameters = [*text.parameters(), *theirs.parameters()]
    training = what.training
    optimizer = torch.optim.AdamW(parameters, betas=(training.beta1, training.beta2), eps=training.epsilon,
                                  weight_decay=training.weight_decay)  # fmt: skip
    loader = make_loader(what, data, make_tokenizer(what.text_encoder), None, replace(RUN, micro_batch_size=8),
                         World(0, 1, torch.device("cpu")))  # fmt: skip
    batches, losses = loader.batches(0), []
    for step in range(1, STEPS + 1):
        batch = next(batches)
        z_t, wanted, weight = by_hand(what, batch)
        error = theirs(z_t, batch.t, text(batch.condition["tokens"])).sample - wanted
        each = weight * error.square().mean(dim=(1, 2, 3))
        optimizer.zero_grad()
        each.mean().backward()
        nn.utils.clip_grad_norm_(parameters, training.gradient_clipping)
        optimizer.param_groups[0]["lr"] = training.learning_rate * min(1.0, step / WARMUP)
        optimizer.step()
        quarters = {i: each[(batch.t >= 250 * i) & (batch.t < 250 * (i + 1))] for i in range(4)}
        losses.append(
            {"loss": each.mean().item(), **{f"loss_t{i}": x.mean().item() for i, x in quarters.items() if len(x)}}
        )
    loader.close()
    return losses


Curve = tuple[TrainSettings, TrainData, list[dict[str, float]]]


def make_curve(folder: Path, **diffusion: object) -> Curve:
    what = settings(diffusion, max_steps=STEPS, lr_schedule="constant", lr_end=1.0, warmup_steps=WARMUP,
                    log_every_steps=1)  # fmt: skip
    what = replace(what, unet=SMALL)
    save_file(make(what).state_dict(), folder / "start.safetensors")
    what = replace(what, training=replace(what.training, start_from=str(folder / "start.safetensors")))
    data = write_data(folder, [9, 14])
    return what, data, plain_losses(what, data)


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    return make_curve(tmp_path_factory.mktemp("parity"))


def check(curve: Curve, output: Path, seconds: float = 240, **run: object) -> None:
    what, data, expected = curve
    results = processes.run(work, what, data, output, replace(RUN, **run), world_size=2, seconds=seconds)
    assert not isinstance(results[0], Exception), results[0]
    found = [values for _, values in results[0]["logged"]]
    for ours, theirs in zip(found, expected, strict=True):
        assert {name: x for name, x in ours.items() if name.startswith("loss")} == pytest.approx(theirs, rel=1e-3), run
    losses = [values["loss"] for values in expected]
    assert losses[-1] < 0.99 * losses[0] or max(losses) - min(losses) > 0.05  # a curve, not a line


def test_two_processes_follow_the_plain_loop(curve: Curve, tmp_path: Path) -> None:
    check(curve, tmp_path, zero_stage=1, micro_batch_size=2)


@pytest.mark.parametrize("diffusion", [
    {"min_snr_gamma": 5.0},
    {"prediction": "eps", "zero_terminal_snr": False, "min_snr_gamma": 5.0},
    {"schedule": "flow", "prediction": "flow", "zero_terminal_snr": False, "beta_start": None, "beta_end": None,
     "min_snr_gamma": 2.0},
], ids=lambda diffusion: diffusion.get("prediction", "v"))  # fmt: skip
def test_every_prediction_weighs_its_losses_as_the_plain_loop_does(tmp_path: Path, diffusion: dict[str, Any]) -> None:
    check(make_curve(tmp_path, **diffusion), tmp_path / "train", zero_stage=1, micro_batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch_size", [4, 1])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_with_and_without_accumulation_and_activation_checkpointing(
    curve: Curve,
    tmp_path: Path,
    stage: int,
    micro_batch_size: int,
    checkpointing: bool,
) -> None:
    check(curve, tmp_path, zero_stage=stage, micro_batch_size=micro_batch_size, activation_checkpointing=checkpointing)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_compiled_model_with_activation_checkpointing_follows_it_too(curve: Curve, tmp_path: Path) -> None:
    """Compiling takes minutes on a processor, and many on a busy one."""
    check(curve, tmp_path, 1500, zero_stage=2, micro_batch_size=4, compile=True, activation_checkpointing=True)


def test_weights_of_another_model_are_refused(curve: Curve, tmp_path: Path) -> None:
    what, data, _ = curve
    state = {name: x for name, x in make(what).state_dict().items() if name != "unet.out.2.bias"}
    save_file(state, tmp_path / "other.safetensors")
    what = replace(what, training=replace(what.training, start_from=str(tmp_path / "other.safetensors")))
    (error,) = processes.run(work, what, data, tmp_path / "train", replace(RUN, micro_batch_size=8))
    assert isinstance(error, ValueError) and "it differs in 1 of" in str(error) and "unet.out.2.bias" in str(error)
