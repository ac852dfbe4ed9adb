"""What is drawn for each sample: noise of which a share is constant over a channel."""

from __future__ import annotations

import numpy as np

from ldm.training.loader import Draw
from tests.ldm.training.tiny import SEED

SHARE, SAMPLES = 0.1, 500


def drawn(offset_noise: float, position: int) -> tuple[np.ndarray, np.ndarray, tuple[int, bool]]:
    eps, posterior = np.empty((4, 8, 8), np.float32), np.empty((4, 8, 8), np.float32)
    rest = Draw(SEED, 1000, 0.1, offset_noise)(position, eps, posterior)
    return eps, posterior, rest


def test_offset_noise_moves_whole_channels_by_its_share_and_nothing_else() -> None:
    shifts = []
    for position in range(SAMPLES):
        (without, posterior, rest), (eps, same, equal) = (drawn(share, position) for share in (0.0, SHARE))
        assert np.array_equal(posterior, same) and rest == equal
        difference = eps - without
        assert np.ptp(difference, axis=(1, 2)).max() < 1e-6
        shifts.append(difference.mean((1, 2)))
    assert abs(np.std(shifts) / SHARE - 1) < 0.1 and abs(np.mean(shifts)) < 0.1 * SHARE
    assert abs(np.corrcoef(np.array(shifts).T)[0, 1]) < 0.2  # each channel its own
