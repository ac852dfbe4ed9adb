"""CLIP's towers against transformers and open_clip themselves, at small sizes and with random weights."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.config import ClipConfig, ClipTowerConfig, TextEncoderConfig
from ldm.models.clip import BytePairs, Clip, ClipTextEncoder
from ldm.models.text_encoder import make_text_encoder
from ldm.models.tokenizer import make_tokenizer
from tests.ldm.models import settings

SEED = int(os.environ.get("LDM_TEST_SEED", 0))
CAPTIONS = ["", "a photograph of a cat", "Ünïcode 🐈, don't & <b>", "word " * 100]
COUNTS = {
    "clip_vit_l_14": 123_060_480,
    "openclip_vit_h_14": 340_387_840,
    "openclip_bigg_14": 694_659_840,
    "sdxl": 123_060_480 + 694_659_840,
}


def conf(name: str) -> TextEncoderConfig:
    return settings.read(TextEncoderConfig, "text_encoder", name)


def small(**changes) -> TextEncoderConfig:
    """SDXL's pair of towers, made small."""
    config, sizes = conf("sdxl"), {"l": (32, 3, 2), "g": (48, 4, 3)}
    towers = {
        name: replace(config.towers[name], width=width, layers=layers, heads=heads)
        for name, (width, layers, heads) in sizes.items()
    }
    towers["g"] = replace(towers["g"], projection=24)
    return replace(config, width=80, towers=towers, **changes)


def one_tower(tower: ClipTowerConfig) -> TextEncoderConfig:
    return replace(small(), width=tower.width, towers={"only": tower})


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return make_tokenizer(conf("sdxl"))(CAPTIONS)


