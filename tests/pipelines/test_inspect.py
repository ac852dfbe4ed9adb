"""`python -m pipelines.inspect` on real files: what they are, what fits them, and what they must not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.interop import compvis
from ldm.interop.checkpoint_file import SAFETENSORS, TensorInfo, WeightFile, open_file, save
from ldm.interop.contents import contents
from ldm.interop.diffusers_folder import write_folder
from ldm.models.denoiser import make_denoiser
from ldm.training import checkpoint, saving
from pipelines.checking.weights import describe_contents
from pipelines.config import CONF
from pipelines.inspect import describe, main
from pipelines.manifest import StageFolder
from tests.ldm.interop.small import key_list
from tests.ldm.interop.test_compvis import FIRST_STAGES, RELEASED, SCHEDULE, parts_of
from tests.ldm.interop.test_diffusers_folder import model
from tests.ldm.models.test_denoiser import text
from tests.ldm.models.test_unet import tiny

ROOT = CONF.parent


def listed(name: str, without: set[str] = frozenset()) -> str:
    """What is said of a released model's file, of which only keys and shapes are known here."""
    shapes = {key: shape for key, shape in key_list(name).items() if key not in without}
    tensors = {key: TensorInfo(shape, torch.float32) for key, shape in shapes.items()}
    known = compvis.buffers(SCHEDULE) | {"scale_factor": torch.tensor(0.25)}
    file = WeightFile(Path(f"{name}.ckpt"), SAFETENSORS, tensors, {}, [], known.__getitem__)
    return "\n".join(describe_contents(file, contents(file)))


