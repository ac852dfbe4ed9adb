"""Rows in, shards out: one reason for each dropped row, the first duplicate stays, equal input gives equal bytes."""

from __future__ import annotations

import hashlib
import resource
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import CONF, compose, options
from pipelines.dag import Dag, Job
from pipelines.manifest import StageFolder
from pipelines.run import normalise
from pipelines.settings import FilterMetadataConfig, SourceConfig, TableResources
from pipelines.spilling import NoRoom
from pipelines.stages import filter_metadata

COLUMNS = {"url": "URL", "caption": "TEXT", "width": "WIDTH", "height": "HEIGHT", "similarity": "similarity"}
SETTINGS = FilterMetadataConfig(
    shard_samples=4, deny_lists={}, deny_domains=[], allow_domains=[], deny_urls=[], allow_urls=[], min_size=100,
    max_aspect=3.0, bounds={"similarity": [0.28, 1.0]}, one_of={}, min_caption_chars=5, min_caption_words=1,
    max_caption_chars=None, deduplicate=["url_caption", "url"],
)  # fmt: skip


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {"URL": f"http://a.test/{number}", "TEXT": f"caption {number}", "WIDTH": 200, "HEIGHT": 100,
            "similarity": 0.3, **changes}


def make_job(
    folder: Path, rows: list[list[dict[str, Any]]], columns: Mapping[str, str | None] = COLUMNS, **changes: Any
) -> Job:
    for i, part in enumerate(rows):
        pq.write_table(pa.Table.from_pylist(part), folder / f"part-{i:05d}.parquet")
    return job_of(folder, SourceConfig(str(folder / "part-*.parquet"), "parquet", dict(columns)), **changes)


def job_of(folder: Path, source: SourceConfig, **changes: Any) -> Job:
    job = Dag(compose([])).job("filter_metadata")
    what = {**job.what, "dataset.source": source, "dataset.filter_metadata": replace(SETTINGS, **changes)}
    return replace(job, what=what, output=StageFolder(folder / "out", "filter_metadata"))


def read(job: Job) -> list[dict[str, Any]]:
    return [r for path in sorted(job.output.path.glob("*.parquet")) for r in pq.read_table(path).to_pylist()]


def test_every_dropped_row_has_one_reason_the_first_that_holds(tmp_path: Path) -> None:
    rows = [
        row(0), row(1, URL=None), row(2, URL="  ", TEXT=None), row(3, TEXT=""), row(4, WIDTH=99, similarity=None),
        row(5, HEIGHT=None), row(6, WIDTH=301), row(7, similarity=0.1), row(8, similarity=6016.0),
        row(9, similarity=float("nan")), row(10, similarity=None), row(11, TEXT="four"), row(12, URL="http://a.test/0"),
        row(13), row(14, WIDTH=float("nan"), HEIGHT=float("nan")), row(0),
    ]  # fmt: skip
    job = make_job(tmp_path, [rows])
    assert filter_metadata.run(job) == {
        "rows": 16, "samples": 2,
        "dropped": {"duplicate_url": 1, "duplicate_url_caption": 1, "extreme_shape": 1, "no_caption": 1, "no_url": 2,
                    "short_caption": 1, "similarity": 4, "too_small": 3},
    }  # fmt: skip
    assert [(r["key"], r["url"]) for r in read(job)] == [("0000000", "http://a.test/0"), ("0000001", "http://a.test/13")]


def test_rows_keep_their_order_across_files_and_shards(tmp_path: Path) -> None:
    job = make_job(tmp_path, [[row(i) for i in range(7)], [row(i) for i in range(7, 10)]])
    filter_metadata.run(job)
    assert [r["url"] for r in read(job)] == [f"http://a.test/{i}" for i in range(10)]
    assert [r["key"] for r in read(job)] == [f"{i // 4:06d}{i % 4}" for i in range(10)]
    assert {shard: record.samples for shard, record in job.output.committed().items()} == {0: 4, 1: 4, 2: 2}


def test_of_duplicates_across_files_the_first_stays(tmp_path: Path) -> None:
    other = row(1, TEXT="another caption")
    job = make_job(tmp_path, [[row(0), row(1)], [other, row(2)], [row(1), other, row(0)]])
    assert filter_metadata.run(job)["dropped"] == {"duplicate_url": 1, "duplicate_url_caption": 3}
    assert [r["caption"] for r in read(job)] == ["caption 0", "caption 1", "caption 2"]


