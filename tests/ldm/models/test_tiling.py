"""Tiled encoding and decoding against the untiled."""

import os
from dataclasses import replace

import pytest
import torch

from ldm.config import AutoencoderSettings
from ldm.models.autoencoder import Autoencoder, make_autoencoder
from ldm.models.tiling import decode_tiled, encode_tiled
from tests.ldm.models import settings

SEED = int(os.environ.get("LDM_TEST_SEED", 0))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(SEED)


@pytest.fixture
def autoencoder() -> Autoencoder:
    network = settings.read(AutoencoderSettings, "autoencoder", "kl_f4").network
    network = replace(network, compvis=replace(network.compvis, channels=32, num_res_blocks=1, channel_mult=[1, 1, 1]))
    return make_autoencoder(network).requires_grad_(False)


class Local:
    """An autoencoder that looks at one pixel at a time: tiles cannot change what it says."""

    factor = 4

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(image, 4)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z.repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_one_tile_is_the_whole_picture_to_the_bit(autoencoder) -> None:
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    moments = autoencoder.encode(image)
    for tile in (48, 64):
        assert torch.equal(encode_tiled(autoencoder, image, tile, 16), moments)
    z = moments[:, :3]
    assert torch.equal(decode_tiled(autoencoder, z, 12, 4), autoencoder.decode(z))


@pytest.mark.parametrize(
    "height, width, tile, overlap", [(64, 64, 32, 8), (40, 100, 32, 0), (36, 52, 16, 12), (8, 99, 5, 2)]
)
def test_tiles_cover_everything_once_and_are_blended_to_one(height: int, width: int, tile: int, overlap: int) -> None:
    z = torch.randn(1, 3, height, width)
    torch.testing.assert_close(decode_tiled(Local(), z, tile, overlap), Local().decode(z), rtol=1e-5, atol=1e-6)
    image = torch.randn(1, 3, 4 * height, 4 * width)
    torch.testing.assert_close(
        encode_tiled(Local(), image, 4 * tile, 4 * overlap), Local().encode(image), rtol=1e-5, atol=1e-6
    )


def test_blending_leaves_no_seam() -> None:
    class Bright(Local):
        """Says a constant that differs from tile to tile."""

        def __init__(self) -> None:
            self.calls = 0

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.full((1, 3, z.shape[2] * 4, z.shape[3] * 4), float(self.calls))

    z = torch.zeros(1, 3, 8, 40)
    steps = {o: decode_tiled(Bright(), z, 16, o).diff(dim=3).abs().max().item() for o in (0, 8)}
    assert steps[0] == 1.0  # a seam without overlap
    assert steps[8] < 0.1


def test_a_large_picture_stays_near_the_untiled(autoencoder) -> None:
    image = torch.rand(1, 3, 96, 96) * 2 - 1  # of one texture, so that norms over a tile and over the picture agree
    whole, tiled = autoencoder.encode(image), encode_tiled(autoencoder, image, 64, 32)
    assert tiled.shape == whole.shape
    assert (tiled - whole).square().mean() < 0.02 * whole.var()


def test_sizes_that_do_not_fit_are_refused(autoencoder) -> None:
    image = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="tile is 30 pixels.*multiple of 4"):
        encode_tiled(autoencoder, image, 30, 8)
    with pytest.raises(ValueError, match="height is 62"):
        encode_tiled(autoencoder, image[:, :, :62], 32, 8)
    with pytest.raises(ValueError, match="overlap of 8 does not fit a tile of 8"):
        decode_tiled(autoencoder, torch.zeros(1, 3, 16, 16), 8, 8)
