"""Whatever is done to a cache on disk is found and named, and no epoch that is read from it is silently shorter."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch

from ldm.shards import CorruptSample
from ldm.training.loader import Draw, Loader, TrainData
from pipelines.checking import checks
from pipelines.checking.checks import Finding
from pipelines.manifest import StageFolder, canonical, read_json, shard_name, write_json
from pipelines.stages.precompute_latents import Worker
from pipelines.training_set import closed_records, shard_info
from pipelines.verify import main, repair, rerun_arguments, verify
from tests.pipelines.small_cache import latents_of, make_cache, overrides_of

SEED = int(os.environ.get("LDM_TEST_SEED", 0))
REFUSALS = (CorruptSample, ValueError, OSError)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    outputs = tmp_path_factory.mktemp("cache")
    make_cache(outputs)
    return outputs


def epoch(outputs: Path) -> dict[str, str]:
    """One epoch as training reads it: key -> hash of the latent."""
    latents = latents_of(outputs)
    records = closed_records(latents)
    infos = [shard_info(latents, record) for record in records.values()]
    data = TrainData(infos, [None] * len(infos), "e", "s", "moments.npy", [4, 4, 4], 1.0)
    loader = Loader(data, Draw(0, 10, 0.0), None, lanes=2, window_shards=2, batch_size=6, micro_batch_size=6)
    found = {}
    for start in range(0, loader.order.samples, 6):
        batch = loader.batch(range(start, start + 6))
        found |= {key: hashlib.sha256(z0.numpy().tobytes()).hexdigest()
                  for key, z0 in zip(batch.keys, batch.z0, strict=True)}  # fmt: skip
    return found


# -- what is done to it ----------------------------------------------------------------------------------------------
def flip_a_byte(latents: StageFolder, shard: int, chance: random.Random) -> None:
    path = latents / f"32/{shard_name(shard)}{chance.choice(['.tar', '.tar', '.index'])}"
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(data))


def members_of(latents: StageFolder, shard: int) -> tuple[Path, list[int]]:
    path = latents / f"32/{shard_name(shard)}.tar"
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
        return path, [member.offset for member in tar.getmembers()]


def cut_at_a_member(latents: StageFolder, shard: int, chance: random.Random) -> None:
    path, offsets = members_of(latents, shard)
    path.write_bytes(path.read_bytes()[: chance.choice(offsets)])


def remove_a_member(latents: StageFolder, shard: int, chance: random.Random) -> None:
    path, offsets = members_of(latents, shard)
    i = chance.randrange(len(offsets) - 1)
    data = path.read_bytes()
    path.write_bytes(data[: offsets[i]] + data[offsets[i + 1] :])


def swap_shards(latents: StageFolder, shard: int, chance: random.Random) -> None:
    """Two shards change places: their tars, tars and indices, records, or everything; or one stands in for both."""
    other = (shard + 1 + chance.randrange(5)) % 6
    names = chance.choice([["32/{}.tar"], ["32/{}.index"], ["32/{}.tar", "32/{}.index"], ["{}.json"],
                           ["32/{}.tar", "32/{}.index", "{}.json"]])  # fmt: skip
    for name in names:
        a, b = (latents / name.format(shard_name(n)) for n in (shard, other))
        data = a.read_bytes(), b.read_bytes()
        a.write_bytes(data[1])
        b.write_bytes(data[0] if chance.random() < 0.5 or data[0] == data[1] else data[1])


def alter_the_record(latents: StageFolder, shard: int, chance: random.Random) -> None:
    """A digit becomes another one, a row is lost in the counts, or all of it is gone."""
    path = latents.record_path(shard)
    kind = chance.randrange(4)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        value = read_json(path)
        write_json(path, {**value, "rows": value["rows"] - 1, "samples": value["samples"] - 1})
    else:
        text = path.read_text()
        at = chance.choice([match.start() for match in re.finditer(r"\d", text)])
        path.write_text(text[:at] + str((int(text[at]) + 1 + chance.randrange(8)) % 10) + text[at + 1 :])


MUTATIONS: list[Callable[[StageFolder, int, random.Random], None]] = [
    flip_a_byte, cut_at_a_member, remove_a_member, swap_shards, alter_the_record,
]  # fmt: skip


def found_and_never_shorter(cache: Path, scratch: Path, mutations: int) -> tuple[int, int]:
    """(how many of the mutations were found, how many were read as another epoch without a word)."""
    chance, whole = random.Random(SEED), epoch(cache)
    found = silent = 0
    for number in range(mutations):
        copy = scratch / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(cache / "small/precompute_latents", copy / "small/precompute_latents")
        MUTATIONS[number % len(MUTATIONS)](latents_of(copy), chance.randrange(6), chance)
        found += bool(verify(latents_of(copy).path, workers=1).findings)
        try:
            silent += epoch(copy) != whole
        except REFUSALS:
            continue
    return found, silent


def test_of_three_hundred_mutations_all_are_found_and_no_epoch_is_silently_shorter(cache: Path, tmp_path: Path) -> None:
    assert found_and_never_shorter(cache, tmp_path, 300) == (300, 0)


def test_with_the_guards_off_mutations_pass(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: without hashes, checksums and seals the same measure fails on both sides."""
    monkeypatch.setattr(checks, "_file_problems", lambda path, info: iter(()))
    monkeypatch.setattr(checks, "_tar_problems", lambda *arguments: iter(()))
    monkeypatch.setattr("pipelines.manifest.seal_of", lambda value: ANY)
    monkeypatch.setattr("pipelines.training_set.edition_digest", lambda digests: ANY)
    found, silent = found_and_never_shorter(cache, tmp_path, 40)
    assert found < 40 and silent > 0


