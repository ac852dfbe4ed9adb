"""Learning-rate multipliers against their closed forms."""

from __future__ import annotations

import math

import pytest

from ldm.training.lr import NAMES, multiplier


def curve(name: str, steps: range, end: float = 0.1) -> list[float]:
    return [multiplier(name, step, warmup_steps=10, max_steps=110, end=end) for step in steps]


@pytest.mark.parametrize("name", NAMES)
def test_all_rise_over_the_warm_up_and_meet_at_one(name: str) -> None:
    assert curve(name, range(10)) == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert curve(name, range(10, 11)) == [1.0]


def test_each_falls_as_it_should() -> None:
    assert curve("constant", range(10, 500)) == [1.0] * 490
    assert curve("linear", range(60, 61)) == pytest.approx([0.1 + 0.9 * 0.5])
    assert curve("cosine", range(35, 36)) == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2])
    assert curve("inverse_sqrt", range(40, 41)) == pytest.approx([0.5])
    for name in ("cosine", "linear"):
        assert curve(name, range(110, 112)) == pytest.approx([0.1, 0.1])


def test_no_warm_up_starts_at_one_and_an_unknown_name_lists_the_known() -> None:
    assert multiplier("cosine", 0, warmup_steps=0, max_steps=10, end=0) == 1.0
    with pytest.raises(ValueError, match="'cosin'; there are: constant, cosine"):
        multiplier("cosin", 0, warmup_steps=1, max_steps=2, end=0)
