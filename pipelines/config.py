"""The configuration: composed by Hydra from conf/, checked against dataclasses, plain and frozen afterwards.

`compose(overrides)` is the one way in. Unknown, missing and mistyped keys raise ConfigError with their full paths, all
at once; below this file nobody sees OmegaConf.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

from ldm.config import (
    AutoencoderSettings,
    AutoencoderTrainingConfig,
    DiffusionConfig,
    EvaluationConfig,
    GenerationConfig,
    TextEncoderConfig,
    TrainingConfig,
    UNetConfig,
)
from pipelines.settings import (
    ClusterConfig,
    DownloadConfig,
    FilterImagesConfig,
    FilterMetadataConfig,
    PathsConfig,
    PrecomputeLatentsConfig,
    SampleWebConfig,
    SelectionConfig,
    SourceConfig,
    TrackingConfig,
)

CONF = Path(__file__).resolve().parent.parent / "conf"


class ConfigError(ValueError):
    """The configuration does not fit; the message says where and how to mend it."""


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One section for each data stage, named like the stage."""

    source: SourceConfig
    sample_web: SampleWebConfig | None  # the embedded web that serves the pictures; null for the real one
    connect: str | None  # how: address:port that stands in for every host of the data set; null asks the name service
    filter_metadata: FilterMetadataConfig
    download: DownloadConfig
    filter_images: FilterImagesConfig
    precompute_latents: PrecomputeLatentsConfig
    selection: SelectionConfig
    mixture: dict[str, float]  # runs whose latents are trained on too -> how often, where this run's own have weight 1


@dataclasses.dataclass(frozen=True)
class StageChoice:
    name: str


@dataclasses.dataclass(frozen=True)
class Config:
    name: str  # name of the run: its results lie in outputs/<name>
    overwrite: bool  # make again what was made from other settings, deleting it first
    dataset: DatasetConfig
    autoencoder: AutoencoderSettings
    text_encoder: TextEncoderConfig | None
    unet: UNetConfig
    diffusion: DiffusionConfig
    training: TrainingConfig
    autoencoder_training: AutoencoderTrainingConfig
    generation: GenerationConfig
    evaluation: EvaluationConfig
    cluster: ClusterConfig
    paths: PathsConfig
    tracking: TrackingConfig
    stage: StageChoice | None = None  # +stage=NAME runs that stage alone


def options(group: str) -> list[str]:
    """Names that may follow `group=`, from the files in conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def read_option(group: str, name: str) -> Any:
    """One file of conf/ as the dataclass of its section, without composing a whole configuration."""
    from omegaconf import OmegaConf

    value = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    return build(_without_none(typing.get_type_hints(Config)[group]), value)


def compose(overrides: list[str]) -> Config:
    """The configuration for a list of Hydra overrides. Raises ConfigError naming everything that does not fit."""
    return build(Config, compose_plain(overrides))


def compose_plain(overrides: list[str]) -> dict[str, Any]:
    """The composed configuration as plain containers, not yet checked against the dataclasses."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    check_overrides(overrides)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose("config", [_into_mappings(override) for override in overrides])
        return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _into_mappings(override: str) -> str:
    """The same override, free to add keys: Hydra refuses new keys even in mappings such as paths.reuse, and which keys
    exist elsewhere check_overrides knows better."""
    key = override.partition("=")[0]
    return override if key.startswith(("+", "~")) or (CONF / key).is_dir() else f"++{override}"


def check_overrides(overrides: list[str]) -> None:
    """Names every override whose group option or key does not exist, with the nearest that does."""
    problems = []
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        if not equals and not override.startswith("~"):
            problems.append(f"{override!r} is not an override; write KEY=VALUE, +stage=NAME or +experiment=NAME")
        elif "." not in key and (CONF / key).is_dir():
            if equals and value not in options(key):
                known = options(key)
                problems.append(f"{key}={value}: no such {key}{_nearest(value, known)}; there are: {', '.join(known)}")
        elif unknown := _unknown_key(Config, key.split(".")):
            problems.append(f"{key}: {unknown}")
    if problems:
        raise ConfigError("\n".join(problems))


def _unknown_key(kind: Any, parts: list[str]) -> str:
    """Says what is wrong with a dotted key below a dataclass; empty when it exists or leads into a free mapping."""
    kind = _without_none(kind)
    if not parts or not dataclasses.is_dataclass(kind):
        return ""
    known = typing.get_type_hints(kind)
    if parts[0] not in known:
        return f"unknown key {parts[0]!r}{_nearest(parts[0], list(known))}"
    return _unknown_key(known[parts[0]], parts[1:])


def _nearest(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _without_none(kind: Any) -> Any:
    """X for X | None; any other type as it is."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        rest = [arm for arm in typing.get_args(kind) if arm is not type(None)]
        return rest[0] if len(rest) == 1 else kind
    return kind


def build(kind: type, value: Any) -> Any:
    """A dataclass from plain containers, strictly. Raises ConfigError with every problem, one a line."""
    problems: list[str] = []
    built = _build(kind, value, "", problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return built


def _build(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    inner = _without_none(kind)
    if value is None and inner is not kind:
        return None
    if dataclasses.is_dataclass(inner) and isinstance(value, dict):
        return _build_dataclass(inner, value, path, problems)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _build(arguments[1], item, f"{path}.{key}", problems) for key, item in value.items()}
    if inner is float and type(value) is int:
        return float(value)
    if inner is object or (isinstance(inner, type) and type(value) is inner):
        return value
    problems.append(f"{path}: found {value!r} ({type(value).__name__}), expected {_describe(kind)}")
    return None


def _build_dataclass(kind: Any, value: dict[str, Any], path: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(kind)
    optional = {f.name for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            problems.append(f"{prefix}{key}: unknown key{_nearest(str(key), list(hints))}")
    arguments = {}
    for name, hint in hints.items():
        if name in value and value[name] != "???":
            arguments[name] = _build(hint, value[name], f"{prefix}{name}", problems)
        elif name not in optional:
            problems.append(f"{prefix}{name}: missing, expected {_describe(hint)}")
            arguments[name] = None
    return kind(**arguments)


def _describe(kind: Any) -> str:
    return getattr(kind, "__name__", None) if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def section(config: Any, path: str) -> Any:
    """The part of a configuration at a dotted path."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def plain(value: Any) -> Any:
    """A section as plain containers, for hashing and for JSON."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
