"""The embedded web: known numbers, the same bytes, an answer for every kind, and an end with its block."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from ldm.images import ImageError, decode_rgb, encode_jpeg, resize_shorter
from pipelines.config import CONF, DatasetConfig, build
from pipelines.embedded_web.pictures import FORMATS, SUBJECTS, Picture, by_hexcode, encode
from pipelines.embedded_web.plan import FATE, KINDS, SHY_HOST, Kind, Row, counts, plan
from pipelines.embedded_web.server import INWARD
from pipelines.fetch import Fetcher
from pipelines.fetching.wire import FetchError
from pipelines.sample_web import ROOT, expected_funnel, serving, write_metadata
from pipelines.settings import SampleWebConfig

SEED = int(os.environ.get("LDM_TEST_SEED", "0"))
DATASET = build(DatasetConfig, yaml.safe_load((CONF / "dataset/openmoji.yaml").read_text()))
SMALL = SampleWebConfig(rows=64, pictures=16, seed=SEED)


def dataset(**changes: object) -> DatasetConfig:
    return replace(DATASET, sample_web=SMALL, **changes)  # type: ignore[arg-type]


# -- the plan ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, pictures", [(1024, 144), (64, 16), (46, 1), (5000, len(SUBJECTS))])
def test_every_row_has_a_kind_and_every_kind_a_row(rows: int, pictures: int) -> None:
    config = SampleWebConfig(rows, pictures, SEED)
    numbers = counts(config)
    assert sum(numbers.values()) == rows and min(numbers.values()) >= 1 and numbers["good"] == pictures
    planned = plan(config)
    assert Counter(row.kind for row in planned) == numbers
    assert sorted(row.number for row in planned) == list(range(rows))


@pytest.mark.parametrize("rows, pictures, words", [
    (40, 16, "expected at least"), (64, 40, "expected at least"), (1024, 0, "expected 1 to"),
    (1024, len(SUBJECTS) + 1, "expected 1 to"),
])  # fmt: skip
def test_sizes_that_cannot_be_had_are_refused(rows: int, pictures: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        counts(SampleWebConfig(rows, pictures, 0))


def test_what_the_default_holds() -> None:
    funnel = expected_funnel(DATASET)
    fallen = {stage: sum(reasons.values()) for stage, reasons in funnel.items()}
    assert fallen == {"filter_metadata": 682, "download": 138, "filter_images": 24, "selection": 36}
    assert 1024 - sum(fallen.values()) == 144
    assert funnel["download"]["timeout"] == 8, "slow ones must be few"


def test_urls_are_unique_and_repeats_stand_after_what_they_repeat() -> None:
    rows = plan(replace(DATASET.sample_web, seed=SEED))  # type: ignore[type-var]
    at = {row.number: i for i, row in enumerate(rows)}
    repeats = [row for row in rows if row.original is not None]
    assert all(at[row.number] > at[row.original] for row in repeats)  # type: ignore[index]
    assert Counter(row.kind for row in repeats).keys() == {"copy", "same_url", "same_url_and_caption"}
    urls = [row.url for row in rows if row.url and not row.kind.startswith("same_url")]
    assert len(set(urls)) == len(urls) and all(url.startswith("http://") and ".test/" in url for url in urls)
    captions = [row.caption for row in rows if row.kind == "good"]
    assert len(set(captions)) == 144


# -- the metadata -----------------------------------------------------------------------------------------------------
def test_metadata_has_laions_columns_and_says_that_its_scores_are_synthetic(tmp_path: Path) -> None:
    write_metadata(SMALL, tmp_path / "m.parquet")
    schema = pq.read_schema(tmp_path / "m.parquet")
    assert {field.name: field.type for field in schema} == {
        "SAMPLE_ID": pa.int64(), "URL": pa.string(), "TEXT": pa.string(), "WIDTH": pa.int32(), "HEIGHT": pa.int32(),
        "LICENSE": pa.string(), "NSFW": pa.string(), "similarity": pa.float64(), "punsafe": pa.float32(),
        "pwatermark": pa.float32(), "hash": pa.int64(),
    }  # fmt: skip
    assert schema.metadata[b"scores"].startswith(b"synthetic") and b"OpenMoji" in schema.metadata[b"pictures"]
    assert pq.read_table(tmp_path / "m.parquet")["URL"].to_pylist() == [row.url for row in plan(SMALL)]


def test_the_same_settings_give_the_same_bytes_also_in_another_process(tmp_path: Path) -> None:
    write_metadata(SMALL, tmp_path / "a.parquet")
    code = f"""from pathlib import Path
