"""The average of the weights: the original's numbers, and that it may be cut into stretches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.training.checkpoint import Stretch
from ldm.training.ema import Ema, decay_at
from tests.ldm.training.tiny import SEED

GOLDEN = load_file(Path(__file__).resolve().parents[2] / "golden" / "ema.safetensors")
NAMES = sorted(key.removeprefix("input/params/0/") for key in GOLDEN if key.startswith("input/params/0/"))


def whole(weights: dict[str, Tensor]) -> list[Stretch]:
    """One process that holds everything; the tensors are flat views of the weights."""
    return [Stretch(name, 0, {"weight": weight.view(-1)}) for name, weight in weights.items()]


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_it_averages_like_the_original(decay: float) -> None:
    weights = {name: GOLDEN[f"input/params/0/{name}"].clone() for name in NAMES}
    ema = Ema(whole(weights), decay)
    for update in range(1, 6):
        for name, weight in weights.items():
            weight.copy_(GOLDEN[f"input/params/{update}/{name}"])
        ema.update()
        if update in (1, 5):
            for stretch in ema.stretches:
                expected = GOLDEN[f"output/decay{decay}/after_{update}/{stretch.name}"].flatten()
                torch.testing.assert_close(stretch.tensors["weight"], expected, rtol=1e-5, atol=5e-7)
    assert ema.updates == int(GOLDEN[f"output/decay{decay}/num_updates"])


def test_the_golden_numbers_see_a_wrong_count() -> None:
    """The twin: counting updates from 0 would miss them by far."""
    weights = {name: GOLDEN[f"input/params/0/{name}"].clone() for name in NAMES}
    ema = Ema(whole(weights), 0.9999)
    ema.updates = -1
    for name, weight in weights.items():
        weight.copy_(GOLDEN[f"input/params/1/{name}"])
    ema.update()
    name = "norm.weight"
    average = next(s.tensors["weight"] for s in ema.stretches if s.name == name)
    assert (average - GOLDEN[f"output/decay0.9999/after_1/{name}"]).abs().max() > 0.01


def test_the_decay_rises_to_its_setting() -> None:
    assert decay_at(0.9999, 1) == 2 / 11
    assert decay_at(0.9999, 10**6) == 0.9999
    assert decay_at(0.5, 8) == decay_at(0.5, 9) == 0.5


def test_stretches_average_like_the_whole() -> None:
    torch.manual_seed(SEED)
    weight = torch.randn(5, 7)
    one = Ema(whole({"w": weight}), 0.9)
    flat = weight.view(-1)
    parts = [
        Ema([Stretch("w", start, {"weight": flat[start:stop]})], 0.9) for start, stop in ((0, 11), (11, 12), (12, 35))
    ]
    for _ in range(4):
        weight.add_(torch.randn(5, 7))
        for ema in (one, *parts):
            ema.update()
    joined = torch.cat([ema.stretches[0].tensors["weight"] for ema in parts])
    assert torch.equal(joined, one.stretches[0].tensors["weight"])
    assert not torch.equal(joined, flat)


def test_what_is_not_averaged_goes_with_its_newest_weight() -> None:
    weights = {"text_encoder.w": torch.zeros(3), "unet.w": torch.zeros(3)}
    ema = Ema(whole(weights), 0.9, lambda name: name.startswith("unet."))
    for weight in weights.values():
        weight.fill_(1.0)
    ema.update()
    now = {stretch.name: float(stretch.tensors["weight"][0]) for stretch in ema.stretches}
    assert now["text_encoder.w"] == 1.0 and now["unet.w"] == pytest.approx(9 / 11)


def test_a_restored_average_goes_on_as_if_nothing_had_happened() -> None:
    torch.manual_seed(SEED)
    weight, steps = torch.randn(6), torch.randn(8, 6)
    ema = Ema(whole({"w": weight}), 0.99)
    for i, step in enumerate(steps):
        if i == 4:
            kept = {"w": ema.stretches[0].tensors["weight"].clone().view(2, 3)}
            ema = Ema([Stretch("w", 2, {"weight": weight.view(-1)[2:5]})], 0.99)
            ema.restore(kept.__getitem__, 4)
        weight.add_(step)
        ema.update()
    torch.manual_seed(SEED)
    again = torch.randn(6)
    straight = Ema(whole({"w": again}), 0.99)
    for step in torch.randn(8, 6):
        again.add_(step)
        straight.update()
    assert torch.equal(ema.stretches[0].tensors["weight"], straight.stretches[0].tensors["weight"][2:5])


def test_weights_in_files_are_averaged_when_they_are_shown_and_others_after_the_step() -> None:
    torch.manual_seed(SEED)
    shown, beside, plain = torch.randn(6), torch.randn(4), torch.randn(10)
    plain.copy_(torch.cat([shown, beside]))
    straight = Ema(whole({"w": plain}), 0.99)
    room: list[int] = []
    stretches = [Stretch("shown", 0, {"weight": shown}, in_files=True), Stretch("beside", 0, {"weight": beside})]
    ema = Ema(stretches, 0.99, room=lambda numel: room.append(numel) or torch.empty(numel))
    assert room == [6]  # what does not fit into memory is not averaged there
    for step in torch.randn(5, 10):
        shown.add_(step[:6]), beside.add_(step[6:]), plain.add_(step)
        now = shown.clone()
        ema.look([Stretch(name, 0, {"weight": now}, in_files=True) for name in ("shown", "other")])
        ema.update()
        straight.update()
    joined = torch.cat([stretch.tensors["weight"] for stretch in ema.stretches])
    assert torch.equal(joined, straight.stretches[0].tensors["weight"])