def test_a_duplicate_of_a_dropped_row_is_none(tmp_path: Path) -> None:
    job = make_job(tmp_path, [[row(0, similarity=0.0), row(0)]])
    assert filter_metadata.run(job)["dropped"] == {"similarity": 1} and len(read(job)) == 1


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        job = make_job(tmp_path / name, [[row(i) for i in range(9)]])
        filter_metadata.run(job)
        digests.append([record.digest for record in job.output.committed().values()])
    assert digests[0] == digests[1]


# -- the account ------------------------------------------------------------------------------------------------------
def losing_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of the second file is lost on its way, as by a reader that skips what it cannot read."""
    judge = filter_metadata.MetadataSet._judge_file

    def losing(self: filter_metadata.MetadataSet, number: int, path: Path) -> None:
        judge(self, number, path)
        if number == 1:
            self.database.execute(f"DELETE FROM rows WHERE place = {filter_metadata._place(1)} + 2")

    monkeypatch.setattr(filter_metadata.MetadataSet, "_judge_file", losing)


def test_rows_are_counted_by_the_files_themselves_and_one_that_is_lost_is_told_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, [[row(i) for i in range(5)], [row(4), row(5, similarity=0.0), row(6), row(7)]])
    assert filter_metadata.run(job) == {
        "rows": 9, "samples": 7, "dropped": {"duplicate_url_caption": 1, "similarity": 1}}  # fmt: skip
    losing_a_row(monkeypatch)
    words = r"part-00001.parquet has 4 rows by its footer, of which 1 stayed and 2 fell: 1 unaccounted for"
    with pytest.raises(RuntimeError, match=words):
        filter_metadata.run(job)
    # The sabotage twin: without the look at each file the sum is wrong, and the stage cannot close on it either.
    monkeypatch.setattr(filter_metadata.MetadataSet, "_account", lambda *counts: None)
    with pytest.raises(RuntimeError, match="9 rows came in, 6 went out and 2 were dropped .*: 1 unaccounted for"):
        filter_metadata.run(job)


# -- each rule --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes, fallen", [
    ({"deny_domains": ["b.test"]}, {2: "denied_domain", 3: "denied_domain"}),
    ({"allow_domains": ["b.test"]}, {0: "other_domain", 1: "other_domain", 4: "other_domain"}),
    ({"deny_urls": [r"\.gif$", "thumb"]}, {1: "denied_url"}),
    ({"allow_urls": [r"\.jpg$"]}, {1: "other_url", 4: "other_url"}),
    ({"one_of": {"language": ["en"]}}, {3: "language", 4: "language"}),
    ({"min_caption_words": 3}, {0: "few_words"}),
    ({"max_caption_chars": 20}, {4: "long_caption"}),
    ({"bounds": {"aesthetic": [5.0, None]}}, {2: "aesthetic", 4: "aesthetic"}),
], ids=str)  # fmt: skip
def test_each_filter_is_a_value(tmp_path: Path, changes: dict[str, Any], fallen: dict[int, str]) -> None:
    urls = ["http://a.test/0.jpg", "http://a.test/1.gif", "http://sub.B.test:80/2.jpg", "http://me@b.test/3.jpg",
            "http://notb.test/4"]  # fmt: skip
    captions = ["two words", "one two three", "one  two\tthree", "one two three", "one two three, and then some more"]
    extra = list(zip(["en", "en", "en", "fr", None], [6.0, 5.0, 4.9, 7.0, None], strict=True))
    rows = [row(i, URL=urls[i], TEXT=captions[i], LANGUAGE=extra[i][0], AESTHETIC=extra[i][1]) for i in range(5)]
    columns = {**COLUMNS, "language": "LANGUAGE", "aesthetic": "AESTHETIC"}
    job = make_job(tmp_path, [rows], columns, **{"bounds": {}, **changes})
    assert filter_metadata.run(job)["dropped"] == Counter(fallen.values())
    assert [r["url"] for r in read(job)] == [url for i, url in enumerate(urls) if i not in fallen]


@pytest.mark.parametrize("name, values", [
    ("url", ["http://a.test/1"]), ("url_md5", [hashlib.md5(b"http://a.test/1").hexdigest().upper()]),
    ("url_sha256", [hashlib.sha256(b"http://a.test/1").hexdigest()]), ("hash", ["-77", "12"]),
])  # fmt: skip
def test_deny_lists_of_urls_and_hashes_count_by_content(tmp_path: Path, name: str, values: list[str]) -> None:
    (tmp_path / "deny.txt").write_text("\n".join([*values, "", "something else "]))
    rows = [row(0, HASH=5), row(1, HASH=-77), row(2, HASH=None)]
    job = make_job(tmp_path, [rows], {**COLUMNS, "hash": "HASH"}, deny_lists={name: str(tmp_path / "deny.txt")})
    assert filter_metadata.run(job)["dropped"] == {f"denied_{name}": 1}
    assert [r["url"] for r in read(job)] == ["http://a.test/0", "http://a.test/2"]
    given = f"dataset.filter_metadata.deny_lists={{{name}: {tmp_path / 'deny.txt'}}}"
    before = Dag(compose([given])).fingerprints["filter_metadata"]
    (tmp_path / "deny.txt").write_text("another")
    assert Dag(compose([given])).fingerprints["filter_metadata"] != before


def test_what_counts_as_a_duplicate_is_a_value(tmp_path: Path) -> None:
    rows = [row(0), row(0), row(0, TEXT="another caption"), row(1)]
    for same, dropped in {
        (): {}, ("url",): {"duplicate_url": 2}, ("url_caption",): {"duplicate_url_caption": 1},
        ("url_caption", "url"): {"duplicate_url": 1, "duplicate_url_caption": 1},
    }.items():  # fmt: skip
        folder = tmp_path / "-".join(("x", *same))
        folder.mkdir()
        assert filter_metadata.run(make_job(folder, [rows], deduplicate=list(same)))["dropped"] == dropped
    with pytest.raises(ValueError, match=r"deduplicate: found \['caption'\]; expected some of"):
        filter_metadata.run(make_job(tmp_path, [rows], deduplicate=["caption"]))


# -- columns ----------------------------------------------------------------------------------------------------------
SCHEMAS: dict[str, dict[str, Any]] = {  # columns and types as the data sets publish them
    "laion400m": {"SAMPLE_ID": 1, "URL": "u", "TEXT": "t", "HEIGHT": 300, "WIDTH": 400, "LICENSE": "?",
                  "NSFW": "UNLIKELY", "similarity": 0.33},
    "laion2b_en": {"SAMPLE_ID": 1, "URL": "u", "TEXT": "t", "HEIGHT": 400, "WIDTH": 300, "LICENSE": "?",
                   "NSFW": "UNLIKELY", "similarity": 0.33},
    "laion2b_en_joined": {"URL": "u", "TEXT": "t", "WIDTH": 400, "HEIGHT": 300, "similarity": 0.33, "hash": -9,
                          "punsafe": 0.1, "pwatermark": 0.1},
    "laion_aesthetics_v2": {"URL": "u", "TEXT": "t", "WIDTH": 400.0, "HEIGHT": 300.0, "similarity": 0.33,
                            "punsafe": 0.1, "pwatermark": 0.1, "AESTHETIC_SCORE": 6.5, "hash": -9,
                            "__index_level_0__": 4},
    "relaion": {"url": "u", "caption": "t", "width": 400, "height": 300, "punsafe": 0.1, "pwatermark": 0.1},
    "coyo700m": {"id": 1, "url": "u", "text": "t", "width": 400, "height": 300, "image_phash": "ff", "text_length": 9,
                 "num_faces": 0, "clip_similarity_vitb32": 0.3, "clip_similarity_vitl14": 0.3,
                 "nsfw_score_opennsfw2": 0.1, "nsfw_score_gantman": 0.1, "watermark_score": 0.1,
                 "aesthetic_score_laion_v2": 5.5},
    "datacomp": {"uid": "f" * 32, "url": "u", "text": "t", "original_width": 400, "original_height": 300,
                 "clip_b32_similarity_score": 0.3, "clip_l14_similarity_score": 0.3, "face_bboxes": [[0.1]],
                 "sha256": "f" * 64},
    "pd12m": {"id": "x", "url": "u", "s3_key": "k", "caption": "t", "hash": "f" * 32, "width": 400, "height": 300,
              "mime_type": "image/jpeg", "license": "CC0", "source": "s"},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_of_the_known_data_sets_are_read(tmp_path: Path, name: str) -> None:
    dataset, good = compose([f"dataset={name}"]).dataset, dict(SCHEMAS[name])
    url, caption = (str(dataset.source.columns[ours]) for ours in ("url", "caption"))
    rows = [{**good, url: f"https://a.test/{i}", caption: f"a caption of four words, {i}"} for i in range(3)]
    small = str(dataset.source.columns["height"])
    rows[1] = {**rows[1], small: 20 * type(good[small])(1)}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part-0.parquet")
    job = job_of(tmp_path, replace(dataset.source, metadata=str(tmp_path / "part-0.parquet")))
    job = replace(job, what={**job.what, "dataset.filter_metadata": dataset.filter_metadata})
    assert filter_metadata.run(job) == {"rows": 3, "samples": 2, "dropped": {"too_small": 1}}
    assert [r["url"] for r in read(job)] == ["https://a.test/0", "https://a.test/2"]
    assert {(r["width"], r["height"]) for r in read(job)} == {(400, 300)}


def test_tab_separated_metadata_whatever_is_in_a_line(tmp_path: Path) -> None:
    lines = [b"http://a.test/0\ta caption of some words", b'http://a.test/1\t"quotes" and\ttabs in it',
             b"http://a.test/2", b"", b"http://a.test/3\tbroken \xff bytes in here\r",
             b"http://a.test/4\tlast one without an end"]  # fmt: skip
    (tmp_path / "cc12m.tsv").write_bytes(b"\n".join(lines))
    source = replace(compose(["dataset=cc12m"]).dataset.source, metadata=str(tmp_path / "cc12m.tsv"))
    job = job_of(tmp_path, source, bounds={})
    assert filter_metadata.run(job) == {"rows": 6, "samples": 4, "dropped": {"no_caption": 1, "no_url": 1}}
    assert [r["caption"] for r in read(job)] == ["a caption of some words", '"quotes" and\ttabs in it',
                                                 "broken \ufffd bytes in here", "last one without an end"]  # fmt: skip
    with pytest.raises(ValueError, match="found 'URL', but a tsv file has no header; expected column0"):
        filter_metadata.run(job_of(tmp_path, replace(source, columns={"url": "URL", "caption": "column1"}), bounds={}))


def test_a_file_that_comes_while_the_others_are_read_is_neither_read_nor_listed(tmp_path: Path) -> None:
    """It belongs to the next edition; one that is listed and was not read would be lost for good."""
    job = make_job(tmp_path, [[row(0)]])
    files = filter_metadata.source_files(job)
    pq.write_table(pa.Table.from_pylist([row(1)]), tmp_path / "part-00001.parquet")
    assert len(filter_metadata.source_files(job)) == 2
    assert filter_metadata.run(job, files)["samples"] == 1
    assert [Path(file["name"]).name for file in filter_metadata.sources(job, files)] == ["part-00000.parquet"]


def test_columns_that_a_data_set_lacks_are_not_filtered_on_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"url": "URL", "caption": "TEXT", "width": None, "height": None, "similarity": None, "language": None}
    job = make_job(tmp_path, [[row(0, WIDTH=1, similarity=0.0)]], columns, one_of={"language": ["en"]})
    assert filter_metadata.run(job)["samples"] == 1
    said = capsys.readouterr().out
    assert "no such column: width, height, similarity, language" in said
    order = [line.split()[0] for line in said.splitlines() if line.startswith("  ")]
    assert order == ["not_utf8", "no_url", "no_caption", "short_caption", "control_characters", "duplicate_url_caption",
                     "duplicate_url"]  # fmt: skip


def test_a_missing_column_shows_found_and_expected(tmp_path: Path) -> None:
    job = make_job(tmp_path, [[row(0)]], {**COLUMNS, "caption": "CAPTION"})
    with pytest.raises(ValueError, match=r"no column CAPTION; it has URL, TEXT, .* expected .*CAPTION \(our caption\)"):
        filter_metadata.run(job)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="part-00001.parquet has no column similarity"):
        filter_metadata.run(make_job(other, [[row(0)], [{"URL": "u", "TEXT": "t", "WIDTH": 1, "HEIGHT": 1}]]))


def test_a_deny_list_without_its_column_is_refused_and_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "deny.txt").write_text("-77\n")
    given = {"deny_lists": {"hash": str(tmp_path / "deny.txt")}}
    words = (r"deny_lists.hash would deny nothing: dataset.source.columns says null for hash; it maps url: URL, .*"
             r"dataset.source.columns.hash=NAME_IN_THE_FILES, or give .*: url, url_md5, url_sha256")  # fmt: skip
    with pytest.raises(ValueError, match=words):
        filter_metadata.run(make_job(tmp_path, [[row(0, HASH=-77)]], {**COLUMNS, "hash": None}, **given))
    with pytest.raises(ValueError, match="does not say which columns hold hash"):
        filter_metadata.run(make_job(tmp_path, [[row(0, HASH=-77)]], COLUMNS, **given))
    job = make_job(tmp_path, [[row(0, HASH=-77), row(1, HASH=5)]], {**COLUMNS, "hash": "HASH"}, **given)
    assert filter_metadata.run(job)["dropped"] == {"denied_hash": 1}


@pytest.mark.parametrize("dataset", options("dataset"))
def test_no_data_set_asks_for_values_of_a_column_that_it_lacks(dataset: str) -> None:
    settings = compose([f"dataset={dataset}"]).dataset
    asked = {*settings.filter_metadata.one_of, *settings.filter_metadata.bounds, *settings.filter_metadata.deny_lists}
    lacking = {name for name in asked if settings.source.columns.get(name) is None}
    assert lacking <= ({"similarity"} if dataset == "relaion" else set()), "it would be left out"


def test_a_data_set_of_one_s_own_is_read_by_the_command_that_its_file_prints(tmp_path: Path) -> None:
    printed = [line.lstrip("# ") for line in (CONF / "dataset/custom.yaml").read_text().splitlines()]
    begin, end = next(i for i, line in enumerate(printed) if line.startswith("python -m")), printed.index("", 2)
    command = shlex.split("".join(line.removesuffix("\\") for line in printed[begin:end]))
    assert command[:3] == ["python", "-m", "pipelines.run"]
    rows = [{"link": f"http://a.test/{i}", "alt_text": f"a caption of words, {i}", "w": 400, "h": 300, "beauty": beauty,
             "file_md5": f"{i:032X}", "unmapped": "x"} for i, beauty in enumerate([6.0, 4.0, 5.5, 7.0])]  # fmt: skip
    mine = tmp_path / "metadata/mine"
    mine.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), mine / "part-0.parquet")
    (mine / "denied.txt").write_text(f"{2:032x}\n")
    here = [argument.replace("metadata/mine", str(mine)) for argument in command[3:]]
    job = Dag(compose(normalise([*here, f"paths.outputs={tmp_path}/outputs"]))).job("filter_metadata")
    assert filter_metadata.run(job) == {"rows": 4, "samples": 2, "dropped": {"aesthetic": 1, "denied_checksum": 1}}
    assert [(r["url"], r["checksum"]) for r in read(job)] == [
        ("http://a.test/0", f"{0:032X}"), ("http://a.test/3", f"{3:032X}")]  # fmt: skip
    assert job.output.path == tmp_path / "outputs/mine/filter_metadata"


@pytest.mark.parametrize("bad", [5, b"bytes", [1.0], {"a": "b"}])
def test_a_url_that_is_no_text_is_refused_with_its_type(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"column URL holds .*, expected text; expected URL \(our url\)"):
        filter_metadata.run(make_job(tmp_path, [[row(0, URL=bad)]]))


def test_a_score_without_a_column_is_named(tmp_path: Path) -> None:
    job = make_job(tmp_path, [[row(0)]], {"url": "URL", "caption": "TEXT"})
    with pytest.raises(ValueError, match="does not say which columns hold similarity; it has url, caption"):
        filter_metadata.run(job)


def test_files_may_differ_in_the_types_of_their_numbers(tmp_path: Path) -> None:
    rows = [row(0, WIDTH=200.0, similarity="0.3"), row(1, WIDTH="wide"), row(2, WIDTH="300", similarity="0.31")]
    job = make_job(tmp_path, [[r] for r in rows])
    assert filter_metadata.run(job)["dropped"] == {"too_small": 1}
    assert [(r["width"], r["similarity"]) for r in read(job)] == [(200.0, 0.3), (300.0, 0.31)]


# -- hostile files ----------------------------------------------------------------------------------------------------
def canary_type(canary: Path) -> type[pa.ExtensionType]:
    """An extension type as a library may register it, which runs code of the file's choice when it is read."""

    class Loaded(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.string(), "tests.loaded")

        def __arrow_ext_serialize__(self) -> bytes:
            return b"anything"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> pa.ExtensionType:
            canary.touch()
            return cls()

    return Loaded


