"""The download stage on the embedded web: the funnel that was planned, bytes that come again, and losses that show."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.images import WHITE, decode_rgb, encode_jpeg, encode_png, resize_shorter
from pipelines.config import CONF, DatasetConfig, compose
from pipelines.dag import Dag, Job, connected
from pipelines.embedded_web.pictures import encode
from pipelines.embedded_web.plan import plan
from pipelines.fetch import LARGEST_BODIES
from pipelines.manifest import Record, StageFolder
from pipelines.sample_web import expected_funnel, serving
from pipelines.settings import SampleWebConfig
from pipelines.stages import download, filter_metadata
from tests.pipelines.unkind_server import Unkind, raw_server, unkind_server

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))
BASE = compose(["+experiment=smoke"])
DATASET: DatasetConfig = replace(BASE.dataset, sample_web=SampleWebConfig(rows=64, pictures=16, seed=SEED))


@dataclass
class Downloaded:
    """A web that was downloaded once, and how to do it again."""

    rows: StageFolder
    job: Job
    records: list[Record]
    again: Callable[[Path], list[Record]]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Downloaded]:
    folder = tmp_path_factory.mktemp("web")
    dag = Dag(replace(BASE, dataset=DATASET, paths=replace(BASE.paths, outputs=str(folder))))
    for stage in ("filter_metadata", "download"):
        dag.refresh(stage)
    rows = dag.job("filter_metadata").output
    filter_metadata.run(dag.job("filter_metadata"))

    with serving(DATASET) as address:
        job = connected(dag.job("download"), address)

        def again(output: Path) -> list[Record]:
            other = replace(job, output=StageFolder(output, "download"))
            return [download.run_shard(other, shard) for shard in sorted(rows.committed())]

        yield Downloaded(rows, job, again(job.output.path), again)


def members(tar: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(tar) as file:
        return file.getmembers()


def content(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]


# -- what comes out ---------------------------------------------------------------------------------------------------
def test_the_funnel_is_the_one_that_was_planned(web: Downloaded) -> None:
    dropped = sum((Counter(record.dropped) for record in web.records), Counter[str]())
    assert dropped == expected_funnel(DATASET)["download"]
    assert [record.rows for record in web.records] == [record.samples for record in web.rows.committed().values()]


def test_the_folder_holds_a_tar_a_ledger_and_a_record_for_each_shard_and_nothing_else(web: Downloaded) -> None:
    folder, suffixes = web.job.output.path, ("tar", "parquet", "json")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {f"{shard:06d}.{suffix}" for shard in range(len(web.records)) for suffix in suffixes}


def test_the_record_says_what_transparent_pictures_were_laid_over(web: Downloaded) -> None:
    assert {tuple(record.facts["background"]) for record in web.records} == {WHITE}


def test_the_ledger_has_every_row_and_the_tar_every_success(web: Downloaded) -> None:
    for shard, record in web.rows.committed().items():
        base = web.job.output.path / f"{shard:06d}"
        asked = pq.read_table(web.rows / f"{shard:06d}.parquet").to_pylist()
        ledger = pq.read_table(base.with_suffix(".parquet")).to_pylist()
        assert [row["key"] for row in ledger] == [row["key"] for row in asked]
        assert [row["url"] for row in ledger] == [row["url"] for row in asked]
        assert all((row["reason"] == "") == (row["status"] == "success") for row in ledger) and record.rows
        names = [f"{row['key']}.{suffix}" for row in ledger if not row["reason"] for suffix in ("jpg", "json", "txt")]
        assert [member.name for member in members(base.with_suffix(".tar"))] == names
        captions = {row["key"]: row["caption"] for row in asked}
        for name, data in content(base.with_suffix(".tar")).items():
            if name.endswith(".txt"):
                assert data.decode() == captions[name.removesuffix(".txt")]


def test_headers_are_fixed(web: Downloaded) -> None:
    found = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.isfile())
             for path in web.job.output.path.glob("*.tar") for m in members(path)}
    assert found == {(0, 0, 0, "", "", 0o644, True)}


def test_the_pictures_are_those_that_were_planned_and_no_larger_than_asked_for(web: Downloaded) -> None:
    planned = {row.url: row for row in reversed(plan(DATASET.sample_web))}  # type: ignore[arg-type]
    good, size = 0, DATASET.download.image_size
    for path in web.job.output.path.glob("*.tar"):
        files = content(path)
        for name in filter(lambda name: name.endswith(".json"), files):
            note, picture = json.loads(files[name]), files[name.replace("json", "jpg")]
            row, pixels = planned[note["url"]], decode_rgb(picture)
            assert picture.startswith(b"\xff\xd8\xff") and pixels.shape[:2] == (note["height"], note["width"])
            assert (note["original_width"], note["original_height"]) == (row.picture.width, row.picture.height)
            assert min(note["width"], note["height"]) == min(size, row.picture.width, row.picture.height)
            if row.kind == "good":
                good += 1
                served = Image.fromarray(decode_rgb(encode(row.picture)))
                expected = np.asarray(served.resize(pixels.shape[1::-1], Image.Resampling.BOX))
                assert np.abs(pixels.astype(int) - expected).mean() < 6, note["url"]
    assert good == DATASET.sample_web.pictures  # type: ignore[union-attr]


def test_the_same_bytes_come_again(web: Downloaded, tmp_path: Path) -> None:
    again = web.again(tmp_path / "again")
    assert [record.files for record in again] == [record.files for record in web.records]
    assert all(len(info["sha256"]) == 64 for record in again for info in record.files.values())


def test_pictures_can_be_kept_exactly(web: Downloaded, tmp_path: Path) -> None:
    settings = replace(DATASET.download, encode_format="png")
    job = replace(web.job, output=StageFolder(tmp_path, "download"), what={"dataset.download": settings})
    assert download.run_shard(job, 0).samples == web.records[0].samples
    pictures = {name: data for name, data in content(tmp_path / "000000.tar").items() if name.endswith(".png")}
    assert len(pictures) == web.records[0].samples
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    with pytest.raises(ValueError, match="encode_format=tiff; expected jpg or png"):
        download.PixelResizer(replace(settings, encode_format="tiff"))


def test_a_small_jpeg_is_not_encoded_anew() -> None:
    rng = np.random.default_rng(0)
    jpeg = encode_jpeg(rng.integers(0, 256, (40, 30, 3), np.uint8), 60)
    resize = download.PixelResizer(replace(DATASET.download, image_size=30, encode_format="jpg"))
    assert resize(io.BytesIO(jpeg + b"more"))[0] == jpeg
    assert resize(io.BytesIO(jpeg[:2] + b"\xff" + jpeg[2:]))[0] == jpeg  # a byte of filling, which is allowed
    odd = jpeg[:20] + b"\x01" + jpeg[20:]  # a byte that Pillow bears, and the standard does not
    again = resize(io.BytesIO(odd))[0]
    assert again != jpeg and np.abs(decode_rgb(again).astype(int) - decode_rgb(jpeg)).mean() < 6
    assert resize(io.BytesIO(encode_jpeg(decode_rgb(jpeg).repeat(2, 0).repeat(2, 1), 60)))[1:3] == (30, 40)


# -- rows by hand -----------------------------------------------------------------------------------------------------
def by_hand(folder: Path, urls: list[str], connect: str | None, **changes: Any) -> Job:
    """The job of a download whose one shard has these URLs."""
    rows, settings = StageFolder(folder / "rows", "filter_metadata"), replace(DATASET.download, retries=0, **changes)
    with rows.attempt(0, "f") as attempt:
        digits = len(str(len(urls) - 1))
        table = [{"key": f"000000{i:0{digits}d}", "url": url, "caption": f"caption {i}"} for i, url in enumerate(urls)]
        pq.write_table(pa.Table.from_pylist(table), attempt.path / "000000.parquet")
        attempt.commit(rows=len(urls), samples=len(urls), dropped={}, inputs={})
    dag = Dag(BASE)
    dag.refresh("filter_metadata")
    job = connected(dag.job("download"), connect)
    return replace(job, what={"dataset.download": settings}, output=StageFolder(folder / "out", "download"),
                   inputs={"filter_metadata": rows})  # fmt: skip


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    picture = encode_png(np.full((120, 130, 3), 77, np.uint8))
    monkeypatch.setattr(Unkind, "on_good", lambda self: self.answer(200, picture))
    monkeypatch.setattr(Unkind, "robots", {"status": 404})
    with unkind_server() as address:
        yield address


def reasons(job: Job) -> list[str]:
    return pq.read_table(job.output / "000000.parquet")["reason"].to_pylist()


def test_nothing_that_is_fetched_comes_from_this_machine_or_its_network(tmp_path: Path, address: str) -> None:
    (tmp_path / "local.png").write_bytes(encode_png(np.zeros((128, 128, 3), np.uint8)))
    urls = [f"file://{tmp_path}/local.png", f"http://{address}/good", "http://127.0.0.1/good", "http://a.test/good"]
    job = by_hand(tmp_path, urls, address)
    record = download.run_shard(job, 0)
    assert reasons(job) == ["scheme", "port", "blocked_address", ""]
    assert record.samples == 1 and record.dropped == {"blocked_address": 1, "port": 1, "scheme": 1}


def test_without_our_fetcher_files_of_this_machine_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sabotage twin: what img2dataset does by itself."""
    (tmp_path / "local.png").write_bytes(encode_png(np.zeros((128, 128, 3), np.uint8)))
    monkeypatch.setattr(download, "fetching_with", lambda *_: contextlib.nullcontext())
    assert download.run_shard(by_hand(tmp_path, [f"file://{tmp_path}/local.png"], None), 0).samples == 1


