"""Tars of somebody else's making, with hashes that fit: readers refuse them by file and member, and run nothing."""

from __future__ import annotations

import os
import pickle
import tarfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from ldm import shards
from ldm.images import encode_png
from ldm.shards import BLOCK, END, INDEX_ROW, CorruptSample, ShardInfo, ShardReader, encode_array, iterate_tar
from pipelines.checking.checks import Shard, check_shard
from pipelines.manifest import StageFolder
from pipelines.stages import filter_images, precompute_latents
from pipelines.stages.train_autoencoder import read_pictures
from tests.pipelines.small_cache import make_cache, picture

KEY = "00000000"
MB, SECONDS = 5, 5.0  # that a refusal may cost
PICKLES = ("pyd", "pth", "pkl", "pickle", "pt")
PLAN = {"fingerprint": "f", "what": {"autoencoder.network": {"posterior": "kl", "factor": 8, "latent_channels": 4},
                                     "dataset.precompute_latents": {"flip": False}}}  # fmt: skip


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def member(name: bytes, data: bytes = b"", *, kind: bytes = b"0", size: bytes = b"", prefix: bytes = b"",
           link: bytes = b"") -> bytes:  # fmt: skip
    """A member of a tar as its header says it, whether or not that is true, with a checksum that fits."""
    fields = [name.ljust(100, b"\0"), b"0000644\0" + b"0000000\0" * 2, size or b"%011o\0" % len(data), b"00000000000\0",
              b" " * 8, kind, link.ljust(100, b"\0"), b"ustar\x0000", bytes(80), prefix.ljust(155, b"\0")]  # fmt: skip
    header = b"".join(fields).ljust(BLOCK, b"\0")
    header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    return header + data + bytes(-len(data) % BLOCK)


def hostile(canary: Path) -> dict[str, tuple[bytes, str]]:
    """What may stand after an honest member of sample KEY, and how it is called in the refusal."""
    here, name, inside = str(canary).encode(), f"{KEY}.json".encode(), b"was here"
    pax = b"".join(b"%d a%07d=b\n" % (14, i) for i in range(100_000))
    found = {
        "traversal": (member(b"../../canary", inside), "../../canary"),
        "absolute": (member(here[-100:], inside), here[-100:].decode()),
        "in a folder": (member(b"x/" + name, inside), f"x/{KEY}.json"),
        "prefix": (member(name, inside, prefix=b"../.."), f"{KEY}.json"),
        "a zero in the name": (member(name + b"\0.pkl", inside), f"{KEY}.json"),
        "a pipe": (member(b"pipe:touch canary", inside), "pipe:touch canary"),
        "duplicate": (member(name, inside) + member(name, b"is here"), f"{KEY}.json"),
        "pax": (member(b"pax", b"24 path=../../../canary\n", kind=b"x"), "pax"),
        "pax of many fields": (member(b"pax", pax, kind=b"x"), "pax"),
        "pax without end": (member(b"pax", kind=b"x", size=b"77777777777\0"), "pax"),
        "pax for all that follows": (member(b"pax", b"24 path=../../../canary\n", kind=b"g"), "pax"),
        "long name": (member(b"././@LongLink", here, kind=b"L"), "././@LongLink"),
        "huge": (member(name, size=b"77777777777\0"), f"{KEY}.json"),
        "huge in base 256": (member(name, size=b"\x80" + b"\x7f" * 11), f"{KEY}.json"),
        "negative in base 256": (member(name, size=b"\xff" * 10 + b"\xf0\x00"), f"{KEY}.json"),
        "negative": (member(name, size=b"-0000002000\0"), f"{KEY}.json"),
        "no size": (member(name, size=b"00000000888\0"), f"{KEY}.json"),
    }
    kinds = {"hard link": b"1", "symbolic link": b"2", "character device": b"3", "block device": b"4", "folder": b"5",
             "fifo": b"6", "sparse": b"S"}  # fmt: skip
    found |= {kind: (member(name, kind=code, link=here[-100:]), f"{KEY}.json") for kind, code in kinds.items()}
    payload = pickle.dumps(Payload(canary))
    return found | {end: (member(f"{KEY}.{end}".encode(), payload), f"{KEY}.{end}") for end in PICKLES}


