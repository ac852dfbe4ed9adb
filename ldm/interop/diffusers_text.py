"""Text encoders and tokenizers in folders of diffusers: LDMBertModel, and transformers' CLIP with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config import ClipTowerConfig, TextEncoderConfig
from ldm.interop.checkpoint_file import WeightFile, save
from ldm.interop.entry import Entry, some, to_own, to_theirs
from ldm.interop.text import bert_entries, clip_entries

IGNORED = ("position_ids", "to_logits.weight", "to_logits.bias")


@dataclass(frozen=True)
class Component:
    """One folder: which class reads it, its settings, weights and other files."""

    classes: list[str]
    settings: dict[str, Any] | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        if self.settings is not None:
            save(folder / "model.safetensors", self.state)
            (folder / "config.json").write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")


# ---- writing ----------------------------------------------------------------------------------------------
def to_diffusers(config: TextEncoderConfig, state: Mapping[str, Tensor]) -> dict[str, Component]:
    """Folder name -> text encoder or tokenizer."""
    if config.kind == "transformer":
        return {"bert": _bert(config, state), "tokenizer": _bert_tokenizer(config)}
    components = {}
    for i, (name, tower) in enumerate(config.towers.items()):
        _check_tower(tower, len(config.towers))
        suffix = "" if i == 0 else f"_{i + 1}"
        components[f"text_encoder{suffix}"] = _clip(config, name, tower, state)
        components[f"tokenizer{suffix}"] = _clip_tokenizer(config, tower)
    return components


def _bert(config: TextEncoderConfig, state: Mapping[str, Tensor]) -> Component:
    written = to_theirs(bert_entries(config.layers, "diffusers", ""), state)
    like = state["token_embedding.weight"]  # to_logits is never run, but the class has it
    written |= {"to_logits.weight": like.new_zeros(like.shape), "to_logits.bias": like.new_zeros(len(like))}
    settings = {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.length,
        "d_model": config.width,
        "encoder_layers": config.layers,
        "encoder_ffn_dim": 4 * config.width,
        "encoder_attention_heads": config.heads,
        "head_dim": config.head_width,
        "activation_function": "gelu",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "pad_token_id": 0,
    }
    return Component(["latent_diffusion", "LDMBertModel"], settings, written)


def _bert_tokenizer(config: TextEncoderConfig) -> Component:
    if config.tokenizer != "wordpiece" or config.vocab_file is None:
        raise ValueError(
            f"text_encoder.tokenizer is {config.tokenizer} with text_encoder.vocab_file {config.vocab_file}; diffusers "
            "reads word pieces from a vocabulary file, whose path must be given"
        )
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": config.length}
    files = {"vocab.txt": Path(config.vocab_file).read_bytes(), "tokenizer_config.json": _json(settings)}
    return Component(["transformers", "BertTokenizer"], files=files)


def _check_tower(tower: ClipTowerConfig, towers: int) -> None:
    """Their pipelines read one tower at its end, and two towers one layer before it."""
    expected = (0, True) if towers == 1 else (1, False)
    if (tower.skip_layers, tower.final_norm) != expected:
        raise ValueError(
            f"a text tower leaves out {tower.skip_layers} layers with final_norm {tower.final_norm}; diffusers' "
            f"pipeline of {towers} tower(s) reads it with {expected[0]} and {expected[1]}"
        )


def _clip(config: TextEncoderConfig, name: str, tower: ClipTowerConfig, state: Mapping[str, Tensor]) -> Component:
    kind = "CLIPTextModelWithProjection" if tower.projection else "CLIPTextModel"
    settings = {
        "architectures": [kind],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.length,
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "projection_dim": tower.projection or tower.width,
        "layer_norm_eps": 1e-5,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "pad_token_id": tower.pad,
    }
    entries = clip_entries(tower.layers, name, "transformers", "", projection=bool(tower.projection))
    return Component(["transformers", kind], settings, to_theirs(entries, state))


def _clip_tokenizer(config: TextEncoderConfig, tower: ClipTowerConfig) -> Component:
    """The same byte pairs, under transformers' names of start and end."""
    from ldm.models.clip import clip_tokenizer

    pairs = clip_tokenizer(config).ids.__self__.tokenizer  # checked there; what it splits with is all that is wanted
    vocab = dict(pairs.encoder)
    names = sorted(vocab, key=vocab.__getitem__)
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab = {name: i for i, name in enumerate([*names[:-2], start, end])}
    merges = [" ".join(pair) for pair in sorted(pairs.bpe_ranks, key=pairs.bpe_ranks.__getitem__)]
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": config.length,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end if tower.pad else "!",
    }
    files = {
        "vocab.json": _json(vocab),
        "merges.txt": ("#version: 0.2\n" + "\n".join(merges) + "\n").encode(),
        "tokenizer_config.json": _json(settings),
    }
    return Component(["transformers", "CLIPTokenizer"], files=files)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


