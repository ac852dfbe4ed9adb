"""Every file in conf/ composes and passes the schema; what does not fit is named, all at once and quickly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.config import CONF, ConfigError, build, compose, options
from pipelines.dag import STAGES, Dag, reads

ROOT = CONF.parent
GROUPS = ["dataset", "autoencoder", "text_encoder", "unet", "diffusion", "training", "generation", "evaluation",
          "cluster", "paths", "scores", "tracking"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines.run", *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("group, name", [(group, name) for group in GROUPS for name in options(group)])
def test_every_option_of_every_group_composes(group: str, name: str) -> None:
    compose([f"{group}={name}"])


@pytest.mark.parametrize("name", options("experiment"))
@pytest.mark.parametrize("stage", STAGES)
def test_every_experiment_composes_with_every_stage(name: str, stage: str) -> None:
    config = compose([f"+experiment={name}", f"+stage={stage}"])
    assert config.stage is not None and config.stage.name == stage
    assert Dag(config).wanted() == [stage]


def test_the_stages_have_one_name_everywhere() -> None:
    assert options("stage") == sorted(STAGES)
    for name in STAGES:
        assert yaml.safe_load((CONF / "stage" / f"{name}.yaml").read_text()) == {"name": name}
        assert (ROOT / "pipelines" / "stages" / f"{name}.py").is_file()


def test_no_file_in_conf_names_a_class_to_be_called() -> None:
    assert [path for path in CONF.rglob("*.yaml") if "_target_" in path.read_text()] == []


def test_every_file_says_what_it_is() -> None:
    assert [path for path in CONF.rglob("*.yaml") if not path.read_text().startswith("#")] == []


def test_all_problems_are_named_at_once_with_full_paths() -> None:
    with pytest.raises(ConfigError) as error:
        compose(["unet=nosuch", "training.max_stepz=1", "naem=x"])
    text = str(error.value)
    assert "unet=nosuch" in text and "openmoji" in text
    assert "training.max_stepz" in text and "'max_steps'" in text
    assert "naem" in text and "'name'" in text


@pytest.mark.parametrize("override, words", [
    ("training.max_steps=abc", ["training.max_steps", "'abc'", "int"]),
    ("training.max_steps=null", ["training.max_steps", "None", "int"]),
    ("overwrite=1", ["overwrite", "bool"]),
    ("dataset.precompute_latents.resolution=[1]", ["dataset.precompute_latents.resolution", "[1]", "int"]),
])  # fmt: skip
def test_a_mistyped_value_is_refused_with_found_and_expected(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        compose([override])
    assert all(word in str(error.value) for word in words)


def test_unknown_and_missing_keys_of_a_section_are_refused() -> None:
    from pipelines.settings import PathsConfig

    with pytest.raises(ConfigError) as error:
        build(PathsConfig, {"output": "x"})
    assert "output: unknown key (did you mean 'outputs'?)" in str(error.value)
    assert "outputs: missing" in str(error.value) and "reuse: missing" in str(error.value)


@pytest.mark.parametrize("arguments, word", [
    (["+stage=precompute_latent"], "precompute_latents"),
    (["stage=nonsense"], "filter_metadata"),
    (["training.max_stepz=3"], "max_steps"),
    (["unet=nosuch"], "there are:"),
    (["nonsense"], "KEY=VALUE"),
])  # fmt: skip
def test_a_wrong_word_lists_the_right_ones_quickly_and_without_a_traceback(arguments: list[str], word: str) -> None:
    before = os.times()
    done = command(*arguments)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 25
    # Of processor time: a test machine is allowed to be busy.
    assert seconds < 6


def test_what_enters_the_fingerprint_and_how_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no run has left a plan
    base = Dag(compose([])).fingerprints
    for how in ("cluster.num_cpus=7", "cluster.train.workers=4", "cluster.train.run.zero_stage=2",
                "dataset.connect=127.0.0.1:80", "dataset.download.threads=3", "dataset.download.min_yield=0.01",
                "dataset.download.requests_per_second=9.0", "dataset.download.yield_after=9", "paths.outputs=x",
                "tracking.enabled=false", "name=y", "training.max_steps=1"):
        assert Dag(compose([how])).fingerprints == base, how
    moved = {
        "dataset.filter_metadata.shard_samples=32": "filter_metadata",
        "dataset.download.retries=7": "download",
        "dataset.filter_images.min_size=9": "filter_images",
        "dataset.precompute_latents.batch_size=3": "precompute_latents",
        "dataset.selection.near_duplicate_bits=1": "train",
        "dataset.mixture={photos: 0.5}": "train",
        "autoencoder.scale_factor=2.0": "train",
        "generation.guidance_scale=9.5": "generate",
    }
    for what, first in moved.items():
        config = compose([what])
        changed = {name for name, value in Dag(config).fingerprints.items() if value != base[name]}
        expected = {first}
        for name in STAGES:
            if set(reads(config, name)) & expected:
                expected.add(name)
        assert changed == expected, what


def test_help_lists_stages_and_experiments() -> None:
    text = command("--help").stdout
    assert all(name in text for name in [*STAGES, *options("experiment")])


def test_weights_count_by_content_and_not_by_path(tmp_path: Path) -> None:
    config = compose([])
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((ROOT / config.autoencoder.weights).read_bytes())
    base = Dag(config).fingerprints
    assert Dag(compose([f"autoencoder.weights={copy}"])).fingerprints == base
    copy.write_bytes(copy.read_bytes() + b"x")
    moved = Dag(compose([f"autoencoder.weights={copy}"])).fingerprints
    assert moved["precompute_latents"] != base["precompute_latents"]
