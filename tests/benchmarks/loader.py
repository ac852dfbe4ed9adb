"""Samples a second from a latent cache: our loader, webdataset's own, and MosaicML Streaming, on the same latents.

    python -m tests.benchmarks.loader --samples 8000 --seconds 4 --rounds 3
    python -m tests.benchmarks.loader --streaming PYTHON   # of an environment by infra/constraints-streaming.txt

Latents are moments of 256 px in fp16, (8, 32, 32), 16 KiB, with a caption each, in shards of 1,000. What is timed is
what a training loop asks for: shuffled batches of 64 as tensors, with captions, tokens or neither. "all" is what our
loader does in training: tokens, fresh posterior noise, noise and timestep for each sample besides. Every contender runs
once in each round, so that a busy machine slows all alike; the medians of wall clock and of processor time (of all
processes and threads) are printed. "cold" drops the files from the page cache before each run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SHAPE, SHARD, BATCH, LENGTH = (8, 32, 32), 1000, 64, 77
WORDS = "a photograph drawing of red blue green house tree mountain river cat dog in the morning light with".split()


def samples(count: int) -> Iterator[tuple[str, np.ndarray, str]]:
    """(key, moments, caption of about twelve words), always the same."""
    random = np.random.default_rng(0)
    for i in range(count):
        caption = " ".join(random.choice(WORDS, 12))
        yield f"{i // SHARD:06d}{i % SHARD:03d}", random.standard_normal(SHAPE, np.float32).astype(np.float16), caption


# -- contenders: each gives batches without end, or until an epoch ends -----------------------------------------------
def write_tars(folder: Path, count: int) -> list[Any]:
    from ldm.shards import ShardInfo, ShardWriter, encode_array

    infos, writer = [], None
    for i, (key, moments, caption) in enumerate(samples(count)):
        if i % SHARD == 0:
            writer = ShardWriter(folder / f"{i // SHARD:06d}.tar", folder / f"{i // SHARD:06d}.index")
        writer.write(key, {"moments.npy": encode_array(moments), "txt": caption.encode()})
        if (i + 1) % SHARD == 0 or i + 1 == count:
            writer.close()
            sha256 = hashlib.sha256(writer.index.read_bytes()).hexdigest()
            infos.append(ShardInfo(str(writer.tar), str(writer.index), len(writer.rows), writer.tar.name, sha256))
    return infos


def ours(infos: list[Any], workers: int, what: str) -> Iterator[int]:
    """`what`: "latents", "tokens" (latents and tokens) or "all"."""
    import torch

    from ldm.training.loader import Draw, Loader, TrainData

    class ReadOnly(Loader):
        def batch(self, positions: range) -> Any:
            read = self._samples([self._row(position) for position in positions])
            captions = [sample.caption for sample in read]
            latents = torch.from_numpy(np.stack([sample.latent for sample in read]))
            return latents, captions if self.tokenizer is None else self.tokenizer(captions)

    data = TrainData(infos, [None] * len(infos), "e", "s", "moments.npy", [4, 32, 32], 0.18215)
    tokenizer = None if what == "latents" else make_tokenizer()
    kind = Loader if what == "all" else ReadOnly
    loader = kind(data, Draw(0, 1000, 0.1), tokenizer, lanes=64, window_shards=4, batch_size=BATCH,
                  micro_batch_size=BATCH, workers=workers)  # fmt: skip
    try:
        for _ in loader.batches(0):
            yield BATCH
    finally:
        loader.close()


def make_tokenizer() -> Any:
    from ldm.config import TextEncoderConfig
    from ldm.models import tokenizer
    from tests.ldm.models import settings

    return tokenizer.make_tokenizer(settings.read(TextEncoderConfig, "text_encoder", "words_tiny"))


def webdataset(infos: list[Any], workers: int, what: str) -> Iterator[int]:
    """Shards and a buffer of 1,000 samples shuffled, as its documentation shows it."""
    import webdataset as wds

    tokenizer = None if what == "latents" else make_tokenizer()

    def unpack(sample: tuple[np.ndarray, str]) -> tuple[Any, Any]:
        moments, caption = sample
        return moments, 0 if tokenizer is None else tokenizer([caption])[0]

    dataset = (
        wds.WebDataset([info.tar for info in infos], shardshuffle=100, empty_check=False)
        .shuffle(1000).decode().to_tuple("moments.npy", "txt").map(unpack).batched(BATCH, partial=False).repeat()
    )  # fmt: skip
    for moments, _ in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        assert moments.shape[1:] == SHAPE
        yield len(moments)


def write_streaming(folder: Path, count: int) -> None:
    from streaming import MDSWriter

    columns = {"moments": f"ndarray:float16:{','.join(map(str, SHAPE))}", "caption": "str"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD * 17_000) as writer:
        for _, moments, caption in samples(count):
            writer.write({"moments": moments, "caption": caption})


def streaming(folder: Path, workers: int, what: str) -> Iterator[int]:
    """Its defaults, shuffled, through torch's own loader as its documentation shows it."""
    import torch
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    tokenizer = None if what == "latents" else make_tokenizer()

    def collate(batch: list[dict[str, Any]]) -> Any:
        captions = [each["caption"] for each in batch]
        moments = torch.from_numpy(np.stack([each["moments"] for each in batch]))
        return moments, captions if tokenizer is None else tokenizer(captions)

    while True:
        batches = DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=collate, drop_last=True)
        for moments, _ in batches:
            yield len(moments)


