"""The small autoencoder: shapes, refusals, and a real pretrained member of its family."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.config import AutoencoderConfig, AutoencoderSettings, TinyConfig
from ldm.models.tiny_autoencoder import TinyAutoencoder
from ldm.training.autoencoder_loss import psnr
from tests.ldm.models import settings

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))

SMALL = AutoencoderConfig(
    kind="tiny", posterior="kl", factor=8, latent_channels=4, compvis=None,
    tiny=TinyConfig(
        image_low=-1.0, latent_clamp=None, patch=4, encoder_widths=[8, 16], encoder_blocks=[0, 1],
        decoder_widths=[8, 16], decoder_blocks=[1, 2], block_convs=2, lowest_norm=False,
    ),
)  # fmt: skip
TAEF2 = AutoencoderConfig(
    kind="tiny", posterior="none", factor=8, latent_channels=32, compvis=None,
    tiny=TinyConfig(
        image_low=0.0, latent_clamp=3.0, patch=1, encoder_widths=[64] * 4, encoder_blocks=[1, 3, 3, 3],
        decoder_widths=[64] * 4, decoder_blocks=[1, 3, 3, 3], block_convs=3, lowest_norm=True,
    ),
)  # fmt: skip


def change(config: AutoencoderConfig, **values: object) -> AutoencoderConfig:
    """The configuration with other values, whichever of the two classes holds them."""
    outer = {key: value for key, value in values.items() if key in {f.name for f in dataclasses.fields(config)}}
    inner = {key: value for key, value in values.items() if key not in outer}
    return dataclasses.replace(config, tiny=dataclasses.replace(config.tiny, **inner), **outer)


def test_moments_and_pictures_have_their_shapes() -> None:
    torch.manual_seed(SEED)
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    autoencoder = TinyAutoencoder(SMALL)
    assert autoencoder.encode(image).shape == (2, 8, 4, 6)
    assert autoencoder.decode(torch.randn(2, 4, 4, 6)).shape == image.shape
    deterministic = TinyAutoencoder(change(SMALL, posterior="none"))
    assert deterministic.encode(image).shape == (2, 4, 4, 6)
    assert deterministic(image).shape == image.shape


def test_a_network_of_its_own_range_sees_the_same_picture() -> None:
    """Equal weights, one network on [-1, 1] and one on [0, 1]: what the first layer of each reads differs so."""
    torch.manual_seed(SEED)
    seen: list[Tensor] = []
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    for low in (-1.0, 0.0):
        autoencoder = TinyAutoencoder(change(SMALL, image_low=low))
        autoencoder.encoder[0].register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
        autoencoder.encode(image)
    torch.testing.assert_close(seen[0], image)
    torch.testing.assert_close(seen[1], (image + 1) / 2)


def test_decoding_leaves_the_network_s_range_for_ours() -> None:
    torch.manual_seed(SEED)
    ours, theirs = TinyAutoencoder(SMALL), TinyAutoencoder(change(SMALL, image_low=0.0))
    theirs.load_state_dict(ours.state_dict())
    z = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(theirs.decode(z), 2 * ours.decode(z) - 1)


def test_clamp_bounds_what_the_decoder_reads() -> None:
    torch.manual_seed(SEED)
    free = TinyAutoencoder(SMALL)
    clamped = TinyAutoencoder(change(SMALL, latent_clamp=3.0))
    clamped.load_state_dict(free.state_dict())
    z = torch.randn(1, 4, 2, 2) * 2
    torch.testing.assert_close(clamped.decode(z), free.decode(3 * torch.tanh(z / 3)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"posterior": "vq"}, 'posterior is "vq"'),
        ({"factor": 16}, "factor is 16; tiny.patch 4 and 2 levels make 8"),
        ({"decoder_blocks": [1, 2, 3]}, "decoder_blocks has 3 levels; encoder_widths has 2"),
    ],
)
def test_settings_of_no_network_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TinyAutoencoder(change(SMALL, **values))


def test_a_picture_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        TinyAutoencoder(SMALL).encode(torch.zeros(1, 3, 32, 36))


def test_parameters_of_the_taesd_family() -> None:
    """TAESD counts 2,445,063 parameters with its 4 latent channels (1,222,532 and 1,222,531)."""
    network = settings.read(AutoencoderSettings, "autoencoder", "taesd").network
    assert network == change(TAEF2, latent_channels=4, lowest_norm=False)
    with torch.device("meta"):
        taesd = TinyAutoencoder(network)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in taesd.named_children()}
    assert count == {"encoder": 1_222_532, "decoder": 1_222_531}


def _pretrained(folder: Path) -> TinyAutoencoder:
    """The pretrained network, its weights under our names."""
    autoencoder = TinyAutoencoder(TAEF2)
    for part, shift in (("encoder", 0), ("decoder", -1)):  # the clamp is the first layer of their decoder
        theirs = torch.load(folder / f"taef2_{part}.pth", weights_only=True)
        ours = {}
        for name, weight in theirs.items():
            layer, _, rest = name.partition(".")
            ours[f"{int(layer) + shift}.{rest}"] = weight.float()
        getattr(autoencoder, part).load_state_dict(ours)
    return autoencoder.eval()


def _photographs(tar_path: Path, count: int, size: int) -> Tensor:
    """The middle squares of the first photographs, (count, 3, size, size) in [-1, 1]."""
    pictures = []
    with tarfile.open(tar_path) as tar:
        for member in tar:
            if not member.name.endswith(".jpg") or len(pictures) == count:
                continue
            picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.resize((size, size), Image.BICUBIC, (left, top, left + side, top + side))
            pictures.append(np.asarray(square))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_a_real_pretrained_member_reconstructs_photographs() -> None:
    folder = os.environ.get("LDM_EXTRA_DATA")
    if not folder:
        pytest.skip("LDM_EXTRA_DATA is not set: it names a folder with taef2_*.pth and cc12m_32.tar")
    autoencoder = _pretrained(Path(folder))
    image = _photographs(Path(folder) / "cc12m_32.tar", count=3, size=256)
    with torch.no_grad():
        decoded = autoencoder(image)
        # Sabotage: without the clamp, the norm's view of the whole picture or the right range, 28 dB are out of reach.
        broken = TinyAutoencoder(change(TAEF2, image_low=-1.0))
        broken.load_state_dict(autoencoder.state_dict())
        wrong = broken(image[:1])
    assert psnr(decoded, image).mean() >= 28
    assert psnr(wrong, image[:1]).mean() < 28
