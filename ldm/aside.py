"""Setting aside: what must not be taken for a result any more leaves its place, and is never deleted."""

from __future__ import annotations

import os
from pathlib import Path


def set_aside(folder: Path, names: list[str]) -> Path:
    """Moves files and folders to a new folder aside/001 below their own, out of sight of whoever reads that."""
    number = 1 + max((int(path.name) for path in (folder / "aside").glob("[0-9]*")), default=0)
    place = folder / "aside" / f"{number:03d}"
    place.mkdir(parents=True)
    for name in sorted(names, key=lambda name: name != "record.json"):  # what vouches for the others goes first
        os.rename(folder / name, place / name)
    return place