def test_the_seam_is_closed_again_also_after_an_error() -> None:
    module = download.load_downloader()
    original = module.download_image_with_retry
    with pytest.raises(KeyError), download.fetching_with(None, None):  # type: ignore[arg-type]
        assert module.download_image_with_retry is not original
        raise KeyError
    assert module.download_image_with_retry is original


def test_a_loss_that_img2dataset_keeps_to_itself_shows(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write = download.SortedWriter.write

    def lossy(self: download.SortedWriter, picture: Any, key: str, *rest: Any) -> None:
        if key.endswith("1"):
            raise OSError("no space left on a device")
        write(self, picture, key, *rest)

    monkeypatch.setattr(download.SortedWriter, "write", lossy)
    job = by_hand(tmp_path, ["http://a.test/good", "http://b.test/good"], address)
    with pytest.raises(RuntimeError, match=r"(?s)2 rows .* ledger has 1.*claims 2 of 2.*no space left on"):
        download.run_shard(job, 0)
    assert job.output.record(0) is None and not list(job.output.path.glob("*.tar"))
    assert "".join(capfd.readouterr()) == "", "what img2dataset prints belongs to the error"


@pytest.mark.parametrize("spoil", ["member", "ledger", "claim"])
def test_tar_ledger_and_claim_must_agree(tmp_path: Path, spoil: str) -> None:
    writer = download.SortedWriter(0, str(tmp_path), True, 6, None, "jpg")
    meta = {"url": "u", "status": "success", "error_message": None, **dict.fromkeys(download.SIZES, 1)}
    for key in ("0000001", "0000000"):
        writer.write(b"x", key, "c", {**meta, "key": key})
    writer.close()
    base, keys = tmp_path / "000000", ["0000000", "0000001"]
    Path(f"{base}_stats.json").write_text(json.dumps({"count": 2, "successes": 2}))
    assert download.verify(base, keys, "jpg") == Counter()
    if spoil == "member":
        with tarfile.open(base.with_suffix(".tar"), "w") as tar:
            tar.addfile(tarfile.TarInfo("0000000.jpg"), io.BytesIO())
    elif spoil == "ledger":
        table = pq.read_table(base.with_suffix(".parquet"))
        pq.write_table(table.slice(1), base.with_suffix(".parquet"))
    else:
        Path(f"{base}_stats.json").write_text(json.dumps({"count": 2, "successes": 1}))
    with pytest.raises(RuntimeError, match="It lost some"):
        download.verify(base, keys, "jpg")


def test_a_yield_below_the_floor_stops_the_stage_and_commits_nothing(tmp_path: Path, address: str) -> None:
    urls = ["http://a.test/good", *(f"http://a.test/missing?{i}" for i in range(9))]
    job = by_hand(tmp_path, urls, address, min_yield=0.2, yield_after=10)
    with pytest.raises(download.YieldError, match=r"1 of 10 .*min_yield=0.2; reasons: \{'http_404': 9\}"):
        download.run_shard(job, 0)
    assert job.output.record(0) is None
    lower = replace(job.what["dataset.download"], min_yield=0.1)
    assert download.run_shard(replace(job, what={"dataset.download": lower}), 0).samples == 1


def test_a_broken_network_is_noticed_long_before_the_last_url(tmp_path: Path, address: str) -> None:
    urls = [f"http://a.test/{'good' if i % 50 == 0 else 'missing'}?{i}" for i in range(1000)]
    Unkind.hits.clear()
    job = by_hand(tmp_path, urls, address, min_yield=0.2, yield_after=100, respect_robots=False)
    with pytest.raises(download.YieldError, match=r"of 1\d\d pictures arrived, fewer than .*min_yield=0.2") as error:
        download.run_shard(job, 0)
    assert Unkind.hits.total() < 200 and error.value.stops_the_run
    assert job.output.record(0) is None and not list(job.output.path.glob("0*"))
    lower = replace(job.what["dataset.download"], min_yield=0.01)
    assert download.run_shard(replace(job, what={"dataset.download": lower}), 0).samples == 20


def test_the_ledger_has_the_hashes_of_the_files_that_came(tmp_path: Path, address: str) -> None:
    job = by_hand(tmp_path, ["http://a.test/missing", "http://a.test/good"], address)
    download.run_shard(job, 0)
    missing, good = pq.read_table(job.output / "000000.parquet").to_pylist()
    body = encode_png(np.full((120, 130, 3), 77, np.uint8))
    assert missing["md5"] is missing["sha256"] is None
    assert (good["md5"], good["sha256"]) == (hashlib.md5(body).hexdigest(), hashlib.sha256(body).hexdigest())


@pytest.mark.parametrize("retries", [0, 1])
def test_a_server_of_our_own_that_ends_is_not_blamed_on_the_urls(tmp_path: Path, retries: int) -> None:
    """As when the driver is killed: the embedded web ends with it, and orphaned workers go on for a while."""
    with raw_server(lambda connection: connection.close()) as address:
        job = by_hand(tmp_path, ["http://a.test/x"] * 3, address, min_yield=0.0, respect_robots=False)
        assert download.run_shard(job, 0).dropped == {"connection": 3}, "a server that is there and says nothing"
    job = by_hand(tmp_path / str(retries), ["http://a.test/x"] * 3, address, min_yield=0.0)
    job = replace(job, what={"dataset.download": replace(job.what["dataset.download"], retries=retries)})
    with pytest.raises(download.StandInError, match=f"dataset.connect={address} has ended"):
        download.run_shard(job, 0)
    assert job.output.record(0) is None and not list(job.output.path.glob("0*"))


# -- what it costs ----------------------------------------------------------------------------------------------------
UNKIND = {  # path -> what may be said of it; a busy machine may be late for what comes at once elsewhere
    "good": "", "missing": "http_404", "failing": "http_500", "drip": "timeout", "dripping-headers": "timeout",
    "never": "timeout", "vast?told": "too_large", "vast": "too_large", "gzip-bomb": "not_an_image",
    "loop": "redirect_loop", "large": "not_an_image", "short": "connection", "half-close": "connection",
}  # fmt: skip
# A worker of its own fetches [paths], and prints by how many MB it grew at most, the seconds and what it said of each.
COSTS = """
import json, sys, time
from pathlib import Path
import pyarrow.parquet as pq
from pipelines import fetch
from pipelines.stages import download
from tests.pipelines.stages.test_download import by_hand

def memory(name):
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) / 1024

def fetched(name, paths):
    settings = dict(threads=64, min_yield=0.0, requests_per_second=None, **json.loads(sys.argv[4]))
    job = by_hand(folder / name, [f"http://a.test/{path}" for path in paths], address, **settings)
    begun = time.monotonic()
    download.run_shard(job, 0)
    return time.monotonic() - begun, pq.read_table(job.output / "000000.parquet")["reason"].to_pylist()

folder, address, paths, fetch.LARGEST_BODIES = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[5])
fetched("before", ["good"] * 8)
before = memory("VmRSS")
seconds, reasons = fetched("paths", paths)
print(json.dumps([memory("VmHWM") - before, seconds, reasons]), flush=True)
"""
MOST = 200  # MB by which a worker may grow
AS_ON_THE_WEB = {"deadline_seconds": 5.0, "max_bytes": 20_000_000}


def costs(folder: Path, address: str, paths: list[str], limits: dict[str, float], largest_bodies: int) -> list[Any]:
    arguments = [folder, address, json.dumps(paths), json.dumps(limits), str(largest_bodies)]
    done = subprocess.run([sys.executable, "-c", COSTS, *arguments], cwd=CONF.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_worker_grows_little_whatever_comes(tmp_path: Path, address: str) -> None:
    paths = [path for path in UNKIND for _ in range(4)]  # all at once
    grown, seconds, said = costs(tmp_path / "limits", address, paths, AS_ON_THE_WEB, LARGEST_BODIES)
    without = {"deadline_seconds": 100.0, "max_bytes": 10**9}  # the twin: a single body is too much
    grown_then, _, said_then = costs(tmp_path / "twin", address, ["vast"], without, LARGEST_BODIES)
    print(f"{len(said)} URLs in {seconds:.1f} s, {grown:.0f} MB more; without a limit {grown_then:.0f} MB")
    wrong = {path: reason for path, reason in zip(paths, said, strict=True) if reason not in (UNKIND[path], "timeout")}
    assert not wrong and grown < MOST
    assert said_then == ["not_an_image"] and grown_then > MOST


@pytest.mark.slow
def test_a_worker_grows_little_however_many_long_bodies_come_at_once(tmp_path: Path, address: str) -> None:
    paths, patient = ["long"] * 24, {**AS_ON_THE_WEB, "deadline_seconds": 100.0}
    grown, seconds, said = costs(tmp_path / "limits", address, paths, patient, LARGEST_BODIES)
    grown_then, _, _ = costs(tmp_path / "twin", address, paths, patient, 1000)  # the twin: room for all of them
    print(f"{len(said)} long bodies in {seconds:.1f} s, {grown:.0f} MB more; without a limit {grown_then:.0f} MB")
    assert set(said) == {"not_an_image"} and grown < MOST < grown_then


# -- the canary, and what a worker loads ------------------------------------------------------------------------------
@pytest.mark.parametrize("spoil", [
    lambda rgb: rgb[..., ::-1], lambda rgb: np.rot90(rgb), lambda rgb: rgb[:, ::-1], lambda rgb: rgb // 2,
    lambda rgb: rgb[: len(rgb) // 2],
], ids=["channels", "turned", "mirrored", "dark", "cut"])  # fmt: skip
def test_a_canary_that_comes_back_changed_stops_the_worker(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    for size in (64, 160, 159, 512):
        download.check_canary(replace(DATASET.download, image_size=size, retries=77))
    whole = (720, 480)

    def decode(data: bytes, size: int, **_: object) -> tuple[np.ndarray, tuple[int, int], bool]:
        return resize_shorter(spoil(decode_rgb(data)).copy(), size), whole, False

    monkeypatch.setattr(download, "decode_small", decode)
    with pytest.raises(download.CanaryError, match="Pillow .* pip install -c infra/constraints.txt"):
        download.check_canary(replace(DATASET.download, retries=78))


def test_a_worker_loads_no_more_of_img2dataset_than_its_downloader() -> None:
    code = ("import sys; from pipelines.stages.download import load_downloader; load_downloader().Downloader; "
            "print(sorted({'torch', 'albumentations', 'cv2', 'pandas', 'ray', 'hydra'} & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""
