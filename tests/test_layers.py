"""The shape of the tree: one tool, one file; arrows point down; nothing of the working place is committed."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("pipelines/**/*.py"), *ROOT.glob("ldm/**/*.py")])

# Tool -> the only files that may import it. To replace a tool, replace its file.
TOOLS = {
    "hydra": {"pipelines/config.py"},
    "omegaconf": {"pipelines/config.py"},
    "ray": {"pipelines/cluster.py"},
    "mlflow": {"pipelines/shipping/server.py", "pipelines/shipping/stage_run.py"},
    "img2dataset": {"pipelines/stages/download.py"},
    "deepspeed": {"ldm/training/engine.py"},
    "open_clip": {"ldm/models/clip.py"},
    "webdataset": {"ldm/shards.py"},
    "duckdb": {"pipelines/spilling.py"},
    "fsspec": {"ldm/storage.py"},
    "upath": {"ldm/storage.py"},
    "botocore": {"ldm/storage.py"},
}

# A module may import the packages of its own row and of those below it.
LAYERS = [
    ["pipelines"],
    ["ldm.training", "ldm.evaluation", "ldm.generate", "ldm.interop"],
    ["ldm.models", "ldm.diffusion", "ldm.images", "ldm.shards"],
    ["ldm.config", "ldm.crash", "ldm.aside", "ldm.storage", "ldm.node_cache"],
]


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when the file is loaded) of every import in a file."""
    inner = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
             for node in ast.walk(function)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            yield name, id(node) not in inner


def layer(module: str) -> int | None:
    return next((i for i, row in enumerate(LAYERS) for name in row if f"{module}.".startswith(f"{name}.")), None)


def wrong_tools(path: str, source: str) -> list[str]:
    found = {name.partition(".")[0] for name, _ in imports(ast.parse(source))}
    return [tool for tool, files in TOOLS.items() if tool in found and path not in files]


def wrong_arrows(path: str, source: str) -> list[str]:
    here = layer(path.removesuffix(".py").replace("/", "."))
    return [name for name, _ in imports(ast.parse(source))
            if here is not None and (there := layer(name)) is not None and there < here]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_tool_one_file_and_arrows_point_down(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert wrong_tools(name, path.read_text()) == []
    assert wrong_arrows(name, path.read_text()) == []


def test_the_checks_see_what_they_forbid() -> None:
    assert wrong_tools("ldm/models/unet.py", "def f():\n    import ray.train") == ["ray"]
    assert wrong_tools("pipelines/cluster.py", "import ray") == []
    assert wrong_arrows("ldm/models/unet.py", "from ldm.training.train import train")
    assert wrong_arrows("ldm/training/train.py", "import pipelines.run")
    assert not wrong_arrows("pipelines/run.py", "from ldm.shards import ShardInfo")


def test_the_library_needs_no_orchestration_and_stages_do_not_import_each_others_work() -> None:
    heavy = {"deepspeed", "open_clip", "webdataset"}
    for path in ROOT.glob("ldm/**/*.py"):
        at_load = {name.partition(".")[0] for name, loaded in imports(ast.parse(path.read_text())) if loaded}
        assert not at_load & heavy, f"{path} imports {at_load & heavy} before it is used"


def test_nothing_committed_names_the_place_where_it_was_made() -> None:
    listing = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True)
    files = listing.stdout.split("\n")
    words = ["/" + "work/", "/" + "root/", "BEGIN" + " OPENSSH"]
    for name in filter(None, files):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", "") and path.is_file():
            text = path.read_text(errors="ignore")
            assert not [word for word in words if word in text], name


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`((?:pipelines|ldm|conf|infra|tests)/[\w./]*)`", text))
    tree = text[text.index("## The tree") : text.index("## Develop")]
    assert len(named) > 30 and {path for path in named if not (ROOT / path).exists()} == set()
    modules = {path.name for path in SOURCES}
    assert {name for name in re.findall(r"\b[a-z_]+\.py\b", tree)} <= modules