def said(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    assert main([f"path={path}"]) == 0
    return capsys.readouterr().out


# ---- files --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RELEASED)
def test_the_right_files_of_conf_fit_every_released_model(name: str) -> None:
    lines = listed(name)
    for part, option in zip(("unet", "autoencoder", "text_encoder"), RELEASED[name], strict=True):
        if option is not None:
            fits = [line for line in lines.splitlines() if "fits" in line and f"{part}={option}" in line]
            assert len(fits) == 1 and "no file" not in fits[0], lines
    assert "nothing is known" not in lines and "missing" not in lines


def test_counts_averages_and_what_is_not_needed_of_the_1_45b_model() -> None:
    lines = listed("ldm_txt2img-1p4B")
    assert "  unet: 686 tensors, 872,300,484 parameters\n    averaged (EMA): 686 tensors, 872,300,484 param" in lines
    assert "text_encoder: 420 tensors, 542,895,360 parameters\n    fits text_encoder=bert_1p45b" in lines
    assert "autoencoder=kl_f8 or autoencoder=sdxl_f8 (of one shape" in lines
    assert "not needed: 2 tensors (a layer that is never run, and has no gradient)" in lines
    assert "schedule: sqrt_linear, 1000 timesteps, betas from 0.0015 to 0.0155" in lines


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stages(name: str) -> None:
    assert f"autoencoder={name.replace('-', '_')}" in listed(f"first_stage_{name}")


def test_a_file_that_lacks_tensors_is_nearest_to_what_it_was() -> None:
    gone = "model.diffusion_model.out.2.bias"
    assert "nearest is unet=txt2img_1p45b: out.2.bias is missing" in listed("ldm_txt2img-1p4B", {gone})


class Callback:
    """What a training framework leaves in a checkpoint; unpickling it plainly would run a command."""

    canary = Path()

    def __reduce__(self) -> tuple:
        return Path.touch, (self.canary,)


def test_a_checkpoint_of_the_original_with_more_than_tensors(tmp_path: Path, capsys) -> None:
    Callback.canary = tmp_path / "executed"
    parts = parts_of("text")
    state = compvis.write(parts, schedule=SCHEDULE, scale_factor=0.25, averages=parts["unet"], updates=7)
    tree = {"epoch": 3, "global_step": 390000, "callbacks": {"last": Callback()}, "state_dict": state}
    torch.save(tree, tmp_path / "model.ckpt")
    out = said(capsys, tmp_path / "model.ckpt")
    assert not Callback.canary.exists()
    for words in ("torch zip archive, layout of the original project", "epoch: 3", "global_step: 390000",
                  "averaged (EMA): ", "scale_factor: 0.25", "were not built: ", "pathlib", "fits no file of conf/unet",
                  "not needed: 12 tensors (schedule"):  # fmt: skip
        assert words in out, words
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert Callback.canary.exists()  # the twin: read plainly, it does run


def test_shipped_weights(capsys) -> None:
    out = said(capsys, ROOT / "ldm/weights/openmoji_kl_f8.safetensors")
    assert "20 float32" in out and "1,954,120 parameters" in out and "fits autoencoder=openmoji_kl_f8" in out


def test_a_denoiser_of_ours_and_its_parts_alone(tmp_path: Path) -> None:
    denoiser = make_denoiser(tiny(), text())
    for name, network in (("whole", denoiser), ("unet", denoiser.unet), ("text_encoder", denoiser.text_encoder)):
        path = tmp_path / f"{name}.safetensors"
        save(path, network.state_dict())
        lines = "\n".join(describe(path))
        found = {part for part in ("unet", "text_encoder") if f"  {part}: " in lines}
        assert found == ({"unet", "text_encoder"} if name == "whole" else {name})
        assert "our layout" in lines and "nothing is known" not in lines


def test_tensors_of_which_nothing_is_known_are_named(tmp_path: Path) -> None:
    save(tmp_path / "lora.safetensors", {"unet:0:up": torch.ones(3)})
    lines = "\n".join(describe(tmp_path / "lora.safetensors"))
    assert "not known here" in lines and "nothing is known: 1: unet:0:up" in lines


# ---- folders ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "sdxl", "unconditional"])
def test_a_folder_of_diffusers_and_one_network_of_it(kind: str, tmp_path: Path, capsys) -> None:
    ours, folder = model(kind, tmp_path), tmp_path / "model"
    write_folder(folder, ours)
    out = said(capsys, folder)
    assert f"folder of diffusers, {ours.pipeline}" in out and "scale_factor: 0.5" in out
    assert {line.split(":")[0].strip() for line in out.splitlines() if "parameters" in line} == set(ours.parts)
    count = sum(value.numel() for value in ours.parts["unet"].values())
    for path in (folder / "unet", folder / "unet/diffusion_pytorch_model.safetensors"):
        out = said(capsys, path)
        assert "unet: UNet2D" in out and f"{count:,} parameters" in out
    names = {"bert": "bert", "sdxl": "text_encoder_2"}
    if kind in names:
        assert "  text_encoder: " in said(capsys, folder / names[kind])
    (folder / "unet/config.json").unlink()
    assert "config.json is not beside it" in said(capsys, folder / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("config, words", [
    ('{"_class_name": "UNet2DModel"}', "config.json has no 'block_out_channels'"),
    ('{"_class_name": "Transformer2DModel"}', "describes a Transformer2DModel; known are UNet2DModel"),
])  # fmt: skip
def test_a_network_that_is_not_ours(config: str, words: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(config)
    assert main([f"path={tmp_path}"]) == 2
    assert words in capsys.readouterr().err


def test_a_checkpoint_of_ours(tmp_path: Path, capsys) -> None:
    state = make_denoiser(tiny(), text()).state_dict()
    stretches = [checkpoint.Stretch(name, 0, {"weight": x.flatten()}) for name, x in state.items()]
    path = saving.save(tmp_path, 7, stretches=stretches, ema=state, config={}, facts={"samples_seen": 56})
    out = said(capsys, path)
    count = sum(value.numel() for key, value in state.items() if key.startswith("unet."))
    assert "checkpoint, whole" in out and "samples_seen 56, step 7" in out
    assert out.count(f"{count:,} parameters") == 2  # trained, averaged
    ema = path / "ema.safetensors"
    ema.write_bytes(ema.read_bytes()[:-1] + b"x")
    assert main([f"path={path}"]) == 2
    assert "ema.safetensors does not have the sha256" in capsys.readouterr().err


def test_folders_of_stages_and_of_a_run(tmp_path: Path, capsys) -> None:
    folder = StageFolder(tmp_path / "run" / "download", "download")
    folder.write_plan({"stage": "download", "fingerprint": "f" * 64})
    records = []
    for shard in range(2):
        with folder.attempt(shard, "f" * 64) as attempt:
            (attempt.path / f"{shard:06d}.tar").write_bytes(b"x" * 100)
            records.append(attempt.commit(rows=5, samples=3, dropped={"http_404": 2}, inputs={}))
    out = said(capsys, folder.path)
    assert "stage download, fingerprint ffffffff" in out and "not finished; shards committed: 2" in out
    assert "10 samples came in, 6 went out; 200 bytes" in out and "dropped, http_404: 4" in out
    folder.close("f" * 64, records, {})
    (folder.path / "000001.tar").write_bytes(b"x")
    out = said(capsys, folder.path)
    assert "closed, 2 shards" in out and "missing or of another size: 000001.tar" in out
    assert "download: closed, 2 shards" in said(capsys, tmp_path / "run")


# ---- what is refused ----------------------------------------------------------------------------------------------
def test_what_is_refused_and_how(tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "notes.txt").write_text("x")
    for argument, words in {
        "path=nowhere": "there is nothing at nowhere",
        f"path={tmp_path / 'broken.ckpt'}": "not of torch",
        f"path={tmp_path / 'text.safetensors'}": "neither safetensors nor",
        f"path={tmp_path / 'notes.txt'}": "nothing that is known here",
        f"path={tmp_path}": "broken.ckpt, notes.txt",
        "pth=x": "it takes path=PATH and was given pth=x",
    }.items():
        assert main([argument]) == 2
        assert words in capsys.readouterr().err


def test_the_command_says_so_without_a_traceback_and_without_torch() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "pipelines.inspect", "path=nowhere"],
                          capture_output=True, text=True, cwd=ROOT)  # fmt: skip
    assert done.returncode == 2 and "there is nothing at nowhere" in done.stderr
    assert "Traceback" not in done.stderr and " torch\n" not in done.stderr


def test_meta_tensors_have_shapes_only(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", {"a": torch.ones(2, 3)})
    tensor = open_file(tmp_path / "x.safetensors").on_meta().read("a")
    assert tensor.is_meta and tensor.shape == (2, 3)
