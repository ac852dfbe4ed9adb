"""Metadata on S3 gives the shards that it gives on disk; what is wrong with it is said by setting and by address."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm.storage import StorageError
from pipelines import extend
from pipelines.config import Config, compose
from pipelines.dag import Job
from pipelines.manifest import StageFolder, edition_digests
from pipelines.metadata.files import at_hand
from pipelines.stages import filter_metadata
from tests.pipelines.stages.test_filter_metadata import job_of, make_job, row
from tests.pipelines.test_extend import address, config_of, finish, manifests, write
from tests.s3_server import BUCKET, S3Server, serving

__all__ = ["address"]  # a fixture


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with serving() as server:
        yield server


def with_metadata(job: Job, metadata: str, output: Path) -> Job:
    source = replace(job.what["dataset.source"], metadata=metadata)
    return replace(job, what={**job.what, "dataset.source": source}, output=StageFolder(output, "filter_metadata"))


def on_s3(s3: S3Server, folder: Path, job: Job, pattern: str) -> Job:
    """The same job on the same files as objects; its output lies beside the other's."""
    for path in folder.iterdir():
        if path.is_file():
            s3.put(f"{folder.name}/{path.name}", path.read_bytes())
    return with_metadata(job, f"s3://{BUCKET}/{folder.name}/{pattern}", folder / "out-s3")


def shards_of(job: Job) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(job.output.path.glob("*.parquet"))}


def test_parquet_gives_the_same_shards_and_lies_on_disk_two_files_at_a_time(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [[row(i, similarity=0.1 * (i % 4)) for i in range(9 * part, 9 * part + 12)] for part in range(6)]
    disk = make_job(tmp_path, parts)
    cloud = on_s3(s3, tmp_path, disk, "part-*.parquet")
    s3.put(f"{tmp_path.name}/part-00000.parquet.crc", b"no metadata")
    s3.put(f"{tmp_path.name}/below/part-00000.parquet", b"no metadata of this set")
    lying: list[int] = []

    def look(method: str, name: str) -> bool:
        lying.append(len(list((tmp_path / "out-s3").rglob("*.fetched"))))
        return False

    monkeypatch.setattr(s3, "refuse", look)
    assert filter_metadata.run(cloud) == filter_metadata.run(disk)
    assert shards_of(cloud) == shards_of(disk) and len(shards_of(disk)) > 3
    assert [s3.requests["GET", f"part-{i:05d}.parquet"] for i in range(6)] == [1] * 6
    assert max(lying) == 1, "when a file is asked for, one other at most is here"
    assert not list((tmp_path / "out-s3/.attempts").iterdir())
    assert filter_metadata.sources(cloud, filter_metadata.source_files(cloud)) == [
        {"name": f"s3://{BUCKET}/{tmp_path.name}/{path.name}", "bytes": path.stat().st_size}
        for path in sorted(tmp_path.glob("part-*.parquet"))
    ]


def test_tab_separated_files_too(s3: S3Server, tmp_path: Path) -> None:
    for part in range(3):
        lines = [f"http://a.test/{part * 4 + i}\ta caption of words, {i}" for i in range(5)]
        (tmp_path / f"{part}.tsv").write_text("\n".join(lines))
    source = replace(compose(["dataset=cc12m"]).dataset.source, metadata=f"{tmp_path}/*.tsv")
    disk = job_of(tmp_path, source, bounds={})
    cloud = on_s3(s3, tmp_path, disk, "*.tsv")
    assert filter_metadata.run(cloud) == filter_metadata.run(disk)
    assert shards_of(cloud) == shards_of(disk) and len(shards_of(disk)) == 4


# -- what is wrong ----------------------------------------------------------------------------------------------------
def job_on(s3: S3Server, folder: Path, metadata: str) -> Job:
    return with_metadata(make_job(folder, [[row(0)]]), metadata, folder / "out")


def test_no_bucket_and_no_match_name_the_setting(s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"dataset.source.metadata=s3://nowhere/x/\*.parquet: .*no such bucket"):
        filter_metadata.run(job_on(s3, tmp_path, "s3://nowhere/x/*.parquet"))
    for nothing in ("x/*.parquet", "x", "*/y/z.parquet"):
        with pytest.raises(FileNotFoundError, match="no metadata at dataset.source.metadata=s3://bucket/"):
            filter_metadata.run(job_on(s3, tmp_path, f"s3://{BUCKET}/{tmp_path.name}/{nothing}"))
    with pytest.raises(StorageError, match="gs://bucket/x.parquet: gs:// is not supported"):
        filter_metadata.run(job_on(s3, tmp_path, "gs://bucket/x.parquet"))


def test_no_credentials_and_no_server_name_the_setting(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_on(s3, tmp_path, f"s3://{BUCKET}/x/*.parquet")
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unheard.getsockname()[1]}")
        with pytest.raises(StorageError, match=r"(?s)dataset.source.metadata=s3://.*Could not connect.*AWS_ENDPOINT"):
            filter_metadata.run(job)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "nowhere")
    with pytest.raises(StorageError, match="dataset.source.metadata=s3://.*AWS_ACCESS_KEY_ID"):
        filter_metadata.run(job)


