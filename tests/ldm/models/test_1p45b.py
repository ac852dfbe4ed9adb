"""The paper's text-to-image model at its real size: built, and run once, within the memory of an ordinary machine."""

from __future__ import annotations

import os
import resource
import time

import pytest
import torch

from ldm.config import TextEncoderConfig, UNetConfig
from ldm.models.denoiser import Denoiser, make_denoiser
from tests.ldm.models import settings

SEED = int(os.environ.get("LDM_TEST_SEED", 0))
MOST_GB = 5  # the weights are 2.8


def make(device: str) -> Denoiser:
    with torch.device(device):
        return make_denoiser(
            settings.read(UNetConfig, "unet", "txt2img_1p45b"),
            settings.read(TextEncoderConfig, "text_encoder", "bert_1p45b"),
        )


def make_filled() -> Denoiser:
    """The model with random weights, made in bfloat16 at once."""
    denoiser = make("meta").to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(SEED)
    for name, parameter in denoiser.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)  # the layers that begin as zeros too
        else:
            parameter.fill_(float(name.endswith("weight")))
    return denoiser


def test_parameter_counts() -> None:
    denoiser = make("meta")
    unet = sum(p.numel() for p in denoiser.unet.parameters())
    text = sum(p.numel() for p in denoiser.text_encoder.parameters())
    assert (unet, text) == (872_300_484, 542_895_360)
    assert unet + text + 39_098_682 == 1_454_294_526  # with the original's unused layer to_logits


@pytest.mark.slow
@pytest.mark.timeout(1800)  # where a processor has no products of bfloat16 they are emulated: minutes for seconds
@torch.no_grad()
def test_one_forward_pass_in_bfloat16() -> None:
    denoiser = make_filled()
    z_t, t = torch.randn(1, 4, 32, 32, dtype=torch.bfloat16), torch.tensor([500])  # of a picture of 256 pixels
    start = time.monotonic()
    encoded = denoiser.encode_condition({"tokens": torch.randint(0, 30522, (1, 77))})
    assert encoded["context"].shape == (1, 77, 1280)
    prediction = denoiser(z_t, t, encoded)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"a forward pass: {seconds:.1f} s, peak memory of the process {peak:.1f} GB")
    assert prediction.shape == z_t.shape and prediction.isfinite().all()
    assert 0.01 < prediction.float().std() < 100
    assert peak < MOST_GB
    other = {"context": torch.randn_like(encoded["context"])}
    small = [denoiser(z_t[:, :, :8, :8], t, condition) for condition in (encoded, other)]
    assert (small[0] - small[1]).abs().max() > 1e-3  # the caption is read
