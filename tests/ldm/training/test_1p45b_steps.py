"""The paper's text-to-image model at its real size takes optimizer steps on a machine with 24 GiB of memory."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.config import TextEncoderConfig, TrainingConfig, TrainingRunConfig, UNetConfig
from ldm.models.attention import SpatialTransformer
from ldm.models.blocks import ResBlock, checkpoint_activations
from ldm.models.denoiser import Denoiser, make_denoiser
from ldm.training.engine import Engine, join
from tests.ldm.models import settings
from tests.ldm.training import processes
from tests.ldm.training.tiny import RUN, SEED, TRAINING

MOST_BYTES_A_PARAMETER = 16
STEPS = 4
LEARNING_RATE = 1e-4
PIECE = 20_000_000  # parameters that are in memory together with their optimizer states


def offload_to(folder: Path) -> dict[str, object]:
    """DeepSpeed's keys that keep the float32 weights and optimizer states in files, a piece at a time in memory."""
    return {
        "zero_optimization": {
            "offload_optimizer": {"device": "nvme", "nvme_path": str(folder), "buffer_count": 4},
            "sub_group_size": PIECE,
            "reduce_bucket_size": PIECE,
            "stage3_prefetch_bucket_size": PIECE,
            "stage3_max_live_parameters": PIECE,
            "stage3_max_reuse_distance": 0,
        },
    }


def make() -> Denoiser:
    """Both networks with their initial weights, in bfloat16 from the start: float32 would need twice the memory."""
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    denoiser = make_denoiser(
        settings.read(UNetConfig, "unet", "txt2img_1p45b"),
        settings.read(TextEncoderConfig, "text_encoder", "bert_1p45b"),
    )
    torch.set_default_dtype(torch.float32)
    checkpoint_activations(denoiser, (ResBlock, SpatialTransformer))
    return denoiser


def losses(training: TrainingConfig, run: TrainingRunConfig) -> tuple[list[float], list[float], int]:
    """(loss before each step, seconds of each step, bytes of memory at the peak), on one batch and one noise."""
    torch.set_num_threads(run.threads)
    engine = Engine(make(), training, run, join())
    generator = torch.Generator().manual_seed(SEED)
    z_t, eps = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    condition: dict[str, Tensor] = {"tokens": torch.randint(0, 30522, (1, 77), generator=generator)}
    found, seconds = [], []
    for _ in range(STEPS):
        start = time.monotonic()
        loss = (engine(z_t, torch.tensor([500]), condition).float() - eps).square().mean()
        engine.backward(loss)
        engine.update(training.learning_rate)
        found.append(loss.item())
        seconds.append(time.monotonic() - start)
        print(f"loss {found[-1]:.4f}, {seconds[-1]:.0f} s", flush=True)
    return found, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_loss_falls_while_optimizer_states_lie_in_files(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed writes to NVMe with libaio: apt-get install libaio-dev")
    training = replace(TRAINING, batch_size=1, precision="bf16", learning_rate=LEARNING_RATE)
    run = replace(RUN, threads=os.cpu_count() or 1, micro_batch_size=1, zero_stage=3, deepspeed=offload_to(tmp_path))
    (result,) = processes.run(losses, training, run, seconds=3500)
    found, seconds, peak = result
    parameters = 872_300_484 + 542_895_360
    print(f"losses {found}, seconds {seconds}, {peak / 2**30:.1f} GiB, {peak / parameters:.1f} bytes a parameter")
    assert found[-1] < found[0] and sorted(found, reverse=True) == found
    assert peak < MOST_BYTES_A_PARAMETER * parameters
