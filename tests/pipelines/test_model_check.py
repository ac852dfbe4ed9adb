from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.models.denoiser import make_denoiser
from pipelines.config import compose, options
from pipelines.model_check import check_all_are_trained, check_model
from pipelines.run import main


def test_the_default_job_and_the_miniature_pass() -> None:
    check_model(compose([]))
    check_model(compose(["+experiment=smoke"]))


@pytest.mark.parametrize("override, words", [
    ("unet.in_channels=4", "unet.in_channels is 4"),
    ("unet.out_channels=3", "unet.out_channels is 3"),
    ("unet.context_dim=100", "unet.context_dim is 100"),
    ("generation.sampler=magic", "magic"),
    ("generation.steps=2000", "2000"),
    ("training.batch_size=15", "training.batch_size is 15"),
    ("training.lr_schedule=sawtooth", "sawtooth"),
    ("diffusion.prediction=w", "'w'"),
    ("text_encoder.tokenizer=wordpiece", "vocab_file"),
    ("dataset.precompute_latents.resolution=72", "9"),
    ("training.gradient_clipping=0", "above 0, or null"),
    ("training.learning_rate=-1", "training.learning_rate is -1"),
    ("cluster.train.workers=0", "cluster.train.workers is 0"),
    ("cluster.train.run.micro_batch_size=0", "micro_batch_size is 0"),
    ("+cluster.train.run.deepspeed.zero_optimisation.stage=1", "did you mean zero_optimization?"),
    ("+cluster.train.run.deepspeed.fp16.enabled=true", "training.precision"),
    ("+cluster.train.run.deepspeed.zero_optimization.offload_optimizer.device=nvme", "device is nvme"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_starts(
    override: str, words: str, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([override, f"paths.outputs={tmp_path}"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_passes_or_asks_for_a_file_that_its_user_brings(name: str) -> None:
    try:
        check_model(compose([f"+experiment={name}"]))
    except ValueError as error:
        assert "text_encoder.vocab_file" in str(error)


@pytest.mark.parametrize("name", ["laion400m_1p45b", "sd2_256"])
def test_no_parameter_of_a_large_model_is_left_to_decay(name: str) -> None:
    config = compose([f"+experiment={name}"])
    with torch.device("meta"):
        denoiser = make_denoiser(config.unet, config.text_encoder)
        z_t = torch.empty(1, config.unet.in_channels, 32, 32)
        condition = {"tokens": torch.zeros(1, config.text_encoder.length, dtype=torch.int64)}
        check_all_are_trained(denoiser, denoiser(z_t, torch.empty(1), condition))
        denoiser.unet.idle = nn.Parameter(torch.empty(3))
        with pytest.raises(ValueError, match="1 trained parameters never get a gradient, unet.idle first"):
            check_all_are_trained(denoiser, denoiser(z_t, torch.empty(1), condition))