def test_a_file_that_cannot_be_read_is_named_by_its_address(s3: S3Server, tmp_path: Path) -> None:
    job = on_s3(s3, tmp_path, make_job(tmp_path, [[row(0)], [row(1)], [row(2)]]), "part-*.parquet")
    s3.put(f"{tmp_path.name}/part-00001.parquet", b"PAR1 and no more")
    with pytest.raises(ValueError, match=f"s3://{BUCKET}/{tmp_path.name}/part-00001.parquet cannot be read as parquet"):
        filter_metadata.run(job)
    with pytest.raises(ValueError, match="part-00001.parquet has 16 bytes, expected 99 as it was listed"):
        list(at_hand({f"s3://{BUCKET}/{tmp_path.name}/part-00001.parquet": 99}, None, tmp_path))


# -- editions ---------------------------------------------------------------------------------------------------------
def edition_config(folder: Path) -> Config:
    return config_of(folder, f"dataset.source.metadata=s3://{BUCKET}/{folder.name}/*.parquet",
                     f"paths.shards=s3://{BUCKET}/{folder.name}-shards", f"cluster.cache.folder={folder}/cache")


def put(s3: S3Server, folder: Path, name: str, paths: list[str]) -> None:
    write(folder, name, paths)
    s3.put(f"{folder.name}/{name}.parquet", (folder / f"{name}.parquet").read_bytes())


def test_new_metadata_on_s3_makes_a_new_edition_of_shards_on_s3(
    s3: S3Server, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, tmp_path, "part-1", ["good?1", "good?2", "missing?1"])
    config = edition_config(tmp_path)
    dag = finish(config, address)
    first = [edition_digests(manifest) for manifest in manifests(dag)]
    put(s3, tmp_path, "part-0", ["good?5", "good?1", "good?6", "good?5"])  # its name comes first; its rows do not

    def die(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut_off, pytest.raises(KeyboardInterrupt):
        cut_off.setattr(StageFolder, "close", die)
        extend.extend(config, {"all"})
    said = extend.extend(config, {"all"})
    assert "Edition 2: 3 rows in 1 new shards (2 new rows fell: {'duplicate_url_caption': 2})" in said
    dag = finish(config, address)
    for manifest, old in zip(manifests(dag), first, strict=True):
        assert manifest["edition"] == 2 and edition_digests(manifest)[:1] == old
    assert [source["name"][-14:] for source in manifests(dag)[0]["sources"]] == ["part-0.parquet", "part-1.parquet"]
    assert "Nothing to add" in extend.extend(config, set())
    put(s3, tmp_path, "part-1", ["good?1", "good?2", "missing?1", "good?3"])
    with pytest.raises(ValueError, match="part-1.parquet has .* rows of closed editions stay as they are"):
        extend.extend(config, set())
