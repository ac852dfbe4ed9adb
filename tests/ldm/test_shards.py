"""Latent shards on disk: what is written is read, and whatever is not what was written is refused by name."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from ldm.shards import CorruptSample, ShardInfo, ShardReader, ShardWriter, decode_array, encode_array, iterate_tar

SEED = int(os.environ.get("LDM_TEST_SEED", 0))


def write(folder: Path, samples: int = 12) -> tuple[ShardInfo, dict[str, dict[str, bytes]]]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    content = {
        f"{i:08d}": {"moments.npy": encode_array(generator.normal(size=(8, 4, 4)).astype(np.float16)),
                     "txt": f"a picture of thing {i} – é".encode()}
        for i in range(samples)
    }  # fmt: skip
    writer = ShardWriter(folder / "000000.tar", folder / "000000.index")
    for key, fields in content.items():
        writer.write(key, fields)
    writer.close()
    return info_of(writer), content


def info_of(writer: ShardWriter) -> ShardInfo:
    sha256 = hashlib.sha256(writer.index.read_bytes()).hexdigest()
    return ShardInfo(str(writer.tar), str(writer.index), len(writer.rows), "digest", sha256)


def test_what_is_written_is_read_in_any_order(tmp_path: Path) -> None:
    info, content = write(tmp_path)
    reader = ShardReader(info)
    assert reader.keys() == list(content) and len(reader) == 12
    for i in random.Random(SEED).sample(range(12), 12):
        assert reader.read(i) == (reader.keys()[i], content[reader.keys()[i]])
    reader.close()
    assert dict(iterate_tar(info.tar)) == content


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a")[0], write(tmp_path / "b")[0]
    assert Path(a.tar).read_bytes() == Path(b.tar).read_bytes()
    assert Path(a.index).read_bytes() == Path(b.index).read_bytes()


def test_any_webdataset_reader_opens_a_shard(tmp_path: Path) -> None:
    info, content = write(tmp_path)
    read = {sample["__key__"]: {"moments.npy": sample["moments.npy"], "txt": sample["txt"]}
            for sample in wds.DataPipeline(wds.SimpleShardList(info.tar), wds.tarfile_to_samples())}
    assert read == content


def read_all(info: ShardInfo) -> dict[str, dict[str, bytes]]:
    reader = ShardReader(info)
    try:
        return dict(map(reader.read, range(len(reader))))
    finally:
        reader.close()


def mutate(info: ShardInfo, kind: str, chance: random.Random) -> None:
    path = Path(info.tar if kind != "index" else info.index)
    data = bytearray(path.read_bytes())
    if kind in ("flip", "index"):
        # The end of a tar is padding that no sample owns; every other byte counts.
        end = len(data) if kind == "index" else max(m.offset_data + m.size for m in tarfile.open(path).getmembers())
        data[chance.randrange(end)] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        members = tarfile.open(path).getmembers()
        del data[chance.choice(members).offset :]
    elif kind == "remove":
        members = tarfile.open(path).getmembers()
        i = chance.randrange(len(members) - 1)
        del data[members[i].offset : members[i + 1].offset]
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", ["flip", "cut", "remove", "index"])
def test_every_mutation_is_found_and_none_shortens_the_shard(tmp_path: Path, kind: str) -> None:
    chance = random.Random(SEED)
    for trial in range(40):
        info, content = write(tmp_path / str(trial), samples=4)
        mutate(info, kind, chance)
        try:
            read = read_all(info)
        except CorruptSample:
            continue
        pytest.fail(f"{kind} {trial}: {read.keys()} was read as if nothing had happened; written was {content.keys()}")


def test_without_the_crc_a_flipped_byte_would_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin of the test above: with the guard switched off, wrong data is read in silence."""
    info, content = write(tmp_path)
    data = bytearray(Path(info.tar).read_bytes())
    data[512 + 200] ^= 1
    Path(info.tar).write_bytes(bytes(data))
    with pytest.raises(CorruptSample, match="00000000 does not match its crc32"):
        read_all(info)
    crc = int(ShardReader(info).rows[0]["crc32"])
    monkeypatch.setattr("ldm.shards.zlib.crc32", lambda data: crc)
    assert ShardReader(info).read(0) != content["00000000"]


@pytest.mark.parametrize("array", [
    np.arange(24, dtype="<f2").reshape(2, 3, 4), np.float32(3.5), np.zeros((0, 4)), np.arange(5, dtype=">i4"),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array([True, False]),
])  # fmt: skip
def test_arrays_come_back_as_they_were(array: np.ndarray) -> None:
    back = decode_array(encode_array(np.asanyarray(array)))
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)


def test_arrays_that_would_be_unpickled_are_refused() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"no \.npy file of plain numbers"):
        decode_array(buffer.getvalue())


def test_cut_or_lengthened_arrays_are_refused() -> None:
    data = encode_array(np.arange(8, dtype="<f4"))
    wide = data.replace(b"(8,), }", b"(8,), }" + b" " * 10_000)
    for other in (data[:-4], data + b"0000", data[:20], b"", data.replace(b"<f4", b"<f9"), wide):
        with pytest.raises(ValueError):
            decode_array(other)


def test_threads_decode_at_the_same_time() -> None:
    """np.load, in Python 3.11, does not survive this."""
    data = encode_array(np.arange(8, dtype="<f4"))
    with ThreadPoolExecutor(8) as pool:
        assert all(x[7] == 7 for x in pool.map(lambda _: decode_array(data), range(20_000)))


def test_samples_out_of_order_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.tar", tmp_path / "a.index")
    writer.write("00000002", {"txt": b"b"})
    with pytest.raises(ValueError, match="00000001 after 00000002"):
        writer.write("00000001", {"txt": b"a"})


def test_a_whole_shard_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    """Tar and index agree with each other; only the record knows that they are not the ones."""
    info, _ = write(tmp_path / "a")
    other, _ = write(tmp_path / "b", samples=12)
    keys = np.fromfile(other.index, ShardReader(other).rows.dtype)
    keys["key"] = [f"{i + 100:08d}" for i in range(12)]
    keys.tofile(other.index)
    os.replace(other.index, info.index)
    with pytest.raises(CorruptSample, match=r"000000.index has sha256 \w+, expected \w+ as its record says"):
        ShardReader(info)