def test_extension_types_execute_nothing(tmp_path: Path) -> None:
    kind, canary = canary_type(tmp_path / "canary"), tmp_path / "canary"
    pa.register_extension_type(kind())
    try:
        captions = pa.ExtensionArray.from_storage(kind(), pa.array(["a caption", "another caption"]))
        table = pa.Table.from_pylist([row(0), row(1)]).set_column(1, "TEXT", captions)
        pq.write_table(table, tmp_path / "part-00000.parquet")
        job = job_of(tmp_path, SourceConfig(str(tmp_path / "part-*.parquet"), "parquet", dict(COLUMNS)))
        canary.unlink(missing_ok=True)
        assert filter_metadata.run(job)["samples"] == 2
        assert not canary.exists()
        pq.read_schema(tmp_path / "part-00000.parquet")  # the sabotage twin: how one reads a schema otherwise
        assert canary.exists()
    finally:
        pa.unregister_extension_type("tests.loaded")


def test_hostile_rows_are_dropped_by_reason_and_the_run_finishes(tmp_path: Path) -> None:
    rows = [
        row(0, TEXT="x" * 10_000_000), row(1, TEXT="NUL \0 inside"), row(2, URL="http://a.test/\x07"),
        row(3, WIDTH=float("nan")), row(4, WIDTH=float("inf"), HEIGHT=float("inf")), row(5, WIDTH=-5.0),
        row(6, similarity=float("-inf")), row(7, TEXT="\t \n "), row(8, URL="\n"),
        row(9, TEXT="bidi \u202e back"), row(9, TEXT="bidi \u202e back"),
        row(10, URL=None, TEXT=None, WIDTH=None, HEIGHT=None, similarity=None),
    ]  # fmt: skip
    for some in rows:
        some["WIDTH"] = None if some["WIDTH"] is None else float(some["WIDTH"])
    job = make_job(tmp_path, [rows], max_caption_chars=1000)
    assert filter_metadata.run(job) == {"rows": 12, "samples": 1, "dropped": {
        "control_characters": 2, "duplicate_url_caption": 1, "long_caption": 1, "no_caption": 1, "no_url": 2,
        "similarity": 1, "too_small": 3,
    }}  # fmt: skip


