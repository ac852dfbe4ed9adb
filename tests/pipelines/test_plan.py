"""What a plan says of memory, arithmetic and money, and that every preset opens with what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldm.models.denoiser import make_denoiser
from ldm.training.budget import RESERVE_BYTES, ModelCosts, gpu_seconds, memory, model_costs
from pipelines import plan
from pipelines.config import CONF, ConfigError, compose, options
from tests.ldm.training.tiny import TEXT_ENCODER, TRAINING, UNET

COSTS = ModelCosts(trained=1000, averaged=600, frozen=100, forward_flop=50.0, frozen_flop=10.0, activation_bytes=64.0,
                   checkpointed_bytes=16.0)  # fmt: skip


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
    training = replace(TRAINING, precision="float32")
    found = memory(COSTS, training, stage, 2, 4, activation_checkpointing=False)
    assert found.total() == pytest.approx(expected + 2 * 64 + RESERVE_BYTES)
    assert memory(COSTS, training, stage, 2, 4, activation_checkpointing=True).activations == 32


def test_bf16_halves_weights_gradients_and_activations_but_no_state() -> None:
    whole, half = (memory(COSTS, replace(TRAINING, precision=p), 1, 2, 4, False) for p in ("float32", "bf16"))
    frozen = 4 * COSTS.frozen  # which stays as it is
    assert (half.weights - frozen, half.gradients, half.activations) == (
        (whole.weights - frozen) / 2, whole.gradients / 2, whole.activations / 2)  # fmt: skip
    assert (half.optimizer, half.average) == (whole.optimizer, whole.average)


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
