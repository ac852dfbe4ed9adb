"""The text encoder against numbers of the original code, and its sizes against the published counts."""

import os
from dataclasses import replace

import pytest
import torch

from ldm.config import TextEncoderConfig
from ldm.models.text_encoder import TextEncoder, make_text_encoder
from tests.ldm import golden
from tests.ldm.models import settings

SEED = int(os.environ.get("LDM_TEST_SEED", 0))


def conf(name: str) -> TextEncoderConfig:
    return settings.read(TextEncoderConfig, "text_encoder", name)


def rename(key: str) -> str:
    """The original's name of a parameter -> ours."""
    key = key.replace("token_emb.", "token_embedding.").replace("pos_emb.emb.", "position_embedding.")
    if not key.startswith("attn_layers."):
        return key
    _, _, layer, part, *rest = key.split(".")
    name = ("attention", "mlp")[int(layer) % 2]
    rest = {"net.0.0": "0", "net.2": "2"}.get(".".join(rest[:-1]), ".".join(rest[:-1])).split(".") + rest[-1:]
    rest = [part for part in rest if part]
    return ".".join([f"blocks.{int(layer) // 2}", name + ("_norm" if part == "0" else ""), *rest])


@pytest.fixture(scope="module")
def original() -> tuple[TextEncoder, dict[str, torch.Tensor], dict]:
    values, tolerance = golden.load("bert"), golden.facts("bert")["tolerance"]
    encoder = TextEncoder(replace(conf("bert_1p45b"), vocab_size=200, length=12, width=64, layers=3))
    weights = {k.removeprefix("weights/transformer."): v.float() for k, v in values.items() if k.startswith("weights/")}
    encoder.load_state_dict({rename(k): v for k, v in weights.items() if not k.startswith("to_logits")})
    return encoder, values, tolerance


@pytest.mark.parametrize("suffix", ["", "_short"])
@torch.no_grad()
def test_context_equals_the_original(original, suffix: str) -> None:
    encoder, values, tolerance = original
    context, expected = encoder(values[f"input/tokens{suffix}"]), values[f"output/embeddings{suffix}"]
    bound = tolerance[f"embeddings{suffix}"]
    print("largest difference", (context - expected).abs().max().item())
    torch.testing.assert_close(context, expected, rtol=bound["suggested_rtol"], atol=bound["suggested_atol"])


@torch.no_grad()
def test_logits_of_the_left_out_layer_equal_the_original(original) -> None:
    encoder, values, tolerance = original
    weight, bias = (values[f"weights/transformer.to_logits.{name}"].float() for name in ("weight", "bias"))
    logits = torch.nn.functional.linear(encoder(values["input/tokens"]), weight, bias)
    bound = tolerance["logits"]
    torch.testing.assert_close(
        logits, values["output/logits"], rtol=bound["suggested_rtol"], atol=bound["suggested_atol"]
    )


@torch.no_grad()
def test_a_wrong_epsilon_would_be_seen(original) -> None:
    encoder, values, tolerance = original
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    try:
        for norm in norms:
            norm.eps = 1e-6
        difference = (encoder(values["input/tokens"]) - values["output/embeddings"]).abs().max()
    finally:
        for norm in norms:
            norm.eps = 1e-5
    assert difference > 100 * tolerance["embeddings"]["suggested_atol"]


# Width and vocabulary of the layer that is left out give the totals of the published checkpoints.
COUNTS = {
    "bert_1p45b": (542_895_360, 581_994_042),
    "bert_text2img256": (166_590_080, 186_154_682),
    "layout": (54_656_000, 58_858_496),
    "bytes_tiny": (953_664, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    config, (count, with_logits) = conf(name), COUNTS[name]
    with torch.device("meta"):
        found = sum(p.numel() for p in make_text_encoder(config).parameters())
    assert found == count
    if with_logits is not None:
        assert found + (config.width + 1) * config.vocab_size == with_logits
    assert f"{count:,} parameters" in (settings.CONF / "text_encoder" / f"{name}.yaml").read_text()


def test_every_parameter_has_a_gradient() -> None:
    torch.manual_seed(SEED)
    encoder = make_text_encoder(conf("bytes_tiny"))
    encoder(torch.randint(0, 259, (2, 78))).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bad_input_is_refused_with_both_numbers() -> None:
    config = conf("bytes_tiny")
    with pytest.raises(ValueError, match="79 long.*78 positions"):
        make_text_encoder(config)(torch.zeros(1, 79, dtype=torch.int64))
    with pytest.raises(ValueError, match="text_encoder.layers is None"):
        make_text_encoder(replace(config, layers=None))
    with pytest.raises(ValueError, match='kind is "lstm"'):
        make_text_encoder(replace(config, kind="lstm"))
