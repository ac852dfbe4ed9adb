"""Small networks that say one number of a picture from its CLIP embedding: how beautiful, how unsafe.

LAION's aesthetic predictor (768 -> 1024 -> 128 -> 64 -> 16 -> 1, nothing between the layers) and its NSFW detector
(ReLU between them, a sigmoid at the end) are both of this kind. Their files are turned into safetensors once, with the
layers named layers.0, layers.1 and so on in their order.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU}
OUTPUTS = {"none": nn.Identity, "sigmoid": nn.Sigmoid}


class ScoreHead(nn.Module):
    """Unit vectors (b, k) -> scores (b,)."""

    def __init__(self, weights: str | Path, activation: str, output: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS or output not in OUTPUTS:
            raise ValueError(
                f"a score head has activation={activation}, output={output}; "
                f"expected {' or '.join(ACTIVATIONS)}, {' or '.join(OUTPUTS)}"
            )
        state = {name: value.float() for name, value in load_file(weights).items()}
        count = len(state) // 2
        names = {f"layers.{i}.{part}" for i in range(count) for part in ("weight", "bias")}
        if not count or names != state.keys():
            raise ValueError(
                f"{weights} holds {', '.join(sorted(state)[:8])}; expected layers.0.weight, layers.0.bias, "
                f"layers.1.weight, ... without a gap"
            )
        self.layers = nn.ModuleList(nn.Linear(*state[f"layers.{i}.weight"].shape[::-1]) for i in range(count))
        self.load_state_dict(state)
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
