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
MOST_GB = 10  # weights in float32 are 5.7


def make(device: str) -> Denoiser:
    with torch.device(device):
        return make_denoiser(
            settings.read(UNetConfig, "unet", "txt2img_1p45b"),
            settings.read(TextEncoderConfig, "text_encoder", "bert_1p45b"),
        )


def make_filled(dtype: torch.dtype) -> Denoiser:
    """The model with random weights, made in its final precision at once."""
    denoiser = make("meta").to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
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
@torch.no_grad()
def test_one_forward_pass() -> None:
    # Where a processor has no bf16 products torch does them fifty times slower than those of float32.
    dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    denoiser = make_filled(dtype)
    z_t, t = torch.randn(1, 4, 32, 32, dtype=dtype), torch.tensor([500])
    tokens = torch.randint(0, 30522, (2, 1, 77))
    start = time.monotonic()
    contexts = [denoiser.encode_condition({"tokens": row}) for row in tokens]
    assert contexts[0]["context"].shape == (1, 77, 1280)
    predictions = [denoiser(z_t, t, context) for context in contexts]
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"two forward passes in {dtype}: {seconds:.1f} s, peak memory {peak:.1f} GB")
    for prediction in predictions:
        assert prediction.shape == z_t.shape and prediction.isfinite().all()
        assert 0.01 < prediction.float().std() < 100
    assert (predictions[0] - predictions[1]).abs().max() > 1e-3  # the caption is read
    assert peak < MOST_GB