# -- timing ----------------------------------------------------------------------------------------------------------
def drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def processor_seconds() -> float:
    """Of this process, its threads and every child that has ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def rate(make: Callable[[], Iterator[int]], seconds: float) -> dict[str, float]:
    """Samples a second of wall clock from the first batch on, and samples a second of processor time in all."""
    begun, batches = processor_seconds(), make()
    next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        count += next(batches)
    wall = time.perf_counter() - started
    batches.close()  # type: ignore[attr-defined]
    return {"wall": count / wall, "processor": (count + BATCH) / (processor_seconds() - begun)}


def run_streaming(given: argparse.Namespace, folder: Path, workers: int, what: str) -> dict[str, float]:
    """One run in the other environment's Python; the latents are written there first."""
    options = {"folder": folder, "workers": workers, "what": what, "samples": given.samples, "seconds": given.seconds}
    command = [given.streaming, "-m", "tests.benchmarks.loader", "--child"]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += ["--cold"] if given.cold else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"streaming failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def streaming_child(given: argparse.Namespace) -> None:
    """What the other environment does; of ours it needs the tokenizer. Prints one line of JSON."""
    importlib.import_module("streaming")  # which takes longer than the run; starting Python is not compared
    if not given.folder.exists():
        write_streaming(given.folder, given.samples)
    if given.cold:
        drop_from_page_cache(given.folder)
    print(json.dumps(rate(lambda: streaming(given.folder, given.workers, given.what), given.seconds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streaming", help="python of an environment that has mosaicml-streaming")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the latents are written; a temporary one if not given")
    parser.add_argument("--child", action="store_true", help="used by the command itself, for Streaming")
    parser.add_argument("--workers", type=int, default=1, help="of the child")
    parser.add_argument("--what", choices=["latents", "tokens"], help="of the child")
    given = parser.parse_args()
    if given.child:
        streaming_child(given)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        compare(Path(name), given)


def compare(folder: Path, given: argparse.Namespace) -> None:
    tars, mds = folder / "tars", folder / "mds"
    tars.mkdir()
    infos = write_tars(tars, given.samples)
    contenders = [("ours", "latents"), ("webdataset", "latents"), ("ours", "tokens"), ("webdataset", "tokens"),
                  ("ours", "all")]  # fmt: skip
    contenders += [("streaming", "latents"), ("streaming", "tokens")] if given.streaming else []
    runs = [(contender, workers, what) for workers in (1, 2) for contender, what in contenders]
    found: dict[Any, list[dict[str, float]]] = {each: [] for each in runs}
    for _ in range(given.rounds):
        for contender, workers, what in runs:
            if given.cold:
                drop_from_page_cache(tars)
            if contender == "streaming":
                result = run_streaming(given, mds, workers, what)
            else:
                make = ours if contender == "ours" else webdataset
                result = rate(partial(make, infos, workers, what), given.seconds)
            found[contender, workers, what].append(result)
    print(f"| contender | workers | what | samples/s ({'cold' if given.cold else 'warm'}) | samples/s of processor |")
    print("|---|--:|---|--:|--:|")
    for (contender, workers, what), results in found.items():
        wall, processor = (statistics.median(r[clock] for r in results) for clock in ("wall", "processor"))
        print(f"| {contender} | {workers} | {what} | {wall:,.0f} | {processor:,.0f} |")


if __name__ == "__main__":
    main()