from pipelines.sample_web import write_metadata
from pipelines.settings import SampleWebConfig
from pipelines.fetching.wire import FetchError
write_metadata({SMALL!r}, Path({str(tmp_path / "b.parquet")!r}))"""
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    write_metadata(replace(SMALL, seed=SEED + 1), tmp_path / "c.parquet")
    a, b, c = ((tmp_path / f"{name}.parquet").read_bytes() for name in "abc")
    assert a == b != c
    assert not list(tmp_path.glob(".*"))


def broken_rules(row: Row, seen: set[tuple[str | None, str | None]]) -> set[str]:
    """Which of the default's rules a row of the metadata breaks, written down once more for this test."""
    rules, bounds = DATASET.filter_metadata, DATASET.filter_metadata.bounds
    broken = {
        "no_url": not row.url,
        "no_caption": not (row.caption or "").strip(),
        "too_small": min(row.width, row.height) < rules.min_size,
        "extreme_shape": max(row.width, row.height) > rules.max_aspect * min(row.width, row.height),
        "similarity": row.similarity is None or not bounds["similarity"][0] <= row.similarity <= 1.0,  # type: ignore
        "punsafe": row.punsafe > bounds["punsafe"][1],  # type: ignore[operator]
        "pwatermark": row.pwatermark > bounds["pwatermark"][1],  # type: ignore[operator]
        "short_caption": bool(row.caption) and len(row.caption.strip()) < rules.min_caption_chars,  # type: ignore
        "duplicate_url_caption": (row.url, row.caption) in seen,
        "duplicate_url": bool(row.url) and row.url in {url for url, _ in seen},
    }
    return {name for name, yes in broken.items() if yes}


def test_a_row_breaks_the_rule_of_its_kind_and_no_other_that_comes_before() -> None:
    assert DATASET.sample_web is not None
    seen: set[tuple[str | None, str | None]] = set()
    order = ["no_url", "no_caption", "too_small", "extreme_shape", "similarity", "punsafe", "pwatermark",
             "short_caption", "duplicate_url_caption", "duplicate_url"]  # fmt: skip
    for row in plan(replace(DATASET.sample_web, seed=SEED)):
        stage, reason = FATE[row.kind]
        first = next((name for name in order if name in broken_rules(row, seen)), "")
        assert first == (reason if stage == "filter_metadata" else ""), row
        seen |= {(row.url, row.caption)} if not first else set()


@pytest.mark.parametrize("section, key, value", [
    ("filter_metadata", "min_size", 200), ("filter_metadata", "min_caption_chars", 10), ("download", "max_pixels", 100),
    ("download", "respect_robots", False), ("filter_images", "max_aspect", 9.0), ("filter_metadata", "bounds", {}),
])  # fmt: skip
def test_no_funnel_is_promised_for_settings_that_the_web_was_not_planned_for(
    section: str, key: str, value: object
) -> None:
    changed = replace(DATASET, **{section: replace(getattr(DATASET, section), **{key: value})})
    with pytest.raises(ValueError, match=f"dataset.{section}.{key}"):
        expected_funnel(changed)


# -- the pictures -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_shows_the_drawing_upright_on_white(form: str) -> None:
    for orientation in range(2, 9) if form == "turned_jpeg" else [1]:
        rgb = decode_rgb(encode(Picture("1F34C", 200, 150, form, orientation)))
        expected = decode_rgb(encode(Picture("1F34C", 200, 150, "png")))
        assert rgb.shape == expected.shape == (150, 200, 3) and (expected[:, :20] == 255).all()
        assert np.abs(rgb.astype(int) - expected).mean() < 2


def phash(rgb: np.ndarray) -> int:
    return int(str(imagehash.phash(Image.fromarray(rgb))), 16)


def stored_phash(row: Row) -> int:
    """The hash of a picture as the download stores it."""
    small = resize_shorter(decode_rgb(encode(row.picture)), DATASET.download.image_size)
    return phash(decode_rgb(encode_jpeg(small, DATASET.download.encode_quality)))


def check_hashes(config: SampleWebConfig) -> None:
    bits = DATASET.selection.near_duplicate_bits
    assert bits is not None
    rows = {row.number: row for row in plan(config) if row.kind in ("good", "copy")}
    hashes = {number: stored_phash(row) for number, row in rows.items()}
    good = [number for number, row in rows.items() if row.kind == "good"]
    for i, a in enumerate(good):
        assert all((hashes[a] ^ hashes[b]).bit_count() >= 12 for b in good[:i]), rows[a].caption
    for number, row in rows.items():
        if row.original is not None:
            assert (hashes[number] ^ hashes[row.original]).bit_count() <= bits, row.caption


