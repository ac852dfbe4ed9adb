"""Learning-rate multipliers: the released configurations' numbers, and closed forms of our own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ldm.training.lr import NAMES, cosine_cycle, cycles, linear_cycle, multiplier

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "lr_schedules.safetensors"
TWO = {"warmup_steps": (100, 50), "cycle_steps": (10_000, 2_000_000), "start": (1e-6, 0.1), "peak": (1.0, 0.5),
       "end": (0.01, 0.001)}


def two_cycles(cycle: Callable[..., float]) -> Callable[[int], float]:
    parts = [partial(cycle, **{name: values[i] for name, values in TWO.items()}) for i in range(2)]
    return partial(cycles, lengths=TWO["cycle_steps"], parts=parts)


RELEASED: dict[str, Callable[[int], float]] = {
    "inpainting_big": partial(cosine_cycle, warmup_steps=1000, cycle_steps=50_000, start=0.001, peak=0.1, end=0.0001),
    "lsun_churches": partial(linear_cycle, warmup_steps=10_000, cycle_steps=10**13, start=1e-6, peak=1.0, end=1.0),
    "linear_two_cycles": two_cycles(linear_cycle),
    "cosine2_two_cycles": two_cycles(cosine_cycle),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_schedules(name: str) -> None:
    golden = load_file(GOLDEN)
    for step, wanted in zip(golden["input/steps"].tolist(), golden[f"output/{name}"].tolist(), strict=True):
        assert RELEASED[name](step) == pytest.approx(wanted, rel=1e-12), step


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_rises_to_one_and_falls_no_lower_than_its_end(name: str) -> None:
    values = [multiplier(name, step, 10, 100, 0.05) for step in range(0, 131)]
    assert values[0] == 0 and values[1] == pytest.approx(0.1) and values[10] == 1
    assert all(a < b for a, b in zip(values[:10], values[1:11], strict=True))
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))
    assert min(values[10:]) >= 0.05
    if name in ("linear", "cosine"):
        assert values[100] == values[130] == pytest.approx(0.05)


def test_closed_forms() -> None:
    assert multiplier("constant", 99, 0, 100, 0.0) == 1
    assert multiplier("linear", 55, 10, 100, 0.0) == pytest.approx(0.5)
    assert multiplier("cosine", 55, 10, 100, 0.2) == pytest.approx(0.6)
    assert multiplier("inverse_sqrt", 40, 10, 100, 0.0) == pytest.approx(0.5)
    assert multiplier("inverse_sqrt", 4, 0, 100, 0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("arguments, words", [
    (("cosin", 0, 10, 0.0), ["lr_schedule", "'cosin'", "inverse_sqrt"]),
    (("cosine", 11, 10, 0.0), ["warmup_steps", "11", "10"]),
    (("cosine", 0, 10, 1.5), ["lr_end", "1.5"]),
])  # fmt: skip
def test_settings_that_make_no_schedule_are_refused(arguments: tuple[str, int, int, float], words: list[str]) -> None:
    name, warmup_steps, max_steps, end = arguments
    with pytest.raises(ValueError) as error:
        multiplier(name, 1, warmup_steps, max_steps, end)
    assert all(word in str(error.value) for word in words)
