"""The report of a small run that was put on disk by hand, and the pieces of its page."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipelines.reporting.examples as reading
from ldm.shards import ShardWriter
from pipelines.journal import Journal, journal_path
from pipelines.manifest import StageFolder, write_json
from pipelines.report import spread_to_end, write_report
from pipelines.reporting.examples import Few, examples
from pipelines.reporting.page import bar, curve, embed, markdown, table, thin, ticks
from pipelines.selection import REASONS, reasons_file, write_selection


def picture(colour: str, side: int = 64) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(sink, "PNG")
    return sink.getvalue()


class Checker(HTMLParser):
    """Sees that every tag is closed in order and collects the addresses of everything that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "line", "polyline"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "polyline")

    def handle_data(self, data: str) -> None:
        self.text += data


def check(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text())
    assert checker.open == []
    return checker


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """outputs/demo with data stages, a training journal, pictures and figures."""
    folder = tmp_path / "demo"
    _data_stages(folder)
    said = Journal(journal_path(folder, "run"))
    said.status("RUNNING")
    said.tags({"code_version": "abc123", "command": "name=<demo>"})
    said.params({"autoencoder": {"weights": None}})
    said.params({"dataset": {"sample_web": {"seed": 0}}})
    worker = Journal(journal_path(folder, "train", "rank0"))
    for step in range(1, 1001):
        worker.metrics({"train/loss": 1 / step, "perf/images": 30.0}, step)
    worker.metrics({"train/loss": math.nan}, 1001)
    _select(folder / "train")
    for name in ("train/grid-100.png", "generate/grid.png", "evaluate/pairs.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture("navy"))
    worker.image("grid", folder / "train/grid-100.png", 100)
    worker.image("grid", folder / "train/gone.png", 200)
    write_json(folder / "evaluate/metrics.json", {
        "prompt_recall@1": 0.75, "prompt_recall_candidates": 128, "prompt_recall_shuffled": 0.0,
    })  # fmt: skip
    made = StageFolder(folder / "generate/12345678", "generate")
    with made.attempt(None, "f") as attempt:
        prompts = [{"prompt": "red apple", "seen": True}, {"prompt": "blue <banana>", "seen": False}]
        write_json(attempt.path / "prompts.json", {"format": 1, "prompts": prompts})
        attempt.commit(rows=2, samples=2, dropped={}, inputs={})
    made.write_plan({"fingerprint": "f" * 64})
    return folder


def _select(train: Path) -> None:
    """Of the eight pictures that were judged good the second and the third are not used."""
    stage = StageFolder(train, "train")
    stage.write_plan({"fingerprint": "train"})
    with stage.attempt(None, "f") as attempt:
        stage.path.mkdir(exist_ok=True)
        write_selection(stage / "selection.parquet", {0: np.array([True, False, False] + 5 * [True])})
        whys = np.array([0, 2, 1] + 5 * [0], np.uint8)
        (stage / REASONS).write_bytes(reasons_file(["used", "near_duplicate", "nsfw_out_of_bounds"], {0: whys}))
        attempt.commit(rows=8, samples=6, dropped={"near_duplicate": 1, "nsfw_out_of_bounds": 1}, inputs={})


def _data_stages(folder: Path) -> None:
    download, images = (StageFolder(folder / name, name) for name in ("download", "filter_images"))
    keys = [f"0000000{i:02d}" for i in range(10)]
    verdicts = ["too_small" if i == 3 else "undecodable_truncated" if i == 4 else "" for i in range(10)]
    for stage in (download, images):
        stage.path.mkdir(parents=True)
        stage.write_plan({"fingerprint": stage.stage * 4})
        run = {"started": 0.0, "finished": 60.0, "seconds": 60.0, "host": "here", "code_version": "abc123"}
        write_json(stage / "run.json", {"format": 1, "runs": [run]})
    with download.attempt(0, "f") as attempt:
        writer = ShardWriter(attempt.path / "000000.tar", attempt.path / "000000.index")
        for i, key in enumerate(keys):
            writer.write(key, {"png": b"broken" if i == 4 else picture("teal"), "txt": f"caption <{i}>".encode()})
        writer.close()
        lost = [("http_404", "http://gone.test/<script>"), ("http_404", "http://gone.test/" + "x" * 999),
                ("http_404", "http://gone.test/c"), ("timeout", "http://slow.test/d")]  # fmt: skip
        rows = [{"key": key, "url": f"http://good.test/{key}", "reason": ""} for key in keys]
        rows += [{"key": f"00000001{i}", "url": url, "reason": why} for i, (why, url) in enumerate(lost)]
        pq.write_table(pa.Table.from_pylist(rows), attempt.path / "000000.parquet")
        record = attempt.commit(rows=14, samples=10, dropped={"http_404": 3, "timeout": 1}, inputs={})
    download.close("f", [record], {"rows": 14, "samples": 10, "dropped": {"http_404": 3, "timeout": 1}})
    with images.attempt(0, "f") as attempt:
        table = pa.table({"key": keys, "verdict": verdicts})
        pq.write_table(table, attempt.path / "000000.parquet")
        attempt.commit(rows=10, samples=8, dropped={"too_small": 1, "undecodable_truncated": 1}, inputs={})


def test_the_page_needs_nothing_but_itself(run_folder: Path) -> None:
    checker = check(write_report(run_folder))
    assert checker.addresses
    assert all(address.startswith(("data:image/webp;base64,", "#")) for address in checker.addresses)
    anchors = set(re.findall(r'id="([^"]+)"', (run_folder / "report.html").read_text()))
    assert {address[1:] for address in checker.addresses if address.startswith("#")} == anchors


def test_the_page_says_what_happened(run_folder: Path) -> None:
    text = check(write_report(run_folder)).text
    for words in (
        "14 in = 10 out + 4 dropped: every row is accounted for",
        "10 in = 8 out + 2 dropped: every row is accounted for",
        "http_404 3", "too_small 1", "75.0%", "128", "abc123", "name=<demo>", "“blue <banana>”", "step 100",
        "caption <0>", "1 points are not finite", "8 in = 6 out + 2 dropped", "License: CC BY-SA 4.0",
        "2 min 0 s of work",
    ):  # fmt: skip
        assert words in text, words
    assert "step 200" not in text, "a grid that is gone"


def test_rows_that_vanish_are_shouted(run_folder: Path) -> None:
    """The sabotage twin: a manifest whose sums do not add up."""
    folder = StageFolder(run_folder / "download", "download")
    folder.close("f", [], {"rows": 15, "samples": 10, "dropped": {"http_404": 4}})
    assert "1 ARE MISSING" in check(write_report(run_folder)).text


def folders_of(run_folder: Path) -> dict[str, StageFolder]:
    return {name: StageFolder(run_folder / name, name) for name in ("download", "filter_images", "train")}


def test_examples_by_reason(run_folder: Path) -> None:
    found = examples(folders_of(run_folder))
    captions = {reason: [caption for _, caption in pictures] for reason, pictures in found.items()}
    assert captions == {
        "": [f"caption <{i}>" for i in (0, 5, 6, 7, 8, 9)], "too_small": ["caption <3>"],
        "undecodable_truncated": ["caption <4>"], "nsfw_out_of_bounds": ["caption <1>"],
        "near_duplicate": ["caption <2>"],
    }  # fmt: skip
    assert found["undecodable_truncated"] == [(b"broken", "caption <4>")]
    (run_folder / "train" / REASONS).unlink()  # as trainings were that kept none
    found = examples(folders_of(run_folder))
    assert [caption for _, caption in found["not_selected"]] == ["caption <1>", "caption <2>"]


def test_sheets_are_headed_by_their_reason_and_its_count(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    for reason in ("near duplicate (1)", "nsfw out of bounds (1)", "too small (1)", "undecodable truncated (1)"):
        sheet = page.partition(f"<h3>Dropped: {reason}</h3>")[2].partition("<h3>")[0]
        assert sheet.count("<figure>") == 1, reason
    assert page.partition("<h3>Kept</h3>")[2].partition("<h3>")[0].count("<img") == 6


def test_what_gave_no_picture_is_told_by_addresses_that_nothing_follows(run_folder: Path) -> None:
    path = write_report(run_folder)
    page, text = path.read_text(), check(path).text
    lost = page.partition("<h3>Without a picture</h3>")[2].partition("</section>")[0]
    assert "No bytes are kept" in lost and lost.index("http 404 (3)") < lost.index("timeout (1)")
    assert "http://gone.test/&lt;script&gt;" in lost and "http://slow.test/d" in text and "good.test" not in lost
    assert "x" * 100 in lost and "x" * 300 not in lost
    assert "<a " not in lost and "<img" not in lost


def test_examples_are_few_and_come_from_everywhere() -> None:
    few = Few(5, 7)
    keys = [f"{i:09d}" for i in range(3000)]
    for i, key in enumerate(keys):
        few.add("" if i % 2 else "timeout", key, key)
    found = few.by_reason()
    assert {reason: len(some) for reason, some in found.items()} == {"": 7, "timeout": 5}
    assert all(some == sorted(some) and int(some[-1]) - int(some[0]) > 1000 for some in found.values())


def test_no_more_pictures_are_read_than_the_page_can_bear(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PICTURE_BYTES", 2 * len(picture("teal")))
    assert sum(len(some) for some in examples(folders_of(run_folder)).values()) == 3


def test_a_run_that_stopped_says_so_first_and_why(run_folder: Path) -> None:
    text = check(write_report(run_folder, "YieldError: 3 of <14> pictures arrived")).text
    head = text.partition("Where every row went")[0]
    assert "This run stopped before its end" in head and "YieldError: 3 of <14> pictures arrived" in head
    assert "14 in = 10 out" in text and "stopped" in text.partition("Sessions")[2]
    assert "This run stopped" not in check(write_report(run_folder)).text


def test_a_run_that_has_hardly_begun_has_a_report_too(tmp_path: Path) -> None:
    assert "<h1>demo</h1>" in write_report(tmp_path / "demo").read_text()


def test_a_stage_that_another_run_lent_is_shown(run_folder: Path) -> None:
    other = run_folder.parent / "other"
    said = Journal(journal_path(other, "run"))
    said.status("RUNNING")
    said.params({"paths": {"reuse": {"download": "demo"}}})
    text = check(write_report(other)).text
    assert "14 in = 10 out" in text and "10 in = 8 out" not in text


# ---- pieces ------------------------------------------------------------------------------------------------------
def test_bar_is_as_long_as_its_parts() -> None:
    text = bar([("out", 60), ("a", 30), ("b", 10), ("c", 0)])
    assert [float(length) for length in re.findall(r"flex:([0-9.]+)", text)] == [0.6, 0.3, 0.1]


def test_table_escapes_and_aligns() -> None:
    text = table([{"name": "<b>", "count": 1200}, {"name": "x", "other": 0.123456}])
    assert "&lt;b&gt;" in text and "1,200" in text and "0.1235" in text and '<th class="number">count' in text


def test_markdown_of_a_card() -> None:
    card = "# A card\n\nWhat `x<y` is,\nin words.\n\n- one\n  more\n- two\n\n| | |\n|---|--:|\n| PSNR | 24 dB |\n"
    text = markdown(card)
    assert text.splitlines()[:2] == ["<h3>A card</h3>", "<p>What <code>x&lt;y</code> is, in words.</p>"]
    assert "<li>one\n  more</li><li>two</li>" in text
    assert "<table><tr><td>PSNR</td><td>24 dB</td></tr></table>" in text


def test_thin_keeps_spikes_and_ends() -> None:
    points = [(float(x), 0.0) for x in range(10_000)]
    points[4321] = (4321.0, 9.0)
    kept = thin(points)
    assert len(kept) <= 410 and (4321.0, 9.0) in kept and kept[0] == points[0] and kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


@pytest.mark.parametrize(
    ("low", "high", "found"), [(0, 10, [0, 2, 4, 6, 8, 10]), (3, 3, [3]), (0.1, 0.32, [0.1, 0.15, 0.2, 0.25, 0.3])]
)
def test_ticks(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(found)


def test_logarithmic_ticks_lie_inside() -> None:
    assert ticks(0.003, 1.2, logarithmic=True) == pytest.approx([0.005, 0.02, 0.1, 0.5])


def test_a_curve_of_nothing_is_nothing() -> None:
    assert curve([], "loss") == curve([(1, 1.0)], "loss") == curve([(1, math.nan), (2, 1.0)], "loss") == ""
    assert "polyline" in curve([(1, 2.0), (2, 2.0)], "constant")


def test_embed_turns_and_shrinks(tmp_path: Path) -> None:
    import base64

    image = Image.new("RGB", (200, 100), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # lies on its side
    sink = io.BytesIO()
    image.save(sink, "JPEG", exif=exif)
    address = embed(sink.getvalue(), side=50)
    shown = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert shown.size == (25, 50)


def test_spread_to_end_has_both_ends() -> None:
    assert spread_to_end(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert spread_to_end([1, 2], 5) == [1, 2]