# -- what is said ----------------------------------------------------------------------------------------------------
def findings_after(cache: Path, tmp_path: Path, change: Callable[[StageFolder], None]) -> list[Finding]:
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    change(latents_of(tmp_path))
    return [finding for _, finding in verify(tmp_path / "small", workers=1).findings]


def test_a_sound_run_is_sound_and_counted(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"path={cache / 'small'}", "workers=2"]) == 0
    assert "sound: 24 shards of download, filter_images, filter_metadata, precompute_latents" in capsys.readouterr().out
    assert main([f"path={latents_of(cache) / '32/000003.index'}"]) == 0
    assert "sound: 1 shards of precompute_latents" in capsys.readouterr().out


def test_a_flipped_byte_is_named_with_shard_and_sample(cache: Path, tmp_path: Path) -> None:
    def flip(latents: StageFolder) -> None:
        path = latents / "32/000004.tar"
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(bytes(data))

    hashed, crc = findings_after(cache, tmp_path, flip)
    assert (hashed.shard, hashed.file, hashed.sample) == (4, "32/000004.tar", "")
    assert hashed.found.startswith("sha256 ") and len(hashed.expected) == 12
    assert str(crc).startswith("precompute_latents shard 000004, 32/000004.tar, sample 00000400: found crc32 ")


def rewrite(latents: StageFolder, shard: int, array: np.ndarray) -> None:
    """A sample's array overwritten in a way that every checksum, hash and seal agrees with: a fault of the writer."""
    tar, index = latents / f"32/{shard_name(shard)}.tar", latents / f"32/{shard_name(shard)}.index"
    data = bytearray(tar.read_bytes())
    data[512 + 128 : 512 + 128 + array.nbytes] = array.tobytes()
    rows = np.fromfile(index, checks.INDEX_ROW)
    rows["crc32"][0] = zlib.crc32(bytes(data[: int(rows["size"][0])]))
    tar.write_bytes(bytes(data))
    rows.tofile(index)
    value = read_json(latents.record_path(shard))
    for name, file in value["files"].items():
        file["sha256"] = hashlib.sha256((latents / name).read_bytes()).hexdigest()
    value.pop("seal")
    write_json(latents.record_path(shard), {**value, "seal": hashlib.sha256(canonical(value)).hexdigest()})


def test_numbers_that_are_not_finite_are_found_even_where_every_hash_agrees(cache: Path, tmp_path: Path) -> None:
    lines = [str(f) for f in findings_after(cache, tmp_path, lambda folder: rewrite(
        folder, 2, np.full(128, np.inf, np.float16)))]  # fmt: skip
    assert any("sample 00000200: found moments.npy with 128 numbers that are not finite, expected none" in line
               for line in lines)  # fmt: skip
    assert any("manifest.parquet" in line for line in lines)  # the shard is not the one that was closed


def test_an_input_that_was_made_again_with_other_bytes_is_named(cache: Path, tmp_path: Path) -> None:
    def change(latents: StageFolder) -> None:
        downloads = StageFolder(latents.path.parent / "download", "download")
        record = downloads.record(1)
        with downloads.attempt(1, record.fingerprint) as attempt:
            (attempt.path / "000001.tar").write_bytes((downloads / "000001.tar").read_bytes() + bytes(10240))
            attempt.commit(rows=6, samples=6, dropped={}, inputs=record.inputs)

    lines = [str(finding) for finding in findings_after(cache, tmp_path, change)]
    assert any(re.match(r"precompute_latents shard 000001, 000001.json: found download/000001 with digest \w+, "
                        r"expected \w+, which it has now", line) for line in lines)  # fmt: skip


def test_every_other_stage_is_checked_too(cache: Path, tmp_path: Path) -> None:
    def change(latents: StageFolder) -> None:
        run = latents.path.parent
        (run / "filter_images/000002.parquet").write_bytes(b"PAR1")
        path = run / "download/000003.tar"
        path.write_bytes(path.read_bytes()[:2048])
        plan = read_json(run / "filter_metadata/plan.json")
        write_json(run / "filter_metadata/plan.json", {**plan, "version": 99})

    lines = "\n".join(str(finding) for finding in findings_after(cache, tmp_path, change))
    assert "filter_images shard 000002, 000002.parquet: found 4 bytes" in lines
    assert re.search(r"download shard 000003, 000003.tar: found .* is cut off", lines)
    assert re.search(r"filter_metadata, plan.json: found fingerprint \w+, expected \w+ by what it says", lines)


