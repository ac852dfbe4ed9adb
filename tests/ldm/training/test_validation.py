"""The validation loss: a number computed by hand, the same on any number of processes, that costs training nothing."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.config import TrainSettings
from ldm.models.tokenizer import make_tokenizer
from ldm.training.engine import Engine, World, join
from ldm.training.frozen import Frozen
from ldm.training.loader import TrainData, hold_out
from ldm.training.step import make_loader
from tests.ldm.training import processes
from tests.ldm.training.test_parity import by_hand, make
from tests.ldm.training.test_train import weights_of, work
from tests.ldm.training.tiny import RUN, UNET, settings, write_data

WHAT = settings(held_out_shards=1, validation_samples=16, caption_dropout=0.5, max_steps=4, warmup_steps=2)
WHAT = replace(WHAT, unet=replace(UNET, dropout=0.5))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    return write_data(tmp_path_factory.mktemp("latents"), [9, 14, 11])


def expected(data: TrainData) -> float:
    """Sixteen held-out samples at once through the plain modules, in closed form."""
    denoiser, tokenizer = make(WHAT).eval(), make_tokenizer(WHAT.text_encoder)
    what = replace(WHAT, training=replace(WHAT.training, batch_size=16))
    _, held_out = hold_out(data, 1)
    assert held_out is not None and len(held_out.shards) == 1
    run, world = replace(RUN, micro_batch_size=16), World(0, 1, torch.device("cpu"))
    batch = next(make_loader(what, held_out, tokenizer, None, run, world, validation=True).batches(0))
    assert not (batch.condition["tokens"] == tokenizer.null).all(1).any()  # no caption is dropped
    z_t, wanted, _ = by_hand(WHAT, batch)
    with torch.no_grad():
        return (denoiser(z_t, batch.t, batch.condition) - wanted).square().mean().item()


def found(what: TrainSettings, data: TrainData) -> dict[str, float]:
    """What a process makes of it, twice, and with each of its two guards off."""
    validation, world, denoiser = importlib.import_module("ldm.training.validation"), join(), make(what)
    frozen = Frozen(denoiser, what.training.precision)
    run = replace(RUN, micro_batch_size=8 // world.world_size // 2, zero_stage=1)
    engine = Engine(denoiser, what.training, run, world)
    loader = make_loader(
        what, hold_out(data, 1)[1], make_tokenizer(what.text_encoder), None, run, world, validation=True
    )
    schedule = importlib.import_module("ldm.training.checks").schedule_of(what.diffusion)

    def loss() -> float:
        return validation.validation_loss(engine, frozen, loader, what, schedule)

    losses = {"first": loss(), "second": loss()}
    assert engine.module.training
    eval_, all_reduce = nn.Module.eval, validation.dist.all_reduce
    nn.Module.eval = lambda self: self
    losses["with dropout"] = loss()
    nn.Module.eval, validation.dist.all_reduce = eval_, lambda total: None
    losses["of its own share"] = loss()
    validation.dist.all_reduce = all_reduce
    return losses


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_is_the_mean_over_held_out_samples_without_dropout(data: TrainData, world_size: int) -> None:
    by_hand = expected(data)
    for losses in processes.run(found, WHAT, data, world_size=world_size):
        print(f"validation loss on {world_size}: {losses['first']:.9f}, by hand {by_hand:.9f}")
        assert losses["first"] == losses["second"] == pytest.approx(by_hand, rel=1e-5)
        # The twins.
        assert losses["with dropout"] != pytest.approx(by_hand, rel=1e-3)
        assert (losses["of its own share"] == pytest.approx(by_hand, rel=1e-5)) == (world_size == 1)


def test_it_changes_no_bit_of_what_is_trained(data: TrainData, tmp_path: Path) -> None:
    run = replace(RUN, micro_batch_size=4, checkpoint_every_steps=100)
    for every in (1, None):
        what = replace(WHAT, training=replace(WHAT.training, validate_every_steps=every))
        (result, _) = processes.run(work, what, data, tmp_path / str(every), run, world_size=2)
        assert len([v for _, v in result["logged"] if "validation_loss" in v]) == (4 if every else 0)
    assert weights_of(tmp_path / "1", 4) == weights_of(tmp_path / "None", 4)