def test_every_control_character_and_none_but_them(tmp_path: Path) -> None:
    """Also beside what JSON escapes, for by that a caption is looked at more closely."""
    characters = [*map(chr, range(0xA1)), "\u2028", "\ud7ff", "\U0001f600"]
    rows = [row(i, TEXT=f'a "{character}\\caption') for i, character in enumerate(characters)]
    rows += [row(1000 + i, URL=f"http://a.test/{i}{character}") for i, character in enumerate(characters)]
    job = make_job(tmp_path, [rows])
    hidden = {*map(chr, range(32)), "\x7f"} - {*"\t\n\r"}
    assert filter_metadata.run(job)["dropped"] == {"control_characters": 2 * len(hidden)}
    assert {r["caption"][3] for r in read(job) if r["caption"].startswith("a ")} == set(characters) - hidden


@pytest.mark.parametrize("caption, stays", [
    ("abc", True), ("ab", False), ("  abc", True), ("abc  ", True), ("  ab", False), ("ab  ", False), (" ab ", False),
    ("äöü", True), ("äö", False), ("a c", True), ("\u3000ab", True),
])  # fmt: skip
def test_blanks_around_a_caption_do_not_count(tmp_path: Path, caption: str, stays: bool) -> None:
    assert filter_metadata.run(make_job(tmp_path, [[row(0, TEXT=caption)]], min_caption_chars=3))["samples"] == stays


