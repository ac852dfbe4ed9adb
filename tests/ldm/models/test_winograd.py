"""Winograd's convolutions against direct ones: values, gradients, whole networks, and when they are used."""

import copy
import os

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models import winograd
from ldm.models.winograd import Winograd, use_winograd
from tests.ldm.models.original import Golden
from tests.ldm.models.test_unet import CASES, condition, load

SEED = int(os.environ.get("LDM_TEST_SEED", 0))


def relative(found: Tensor, exact: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return ((found - exact).abs().max() / exact.abs().max()).item()


def inputs(c: int, out: int, h: int, w: int, memory_format: torch.memory_format) -> list[Tensor]:
    torch.manual_seed(SEED)
    x = torch.randn(2, c, h, w).contiguous(memory_format=memory_format)
    return [x.requires_grad_(), torch.randn(out, c, 3, 3, requires_grad=True), torch.randn(out, requires_grad=True)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("c", "out", "h", "w"), [(5, 7, 4, 4), (8, 3, 8, 12), (64, 96, 16, 16), (1, 1, 20, 4)])
def test_values_and_gradients(c: int, out: int, h: int, w: int, memory_format: torch.memory_format) -> None:
    given = inputs(c, out, h, w, memory_format)
    y = Winograd.apply(*given)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = F.conv2d(*exact, padding=1)
    grad = torch.randn_like(y)
    pairs = [(y, expected)]
    pairs += zip(torch.autograd.grad(y, given, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True)
    assert [relative(found, right) < 3e-5 for found, right in pairs] == [True] * 4


@pytest.mark.parametrize("tiles", [1, 3, 8, 20, 100])
@pytest.mark.parametrize("no_grad", [False, True])
def test_strips_of_any_size_make_the_same(tiles: int, no_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows of tiles at once, one picture, or several of the two."""
    given = inputs(5, 7, 16, 12, torch.channels_last)
    monkeypatch.setattr(winograd, "STRIP_TILES", tiles)
    count = len(list(winograd.strips(2, 16, 12)))
    assert count == {1: 8, 3: 8, 8: 4, 20: 2, 100: 1}[tiles]
    if no_grad:
        conv = nn.Conv2d(5, 7, 3, padding=1).requires_grad_(False)
        x = given[0].detach()
        found = winograd.convolve_strips(x, winograd.kept_weight(conv), conv.bias, keep=None)
        assert relative(found, conv(x)) < 3e-5
        return
    y, grad = Winograd.apply(*given), torch.randn(2, 7, 16, 12)
    for found, right in zip(torch.autograd.grad(y, given, grad),
                            torch.autograd.grad(F.conv2d(*given, padding=1), given, grad), strict=True):  # fmt: skip
        assert relative(found, right) < 3e-5


@torch.no_grad()
def test_a_kept_weight_is_made_again_when_the_weight_changes() -> None:
    conv, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(4, 64, 16, 16)
    use_winograd(conv)
    first = conv(x)
    kept = conv.winograd[1]
    conv(x)
    assert conv.winograd[1] is kept and list(conv.state_dict()) == ["weight", "bias"]
    conv.weight.mul_(2)
    torch.testing.assert_close(conv(x) - conv.bias[:, None, None], 2 * (first - conv.bias[:, None, None]))
    conv.load_state_dict({"weight": torch.zeros(64, 64, 3, 3), "bias": torch.ones(64)})
    assert (conv(x) == 1).all()
    with torch.inference_mode():
        loaded = nn.Conv2d(64, 64, 3, padding=1)
        expected = loaded(x)
        use_winograd(loaded)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["FROM_INPUT", "FROM_WEIGHT", "TO_RESULT"])
def test_every_matrix_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above: with one entry off by a fiftieth the results are wrong."""
    matrix = getattr(winograd, name).clone()
    matrix[1, 1] += 0.02
    monkeypatch.setattr(winograd, name, matrix)
    given = inputs(8, 8, 8, 8, torch.channels_last)
    assert relative(Winograd.apply(*given), F.conv2d(*given, padding=1)) > 1e-4


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_networks_still_equal_the_original(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "LEAST_TILES", 1)
    case = Golden("unet_" + name)
    unet = load(case).to(memory_format=torch.channels_last)
    direct = unet(case.input("x"), case.input("timesteps"), **condition(case))
    names = list(unet.state_dict())
    use_winograd(unet)
    prediction = unet(case.input("x"), case.input("timesteps"), **condition(case))
    assert names == list(unet.state_dict()) and not torch.equal(prediction, direct)
    torch.testing.assert_close(prediction, case.output("prediction"), **case.bounds("prediction"))


def test_a_copy_uses_its_own_weights() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1)
    use_winograd(conv)
    other = copy.deepcopy(conv)
    nn.init.zeros_(other.weight)
    x = torch.randn(4, 64, 16, 16)
    torch.testing.assert_close(other(x), other.bias[:, None, None].expand_as(other(x)))
    assert not torch.allclose(conv(x), other(x))


@pytest.mark.parametrize(
    ("conv", "side", "batch", "taken"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), 16, 4, True),
        (nn.Conv2d(64, 64, 3, padding=1), 16, 1, False),  # too few tiles
        (nn.Conv2d(64, 64, 3, padding=1), 18, 4, False),  # sides that tiles do not fill
        (nn.Conv2d(4, 64, 3, padding=1), 16, 4, False),  # too few channels
        (nn.Conv2d(64, 64, 3, padding=1, stride=2), 16, 4, False),
        (nn.Conv2d(64, 64, 1), 16, 4, False),
        (nn.Conv2d(64, 64, 3, padding=1, groups=2), 16, 4, False),
    ],
)
@torch.no_grad()
def test_only_where_it_is_quicker(
    conv: nn.Conv2d, side: int, batch: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    transform = winograd.transform_input
    monkeypatch.setattr(winograd, "transform_input", lambda *given: calls.append(1) or transform(*given))
    torch.manual_seed(SEED)
    x = torch.randn(batch, conv.in_channels, side, side)
    expected = conv(x)
    use_winograd(conv)
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)
    assert bool(calls) == taken
    with torch.autocast("cpu", dtype=torch.bfloat16):
        conv(x)
    conv.double()(x.double())
    assert bool(calls) == taken and len(calls) <= 1
