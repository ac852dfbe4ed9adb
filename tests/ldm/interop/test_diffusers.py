"""The same weights through diffusers' classes give the same numbers, and come back to the bit."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

from ldm.config import AutoencoderConfig, UNetConfig
from ldm.interop import diffusers as names
from ldm.interop.entry import Entry, shapes, to_own, to_theirs
from ldm.interop.text import bert_entries
from ldm.models.autoencoder import make_autoencoder
from ldm.models.text_encoder import make_text_encoder
from ldm.models.unet import UNet
from tests.ldm import golden
from tests.ldm.interop.small import AUTOENCODERS, BERT, SEED, UNETS, check_digests, conf, key_list, trained


def their_class(settings: dict) -> torch.nn.Module:
    kind = getattr(diffusers, settings["_class_name"])
    return kind.from_config({key: value for key, value in settings.items() if key != "_class_name"}).eval()


def carried_over(ours: torch.nn.Module, entries: list[Entry], theirs: torch.nn.Module) -> None:
    """Weights into diffusers' class, strictly, and back to the bit."""
    state = ours.state_dict()
    written = to_theirs(entries, state)
    theirs.load_state_dict(written, strict=True)
    back = to_own(entries, lambda key: theirs.state_dict()[key])
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


# ---- U-Nets -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [kind for kind in UNETS if kind != "sdxl"])
@torch.no_grad()
def test_unets(kind: str) -> None:
    config = UNETS[kind]
    ours = trained(UNet(config))
    theirs = their_class(names.unet_to_diffusers(config, 8))
    carried_over(ours, names.unet_entries(config), theirs)
    z_t, t = noise(2, config.in_channels, 8, 8), torch.tensor([3, 900])
    condition, others = condition_of(config)
    prediction = ours(z_t, t, **condition)
    expected = theirs(z_t, t, **others).sample
    print(kind, "largest difference", float((prediction - expected).abs().max()))
    assert float(prediction.std()) > 0.02
    torch.testing.assert_close(prediction, expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_swapped_weights_show() -> None:
    """The twin of the test above: query and value exchanged in one block: numbers differ."""
    config = UNETS["unconditional"]
    ours, theirs = trained(UNet(config)), their_class(names.unet_to_diffusers(config, 8))
    written = to_theirs(names.unet_entries(config), ours.state_dict())
    query, value = (f"mid_block.attentions.0.{name}.weight" for name in ("to_q", "to_v"))
    theirs.load_state_dict(written | {query: written[value], value: written[query]})
    z_t, t = noise(2, 4, 8, 8), torch.tensor([3, 900])
    assert (ours(z_t, t) - theirs(z_t, t).sample).abs().max() > 1e-4


def condition_of(config: UNetConfig) -> tuple[dict[str, Tensor], dict]:
    """The same condition in our words and in theirs."""
    ours, theirs = {}, {}
    if config.context_dim is not None:
        ours["context"] = theirs["encoder_hidden_states"] = noise(2, 5, config.context_dim)
    if config.num_classes is not None:
        ours["class_label"] = theirs["class_labels"] = torch.tensor([1, 4])
    return ours, theirs


@torch.no_grad()
def test_a_vector_is_the_pooled_text_and_the_embedded_sizes() -> None:
    from ldm.models.conditioning import embed_numbers

    config = replace(UNETS["sdxl"], vector_dim=12 + 6 * 256)
    ours, theirs = trained(UNet(config)), their_class(names.unet_to_diffusers(config, 8))
    carried_over(ours, names.unet_entries(config), theirs)
    z_t, t, context, pooled = noise(2, 4, 8, 8), torch.tensor([3, 900]), noise(2, 5, 24), noise(2, 12)
    sizes = torch.tensor([[512, 512, 0, 0, 512, 512], [256, 128, 8, 0, 512, 256]])
    prediction = ours(z_t, t, context=context, vector=torch.cat([pooled, embed_numbers(sizes)], 1))
    added = {"text_embeds": pooled, "time_ids": sizes}
    expected = theirs(z_t, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", UNETS)
def test_a_unets_configuration_comes_back(kind: str) -> None:
    config = UNETS[kind]
    settings = {key: value for key, value in their_class(names.unet_to_diffusers(config, 8)).config.items()}
    back = names.unet_from_diffusers({"_class_name": names.unet_to_diffusers(config, 8)["_class_name"], **settings})
    if config.transformer_depth is None and config.num_heads is not None:  # they count channels of a head
        config = replace(config, num_heads=None, num_head_channels=32 // config.num_heads)
    if config.transformer_depth is not None and config.num_heads is None:
        assert back.num_head_channels == config.num_head_channels
    levels = [2**i for i in range(3)]
    known = {"attention_resolutions": [i for i in reversed(levels) if i in config.attention_resolutions],
             "qkv_order": "head_first"}  # fmt: skip
    assert asdict(back) == asdict(replace(config, **known))


def test_a_middle_without_norm_is_refused() -> None:
    settings = names.unet_to_diffusers(UNETS["churches_like"], 8) | {"attn_norm_num_groups": None}
    with pytest.raises(ValueError, match="attn_norm_num_groups is None"):
        names.unet_from_diffusers(settings)


def test_golden_unet_equals_what_others_converted() -> None:
    from tests.ldm.models.original import Golden, unet_config

    case = Golden("unet_text")
    written = to_theirs(names.unet_entries(unet_config(case.params)), case.weights())
    check_digests(written, "unet_text_diffusers")


@pytest.mark.parametrize("change, word", [
    ({"resblock_updown": True}, "resblock_updown"),
    ({"transformer_depth": None, "context_dim": None, "attention_resolutions": [1, 2, 4]}, "num_heads"),
    ({"transformer_depth": None, "context_dim": None, "vector_dim": 3}, "vector_dim"),
])  # fmt: skip
def test_what_their_classes_cannot_express_is_refused(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        names.unet_to_diffusers(replace(UNETS["text"], **change), 8)


@pytest.mark.parametrize("name", ["lsun_churches256", "inpainting_big"])
def test_the_released_ones_that_they_cannot_express(name: str) -> None:
    with pytest.raises(ValueError, match="num_heads is 8"):
        names.unet_to_diffusers(conf(UNetConfig, "unet", name), 32)


def test_a_network_that_is_not_ours_is_refused_by_name() -> None:
    settings = names.unet_to_diffusers(UNETS["text"], 8)
    for change, word in (({"act_fn": "gelu"}, "act_fn"), ({"class_embed_type": "timestep"}, "class_embed_type"),
                         ({"down_block_types": ["DownBlock2D"] * 2 + ["KDownBlock2D"]}, "KDownBlock2D"),
                         ({"attention_head_dim": [4, 4, 4]}, "heads")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            names.unet_from_diffusers(settings | change)


# Their list of keys, our configuration: at real size, on the meta device.
@pytest.mark.parametrize("listing, name", [
    ("diffusers_ldm_text2im_large_unet", "txt2img_1p45b"),
    ("diffusers_sd15_unet", "sd15"),
    ("diffusers_sd21_unet", "sd21"),
    ("diffusers_sdxl_unet", "sdxl_base"),
    ("diffusers_ldm_celebahq256_unet", "uncond_f4"),
])  # fmt: skip
def test_every_key_and_shape_of_published_unets(listing: str, name: str) -> None:
    config = conf(UNetConfig, "unet", name)
    with torch.device("meta"):
        state = UNet(config).state_dict()
    entries = names.unet_entries(config)
    assert shapes(to_theirs(entries, state)) == key_list(listing)
    theirs = {key: torch.empty(shape, device="meta") for key, shape in key_list(listing).items()}
    assert shapes(to_own(entries, theirs.__getitem__)) == shapes(state)


# ---- autoencoders -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", AUTOENCODERS)
@torch.no_grad()
def test_autoencoders(kind: str) -> None:
    config = AUTOENCODERS[kind]
    ours = trained(make_autoencoder(config))
    theirs = their_class(names.autoencoder_to_diffusers(config, 0.5, 32))
    carried_over(ours, names.autoencoder_entries(config), theirs)
    image, z = noise(1, 3, 64, 64), noise(1, 4, 64 // config.factor, 64 // config.factor)
    if config.posterior == "kl":
        encoded, decoded = theirs.encode(image).latent_dist.parameters, theirs.decode(z).sample
        encoded = torch.cat([encoded.chunk(2, 1)[0], encoded.chunk(2, 1)[1]], 1)
    else:
        encoded, decoded = theirs.encode(image).latents, theirs.decode(z).sample
    print(kind, float((ours.encode(image) - encoded).abs().max()), float((ours.decode(z) - decoded).abs().max()))
    torch.testing.assert_close(ours.encode(image), encoded, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.decode(z), decoded, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_an_autoencoders_configuration_comes_back(kind: str) -> None:
    settings = names.autoencoder_to_diffusers(AUTOENCODERS[kind], 0.5, 32)
    settings = {"_class_name": settings["_class_name"], **their_class(settings).config}
    assert names.autoencoder_from_diffusers(settings) == (AUTOENCODERS[kind], 0.5)


def test_golden_autoencoder_equals_what_others_converted() -> None:
    from tests.ldm.models.test_autoencoder import load

    ours, _, _ = load("kl_f8")
    check_digests(to_theirs(names.autoencoder_entries(ours.config), ours.state_dict()), "kl_f8_diffusers")


@pytest.mark.parametrize("listing, name", [
    ("diffusers_ldm_celebahq256_vqvae", "vq_f4"),
    ("diffusers_ldm_text2im_large_vqvae", "kl_f8"),
    ("diffusers_sd15_vae", "kl_f8"),
])  # fmt: skip
def test_every_key_and_shape_of_published_autoencoders(listing: str, name: str) -> None:
    from ldm.config import AutoencoderSettings

    config = conf(AutoencoderSettings, "autoencoder", name).network
    with torch.device("meta"):
        state = make_autoencoder(config).state_dict()
    assert shapes(to_theirs(names.autoencoder_entries(config), state)) == key_list(listing)


def test_names_of_older_files() -> None:
    assert names.current_name("decoder.mid_block.attentions.0.proj_attn.weight").endswith(".to_out.0.weight")
    assert names.current_name("encoder.mid_block.attentions.0.key.bias").endswith(".to_k.bias")


def test_a_small_autoencoder_has_no_class_there() -> None:
    config: AutoencoderConfig = replace(AUTOENCODERS["kl_f8"], kind="tiny")
    with pytest.raises(ValueError, match="tiny"):
        names.autoencoder_to_diffusers(config, 1.0, 32)


# ---- text encoders ----------------------------------------------------------------------------------------
def bert_class(vocab: int, length: int, width: int, layers: int, heads: int, head_width: int) -> LDMBertModel:
    return LDMBertModel(LDMBertConfig(
        vocab_size=vocab, max_position_embeddings=length, d_model=width, encoder_ffn_dim=4 * width,
        encoder_layers=layers, encoder_attention_heads=heads, head_dim=head_width,
    )).eval()  # fmt: skip


@torch.no_grad()
def test_the_transformer_that_is_trained_with_the_unet() -> None:
    ours = trained(make_text_encoder(BERT))
    theirs = bert_class(BERT.vocab_size, BERT.length, BERT.width, BERT.layers, BERT.heads, BERT.head_width)
    written = to_theirs(bert_entries(BERT.layers, "diffusers", ""), ours.state_dict())
    kept = theirs.load_state_dict(written, strict=False)
    assert kept.missing_keys == ["to_logits.weight", "to_logits.bias"] and not kept.unexpected_keys
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(SEED))
    torch.testing.assert_close(ours(tokens), theirs(tokens)[0], rtol=0, atol=1e-5)


def test_golden_transformer_equals_what_others_converted() -> None:
    weights = golden.load("bert")
    state = to_own(bert_entries(3, "original", "weights/transformer."), weights.__getitem__)
    written = to_theirs(bert_entries(3, "diffusers", ""), state)
    logits = {f"to_logits.{name}": weights[f"weights/transformer.to_logits.{name}"] for name in ("weight", "bias")}
    check_digests(written | logits, "bert_diffusers")


def test_every_key_of_the_published_transformer() -> None:
    expected = set(key_list("diffusers_ldm_text2im_large_bert")) - {"to_logits.weight", "to_logits.bias"}
    assert {key for entry in bert_entries(32, "diffusers", "") for key in entry.theirs} == expected
