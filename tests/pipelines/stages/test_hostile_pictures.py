"""Pictures that are meant to hurt, through the worker's own resizer, with the settings for the real web."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.config import CONF

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))
MB, SECONDS = 500, 5.0  # that a worker may hold and take, whatever the picture

# A process of its own looks at every file, as a worker does, and prints for each the reason, seconds, most MB so far.
LOOK = """
import io, json, sys, time
from pathlib import Path
from pipelines.config import compose
from pipelines.stages.download import PixelResizer
resize = PixelResizer(compose(["dataset=cc12m"]).dataset.download)
for path in sorted(Path(sys.argv[1]).iterdir()):
    begun = time.process_time()
    reason = resize(io.BytesIO(path.read_bytes()))[-1]
    # Not ru_maxrss: a child begins with the one of the process that started it.
    most = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps([path.name, reason, time.process_time() - begun, most]))
"""


def png_of_zeros(side: int, rows: int) -> bytes:
    """A PNG that claims side x side black pixels and holds so many rows of them, in few bytes."""
    packer, row = zlib.compressobj(1), bytes(1 + 3 * side)
    packed = b"".join([*(packer.compress(row) for _ in range(rows)), packer.flush()])
    parts = [(b"IHDR", side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"), (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in parts
    )


def gif_of_frames(frames: int) -> bytes:
    sink = io.BytesIO()
    Image.new("P", (64, 64)).save(sink, "GIF")
    head, frame = sink.getvalue()[:-1].partition(b",")[::2]
    return head + (b"," + frame) * frames + b";"


def saved(format: str) -> bytes:
    sink = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(sink, format)
    return sink.getvalue()


def hostile(folder: Path) -> dict[str, set[str | None]]:
    """Writes the files; returns what may be said of each (None: it is taken)."""
    jpeg, chance = saved("JPEG"), np.random.default_rng(SEED)
    files: dict[str, tuple[bytes, set[str | None]]] = {
        "png_7000": (png_of_zeros(7_000, 7_000), {None}),
        "png_9000": (png_of_zeros(9_000, 9_000), {"too_many_pixels"}),
        "png_30000": (png_of_zeros(30_000, 100), {"too_many_pixels"}),
        "gif_100000_frames": (gif_of_frames(100_000), {None}),
        "tiff": (saved("TIFF"), {"not_an_image"}),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script/></svg>", {"not_an_image"}),
        "polyglot_html": (b"<html>" + jpeg, {"not_an_image"}),
        "polyglot_zip": (jpeg + b"PK\x03\x04" + bytes(1000), {None}),
    }
    for i in range(300):
        data = bytearray(jpeg[: chance.integers(3, len(jpeg))])
        data[chance.integers(2, len(data))] ^= int(chance.integers(1, 256))
        files[f"fuzzed_{i:03d}"] = bytes(data), {None, "truncated", "broken", "not_an_image", "too_many_pixels"}
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: reasons for name, (_, reasons) in files.items()}


def test_no_picture_costs_much_memory_or_time_or_ends_the_worker(tmp_path: Path) -> None:
    expected = hostile(tmp_path)
    done = subprocess.run([sys.executable, "-c", LOOK, tmp_path], cwd=CONF.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name for name, *_ in seen} == expected.keys()
    assert [(name, reason) for name, reason, *_ in seen if reason not in expected[name]] == []
    slowest, most = max((seconds, name) for name, _, seconds, _ in seen), max(most for *_, most in seen)
    print(f"{len(seen)} files; slowest {slowest[1]} with {slowest[0]:.2f} s of processor time, {most:.0f} MB at most")
    assert slowest[0] < SECONDS and most < MB