# ---- text towers ------------------------------------------------------------------------------------------
def as_transformers(encoder: ClipTextEncoder, name: str) -> torch.nn.Module:
    """The same tower, with the same weights, in transformers."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tower = encoder.config.towers[name]
    theirs = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=tower.width,
            intermediate_size=4 * tower.width,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            projection_dim=tower.projection or 8,
            hidden_act=tower.activation,
            eos_token_id=49407,
            pad_token_id=tower.pad,
            bos_token_id=49406,
        )
    )
    weights, model = encoder.towers[name].state_dict(), theirs.text_model
    state = {
        "embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
        "final_layer_norm.weight": weights["ln_final.weight"],
        "final_layer_norm.bias": weights["ln_final.bias"],
    }
    for i in range(tower.layers):
        ours, layer = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", weights[f"{ours}attn.in_proj_{kind}"].chunk(3), strict=True):
                state[f"{layer}self_attn.{part}_proj.{kind}"] = value
            for a, b in (("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
                         ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):  # fmt: skip
                state[f"{layer}{b}.{kind}"] = weights[f"{ours}{a}.{kind}"]
    model.load_state_dict(state)
    if tower.projection:
        theirs.text_projection.load_state_dict({"weight": weights["text_projection"].T.contiguous()})
    return theirs.eval()


@torch.no_grad()
def test_both_towers_of_sdxl_equal_transformers(tokens: torch.Tensor) -> None:
    encoder = make_text_encoder(small())
    context, pooled = encoder.encode(tokens)
    assert context.shape == (4, 77, 80) and pooled.shape == (4, 24)
    padded = torch.where((tokens == 49407).cumsum(1) > 0, 49407, tokens)
    first = as_transformers(encoder, "l")(padded, output_hidden_states=True)
    second = as_transformers(encoder, "g")(tokens, output_hidden_states=True)
    expected = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=2)
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, second.text_embeds, rtol=1e-5, atol=1e-5)
    assert torch.equal(encoder(tokens), context)


@pytest.mark.parametrize("skip", [0, 1])
@torch.no_grad()
def test_one_tower_with_the_final_norm_equals_transformers(tokens: torch.Tensor, skip: int) -> None:
    encoder = make_text_encoder(one_tower(replace(small().towers["l"], pad=0, final_norm=True, skip_layers=skip)))
    theirs = as_transformers(encoder, "only")
    states = theirs(tokens, output_hidden_states=True).hidden_states[-1 - skip]
    context, pooled = encoder.encode(tokens)
    torch.testing.assert_close(context, theirs.text_model.final_layer_norm(states), rtol=1e-5, atol=1e-5)
    assert pooled is None


@torch.no_grad()
def test_activation_and_padding_matter(tokens: torch.Tensor) -> None:
    tower = small().towers["l"]
    encoder = make_text_encoder(one_tower(tower))
    for change in ({"pad": 0}, {"activation": "gelu"}, {"skip_layers": 0}):
        other = make_text_encoder(one_tower(replace(tower, **change)))
        other.load_state_dict(encoder.state_dict())
        assert not torch.allclose(other(tokens), encoder(tokens), atol=1e-5), change
    wide = make_text_encoder(one_tower(replace(tower, pad=0)))
    wide.load_state_dict(encoder.state_dict())
    end = tokens[1].argmax() + 1  # what stands after the end changes nothing before it
    torch.testing.assert_close(wide(tokens)[1, :end], encoder(tokens)[1, :end])


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        encoder = make_text_encoder(conf(name))
    assert sum(p.numel() for p in encoder.parameters()) == COUNTS[name]
    assert f"{COUNTS[name]:,} parameters" in (settings.CONF / "text_encoder" / f"{name}.yaml").read_text()


def test_it_is_frozen_and_stays_so(tokens: torch.Tensor) -> None:
    encoder = torch.nn.Sequential(make_text_encoder(small())).train()[0]
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(tokens).requires_grad


def test_weights_come_from_a_file_strictly(tmp_path: Path, tokens: torch.Tensor) -> None:
    encoder, path = make_text_encoder(small()), tmp_path / "towers.safetensors"
    save_file(encoder.state_dict(), path)
    again = make_text_encoder(small(weights=str(path)))
    assert torch.equal(again(tokens), encoder(tokens))
    state = encoder.state_dict()
    del state["towers.g.ln_final.bias"]
    save_file({**state, "towers.g.logit_scale": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="towers.safetensors.*ln_final.bias.*logit_scale") as error:
        make_text_encoder(small(weights=str(path)))
    assert "text_encoder.weights" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no CLIP weights at nowhere"):
        make_text_encoder(small(weights="nowhere"))


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"width": 64}, "width is 64; the towers make 80"),
        ({"towers": {}}, "towers is empty"),
        ({"activation": "relu"}, 'towers.l.activation is "relu"'),
        ({"skip_layers": 3}, "towers.l.skip_layers is 3; the tower has 3"),
        ({"heads": 5}, "towers.l.width is 32; 5 heads"),
    ],
)
def test_settings_that_describe_no_encoder_are_refused(change: dict, complaint: str) -> None:
    config = small()
    if not change.keys() <= {"width", "towers"}:
        change = {"towers": {**config.towers, "l": replace(config.towers["l"], **change)}}
    with pytest.raises(ValueError, match=complaint):
        make_text_encoder(replace(config, **change))
    with pytest.raises(ValueError, match="tokens are 76 long; CLIP reads 77"):
        make_text_encoder(config)(torch.zeros(1, 76, dtype=torch.int64))


# ---- the tokenizer ----------------------------------------------------------------------------------------
def test_tokens_equal_open_clips_own() -> None:
    import open_clip

    tokenizer = make_tokenizer(conf("clip_vit_l_14"))
    assert torch.equal(tokenizer(CAPTIONS), open_clip.get_tokenizer("ViT-L-14")(CAPTIONS))
    assert tokenizer.null.tolist() == [49406, 49407] + [0] * 75
    assert tokenizer(["word " * 100])[0, -1] == 49407


def test_the_list_of_byte_pairs_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt.gz"
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match="pairs.txt.gz has sha256 .*open_clip brings it"):
        make_tokenizer(replace(conf("clip_vit_l_14"), vocab_file=str(path)))
    with pytest.raises(ValueError, match="vocab_sha256 must be set"):
        make_tokenizer(replace(conf("clip_vit_l_14"), vocab_sha256=None))
    with pytest.raises(ValueError, match="has 49408 tokens; text_encoder.vocab_size is 49407"):
        make_tokenizer(replace(conf("clip_vit_l_14"), vocab_size=49407))


def test_the_cache_of_words_stays_small(monkeypatch) -> None:
    from open_clip.tokenizer import default_bpe

    monkeypatch.setattr(BytePairs, "cached_words", 10)
    pairs = BytePairs(Path(default_bpe()))
    captions = [f"number {i} and wordlike{i}" for i in range(40)]
    assert [pairs.ids(c) for c in captions] == [pairs.tokenizer.encode(c) for c in captions]
    pairs.ids("a")
    assert len(pairs.tokenizer.cache) < 20


# ---- both towers ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clip") / "tiny-for-tests.json"
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


def test_pictures_and_captions_become_unit_vectors(architecture: str, tmp_path: Path) -> None:
    clip = Clip(ClipConfig(model=architecture, weights=None)).train()
    pictures = torch.stack([clip.preprocess(Image.new("RGB", size, colour))
                            for size, colour in (((50, 40), "red"), ((32, 99), "blue"))])  # fmt: skip
    assert pictures.shape == (2, 3, 32, 32)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(pictures[0, :, 5, 5], (torch.tensor([1.0, 0, 0]) - mean) / std)
    images, texts = clip.encode_image(pictures), clip.encode_text(clip.tokenize(CAPTIONS))
    assert images.shape == (2, 16) and texts.shape == (4, 16)
    for vectors in (images, texts):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
        assert (vectors[0] - vectors[1]).abs().max() > 1e-4
    assert not clip.model.training and not any(p.requires_grad for p in clip.parameters())

    path = tmp_path / "clip.safetensors"
    save_file(clip.model.state_dict(), path)
    again = Clip(ClipConfig(model=architecture, weights=str(path)))
    assert torch.equal(again.encode_image(pictures), images)


def test_unknown_architectures_and_weights_are_refused(architecture: str) -> None:
    with pytest.raises(ValueError, match='no architecture "ViT-Z-99"'):
        Clip(ClipConfig(model="ViT-Z-99", weights=None))
    with pytest.raises(FileNotFoundError, match="no CLIP architecture at nowhere.json"):
        Clip(ClipConfig(model="nowhere.json", weights=None))
    with pytest.raises(FileNotFoundError, match="no CLIP weights at nowhere"):
        Clip(ClipConfig(model=architecture, weights="nowhere"))