@pytest.mark.parametrize("arguments", [[], ["paht=x"], ["path=/nowhere"], ["path=x", "repair=yes"]])
def test_requests_that_do_not_fit_say_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "path=PATH" in capsys.readouterr().err or arguments == ["path=/nowhere"]


# -- repair ----------------------------------------------------------------------------------------------------------
def test_a_repair_makes_the_damaged_shards_again_and_no_other(cache: Path, tmp_path: Path) -> None:
    from pipelines.dag import Dag
    from pipelines.manifest import sum_funnel
    from tests.pipelines.small_cache import config_of

    whole = {p.name: p.read_bytes() for p in (cache / "small/precompute_latents/32").iterdir()}
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    latents, chance = latents_of(tmp_path), random.Random(SEED)
    cut_at_a_member(latents, 1, chance)
    alter_the_record(latents, 4, chance)
    untouched = {n: latents.record_path(n).stat().st_mtime_ns for n in (0, 2, 3, 5)}
    made: list[int] = []

    def run(folder: StageFolder) -> None:
        dag = Dag(config_of(tmp_path))
        todo = dag.refresh("precompute_latents").todo
        made.extend(todo)
        worker = Worker(dag.statuses["precompute_latents"].job)
        for shard in todo:
            worker.run_shard(shard)
        records = list(folder.committed().values())
        folder.close(dag.fingerprints["precompute_latents"], records, sum_funnel(records))

    repair(verify(latents.path, workers=1), run)
    assert made == [1, 4] and not verify(latents.path, workers=1).findings
    assert {n: latents.record_path(n).stat().st_mtime_ns for n in untouched} == untouched
    assert {p.name: p.read_bytes() for p in (latents / "32").iterdir()} == whole


def test_a_repair_gives_the_stage_s_own_command_again(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "runs/mine/precompute_latents", "precompute_latents")
    folder.path.mkdir(parents=True)
    with pytest.raises(ValueError, match="does not say which command made .*; give it with .stage=precompute_latents"):
        rerun_arguments(folder)
    command = "+stage=download name=old 'paths.reuse={a: b, c: d}' overwrite=true training.max_steps=3"
    write_json(folder / "run.json", {"format": 1, "runs": [{"command": "x"}, {"command": command}]})
    assert rerun_arguments(folder) == ["paths.reuse={a: b, c: d}", "training.max_steps=3", "+stage=precompute_latents",
                                       "name=mine", f"paths.outputs={tmp_path / 'runs'}"]  # fmt: skip


def spoil_the_plan(plan: Path, kind: str) -> None:
    if kind == "removed":
        plan.unlink()
    elif kind == "cut":
        plan.write_bytes(plan.read_bytes()[:200])
    elif kind == "altered":
        plan.write_text(plan.read_text().replace('"resolution": 32', '"resolution": 33'))
    else:
        write_json(plan, {key: value for key, value in read_json(plan).items() if key != "what"})


@pytest.mark.parametrize("kind", ["removed", "cut", "altered", "incomplete"])
def test_a_damaged_plan_is_found_and_written_anew_from_the_stage_s_command(
    cache: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    folder = latents_of(tmp_path)
    before = (folder / "plan.json").read_bytes()
    command = shlex.join([*overrides_of(tmp_path), "+stage=precompute_latents"])
    write_json(folder / "run.json", {"format": 1, "runs": [{"command": command}]})
    spoil_the_plan(folder / "plan.json", kind)
    assert main([f"path={folder.path}"]) == 1 and "precompute_latents, plan.json: found" in capsys.readouterr().out
    assert main([f"path={tmp_path / 'small'}", "repair=true", "workers=1"]) == 0
    assert "repair: precompute_latents, its plan" in capsys.readouterr().out
    assert (folder / "plan.json").read_bytes() == before


def test_a_plan_is_not_written_anew_from_settings_that_did_not_make_the_records(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    folder = latents_of(tmp_path)
    command = shlex.join([*overrides_of(tmp_path), "dataset.precompute_latents.flip=true"])
    write_json(folder / "run.json", {"format": 1, "runs": [{"command": command}]})
    spoil_the_plan(folder / "plan.json", "cut")
    assert main([f"path={folder.path}", "repair=true"]) == 2
    assert "which its last command does not give" in (said := capsys.readouterr().err)
    assert "+stage=precompute_latents overwrite=true makes it again" in said and folder.record(0) is not None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_run_is_repaired_by_command(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)

    for stage in ("filter_metadata", "download", "filter_images", "precompute_latents"):
        done = command("pipelines.run", "+experiment=smoke", f"+stage={stage}", f"paths.outputs={tmp_path}")
        assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "smoke"
    before = {path: path.read_bytes() for path in run.glob("precompute_latents/*/*")}
    os.truncate(next(path for path in before if path.suffix == ".tar"), 5000)
    broken = command("pipelines.verify", f"path={run}")
    assert broken.returncode == 1 and "found 5000 bytes" in broken.stdout
    mended = command("pipelines.verify", f"path={run}", "repair=true")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "sound: " in mended.stdout and {path: path.read_bytes() for path in before} == before
    assert json.loads((run / "precompute_latents/run.json").read_text())["runs"][-1]["shards"] == 1