def broken_text(texts: list[bytes]) -> pa.StringArray:
    """Strings as a file may claim that it holds them."""
    return pa.StringArray.from_buffers(len(texts), *pa.array(texts, pa.binary()).buffers()[1:])


def test_text_that_is_not_utf_8_drops_its_row_and_no_other_and_executes_nothing(tmp_path: Path) -> None:
    kind, canary = canary_type(tmp_path / "canary"), tmp_path / "canary"
    pa.register_extension_type(kind())
    try:
        good = pa.Table.from_pylist([row(i, LICENSE=f"by {i}") for i in range(6)])
        urls = [b"http://a.test/0", b"http://\xff/1", *[b"http://b.test"] * 4]
        captions = ["caption €".encode(), *[b"caption"] * 3, b"\xc3(", b"text 5"]
        licenses = [b"by", b"by", b"\x80", b"by", b"by", b"by"]
        table = good.set_column(0, "URL", broken_text(urls)).set_column(1, "TEXT", broken_text(captions))
        table = table.set_column(5, "LICENSE", broken_text(licenses))
        marked = pa.ExtensionArray.from_storage(kind(), pa.array(["not read"] * 6))
        pq.write_table(table.append_column("MARKED", marked), tmp_path / "part-00000.parquet")
        pq.write_table(pa.Table.from_pylist([row(7, LICENSE="by")]), tmp_path / "part-00001.parquet")
        source = SourceConfig(str(tmp_path / "part-*.parquet"), "parquet", {**COLUMNS, "license": "LICENSE"})
        job = job_of(tmp_path, source)
        canary.unlink(missing_ok=True)
        assert filter_metadata.run(job) == {"rows": 7, "samples": 3, "dropped": {"duplicate_url": 1, "not_utf8": 3}}
        assert not canary.exists()
    finally:
        pa.unregister_extension_type("tests.loaded")
    assert [(r["url"], r["caption"]) for r in read(job)] == [
        ("http://a.test/0", "caption €"), ("http://b.test", "caption"), ("http://a.test/7", "caption 7")]  # fmt: skip
    assert {r["license"] for r in read(job)} == {"by"}
    assert not list(job.output.path.glob(".attempts/*"))


