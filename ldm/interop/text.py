"""Text encoders in four layouts: the original's and diffusers' transformer, transformers' and open_clip's CLIP.

Entries are made for a number of layers, so they say what must be there as well as what it is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ldm.interop.entry import Entry

WB = ("weight", "bias")
# ours, the original's, diffusers' (LDMBertModel, below "model.")
BERT = [
    ("token_embedding", "token_emb", "embed_tokens", ("weight",)),
    ("position_embedding", "pos_emb.emb", "embed_positions", ("weight",)),
    ("norm", "norm", "layer_norm", WB),
]
BERT_BLOCK = [
    ("attention_norm", "{attention}.0", "self_attn_layer_norm", WB),
    ("attention.to_q", "{attention}.1.to_q", "self_attn.q_proj", ("weight",)),
    ("attention.to_k", "{attention}.1.to_k", "self_attn.k_proj", ("weight",)),
    ("attention.to_v", "{attention}.1.to_v", "self_attn.v_proj", ("weight",)),
    ("attention.to_out", "{attention}.1.to_out", "self_attn.out_proj", WB),
    ("mlp_norm", "{mlp}.0", "final_layer_norm", WB),
    ("mlp.0", "{mlp}.1.net.0.0", "fc1", WB),
    ("mlp.2", "{mlp}.1.net.2", "fc2", WB),
]
# ours and open_clip's, transformers'
CLIP_BLOCK = [
    ("ln_1", ("layer_norm1",), WB),
    ("attn.out_proj", ("self_attn.out_proj",), WB),
    ("ln_2", ("layer_norm2",), WB),
    ("mlp.c_fc", ("mlp.fc1",), WB),
    ("mlp.c_proj", ("mlp.fc2",), WB),
]
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def bert_entries(layers: int, layout: str, prefix: str) -> list[Entry]:
    """The transformer that is trained with the U-Net; layout "original" or "diffusers", their keys below `prefix`."""
    original = layout == "original"
    entries = []
    for own, theirs, diffusers, parameters in BERT:
        name = theirs if original else f"model.{diffusers}"
        entries += [Entry(f"{own}.{p}", (f"{prefix}{name}.{p}",)) for p in parameters]
    for i in range(layers):
        halves = {"attention": f"attn_layers.layers.{2 * i}", "mlp": f"attn_layers.layers.{2 * i + 1}"}
        for own, theirs, diffusers, parameters in BERT_BLOCK:
            name = theirs.format(**halves) if original else f"model.layers.{i}.{diffusers}"
            entries += [Entry(f"blocks.{i}.{own}.{p}", (f"{prefix}{name}.{p}",)) for p in parameters]
    return entries


def clip_entries(layers: int, tower: str, layout: str, prefix: str, *, projection: bool) -> list[Entry]:
    """One tower of CLIP, ours below towers.<tower>; layout "open_clip" (as ours) or "transformers"."""
    entries = _open_clip(layers, projection) if layout == "open_clip" else _transformers(layers, projection)
    return [
        Entry(f"towers.{tower}.{entry.own}", tuple(prefix + key for key in entry.theirs), turned=entry.turned)
        for entry in entries
    ]


def _open_clip(layers: int, projection: bool) -> list[Entry]:
    return [Entry(entry.own, (entry.own,)) for entry in _transformers(layers, projection)]


def _transformers(layers: int, projection: bool) -> list[Entry]:
    entries = [
        Entry("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        Entry("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        *(Entry(f"ln_final.{p}", (f"text_model.final_layer_norm.{p}",)) for p in WB),
    ]
    if projection:
        entries.append(Entry("text_projection", ("text_projection.weight",), turned=True))
    for i in range(layers):
        own, theirs = f"transformer.resblocks.{i}.", f"text_model.encoder.layers.{i}."
        entries += [Entry(f"{own}attn.in_proj_{p}", tuple(f"{theirs}{name}.{p}" for name in QKV)) for p in WB]
        for name, (other,), parameters in CLIP_BLOCK:
            entries += [Entry(f"{own}{name}.{p}", (f"{theirs}{other}.{p}",)) for p in parameters]
    return entries


def count(keys: Iterable[str], pattern: str) -> int:
    """How many different numbers stand where `pattern` has its group; 0 if none."""
    found = (re.match(pattern, key) for key in keys)
    return len({match[1] for match in found if match})


def towers(keys: Iterable[str]) -> dict[str, int]:
    """Our CLIP keys -> name of each tower and its layers."""
    keys = list(keys)
    names = dict.fromkeys(key.split(".")[1] for key in keys if key.startswith("towers."))
    return {name: count(keys, rf"towers\.{name}\.transformer\.resblocks\.(\d+)\.") for name in names}


def bert_layers(keys: Iterable[str]) -> int:
    """Our keys of the transformer -> its layers; 0 where it is none."""
    return count(keys, r"blocks\.(\d+)\.")