def test_good_pictures_differ_and_copies_do_not() -> None:
    check_hashes(SMALL)


@pytest.mark.slow
def test_good_pictures_differ_and_copies_do_not_in_the_default() -> None:
    assert DATASET.sample_web is not None
    check_hashes(replace(DATASET.sample_web, seed=SEED))


def test_subjects_are_plain_and_distinct() -> None:
    captions = [by_hexcode()[hexcode].caption for hexcode in SUBJECTS]
    assert len(set(captions)) == len(set(SUBJECTS)) == len(SUBJECTS) >= 144
    assert {"banana", "red apple", "pizza", "cat face", "butterfly", "house"} <= set(captions[:16])
    assert not any("-" in hexcode.removesuffix("-FE0F") or "flag" in caption
                   for hexcode, caption in zip(SUBJECTS, captions, strict=True))  # fmt: skip


# -- the answers ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(dataset()) as address:
        assert address is not None and address.startswith("127.0.0.1:")
        yield address


def row_of(kind: str) -> Row:
    return next(row for row in plan(SMALL) if row.kind == kind)


def ask(address: str, url: str, timeout: float = 20.0) -> tuple[int, dict[str, str], bytes]:
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("GET", f"/{path}", headers={"Host": host})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def test_all_good_pictures_arrive_also_after_redirects(address: str) -> None:
    hops = Counter[int]()
    for row in plan(SMALL):
        if row.kind in ("good", "copy"):
            url, asked = str(row.url), 0
            while (answer := ask(address, url))[0] == 302:
                url, asked = answer[1]["Location"], asked + 1
            status, fields, body = answer
            assert status == 200 and asked == row.hops
            assert fields["Content-Type"].startswith("image/") and body == encode(row.picture)
            assert decode_rgb(body).shape == (row.height, row.width, 3)
            hops[asked] += 1
    assert hops[2] == 1


@pytest.mark.parametrize("kind, status", [("missing", 404), ("gone", 410), ("failing", 500)])
def test_answers_without_a_picture(address: str, kind: str, status: int) -> None:
    assert ask(address, str(row_of(kind).url))[0] == status
    assert ask(address, "http://nobody.test/at/all.jpg")[0] == 404


def test_answers_that_are_no_good_pictures(address: str) -> None:
    assert ask(address, str(row_of("opted_out").url))[1]["X-Robots-Tag"] == "noai, noimageai"
    assert ask(address, str(row_of("page").url))[2].startswith(b"<!doctype html>")
    for kind, reason in (("page", "not_an_image"), ("cut", "truncated"), ("bomb", "too_many_pixels")):
        body = ask(address, str(row_of(kind).url))[2]
        assert len(body) < 40_000
        with pytest.raises(ImageError) as raised:
            decode_rgb(body, max_pixels=DATASET.download.max_pixels)
        assert raised.value.reason == reason
    height, width, _ = decode_rgb(ask(address, str(row_of("small").url))[2]).shape
    assert max(height, width) < DATASET.filter_images.min_size <= min(row_of("small").height, row_of("small").width)
    height, width, _ = decode_rgb(ask(address, str(row_of("extreme").url))[2]).shape
    assert max(height, width) > DATASET.filter_images.max_aspect * min(height, width)


def test_redirects_that_lead_nowhere(address: str) -> None:
    here = str(row_of("circling").url)
    assert ask(address, here)[1]["Location"] == "?again"
    assert ask(address, f"{here}?again")[1]["Location"] == here
    assert ask(address, str(row_of("inward").url))[1]["Location"] == INWARD


def test_only_one_host_forbids_and_only_a_part(address: str) -> None:
    status, _, body = ask(address, f"http://{SHY_HOST}/robots.txt")
    assert status == 200 and b"Disallow: /private/" in body
    assert ask(address, "http://img.meadow.test/robots.txt")[0] == 404
    private = str(row_of("private").url)
    assert private.startswith(f"http://{SHY_HOST}/private/") and ask(address, private)[0] == 200


