from __future__ import annotations

import io

from PIL import Image

from pipelines.reporting.plot import KEPT, funnel_png


def share(png: bytes, colour: str) -> float:
    """Pixels of a colour among all that are part of a bar."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    coloured = [(count, rgb) for count, rgb in image.getcolors(1 << 24) if max(rgb) - min(rgb) > 40]
    return sum(count for count, rgb in coloured if rgb == wanted) / sum(count for count, _ in coloured)


def test_bars_show_how_much_is_kept() -> None:
    stages = [("download", {"rows": 100, "samples": 50, "dropped": {"http_404": 45, "timeout": 5}}),
              ("filter_images", {"rows": 50, "samples": 50, "dropped": {}})]
    assert abs(share(funnel_png(stages), KEPT) - 100 / 150) < 0.05
    assert funnel_png([]).startswith(b"\x89PNG")
