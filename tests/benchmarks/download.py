"""Our download against plain img2dataset, on the same photographs from the same server on loopback.

    LDM_EXTRA_DATA=FOLDER python -m tests.benchmarks.download            FOLDER holds cc12m_32.tar
    ... urls=400 scale=1,3                                               so many URLs, of photographs so much larger

Both fetch, decode, make the shorter side 256 pixels, encode JPEG and write a tar; budgets for hosts and robots.txt are
off on both sides, and our fetcher keeps its checks: addresses, deadline, byte cap, opt-out headers. Each runs in a
process of its own, whose processor time is what counts; the server (nginx where there is one) runs beside it.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

SIDE, THREADS = 256, 32


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "part" in given:
        measure(given["part"], Path(given["folder"]), given["address"], int(given["urls"]))
        return
    for scale in given.get("scale", "1,3").split(","):
        with tempfile.TemporaryDirectory() as name, serving(make_photographs(Path(name), int(scale))) as address:
            for part in ("img2dataset", "ours", "img2dataset", "ours"):
                arguments = [f"part={part}", f"folder={name}", f"address={address}", f"urls={given.get('urls', 400)}"]
                print(f"x{scale}  ", end="", flush=True)
                subprocess.run([sys.executable, "-m", "tests.benchmarks.download", *arguments], check=True)


def make_photographs(folder: Path, scale: int) -> Path:
    """The photographs of cc12m_32.tar, each side `scale` times as long, as files under folder/photos."""
    from PIL import Image

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


def measure(part: str, folder: Path, address: str, urls: int) -> None:
    """Runs one of the two over `urls` URLs and prints images for each second of one core."""
    output = folder / f"{part}-{time.monotonic_ns()}"
    output.mkdir()
    photographs = len(list((folder / "photos").iterdir()))
    run = {"img2dataset": by_img2dataset, "ours": by_ours}[part]
    run(output, address, [f"{i % photographs}.jpg" for i in range(40)])  # warm: imports, canary, connections
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    made = run(output, address, [f"{i % photographs}.jpg?{i}" for i in range(urls)])
    seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if made < urls:
        raise RuntimeError(f"{part}: {made} of {urls} photographs arrived; a figure would mean nothing")
    speed = f"{made / cpu:>7.1f} images a core second   {made / seconds:>7.1f} images/s"
    print(f"{part:<12} {made} of {urls}   {speed}", flush=True)


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
