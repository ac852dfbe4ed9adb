"""What lies in a latent cache, to be looked at: samples decoded beside their captions, and statistics.

`python -m pipelines.inspect path=PATH` calls it for the folder of precompute_latents and for any file of one of its
shards. The autoencoder is found by the hash that the cache's plan names, never by a path alone: latents decoded by
another one look almost right. Of a cache on an object store a few shards are fetched, and nothing is put there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.node_cache import NodeCache
from ldm.shards import ShardInfo, decode_array, open_shard
from ldm.storage import exists, is_remote
from pipelines.bucket import folder_at
from pipelines.manifest import Record, StageFolder, read_json, sha256_file, shard_name, write_whole

STAGE = "precompute_latents"
PICTURES, COLUMNS = 24, 6  # on a sheet
SAMPLES = 2000  # whose latents are measured, spread evenly over those asked for
FETCHED = 8  # shards of a cache on an object store, spread evenly too


def is_latents(path: Any) -> bool:
    """Whether it is the folder of precompute_latents or a file of one of its shards."""
    return _home(path) is not None


def _home(path: Any) -> Any:
    """The folder of precompute_latents that a path is, or in which it is a shard's file; None: neither."""
    inside = list(path.parents)[:2] if re.match(r"\d{6,}\.", path.name) else [path]
    plans = [folder for folder in inside if exists(folder / "plan.json")]
    return plans[0] if plans and read_json(plans[0] / "plan.json").get("stage") == STAGE else None