# ---- reading ----------------------------------------------------------------------------------------------
def from_diffusers(
    found: list[tuple[dict[str, Any], WeightFile]], folder: Path
) -> tuple[TextEncoderConfig, dict[str, Tensor]]:
    """config.json and weights of each text encoder -> our configuration and state dict.

    Which vocabulary is meant (vocab_sha256) is not in the folder's settings: the caller sets it.
    """
    settings, file = found[0]
    if settings.get("model_type") == "ldmbert":
        config = _bert_config(settings, folder.parent / "tokenizer" / "vocab.txt")
        return config, _to_own(bert_entries(config.layers, "diffusers", ""), file)
    names = ["l", "g"] if len(found) > 1 else ["l" if settings.get("hidden_act") == "quick_gelu" else "h"]
    towers, state = {}, {}
    for name, (settings, file) in zip(names, found, strict=True):
        towers[name] = tower = _tower(settings, file, len(found))
        entries = clip_entries(tower.layers, name, "transformers", "", projection=bool(tower.projection))
        state |= _to_own(entries, file)
    config = TextEncoderConfig(
        canvas=None,
        kind="clip",
        tokenizer="clip",
        vocab_file=None,
        vocab_sha256=None,
        vocab_size=found[0][0]["vocab_size"],
        length=found[0][0]["max_position_embeddings"],
        width=sum(tower.width for tower in towers.values()),
        layers=None,
        heads=None,
        head_width=None,
        towers=towers,
        weights=None,
    )
    return config, state


def _bert_config(settings: Mapping[str, Any], vocab: Path) -> TextEncoderConfig:
    return TextEncoderConfig(
        canvas=None,
        kind="transformer",
        tokenizer="wordpiece",
        vocab_file=str(vocab) if vocab.is_file() else None,
        vocab_sha256=None,
        vocab_size=settings["vocab_size"],
        length=settings["max_position_embeddings"],
        width=settings["d_model"],
        layers=settings["encoder_layers"],
        heads=settings["encoder_attention_heads"],
        head_width=settings["head_dim"],
        towers=None,
        weights=None,
    )


def _tower(settings: Mapping[str, Any], file: WeightFile, towers: int) -> ClipTowerConfig:
    projected = "text_projection.weight" in file.tensors
    openai = settings.get("hidden_act", "quick_gelu") == "quick_gelu"
    return ClipTowerConfig(
        width=settings["hidden_size"],
        layers=settings["num_hidden_layers"],
        heads=settings["num_attention_heads"],
        activation="quick_gelu" if openai else "gelu",
        skip_layers=0 if towers == 1 else 1,
        final_norm=towers == 1,
        projection=settings["projection_dim"] if projected else None,
        pad=settings["vocab_size"] - 1 if openai else 0,
    )


def _to_own(entries: list[Entry], file: WeightFile) -> dict[str, Tensor]:
    """Strictly; keys with and without "text_model." in front are both in use."""
    keys = {key: key for key in file.tensors if not key.endswith(IGNORED)}
    if any(key.startswith("encoder.") for key in keys):
        keys = {f"text_model.{key}" if not key.startswith("text_projection") else key: key for key in keys}
    wanted = {key for entry in entries for key in entry.theirs}
    problems = [f"{key} is missing" for key in sorted(wanted - keys.keys())]
    problems += [f"{keys[key]} is unexpected" for key in sorted(keys.keys() - wanted)]
    if problems:
        raise ValueError(f"{file.path} does not fit its config.json: {some(problems)}")
    return to_own(entries, lambda key: file.read(keys[key]))
