"""A piece of a parameter as the optimizer holds it, in memory or in files that DeepSpeed left after the last step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.training.checkpoint import Stretch


@dataclass(frozen=True)
class Held:
    """Elements of a parameter inside the flat tensor that the optimizer updates."""

    name: str
    start: int  # in the flattened parameter
    flat: Tensor  # what the optimizer updates; empty while it is in a file
    offset: int  # in `flat`
    numel: int
    states: dict[Tensor, dict[str, Tensor]]  # of the optimizer
    group: int = 0  # of parameters that DeepSpeed updates together
    folder: str | None = None  # of its files, where the group has any

    def stretch(self, kinds: tuple[str, ...]) -> Stretch:
        in_files = self.folder is not None
        tensors = _Tensors(self, kinds) if in_files else {kind: self.state(kind) for kind in kinds}
        return Stretch(self.name, self.start, tensors, in_files)

    def state(self, kind: str) -> Tensor:
        if self.folder is not None and not self.flat.numel():
            whole = self._file(kind)
        else:
            whole = self.flat.detach() if kind == "weight" else self.flat_state()[kind]
        return whole.view(-1)[self.offset : self.offset + self.numel]

    def _file(self, kind: str) -> Tensor:
        """What a file holds, as DeepSpeed left it there after the last step."""
        file = f"{self.flat.ds_id}.tensor.swp" if kind == "weight" else f"{kind}-{self.flat.ds_id}.tensor.swp"
        path, end = Path(self.folder or "", file), self.offset + self.numel
        if kind != "weight" and not path.exists():  # made by the first step
            return torch.zeros(1).expand(end)
        return torch.from_file(str(path), shared=False, size=end, dtype=torch.float32)

    def flat_state(self) -> dict[str, Tensor]:
        """AdamW's state of the flat tensor, made as AdamW would make it where no step was taken yet."""
        state = self.states[self.flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=self.flat.device)
            state["exp_avg"] = torch.zeros_like(self.flat, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(self.flat, requires_grad=False)
        return state


class _Tensors(Mapping[str, Tensor]):
    """What is held of a parameter that lies in files: read when it is asked for, unless it is in memory just then."""

    def __init__(self, held: Held, kinds: tuple[str, ...]) -> None:
        self._held, self._kinds = held, kinds

    def __getitem__(self, kind: str) -> Tensor:
        return self._held.state(kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)