@dataclass
class Measured:
    """Sums over samples of one folder of a cache, and the samples to be drawn."""

    sums: np.ndarray = field(default_factory=lambda: np.zeros((2, 1)))  # of the means and of their squares, by channel
    count: int = 0  # numbers in each channel
    captions: list[str] = field(default_factory=list)
    shown: list[tuple[str, str, np.ndarray]] = field(default_factory=list)  # key, caption, mean (c, h, w)

    def add(self, key: str, caption: str, mean: np.ndarray, show: bool) -> None:
        values = mean.astype(np.float64)
        self.sums = self.sums + np.stack([values.sum((1, 2)), (values**2).sum((1, 2))])
        self.count += mean[0].size
        self.captions.append(caption)
        if show:
            self.shown.append((key, caption, mean))

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel, (c,) each."""
        mean, square = self.sums / max(self.count, 1)
        return mean, np.sqrt(np.maximum(square - mean**2, 0))


def describe(path: Any) -> list[str]:
    """Statistics of a cache or of one of its shards, in lines; where the sheet is, the last line says."""
    path = path if is_remote(path) else path.absolute()
    home = _home(path)
    if home is None:
        raise ValueError(f"{path} is neither the folder of {STAGE} nor a file of one of its shards")
    folder, plan = folder_at(home, STAGE), read_json(home / "plan.json")
    shards = None if path == home else [int(re.match(r"\d+", path.name)[0])]  # type: ignore[index]
    records = folder.committed() if shards is None else {n: folder.record(n) for n in shards}
    channels = plan["what"]["autoencoder.network"]["latent_channels"]
    lines, pictures = [], []
    if folder.cache is not None and len(records) > FETCHED:
        lines.append(f"  {FETCHED} of {len(records):,} shards are fetched and measured")
        records = {shard: records[shard] for shard in spread(list(records), FETCHED)}
    for name, infos in sorted(_by_folder(folder, records).items()):
        measured = measure(infos, channels, folder.cache)
        lines += _lines(name, infos, measured)
        pictures.append((name, measured.shown))
    lines += [f"  decoded back, worst shard: {min(psnrs):.1f} dB"] if (psnrs := _psnrs(records)) else []
    weights = find_weights(folder, plan)
    if weights is None or not any(shown for _, shown in pictures):
        given = plan["what"]["autoencoder.weights"] or "those of train_autoencoder"
        return [*lines, f"  no sheet: the autoencoder's weights, {given[:12]}, are in no place that is known here"]
    beside = Path.cwd() if is_remote(home) else home
    target = beside / ("sheet.png" if shards is None else f"sheet-{shard_name(shards[0])}.png")
    write_whole(target, draw(pictures, plan, weights))
    return [*lines, f"  decoded beside their captions: {target}"]


def _by_folder(folder: StageFolder, records: dict[int, Record]) -> dict[str, list[ShardInfo]]:
    """The tars of each folder of a cache: one for each resolution and shape of picture."""
    found: dict[str, list[ShardInfo]] = {}
    for record in records.values():
        counts = record.facts.get("folders", {})
        for tar in (file for file in record.files if file.endswith(".tar")):
            index, name = tar.removesuffix(".tar") + ".index", str(Path(tar).parent)
            stored = tuple(file for each in (tar, index) if (file := folder.stored(each, record)))
            info = ShardInfo(str(folder / tar), str(folder / index), counts.get(name, record.samples), record.digest,
                             record.files[index]["sha256"], stored)  # fmt: skip
            found.setdefault(name, []).append(info)
    return found


def measure(infos: list[ShardInfo], channels: int, cache: NodeCache | None) -> Measured:
    """Reads up to SAMPLES samples, each checked, spread evenly over some shards."""
    total = sum(info.samples for info in infos)
    chosen = spread(list(range(total)), SAMPLES)
    shown = set(spread(chosen, PICTURES))
    measured = Measured()
    for number, key, fields in _read(infos, set(chosen), cache):
        array = decode_array(fields.get("moments.npy") or fields["latent.npy"])
        measured.add(key, fields["txt"].decode(), array[:channels], number in shown)
    return measured


def spread(numbers: list[int], count: int) -> list[int]:
    """At most `count` of the numbers, evenly spread over them."""
    return [numbers[i] for i in np.linspace(0, len(numbers) - 1, min(len(numbers), count)).astype(int)]


def _read(
    infos: list[ShardInfo], chosen: set[int], cache: NodeCache | None
) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    first = 0
    for info in infos:
        wanted = [number for number in range(first, first + info.samples) if number in chosen]
        if wanted:
            reader = open_shard(info, cache)
            for number in wanted:
                yield number, *reader.read(number - first)
            reader.close()
        first += info.samples


def _lines(name: str, infos: list[ShardInfo], measured: Measured) -> list[str]:
    total = sum(info.samples for info in infos)
    lines = [f"  {name}: {total:,} samples in {len(infos):,} shards, {len(measured.captions):,} of them measured"]
    if not measured.captions:
        return lines
    mean, std = measured.moments()
    overall = float(np.sqrt((std**2 + mean**2).mean() - mean.mean() ** 2))
    lengths = sorted(len(caption) for caption in measured.captions)
    return [
        *lines,
        f"    mean of z by channel: {'  '.join(f'{x:+.3f}' for x in mean)}",
        f"    std of z by channel:  {'  '.join(f'{x:6.3f}' for x in std)}   all {overall:.4f}, so that "
        f"scale_factor {1 / max(overall, 1e-9):.4f} makes it 1",
        f"    captions: {lengths[0]} to {lengths[-1]} characters, median {lengths[len(lengths) // 2]}, "
        f"{lengths.count(0)} empty, {len(set(measured.captions)):,} different",
    ]


def _psnrs(records: dict[int, Record]) -> list[float]:
    return [record.facts["psnr"] for record in records.values() if record.facts.get("psnr") is not None]


def find_weights(folder: StageFolder, plan: dict[str, Any]) -> Path | None:
    """The weights that made a cache: trained beside it, shipped, or named by the command; the hash decides."""
    from pipelines.dag import ROOT

    wanted = plan["what"]["autoencoder.weights"]
    beside = [] if is_remote(folder.path) else [folder.path.parent / "train_autoencoder" / "autoencoder.safetensors"]
    if wanted is None:
        return next((path for path in beside if path.is_file()), None)
    runs = read_json(folder / "run.json")["runs"] if exists(folder / "run.json") else []
    named = [word.partition("=")[2] for run in runs for word in shlex.split(run["command"])
             if word.startswith("autoencoder.weights=")]  # fmt: skip
    candidates = [*sorted((ROOT / "ldm/weights").glob("*.safetensors")), *beside, *(ROOT / name for name in named)]
    return next((path for path in candidates if path.is_file() and sha256_file(path) == wanted), None)


def draw(pictures: list[tuple[str, list[tuple[str, str, np.ndarray]]]], plan: dict[str, Any], weights: Path) -> bytes:
    """A PNG with a section for each folder of the cache."""
    import torch
    from torch.nn.functional import pad

    from ldm.config import AutoencoderConfig, AutoencoderSettings, from_plain
    from ldm.models.autoencoder import load_autoencoder
    from ldm.sheet import Tile, draw_sheet

    network = from_plain(AutoencoderConfig, plan["what"]["autoencoder.network"])
    autoencoder = load_autoencoder(AutoencoderSettings(network, str(weights), 1.0), "cpu")
    sides = [side * network.factor for _, shown in pictures for _, _, mean in shown for side in mean.shape[1:]]
    largest = max(sides)
    sections = []
    for name, shown in pictures:
        tiles = []
        for key, caption, mean in shown:
            with torch.inference_mode():
                image = autoencoder.decode(torch.from_numpy(mean.astype(np.float32))[None])[0].clamp(-1, 1)
            right, below = largest - image.shape[2], largest - image.shape[1]
            tiles.append(Tile([pad(image, (0, right, 0, below), value=1.0)], f"{key} {caption}"))
        sections.append((f"{name}: {len(tiles)} samples", tiles))
    return draw_sheet(sections, COLUMNS)
