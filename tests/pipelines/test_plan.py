"""What a plan says of memory, arithmetic and money, and that every preset opens with what it says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import encode_sizes
from ldm.models.autoencoder import load_autoencoder
from ldm.models.denoiser import make_denoiser
from ldm.training.budget import RESERVE_BYTES, Memory, ModelCosts, gpu_seconds, memory, model_costs
from pipelines import plan, plan_encoding
from pipelines.config import CONF, ConfigError, compose, options
from tests.ldm.training.tiny import RUN, TEXT_ENCODER, TRAINING, UNET

COSTS = ModelCosts(trained=1000, averaged=600, frozen=100, forward_flop=50.0, frozen_flop=10.0, activation_bytes=64.0,
                   checkpointed_bytes=16.0)  # fmt: skip


def memory_of(precision: str, **run: Any) -> Memory:
    """Of each of four GPUs, with micro batches of two."""
    return memory(COSTS, replace(TRAINING, precision=precision), replace(RUN, micro_batch_size=2, **run), 4)


def with_gpus() -> list[str]:
    return [name for name in options("experiment") if compose([f"+experiment={name}"]).cluster.train.gpu is not None]


@pytest.mark.parametrize("name", with_gpus())
def test_a_preset_opens_with_what_the_plan_says_and_fits_its_gpu(name: str) -> None:
    made = plan.make_plan(compose([f"+experiment={name}"]))
    header = (CONF / "experiment" / f"{name}.yaml").read_text().partition("\ndefaults:")[0]
    assert f"# {plan.headline(made)}\n" in header
    assert made.memory().total() < made.gpu.memory_bytes


def test_the_presets_with_gpus_are_those_that_we_know() -> None:
    assert with_gpus() == ["laion400m_1p45b", "sd2_256", "sd2_512", "single_gpu_1p45b"]


def test_the_paper_s_model_has_its_parameters_and_the_arithmetic_of_its_matrices() -> None:
    """A matrix costs two FLOP for each weight and token: nearly all of the text encoder is matrices."""
    config = compose(["+experiment=laion400m_1p45b"])
    costs = plan.costs_of(config)
    with torch.device("meta"):
        unet = make_denoiser(config.unet, None)
        context = {"context": torch.empty(1, 77, 1280)}
        alone = model_costs(unet, torch.empty(1, 4, 32, 32), context, "unet")
    assert (costs.trained, costs.averaged, costs.frozen) == (872_300_484 + 542_895_360, 872_300_484, 0)
    assert alone.trained == 872_300_484
    matrices = 542_895_360 - 30522 * 1280  # without the table of tokens
    assert costs.forward_flop - alone.forward_flop == pytest.approx(2 * 77 * matrices, rel=0.03)
    assert costs.checkpointed_bytes < 0.5 * costs.activation_bytes


@pytest.mark.parametrize("stage, expected", [
    (0, 4 * 1100 + 4000 + 8000 + 2400),  # everything, and the average
    (1, 4 * 1100 + 4000 + 12000 / 4 + 600),
    (2, 4 * 1100 + 1000 + 12000 / 4 + 600),
    (3, 4 * 350 + 1000 + 12000 / 4 + 600),
])  # fmt: skip
def test_memory_of_each_stage_in_closed_form(stage: int, expected: float) -> None:
    found = memory_of("float32", zero_stage=stage)
    assert found.total() == pytest.approx(expected + 2 * 64 + RESERVE_BYTES)
    assert memory_of("float32", zero_stage=stage, activation_checkpointing=True).activations == 32


def test_bf16_halves_weights_and_activations_but_no_sum_and_no_state() -> None:
    whole, half = memory_of("float32"), memory_of("bf16")
    frozen = 4 * COSTS.frozen  # which stays as it is
    assert (half.weights - frozen, half.activations) == ((whole.weights - frozen) / 2, whole.activations / 2)
    assert (half.gradients, half.optimizer, half.average) == (whole.gradients, whole.optimizer, whole.average)
    small = memory_of("bf16", deepspeed={"data_types": {"grad_accum_dtype": "bf16"}})
    assert small == replace(half, gradients=whole.gradients / 2)


def test_what_is_offloaded_counts_nothing() -> None:
    optimizer = {"offload_optimizer": {"device": "cpu"}}
    both = {**optimizer, "offload_param": {"device": "cpu"}}
    here = memory_of("bf16", zero_stage=2)
    assert memory_of("bf16", zero_stage=2, deepspeed={"zero_optimization": both}) == replace(
        here, optimizer=0, average=0
    )
    here = memory_of("bf16", zero_stage=3)
    found = memory_of("bf16", zero_stage=3, deepspeed={"zero_optimization": optimizer})
    assert found == replace(here, optimizer=0, average=0, gradients=0)
    found = memory_of("bf16", zero_stage=3, deepspeed={"zero_optimization": both})
    assert found == replace(here, optimizer=0, average=0, gradients=0, weights=4 * COSTS.frozen)
    none = {"offload_optimizer": {"device": "none"}}
    assert memory_of("bf16", zero_stage=3, deepspeed={"zero_optimization": none}) == here


def test_a_frozen_part_has_no_backward_pass() -> None:
    assert COSTS.step_flop() == 3 * 40 + 10
    training = replace(TRAINING, batch_size=8, max_steps=5)
    assert gpu_seconds(COSTS, training, peak_flops=100.0, mfu=0.5) == 130 * 8 * 5 / 50


def test_activations_are_what_autograd_keeps() -> None:
    """On the processor, with real tensors, the same model keeps as much, but for attention and small change."""
    with torch.device("meta"):
        costs = model_costs(make_denoiser(UNET, TEXT_ENCODER), torch.empty(1, 2, 4, 4),
                            {"tokens": torch.zeros(1, 12, dtype=torch.int64)}, "all")  # fmt: skip
    denoiser = make_denoiser(UNET, TEXT_ENCODER)
    known = {p.data_ptr() for p in denoiser.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        denoiser(torch.randn(1, 2, 4, 4), torch.zeros(1), {"tokens": torch.zeros(1, 12, dtype=torch.int64)})
    assert costs.activation_bytes == pytest.approx(sum(kept.values()), rel=0.2)


def test_the_command_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="cluster=h100"):
        plan.make_plan(compose([]))
    assert plan.main([]) == 2
    small = ["cluster=h100", "text_encoder=words_tiny"]
    assert plan.main(small) == 0
    text = capsys.readouterr().out
    assert "8 x H100 SXM" in text and "ZeRO stage" in text
    assert plan.main([*small, "cluster.train.gpu.memory_bytes=1e9"]) == 1
    assert "It does not fit" in capsys.readouterr().err


def test_the_batch_to_encode_is_found_by_encoding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_sizes, "SECONDS", 0.0)
    asked = ["+stage=precompute_latents", "dataset.precompute_latents.resolution=32"]
    assert plan.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "32x32 in float32 on cpu" in lines[0]
    rows = [line.split() for line in lines if re.fullmatch(r" +\d+ +[\d,.]+ +[\d.]+", line)]
    assert [int(row[0]) for row in rows[:3]] == [1, 2, 4]
    setting, _, size = lines[-1].partition("=")
    assert setting == "dataset.precompute_latents.batch_size" and size in {row[0] for row in rows}
    monkeypatch.setattr(encode_sizes, "memory_limit", lambda device: 0)
    monkeypatch.setattr(encode_sizes, "try_sizes", lambda *given: iter(()))
    assert plan.main(asked) == 1 and "lower dataset.precompute_latents.resolution" in capsys.readouterr().err


def test_an_autoencoder_without_weights_is_tried_with_random_ones(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(["autoencoder.weights=null"])
    with plan_encoding.weights_of(config) as path:
        load_autoencoder(replace(config.autoencoder, weights=path), "cpu")
    assert not Path(path).exists()


def test_workers_of_one_device_share_its_memory() -> None:
    local, gpu = (compose([f"cluster={name}"]).cluster for name in ("local", "h100"))
    assert (plan_encoding.workers_beside(local, "cpu"), plan_encoding.workers_beside(gpu, "cuda")) == (1, 1)
    resources = replace(local.precompute_latents, num_cpus=1.5, in_flight=8)
    assert plan_encoding.workers_beside(replace(local, num_cpus=4, precompute_latents=resources), "cpu") == 2
