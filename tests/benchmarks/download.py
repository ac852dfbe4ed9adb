"""Our download against plain img2dataset, on the same photographs from the same server on loopback.

    LDM_EXTRA_DATA=FOLDER python -m tests.benchmarks.download            FOLDER holds cc12m_32.tar
    ... urls=400 scale=1,3 rounds=5            URLs for each process, photographs so much larger, repeats

Both fetch, decode, make the shorter side 256 pixels, encode JPEG and write a tar; budgets for hosts and robots.txt are
off on both sides, and our fetcher keeps its checks: addresses, deadline, byte cap, opt-out headers. One process of
each, then two at once, take turns in every round; the server (nginx where there is one) runs beside them. Before
anything is timed their pictures are compared: the same sizes but for a pixel of rounding, and nearly the same colours.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

SIDE, THREADS = 256, 32
TOLERANCE = 4.0  # of 255, between two pictures made very small: filters and a pixel of rounding hardly show there
PARTS = ("img2dataset", "ours")


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "part" in given:
        serve_orders(given["part"], Path(given["folder"]), given["address"])
        return
    urls, rounds = int(given.get("urls", 400)), int(given.get("rounds", 5))
    for scale in given.get("scale", "1,3").split(","):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            address = stack.enter_context(serving(make_photographs(folder, int(scale))))
            workers = {part: [stack.enter_context(Worker(part, folder, address)) for _ in range(2)] for part in PARTS}
            check_same_pictures(*(in_step(workers[part], 32)[0]["tar"] for part in PARTS))
            for processes in (1, 2):
                compare(f"x{scale}, {processes} processes", workers, processes, urls, rounds)


class Worker:
    """A process that runs one of the two again and again, as it is told."""

    def __init__(self, part: str, folder: Path, address: str) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.download", f"part={part}", f"folder={folder}",
                   f"address={address}"]  # fmt: skip
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def order(self, urls: int) -> None:
        self.process.stdin.write(f"{urls}\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, float | str]:
        """{cpu, wall, tar}: seconds of processor time and of wall clock, and the tar that was written."""
        return json.loads(self.process.stdout.readline())


def in_step(workers: list[Worker], urls: int) -> list[dict]:
    """What several processes take that work at the same time."""
    for worker in workers:
        worker.order(urls)
    return [worker.answer() for worker in workers]


def compare(title: str, workers: dict[str, list[Worker]], processes: int, urls: int, rounds: int) -> None:
    speeds: dict[str, list[tuple[float, float]]] = {part: [] for part in PARTS}
    for _ in range(rounds):
        for part in PARTS:
            took = in_step(workers[part][:processes], urls)
            images = urls * processes
            cpu, wall = sum(each["cpu"] for each in took), max(each["wall"] for each in took)
            speeds[part].append((images / cpu, images / wall))
    print(f"{title}: median (slowest to fastest) of {rounds}")
    for part in PARTS:
        core, clock = ([each[i] for each in speeds[part]] for i in (0, 1))
        print(f"  {part:<12} {_spread(core)} images a core second   {_spread(clock)} images/s")
    ratios = [ours[0] / theirs[0] for ours, theirs in zip(speeds["ours"], speeds["img2dataset"], strict=True)]
    print(f"  ours over img2dataset by core second, round by round: {_spread(ratios, 2)}", flush=True)


def _spread(figures: list[float], digits: int = 1) -> str:
    return f"{statistics.median(figures):.{digits}f} ({min(figures):.{digits}f} to {max(figures):.{digits}f})"


def check_same_pictures(theirs: str, ours: str) -> None:
    """Raises RuntimeError when the two tars do not hold the same pictures."""
    expected, found = pictures_of(theirs), pictures_of(ours)
    if len(expected) != len(found):
        raise RuntimeError(f"img2dataset wrote {len(expected)} pictures, ours {len(found)}")
    for one, other in zip(expected, found, strict=True):
        difference = float(np.abs(_tiny(one) - _tiny(other)).mean())
        if np.abs(np.subtract(one.size, other.size)).max() > 1 or difference > TOLERANCE:
            raise RuntimeError(f"pictures differ: {one.size} and {other.size}, and by {difference:.1f} of 255")


def _tiny(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((32, 32), Image.Resampling.BOX), np.float32)


def pictures_of(path: str) -> list[Image.Image]:
    with tarfile.open(path) as tar:
        members = sorted((member for member in tar if member.name.endswith(".jpg")), key=lambda member: member.name)
        return [Image.open(tar.extractfile(member)).convert("RGB") for member in members]


def make_photographs(folder: Path, scale: int) -> Path:
    """The photographs of cc12m_32.tar, each side `scale` times as long, as files under folder/photos."""
    photos = folder / "photos"
    photos.mkdir()
    folder.chmod(0o755)  # nginx that root starts reads as nobody
    with tarfile.open(Path(os.environ["LDM_EXTRA_DATA"]) / "cc12m_32.tar") as tar:
        pictures = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore
    for i, data in enumerate(pictures):
        if scale > 1:
            with Image.open(io.BytesIO(data)) as small:
                sink = io.BytesIO()
                small.convert("RGB").resize((small.width * scale, small.height * scale)).save(sink, "JPEG", quality=90)
            data = sink.getvalue()
        (photos / f"{i}.jpg").write_bytes(data)
    return photos


@contextmanager
def serving(photos: Path) -> Iterator[str]:
    """A server that is not the limit, for the time of the block: nginx, or Python's own."""
    port, nginx = 18765, shutil.which("nginx")
    if nginx:
        (photos.parent / "nginx.conf").write_text(f"""
            daemon off; worker_processes 1; error_log stderr crit; pid {photos.parent}/pid;
            events {{ worker_connections 512; }}
            http {{ access_log off; keepalive_requests 100000; types {{ image/jpeg jpg; }}
                    server {{ listen 127.0.0.1:{port}; root {photos}; }} }}""")
        command = [nginx, "-c", str(photos.parent / "nginx.conf"), "-p", str(photos.parent)]
    else:
        command = [sys.executable, "-m", "http.server", str(port), "-b", "127.0.0.1", "-d", str(photos)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(2)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def serve_orders(part: str, folder: Path, address: str) -> None:
    """Fetches as many photographs as each line of stdin says, and prints what that took."""
    photographs = len(list((folder / "photos").iterdir()))
    run = {"img2dataset": by_img2dataset, "ours": by_ours}[part]
    for line in sys.stdin:
        urls, output = int(line), folder / f"{part}-{os.getpid()}-{time.monotonic_ns()}"
        output.mkdir()
        begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        made = run(output, address, [f"{i % photographs}.jpg?{i}" for i in range(urls)])
        seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF)
        if made < urls:
            raise RuntimeError(f"{part}: {made} of {urls} photographs arrived; a figure would mean nothing")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        tar = next(str(path) for path in output.glob("*.tar"))
        print(json.dumps({"cpu": cpu, "wall": seconds, "tar": tar}), flush=True)