def pictures(extra: bytes = b"") -> bytes:
    """A tar with one downloaded picture."""
    honest = member(f"{KEY}.png".encode(), encode_png(picture(0, 0))) + member(f"{KEY}.txt".encode(), b"waves")
    return honest + extra + 2 * END


def latents(folder: StageFolder, extra: bytes = b"") -> ShardInfo:
    """Commits a shard with one latent: tar, index and record fit each other whatever `extra` is."""
    array = encode_array(np.zeros((8, 4, 4), np.float16))
    sample = member(f"{KEY}.moments.npy".encode(), array) + member(f"{KEY}.txt".encode(), b"waves") + extra
    index = np.array([(KEY, 0, len(sample), zlib.crc32(sample))], INDEX_ROW).tobytes()
    with folder.attempt(0, "f") as attempt:
        (attempt.path / "32").mkdir()
        (attempt.path / "32/000000.tar").write_bytes(sample + 2 * END)
        (attempt.path / "32/000000.index").write_bytes(index)
        attempt.commit(rows=1, samples=1, dropped={}, inputs={}, facts={"folders": {"32": 1}})
    paths = str(folder / "32/000000.tar"), str(folder / "32/000000.index")
    return ShardInfo(*paths, 1, "digest", sha256(index).hexdigest())


def refusal(read: Callable[[], object]) -> str:
    """What a reader says when it refuses, which it must do at once and in little memory."""
    begun = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptSample) as refused:
            read()
        most = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert most < MB and time.process_time() - begun < SECONDS
    return str(refused.value)


def read_all(info: ShardInfo) -> list[dict[str, bytes]]:
    reader = ShardReader(info)
    try:
        return [reader.read(i)[1] for i in range(len(reader))]
    finally:
        reader.close()


