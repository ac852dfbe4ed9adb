from __future__ import annotations

import pytest

from pipelines.config import compose, options
from pipelines.model_check import check_model
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