def by_img2dataset(output: Path, address: str, names: list[str]) -> int:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    table = pa.table({"url": [f"http://{address}/{name}" for name in names], "caption": ["a caption"] * len(names)})
    feather = output / "input.feather"
    with pa.OSFile(str(feather), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    resizer = Resizer(image_size=SIDE, resize_mode="keep_ratio", resize_only_if_bigger=True)
    downloader = Downloader(WebDatasetSampleWriter, resizer, THREADS, True, False, str(output), ["url", "caption"], 10,
                            10_000, 5, None, None, "jpg", 0, None, ["noai", "noimageai"])  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        downloader.download_shard((0, str(feather)))
    with tarfile.open(output / "00000.tar") as tar:
        return sum(member.name.endswith(".jpg") for member in tar)


def by_ours(output: Path, address: str, names: list[str]) -> int:
    from pipelines.config import compose
    from pipelines.stages import download

    settings = replace(
        compose(["dataset=cc12m"]).dataset.download, image_size=SIDE, threads=THREADS, respect_robots=False,
        requests_per_second=None,
    )  # fmt: skip
    download.check_canary(settings)
    keys = [f"000000{i:04d}" for i in range(len(names))]
    urls = [f"http://photographs.test/{name}" for name in names]
    rows = pa.table({"key": keys, "url": urls, "caption": ["a caption"] * len(names)})
    fetcher, arrivals = download.fetcher_of_process(settings, address), download.Arrivals(settings)
    said = download._download(rows, 0, output, settings, fetcher, arrivals)
    dropped = download.verify(output / "000000", keys, "jpg", said)
    return len(names) - dropped.total()


if __name__ == "__main__":
    main()