def test_readers_of_latents_refuse_what_is_no_plain_sample(tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", StageFolder(tmp_path / "precompute_latents", "precompute_latents")
    shard = Shard(str(folder.path), folder.stage, 0, {**PLAN, "stage": folder.stage})
    honest = latents(folder)
    assert check_shard(shard) == [] and list(read_all(honest)[0]) == ["moments.npy", "txt"]
    for kind, (extra, name) in hostile(canary).items():
        info = latents(folder, extra)
        for read in (read_all, lambda info: list(iterate_tar(info.tar))):
            said = refusal(lambda read=read, info=info: read(info))
            assert info.tar in said and name in said, kind
        found = [finding for finding in check_shard(shard) if finding.sample == KEY]
        assert [finding.file for finding in found] == ["32/000000.tar"] and name in found[0].found, kind
    assert not canary.exists()


@pytest.mark.parametrize("offset, size", [(1 << 63, 100), (512, 100), (0, 1 << 31)])
def test_an_index_that_leads_anywhere_is_refused(tmp_path: Path, offset: int, size: int) -> None:
    folder = StageFolder(tmp_path, "precompute_latents")
    info = latents(folder)
    index = np.array([(KEY, offset, size, 0)], INDEX_ROW).tobytes()
    Path(info.index).write_bytes(index)
    info = ShardInfo(info.tar, info.index, 1, "digest", sha256(index).hexdigest())
    assert info.index in refusal(lambda: read_all(info))
    found = check_shard(Shard(str(tmp_path), folder.stage, 0, {**PLAN, "stage": folder.stage}))
    assert {"32/000000.index", "32/000000.tar"} == {finding.file for finding in found}


def test_stages_and_verify_refuse_such_downloads(tmp_path: Path) -> None:
    canary, dag = tmp_path / "canary", make_cache(tmp_path / "outputs", shards=1, rows=2)
    judging, encoding = (dag.statuses[stage].job for stage in ("filter_images", "precompute_latents"))
    worker, folder = precompute_latents.Worker(encoding), StageFolder(tmp_path / "download", "download")
    tar = judging.inputs["download"] / "000000.tar"
    readers = {
        "filter_images": lambda: filter_images.run_shard(judging, 0),
        "precompute_latents": lambda: worker.run_shard(0),
        "train_autoencoder": lambda: read_pictures(encoding, 32),
        "iterate_tar": lambda: list(iterate_tar(tar)),
    }
    for kind, (extra, name) in {"honest": (b"", ""), **hostile(canary)}.items():
        tar.write_bytes(pictures(extra))
        with folder.attempt(0, "f") as attempt:
            (attempt.path / "000000.tar").write_bytes(pictures(extra))
            attempt.commit(rows=1, samples=1, dropped={}, inputs={})
        found = check_shard(Shard(str(folder.path), "download", 0, {**PLAN, "stage": "download"}))
        if kind == "honest":
            assert found == [] and len(list(iterate_tar(tar))) == 1
            continue
        assert [finding.file for finding in found] == ["000000.tar"] and name in found[0].found, kind
        for reader, read in readers.items():
            with pytest.raises(CorruptSample) as refused:
                read()
            assert str(tar) in str(refused.value) and name in str(refused.value), (kind, reader)
    assert not canary.exists()


def test_samples_without_a_picture_or_a_caption_are_named(tmp_path: Path) -> None:
    for name in ("png", "txt"):
        (tmp_path / "a.tar").write_bytes(member(f"{KEY}.{name}".encode()) + 2 * END)
        with pytest.raises(CorruptSample, match=rf"a\.tar: sample {KEY} has {name}; expected a picture .* and a txt"):
            list(filter_images.pictures_of(tmp_path / "a.tar"))


def test_tars_that_are_cut_out_of_order_or_without_their_checksum_are_refused(tmp_path: Path) -> None:
    tar, one = tmp_path / "a.tar", pictures()
    for whole in range(0, len(one) - 2 * BLOCK, BLOCK):  # also between members, where tarfile says nothing
        tar.write_bytes(one[:whole])
        assert "is cut off" in refusal(lambda: list(iterate_tar(tar)))
    other = member(b"00000001.txt", b"a")
    tar.write_bytes(other + pictures())
    assert f"{KEY}.png comes after those of 00000001" in refusal(lambda: list(iterate_tar(tar)))
    tar.write_bytes(other.replace(b"ustar", b"Ustar") + 2 * END)
    assert "does not have its checksum" in refusal(lambda: list(iterate_tar(tar)))


def test_a_sample_as_large_as_a_disk_is_not_read(tmp_path: Path) -> None:
    """A file with nothing in it but a claim, which is true: 6 GiB of zeros."""
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(member(f"{KEY}.png".encode(), size=b"60000000000\0"))
        file.truncate(7 << 30)
    assert f"{KEY}.png makes its sample larger" in refusal(lambda: list(iterate_tar(tmp_path / "a.tar")))


def test_these_tars_are_hostile_where_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twins: others unpack and unpickle them, and so would our readers' callers without the list of endings."""
    canary, tar = tmp_path / "canary", tmp_path / "a.tar"
    tar.write_bytes(pictures(hostile(canary)["pyd"][0]))
    list(wds.DataPipeline(wds.SimpleShardList(str(tar)), wds.tarfile_to_samples(), wds.decode()))
    assert canary.exists()
    canary.unlink()
    monkeypatch.setattr(shards, "_field", lambda field: field.decode())
    ((_, fields),) = iterate_tar(tar)
    pickle.loads(fields["pyd"])
    assert canary.exists()
    canary.unlink()
    (tmp_path / "a/b").mkdir(parents=True)
    tar.write_bytes(pictures(hostile(canary)["traversal"][0]))
    with tarfile.open(tar) as file:
        file.extractall(tmp_path / "a/b", filter="fully_trusted")
    assert canary.exists()
