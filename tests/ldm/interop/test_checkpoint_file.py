"""Files of weights are read to the bit, damaged ones are refused, and nothing in a file is ever run."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldm.interop.checkpoint_file import LEGACY, LEGACY_MAGIC, SAFETENSORS, ZIP, open_file, save

ROOT = Path(__file__).resolve().parents[3]


class Callback:
    """Stands for what Lightning pickles beside the weights."""

    def __init__(self) -> None:
        self.best = torch.tensor(1.5)


def weights() -> dict[str, torch.Tensor]:
    x = torch.arange(24, dtype=torch.float32).view(4, 6)
    return OrderedDict(
        plain=x, turned=x.t(), view=x[1:3, 2:], parameter=torch.nn.Parameter(x + 1), half=x.half(), brain=x.bfloat16(),
        double=x.double(), integers=x.long(), small=x.int(), truth=x > 3, bytes=x.byte(), scalar=torch.tensor(0.5),
        empty=torch.empty(0, 3), tied=x,
    )  # fmt: skip


def same(path: Path, kind: str, expected: dict[str, torch.Tensor]) -> None:
    file = open_file(path)
    assert file.format == kind and file.tensors.keys() == expected.keys()
    for key, value in expected.items():
        read = file.read(key)
        assert (file.tensors[key].shape, file.tensors[key].dtype) == (tuple(value.shape), value.dtype)
        assert read.dtype == value.dtype and torch.equal(read, value.detach()), key


@pytest.mark.parametrize("zipped, kind", [(True, ZIP), (False, LEGACY)])
@pytest.mark.parametrize("inside", [True, False])
def test_what_torch_wrote_is_read_to_the_bit(tmp_path: Path, zipped: bool, kind: str, inside: bool) -> None:
    path = tmp_path / "model.ckpt"
    rest = {"epoch": 3, "pytorch-lightning_version": "1.4.2", "callbacks": {Callback: {"cb": Callback()}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "groups": {1, 2}, "size": torch.Size([2])}]}
    tree = {"state_dict": weights(), **rest} if inside else weights()
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    same(path, kind, weights())
    file = open_file(path)
    if inside:
        assert file.facts == {"epoch": 3, "pytorch-lightning_version": "1.4.2"}
        assert file.stubs == [f"{__name__}.Callback"]


@pytest.mark.parametrize("suffix, kind", [(".ckpt", ZIP), (".safetensors", SAFETENSORS)])
def test_what_is_saved_is_read_to_the_bit(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"model{suffix}"
    save(path, weights())
    same(path, kind, weights())
    if suffix == ".ckpt":
        loaded = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(loaded[key], value) for key, value in weights().items())
    assert path.stat().st_size < 20_000  # a view is written without the rest of what it views
    with pytest.raises(ValueError, match=".pt"):
        save(tmp_path / "model.pt", weights())


def test_several_safetensors_files_with_an_index(tmp_path: Path) -> None:
    state = {key: value.detach().clone().contiguous() for key, value in weights().items()}
    first = dict(list(state.items())[:5])
    second = {key: value for key, value in state.items() if key not in first}
    save_file(first, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    places = {key: "a.safetensors" if key in first else "b.safetensors" for key in state}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    same(index, SAFETENSORS, state)
    index.write_text(json.dumps({"weight_map": places | {"more": "b.safetensors"}}))
    with pytest.raises(ValueError, match="more"):
        open_file(index)
    index.write_text(json.dumps({"weight_map": {"plain": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="outside"):
        open_file(index)


def test_looking_through_a_file_does_not_read_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"big": torch.zeros(1000, 1000)}, path)
    with zipfile.ZipFile(path) as archive:
        start = next(info for info in archive.infolist() if "/data/0" in info.filename).header_offset
    data = bytearray(path.read_bytes())
    data[start + 2000] ^= 1
    path.write_bytes(data)
    file = open_file(path)  # only when its numbers are read does the damage show
    assert file.tensors["big"].shape == (1000, 1000)
    with pytest.raises(ValueError, match="damaged"):
        file.read("big")


def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.ones(3)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"_rebuild_tensor_v2")] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        open_file(path)


# ---- nothing is run ---------------------------------------------------------------------------------------
class Evil:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def evils(canary: Path) -> dict[str, bytes]:
    """Pickles that each make the canary file when they are loaded plainly."""
    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    tensors = weights()["plain"].tolist()
    return {
        "call": pickle.dumps({"state_dict": {"w": Evil(os.system, command)}}, 2),
        "beside": pickle.dumps({"state_dict": {"w": tensors}, "callbacks": [Evil(os.system, command)]}, 4),
        "eval": pickle.dumps({"w": Evil(eval, code)}, 2),
        "exec": pickle.dumps({"w": Evil(exec, code)}, 4),
        "open": pickle.dumps({"w": Evil(builtins.open, str(canary), "w")}, 4),
        "attribute": pickle.dumps({"w": Evil(getattr(Path(canary), "touch"))}, 4),  # noqa: B009
        "key": pickle.dumps({Evil(os.system, command): 1}, 2),
        "nested": pickle.dumps({"w": Evil(list, Evil(map, os.system, [command]))}, 4),
        "old opcodes": b"(dS'w'\n(S'" + command.encode() + b"'\nios\nsystem\ns.",
        "by hand": b"\x80\x02}q\x00X\x01\x00\x00\x00wcos\nsystem\n(X" + len(command).to_bytes(4, "little")
        + command.encode() + b"tRs.",
    }  # fmt: skip


NAMES = list(evils(Path("x")))


def wrapped(data: bytes, path: Path, kind: str) -> Path:
    """A pickle as a file of weights: the archive of today, the file from before 1.6, or bare."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3")
    elif kind == "legacy":
        start = [LEGACY_MAGIC, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in start) + data + pickle.dumps([], 2))
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_nothing_in_a_file_is_run(tmp_path: Path, name: str, kind: str) -> None:
    canary = tmp_path / "canary"
    path = wrapped(evils(canary)[name], tmp_path / "model.ckpt", kind)
    with pytest.raises(ValueError):  # there are no tensors in it
        open_file(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_pickles_do_run_when_they_are_loaded_plainly(tmp_path: Path, name: str) -> None:
    """The twin: each of them makes its canary when Python itself loads it."""
    canary = tmp_path / "canary"
    try:
        pickle.loads(evils(canary)[name])
    except (AttributeError, TypeError):
        assert name in ("attribute",)
    assert canary.exists()


def test_weights_are_read_and_the_rest_is_named(tmp_path: Path) -> None:
    """A checkpoint with true weights and a command beside them: the weights come, the command is a name."""
    canary, path = tmp_path / "canary", tmp_path / "model.ckpt"
    torch.save({"state_dict": weights(), "hook": Evil(os.system, f"touch {canary}"), "callback": Callback()}, path)
    file = open_file(path)
    assert torch.equal(file.read("plain"), weights()["plain"])
    assert file.stubs == ["posix.system", f"{__name__}.Callback"] and not canary.exists()
    torch.load(path, weights_only=False)  # the twin: plainly loaded, it is made
    assert canary.exists()


def test_a_stub_keeps_nothing_and_calls_nothing(tmp_path: Path) -> None:
    """Everything that a pickle can do to an object, done to one that is not built."""
    program = (
        b"\x80\x02}X\x01\x00\x00\x00w"
        b"csome.module\nThing\n)\x81"  # Thing.__new__
        b"}X\x01\x00\x00\x00aK\x01sb"  # its state
        b"K\x01a"  # append
        b"(K\x01K\x02e"  # extend
        b"X\x01\x00\x00\x00kK\x01s"  # set item
        b"s."
    )
    path = wrapped(program, tmp_path / "model.ckpt", "zip")
    with pytest.raises(ValueError, match="no tensors"):
        open_file(path)


def test_the_tree_loads_no_pickle_in_any_other_way() -> None:
    words = [r"weights_only\s*=\s*False", r"pickle\.loads?\(", "joblib", "dill", "cloudpickle", "read_pickle",
             "allow_pickle=True"]  # fmt: skip
    forbidden = re.compile("|".join(words))
    sources = [*ROOT.glob("ldm/**/*.py"), *ROOT.glob("pipelines/**/*.py")]
    assert len(sources) > 30
    assert [path for path in sources if forbidden.search(path.read_text())] == []
    assert forbidden.search("torch.load(path, weights_only = False)") and forbidden.search("pickle.load(file)")


# ---- damaged and strange ----------------------------------------------------------------------------------
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.97])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"w": torch.ones(100, 100)}}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError):
        open_file(path).read("w")


