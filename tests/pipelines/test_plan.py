"""What a plan says of memory, arithmetic and money, and that every preset opens with what it says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm import encode_sizes
from ldm.models.autoencoder import load_autoencoder
from ldm.models.denoiser import make_denoiser
from ldm.training.costs import model_costs
from pipelines import plan, plan_encoding
from pipelines.config import CONF, compose, options

PAPER = "+experiment=laion400m_1p45b"


@pytest.mark.parametrize("name", options("experiment"))
def test_a_preset_opens_with_what_the_plan_says_and_fits(name: str) -> None:
    """By the command that it names itself."""
    header = (CONF / "experiment" / f"{name}.yaml").read_text().partition("\nname:")[0].partition("\ndefaults:")[0]
    asked = re.search(r"`python -m pipelines\.plan ([^`]+)`", header)[1].split()
    assert f"+experiment={name}" in asked
    made = plan.make(compose(asked))
    assert f"# {plan.headline(made)}\n" in header
    assert made.bytes < made.gpu.memory_bytes


def test_the_presets_are_those_that_we_know() -> None:
    assert options("experiment") == [
        "default", "laion400m_1p45b", "openmoji_autoencoder", "sd2_256", "sd2_512", "single_gpu_1p45b", "smoke"
    ]  # fmt: skip


def test_the_default_job_has_a_name() -> None:
    assert compose(["+experiment=default"]) == compose([])


def test_the_second_half_starts_from_the_first_one_s_weights() -> None:
    first, second = (compose([f"+experiment=sd2_{px}", "paths.outputs=/runs"]) for px in (256, 512))
    step = f"step-{first.training.max_steps:08d}"
    assert second.training.start_from == f"/runs/{first.name}/train/{step}/ema.safetensors"


def test_the_paper_s_model_has_its_parameters_and_the_arithmetic_of_its_matrices() -> None:
    """A matrix costs two FLOP for each weight and token: nearly all of the text encoder is matrices."""
    config = compose([PAPER])
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
    # Blocks are the U-Net but for its ends and what changes its sides.
    assert 0.8 * alone.forward_flop < costs.blocks_flop == alone.blocks_flop < alone.forward_flop


def test_activation_checkpointing_takes_longer_and_saves_memory() -> None:
    plain, again = (plan.make_plan(compose([PAPER, f"cluster.train.run.activation_checkpointing={x}"]))
                    for x in ("false", "true"))  # fmt: skip
    blocks = plain.costs.blocks_flop / plain.costs.step_flop()
    assert again.gpu_hours == pytest.approx((1 + blocks) * plain.gpu_hours) and 0.1 < blocks < 1 / 3
    assert again.bytes < plain.bytes
    assert "of a sample again" in plan.describe(again) and "again" not in plan.describe(plain)


def test_a_frozen_text_encoder_costs_nothing_where_its_features_are_cached() -> None:
    run, cached = (plan.make_plan(compose(["+experiment=sd2_256", f"dataset.precompute_latents.text_features={x}"]))
                   for x in ("false", "true"))  # fmt: skip
    assert run.costs.frozen > 3e8 and cached.costs.frozen == cached.costs.frozen_flop == 0
    assert cached.costs.step_flop() == run.costs.step_flop() - run.costs.frozen_flop
    assert run.memory().weights - cached.memory().weights == 4 * run.costs.frozen
    assert cached.gpu_hours < run.gpu_hours


@pytest.mark.parametrize("overrides, words", [
    ([PAPER, "cluster.train.workers=64"], "680, which 64 processes cannot share"),
    ([PAPER, "cluster.train.run.micro_batch_size=16"], "which does not divide the 85 samples"),
    ([PAPER, "cluster.train.workers=0"], "cluster.train.workers is 0"),
    (["+experiment=single_gpu_1p45b", "cluster.train.run.zero_stage=0"], "zero_stage=1"),
    ([PAPER, "cluster.train.run.zero_stage=3", "cluster.train.run.compile=true"], "compile"),
    ([PAPER, "unet.out_channels=3"], "unet.out_channels is 3"),
    (["cluster.train.gpu=null"], "cluster=h100"),
    ([PAPER, "+stage=train_autoencoder"], "cluster=local"),
])  # fmt: skip
def test_what_training_would_refuse_has_no_price(
    overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(overrides) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.out == ""


def table(text: str) -> dict[str, list[str]]:
    """First word of each line of the table -> the others."""
    lines = [line.split() for line in text.partition("by ZeRO stage and micro batch")[2].splitlines()[1:]]
    return {line[0]: line[1:] for line in lines}


def test_the_table_holds_what_the_engine_takes() -> None:
    sizes = table(plan.describe(plan.make_plan(compose([PAPER]))))
    assert sizes["stage"] == ["1", "5", "17", "85"] and set(sizes) == {"stage", "0", "1", "2", "3"}
    alone = table(plan.describe(plan.make_plan(compose(["+experiment=single_gpu_1p45b"]))))
    assert set(alone) == {"stage", "1", "2", "3"}  # at stage 0 bf16 would have no masters
    assert alone["stage"][:3] == ["1", "2", "4"] and "17" in alone["stage"] and len(alone["stage"]) <= 11
    assert plan.micro_batches(680, 340)[-2:] == [40, 340]


def test_the_command_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["cluster=h100", "text_encoder=words_tiny", "cluster.train.run.micro_batch_size=2"]
    assert plan.main(small) == 0
    text = capsys.readouterr().out
    assert "8 x H100 SXM" in text and "ZeRO stage" in text
    assert plan.main([*small, "cluster.train.gpu.memory_bytes=1e9"]) == 1
    assert "It does not fit" in capsys.readouterr().err
    assert plan.main([]) == 0
    assert "2 x processor core" in capsys.readouterr().out
    assert plan.main(["+stage=train_autoencoder"]) == 0
    assert "1,954,120 trained" in capsys.readouterr().out


@pytest.mark.parametrize("hours, words", [
    (0.01, "under a minute"), (0.5, "30 minutes"), (3.0, "3.0 hours"), (36.0, "1.5 days"),
])  # fmt: skip
def test_a_duration_is_told_in_a_unit_that_fits(hours: float, words: str) -> None:
    assert plan.duration(hours) == words


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
