"""Small networks that say one number of a picture from its CLIP embedding: how beautiful, how unsafe.

LAION's aesthetic predictor (768 -> 1024 -> 128 -> 64 -> 16 -> 1, nothing between the layers; its first version is one
layer) and its NSFW detector (768 -> 64 -> 512 -> 256 -> 1, ReLU between them, a sigmoid at the end) are of this kind.
Their weights are taken as they were released, whatever they call their layers:

    layers.0.weight, layers.2.weight, ...     in the order of their numbers: what has none stands between them
    linear_1.weight, linear_2.weight, ...     with norm.mean and norm.variance, by which the embedding is normalised
    weight, bias                              one layer
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU}
OUTPUTS = {"none": nn.Identity, "sigmoid": nn.Sigmoid}
LAYER = re.compile(r"(?:(?:layers\.|linear_)(\d+)\.)?(weight|bias)")
NORM = {"norm.mean", "norm.variance"}


class ScoreHead(nn.Module):
    """Unit vectors (b, k) -> scores (b,)."""

    def __init__(self, state: Mapping[str, Tensor], activation: str, output: str, where: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS or output not in OUTPUTS:
            raise ValueError(
                f"a score head has activation={activation}, output={output}; "
                f"expected {' or '.join(ACTIVATIONS)}, {' or '.join(OUTPUTS)}"
            )
        self.layers = nn.ModuleList()
        for weight, bias in layers_of(state, where):
            layer = nn.Linear(*weight.shape[::-1])
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.layers.append(layer)
        self.activation, self.output = ACTIVATIONS[activation](), OUTPUTS[output]()
        self.requires_grad_(False)

    def forward(self, embedding: Tensor) -> Tensor:
        x = self.layers[0](embedding)
        for layer in self.layers[1:]:
            x = layer(self.activation(x))
        return self.output(x).squeeze(-1)

    @property
    def width(self) -> int:
        """Numbers in the embedding that it reads."""
        return self.layers[0].in_features


def layers_of(state: Mapping[str, Tensor], where: str) -> list[tuple[Tensor, Tensor]]:
    """(weight (out, in), bias (out,)) of each layer in order, float32, the normalisation folded into the first."""
    found: dict[int, dict[str, Tensor]] = {}
    for name in state.keys() - NORM:
        layer = LAYER.fullmatch(name)
        found.setdefault(int(layer[1] or 0) if layer else -1, {})[layer[2] if layer else name] = state[name].double()
    layers = [(found[number].get("weight"), found[number].get("bias")) for number in sorted(found)]
    widths = [weight.shape for weight, bias in layers if weight is not None and bias is not None and weight.ndim == 2]
    fits = all(after[1] == before[0] for before, after in zip(widths, widths[1:], strict=False))
    if not layers or len(widths) < len(layers) or not fits or widths[-1][0] != 1 or len(NORM & state.keys()) == 1:
        raise ValueError(
            f"{where} holds {', '.join(f'{name} {tuple(x.shape)}' for name, x in sorted(state.items())[:8])}; expected "
            f"weight (out, in) and bias (out,) of layers.0, layers.1, ... or linear_1, linear_2, ... up to one number"
        )
    if state.keys() >= NORM:
        (weight, bias), deviation = layers[0], state["norm.variance"].double().sqrt() + 1e-10
        layers[0] = weight / deviation, bias - weight @ (state["norm.mean"].double() / deviation)
    return [(weight.to(torch.float32), bias.to(torch.float32)) for weight, bias in layers]
