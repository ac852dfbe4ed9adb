"""Reads a file of conf/ into its dataclass without Hydra, for tests of the networks alone."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).resolve().parents[3] / "conf"


def read(kind: type, section: str, name: str) -> Any:
    """conf/<section>/<name>.yaml as a dataclass; a key too many or too few raises."""
    return build(kind, yaml.safe_load((CONF / section / f"{name}.yaml").read_text(encoding="utf-8")))


def build(kind: Any, value: Any) -> Any:
    """Plain containers as nested dataclasses."""
    if isinstance(kind, types.UnionType):
        kind = next(arm for arm in typing.get_args(kind) if arm is not type(None))
        return None if value is None else build(kind, value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{key: build(hints[key], item) for key, item in value.items()})
    if typing.get_origin(kind) is dict:
        return {key: build(typing.get_args(kind)[1], item) for key, item in value.items()}
    return value
