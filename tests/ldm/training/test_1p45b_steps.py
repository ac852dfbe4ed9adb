"""The paper's text-to-image model at its real size takes optimizer steps on a machine with 24 GiB of memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.config import TextEncoderConfig, TrainingConfig, TrainingRunConfig, UNetConfig
from ldm.models.attention import SpatialTransformer
from ldm.models.blocks import ResBlock, checkpoint_activations
from ldm.models.denoiser import Denoiser, make_denoiser
from ldm.training.budget import memory
from ldm.training.costs import model_costs
from ldm.training.engine import Engine, World, join
from tests.ldm.models import settings
from tests.ldm.training import processes
from tests.ldm.training.resident import measure_tensors, resident_bytes
from tests.ldm.training.tiny import RUN, SEED, TRAINING

PARAMETERS = 872_300_484 + 542_895_360
STEPS = 4
LEARNING_RATE = 1e-4
PIECE = 20_000_000  # parameters that are in memory together with their optimizer states
SUMS_IN_BF16 = {"data_types": {"grad_accum_dtype": "bf16"}}  # there is one addend

SMALL_PIECES = {
    "sub_group_size": PIECE,
    "reduce_bucket_size": PIECE,
    "stage3_prefetch_bucket_size": PIECE,
    "stage3_max_live_parameters": PIECE,
    "stage3_max_reuse_distance": 0,
}


def in_files(folder: Path) -> dict[str, object]:
    """DeepSpeed's keys that keep the float32 weights and optimizer states in files, a piece at a time in memory.

    In memory are 2 bytes a parameter of weights and 2 of gradients, both bf16, and what a piece needs on its way.
    """
    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": str(folder), "buffer_count": 4}}
    return {"zero_optimization": {**SMALL_PIECES, **offload}, **SUMS_IN_BF16}


def in_memory(folder: Path) -> dict[str, object]:
    """DeepSpeed's keys that keep everything in memory, and everything in bf16.

    That is 2 bytes a parameter each of weights, their masters, gradients and both averages of AdamW: 10 bytes, 13.2
    GiB, and what a piece needs on its way.
    """
    bf16 = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return {"zero_optimization": SMALL_PIECES, "bf16": bf16, **SUMS_IN_BF16}


UNET = settings.read(UNetConfig, "unet", "txt2img_1p45b")
TEXT_ENCODER = settings.read(TextEncoderConfig, "text_encoder", "bert_1p45b")


def make() -> Denoiser:
    """Both networks with their initial weights, in bfloat16 from the start: float32 would need twice the memory."""
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    denoiser = make_denoiser(UNET, TEXT_ENCODER)
    torch.set_default_dtype(torch.float32)
    checkpoint_activations(denoiser, (ResBlock, SpatialTransformer))
    return denoiser


def reckoned(training: TrainingConfig, run: TrainingRunConfig) -> float:
    """Bytes of memory, as `python -m pipelines.plan` reckons them; nothing is averaged here."""
    with torch.device("meta"):
        tokens = {"tokens": torch.zeros(1, 77, dtype=torch.int64)}
        costs = model_costs(make_denoiser(UNET, TEXT_ENCODER), torch.empty(1, 4, 8, 8), tokens, "unet", "bf16")
    return memory(replace(costs, averaged=0), training, run, World(0, 1, torch.device("cpu"))).total()


def losses(training: TrainingConfig, run: TrainingRunConfig) -> tuple[list[float], list[float], int]:
    """(loss before each step, seconds of each step, bytes of memory at the peak), on one batch and one noise."""
    measure_tensors()
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
    return found, seconds, resident_bytes("VmHWM")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("states", [in_files, in_memory])
def test_the_loss_falls(tmp_path: Path, states: Callable[[Path], dict[str, object]]) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if states is in_files and not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed writes to NVMe with libaio: apt-get install libaio-dev")
    training = replace(TRAINING, batch_size=1, precision="bf16", learning_rate=LEARNING_RATE)
    run = replace(RUN, threads=os.cpu_count() or 1, micro_batch_size=1, zero_stage=3, deepspeed=states(tmp_path))
    (result,) = processes.run(losses, training, run, seconds=3500)
    found, seconds, peak = result
    expected = reckoned(training, run)
    print(f"losses {found}, seconds {seconds}, {peak / 2**30:.1f} GiB, {peak / PARAMETERS:.1f} bytes a parameter, "
          f"reckoned {expected / 2**30:.1f} GiB")  # fmt: skip
    assert found[-1] < found[0] and sorted(found, reverse=True) == found
    assert peak == pytest.approx(expected, rel=0.1)
