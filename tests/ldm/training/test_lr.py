"""Learning-rate multipliers: the released configurations' numbers, and closed forms of our own."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from ldm.training.lr import NAMES, multiplier

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "lr_schedules.safetensors"

# The original's schedules of one cycle by our settings: (name, warm-up, max_steps, end), and the height of the peak.
RELEASED = {
    "inpainting_big": (("cosine", 1000, 50_000, 0.001), 0.1),
    "lsun_churches": (("constant", 10_000, 10**13, 0.0), 1.0),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_schedules_are_ours_but_for_where_warm_up_begins(name: str) -> None:
    (kind, warmup_steps, max_steps, end), peak = RELEASED[name]
    golden, apart = load_file(GOLDEN), 0.0
    for step, wanted in zip(golden["input/steps"].tolist(), golden[f"output/{name}"].tolist(), strict=True):
        found = peak * multiplier(kind, step, warmup_steps, max_steps, end)
        if step >= warmup_steps:
            assert found == pytest.approx(wanted, rel=1e-12), step
        else:  # from 0 here, from a thousandth or less there
            apart = max(apart, abs(found - wanted))
    assert 0 < apart <= 0.001


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