def test_a_cut_off_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, weights())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not whole"):
        open_file(path)


NUMBERS = object()


def tensor_pickle(shape: tuple, stride: tuple, offset: int, size: int = 4) -> bytes:
    """A pickle with one tensor of float32, of any shape."""

    class Unchecked(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", size) if value is NUMBERS else None

    file = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    Unchecked(file, 2).dump({"w": Evil(rebuild, NUMBERS, offset, shape, stride, False, OrderedDict())})
    return file.getvalue()


@pytest.mark.parametrize("shape, stride, offset", [
    ((5,), (1,), 0), ((2, 2), (4, 1), 0), ((2,), (1,), 3), ((2,), (1,), -1), ((2,), (-1,), 1), ((-1,), (1,), 0),
    ((2, 2), (1,), 0), ((2**62, 2**62), (1, 1), 0), ((2**40,), (0,), 0),
])  # fmt: skip
def test_a_tensor_outside_its_numbers_is_refused(tmp_path: Path, shape: tuple, stride: tuple, offset: int) -> None:
    path = wrapped(tensor_pickle(shape, stride, offset), tmp_path / "model.ckpt", "zip")
    with pytest.raises(ValueError):
        open_file(path)


def test_a_tensor_within_its_numbers_is_read(tmp_path: Path) -> None:
    """The twin of the test above, of the same making."""
    path = wrapped(tensor_pickle((2, 2), (2, 1), 0), tmp_path / "model.ckpt", "zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", torch.arange(4, dtype=torch.float32).numpy().tobytes())
    assert open_file(path).read("w").tolist() == [[0, 1], [2, 3]]


def test_numbers_that_are_not_there_are_named(tmp_path: Path) -> None:
    file = open_file(wrapped(tensor_pickle((4,), (1,), 0), tmp_path / "model.ckpt", "zip"))
    with pytest.raises(ValueError, match="archive/data/0, 16 bytes"):
        file.read("w")


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with pytest.raises(FileNotFoundError, match="no file"):
        open_file(path)
    path.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="<html>"):
        open_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(ValueError, match="0 data.pkl"):
        open_file(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(ValueError, match="list"):
        open_file(path)