def test_slow_answers(address: str) -> None:
    with pytest.raises(TimeoutError):
        ask(address, str(row_of("silent").url), timeout=0.5)
    host, _, path = str(row_of("dripping").url).removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.request("GET", f"/{path}", headers={"Host": host})
    response = connection.getresponse()
    assert response.status == 200 and 2 <= len(response.read1()) < 100
    assert 1 <= len(response.read1()) < 100
    connection.close()


def test_an_endless_answer_does_not_say_how_long_it_is(address: str) -> None:
    host, _, path = str(row_of("endless").url).removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request("GET", f"/{path}", headers={"Host": host})
    response = connection.getresponse()
    assert response.getheader("Content-Length") is None
    assert len(response.read(DATASET.download.max_bytes + 1)) == DATASET.download.max_bytes + 1
    connection.close()


def test_one_connection_serves_several_hosts(address: str) -> None:
    connection = http.client.HTTPConnection(address, timeout=20)
    for host, expected in ((SHY_HOST, 200), ("img.meadow.test", 404), (SHY_HOST.upper() + ":80", 200)):
        connection.request("GET", "/robots.txt", headers={"Host": host})
        response = connection.getresponse()
        assert response.status == expected and response.read()
    connection.request("POST", "/robots.txt", headers={"Host": SHY_HOST})
    assert connection.getresponse().status == 405
    connection.close()


def fate(fetcher: Fetcher, row: Row) -> str:
    try:
        rgb = decode_rgb(fetcher.fetch(str(row.url)), max_pixels=DATASET.download.max_pixels)
    except (FetchError, ImageError) as error:
        return error.reason
    sizes = sorted(rgb.shape[:2])
    if sizes[0] < DATASET.filter_images.min_size:
        return "too_small"
    return "extreme_shape" if sizes[1] > DATASET.filter_images.max_aspect * sizes[0] else ""


ASKED = [kind for kind in KINDS if kind.stage != "filter_metadata"]


@pytest.mark.parametrize("kind", ASKED, ids=lambda kind: kind.name)
def test_the_fetcher_gives_each_kind_its_reason(address: str, kind: Kind) -> None:
    with closing(Fetcher(replace(DATASET.download, retries=0, deadline_seconds=2.0), address)) as fetcher:
        assert fate(fetcher, row_of(kind.name)) == ("" if kind.stage == "selection" else kind.reason)


# -- beginning and end ------------------------------------------------------------------------------------------------
def refuses(address: str, seconds: float = 10.0) -> bool:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_the_server_is_gone_after_the_block_also_after_an_error() -> None:
    with serving(dataset()) as address:
        assert address is not None and not refuses(address, 0.2)
    assert refuses(address, 0.2)
    with pytest.raises(KeyError), serving(dataset(connect=address)) as again:
        assert again == address, "the port that was asked for"
        raise KeyError
    assert refuses(address, 0.2)


def test_the_server_ends_when_its_driver_is_killed() -> None:
    code = f"""import sys, tests.pipelines.test_sample_web as t
with t.serving(t.replace(t.DATASET, sample_web=t.{SMALL!r})) as address:
    print(address, flush=True)
    sys.stdin.read()"""
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None and driver.stdin is not None
    address = driver.stdout.readline().strip()
    assert address and not refuses(address, 0.2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdin.close()
    driver.stdout.close()
    assert refuses(address)


def test_where_nothing_is_to_be_served_and_where_it_cannot_be() -> None:
    real = replace(DATASET, sample_web=None)
    with serving(real) as address:
        assert address is None
    with serving(replace(real, connect="127.0.0.1:9")) as address:
        assert address == "127.0.0.1:9"
    with pytest.raises(ValueError, match="loopback only"), serving(dataset(connect="10.0.0.5:80")):
        pass
    with pytest.raises(ValueError, match="sample_web is null"):
        expected_funnel(real)


def test_a_port_that_is_taken_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match="before it answered"), serving(dataset(connect=f"127.0.0.1:{port}")):
            pass
    assert f"cannot listen on 127.0.0.1:{port}" in capfd.readouterr().err


def test_the_server_by_hand_says_what_it_expects() -> None:
    command = [sys.executable, "-m", "pipelines.embedded_web.server", "rows=64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=False)
    assert done.returncode == 2 and "expected rows=N pictures=N seed=N port=N" in done.stderr


def test_planning_and_serving_load_neither_torch_nor_arrow() -> None:
    code = "import sys, pipelines.embedded_web.server, pipelines.sample_web; " \
           "print(sorted({'torch', 'pyarrow', 'ray', 'hydra', 'omegaconf'} & sys.modules.keys()))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
