"""Says what a file or folder is.

    python -m pipelines.inspect path=PATH

PATH may be a file of weights (.ckpt, .safetensors, .pt, .pth, .bin, .safetensors.index.json), a folder of diffusers or
one network of it, a checkpoint (step-00001000), a stage's folder, a shard of latents, or a run's; the last three also
as s3://bucket/prefix. Of weights it tells the parts, how many parameters they and their averages have, which file of
conf/ fits them, and what else there is; of latents it tells statistics and draws samples beside their captions. Nothing
is executed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ldm.storage import check, exists, is_remote, place
from pipelines.bucket import folder_at, homes_below
from pipelines.checking import latent_sheet, weights
from pipelines.manifest import Record, StageFolder, sum_funnel

PLAN = "plan.json"
MENDABLE = 2  # exit code of everything that the caller can mend


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0 recognised, 2 not, or not whole."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        print("\n".join(describe(asked_path(arguments))))
    except (OSError, ValueError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return MENDABLE
    return 0


def asked_path(arguments: list[str]) -> Any:
    """The path of `path=PATH`."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if set(given) != {"path"} or not given["path"]:
        raise ValueError(f"it takes path=PATH and was given {' '.join(arguments) or 'nothing'}")
    path = place(given["path"])
    check(path, "path")
    return path


def describe(path: Any) -> list[str]:
    """What is at a path, in lines."""
    if not is_remote(path) and not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    for recognised, lines_of in RESULTS if is_remote(path) else WEIGHTS + RESULTS:
        if recognised(path):
            return lines_of(path)
    if is_remote(path):
        raise ValueError(f"{path} is no run, no stage and no shard of latents: no {PLAN} in it, below it or above it")
    inside = ", ".join(sorted(child.name for child in path.iterdir())[:8]) if path.is_dir() else "no folder"
    raise ValueError(
        f"{path} is nothing that is known here: no file of weights, no folder with model_index.json, config.json, "
        f"manifest.json, plan.json or stages in it ({inside or 'it is empty'})"
    )


# ---- results of stages --------------------------------------------------------------------------------------------
def is_stage(path: Any) -> bool:
    return exists(path / PLAN)


def holds_stages(path: Any) -> bool:
    """A run's folder, or that of a stage that keeps one folder for each fingerprint."""
    return bool(homes_below(path, (PLAN,)))


def describe_stage(path: Any) -> list[str]:
    """Whose results they are, how far they got, and how many samples came through."""
    folder = folder_at(path, path.name)
    plan = folder.read_plan()
    shards, whole = folder.committed(), folder.record()
    lines = [f"{path}: results of stage {plan['stage']}, fingerprint {plan['fingerprint'][:8]}"]
    if whole is not None:
        lines.append("  finished")
    elif folder.manifest() is not None:
        lines.append(f"  closed, {len(shards)} shards")
    else:
        lines.append(f"  not finished; shards committed: {len(shards)}")
    records = list(shards.values()) if whole is None else [whole]
    lines += _funnel_lines(folder, records) if records else []
    if is_remote(path):
        return lines
    checkpoints = sorted(child.name for child in path.glob("step-*") if (child / "COMMITTED").is_file())
    return lines + ([f"  checkpoints: {', '.join(checkpoints)}"] if checkpoints else [])


def _funnel_lines(folder: StageFolder, records: list[Record]) -> list[str]:
    funnel = sum_funnel(records)
    size = sum(record.bytes for record in records)
    lines = [f"  {funnel['rows']:,} samples came in, {funnel['samples']:,} went out; {size:,} bytes"]
    lines += [f"    dropped, {reason}: {count:,}" for reason, count in funnel["dropped"].items()]
    wrong = [name for names in folder.missing_files(records).values() for name in names]
    return lines + ([f"  missing or of another size: {', '.join(wrong)}"] if wrong else [])


def describe_latents(path: Any) -> list[str]:
    """A cache of latents, or one shard of it: besides what every stage has, statistics and a sheet of pictures."""
    head = describe_stage(path) if is_stage(path) else [f"{path}: a shard of latents"]
    return [*head, *latent_sheet.describe(path)]


def describe_run(path: Any) -> list[str]:
    """The stages in a folder, a line each; each can be asked after by itself."""
    lines, homes = [f"{path}: results of"], homes_below(path, (PLAN,))
    inside = {home: home if home.parent == path else home.parent for home in homes}
    for child in dict.fromkeys(inside.values()):
        count = sum(each == child for each in inside.values())
        said = describe_stage(child)[1].strip() if child in homes else f"{count} results"
        lines.append(f"  {child.name}: {said}")
    return lines


# What a path may be, in the order of asking: whether it is that, and what there is to say of it. Another kind of file
# is another row.
Kind = tuple[Callable[[Any], bool], Callable[[Any], list[str]]]
WEIGHTS: list[Kind] = [
    (weights.is_checkpoint, weights.describe_checkpoint),
    (weights.is_pipeline, weights.describe_pipeline),
    (weights.is_network, weights.describe_network),
    (weights.is_file, weights.describe_file),
]
RESULTS: list[Kind] = [
    (latent_sheet.is_latents, describe_latents),
    (is_stage, describe_stage),
    (holds_stages, describe_run),
]


if __name__ == "__main__":
    sys.exit(main())
