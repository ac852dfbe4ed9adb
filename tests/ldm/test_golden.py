"""Weights that are drawn again are those that the original code was run with."""

import os

import numpy as np
import pytest
import torch

from tests.ldm import golden

SEED = int(os.environ.get("LDM_TEST_SEED", 0))
CASES = sorted(path.stem for path in golden.FOLDER.glob("*.json") if "drawn" in golden.facts(path.stem))


def test_numbers_are_those_of_torch() -> None:
    for count in (16, 17, 31, 32, 1000, 4096):
        theirs = torch.randn(count, generator=torch.Generator().manual_seed(SEED)).numpy()
        ours = golden.normal(golden.uniform(SEED, count + 16), count)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_of_a_case_is_there(name: str) -> None:
    weights = [value for key, value in golden.load(name).items() if key.startswith("weights/")]
    assert len(weights) == golden.facts(name)["num_weight_tensors"]
    assert all(not value.is_floating_point() or value.dtype == torch.float16 for value in weights)


def test_a_weight_that_is_not_the_originals_is_noticed() -> None:
    """The twin: one number that is not put right, and the digest is another."""
    drawn, none = golden.facts("bert")["drawn"], torch.zeros(0)
    with pytest.raises(ValueError, match="drawn from seed 51 have sha256"):
        golden.draw(drawn, none.int(), none.half())