@pytest.mark.parametrize("spoil", [lambda data: data[:-20], lambda data: b"PAR1" + data[:50], lambda data: b"",
                                   lambda data: data.replace(b"caption 1", b"")])  # fmt: skip
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    job, path = make_job(tmp_path, [[row(0)], [row(1)]]), tmp_path / "part-00001.parquet"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match="part-00001.parquet cannot be read as parquet.* move it away"):
        filter_metadata.run(job)


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """As on a disk that is full, or under a quota."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_is_not_blamed_on_the_file_that_is_read(tmp_path: Path) -> None:
    captions = [3 * hashlib.sha512(f"{i}".encode()).hexdigest() for i in range(150_000)]
    table = pa.table({"URL": [f"http://a.test/{i}" for i in range(len(captions))], "TEXT": captions})
    pq.write_table(table, tmp_path / "part-0.parquet")
    columns = {"url": "URL", "caption": "TEXT", "similarity": None}
    job = job_of(tmp_path, SourceConfig(str(tmp_path / "part-0.parquet"), "parquet", columns), shard_samples=10**6)
    little = replace(job.how.cluster, filter_metadata=TableResources(threads=1, memory_bytes=60_000_000))
    job = replace(job, how=replace(job.how, cluster=little))
    with no_file_longer_than(2_000_000), pytest.raises(NoRoom) as error:
        filter_metadata.run(job)
    said = str(error.value)
    assert "cluster.filter_metadata.memory_bytes=60000000 go to" in said and f"{tmp_path}/out/.attempts/" in said
    assert "Free some there" in said and "part-0.parquet" not in said and "move it away" not in said
    assert "File too large" in said
    assert filter_metadata.run(job)["samples"] == len(captions), "with room the same command does it"


def test_hostile_captions_are_text_and_nothing_else(tmp_path: Path) -> None:
    nasty = ["'; DROP TABLE rows; --", "${jndi:ldap://x}", "bidi \u202e reversed", "x" * 1_000_000, "${oc.env:HOME}"]
    job = make_job(tmp_path, [[row(i, TEXT=text) for i, text in enumerate(nasty)]])
    filter_metadata.run(job)
    assert [r["caption"] for r in read(job)] == nasty
