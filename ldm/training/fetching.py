"""Going on from a copy: the newest checkpoint of this disk, or of the place where copies lie, whichever is newer.

Every process fetches its share of the files. A copy that is not whole is refused by name and set aside, one of other
settings refused before it is fetched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm import storage
from ldm.storage import is_remote
from ldm.training import checkpoint, copies, sealing
from ldm.training.checkpoint import Checkpoint, NotWhole, Tell
from ldm.training.together import by_first, each, rank, world_size

log = logging.getLogger(__name__)


def newest(
    home: Path,
    place: Any | None,
    tell: Tell | None = None,
    allowed: Callable[[Checkpoint], object] = lambda found: None,
) -> Checkpoint | None:
    """The newest checkpoint that verifies, of this disk or fetched from the place; all processes call it.

    `allowed` raises where a training may not go on from one: before anything of a copy is fetched but what it says of
    itself. A place that does not answer stops nobody who has a checkpoint here. Raises ValueError where the copies are
    another training's.
    """
    here, lost = None, None
    try:
        here = checkpoint.newest(home, finish=True, tell=tell)
    except NotWhole as error:
        lost = error
    if here is not None:
        allowed(here)
    if place is not None:
        offered = _offered(place, here, tell)
        newer = [name for name in offered if here is None or checkpoint.step_of(name) > here.step]
        for name in sorted(newer, reverse=True):
            account = by_first(lambda name=name: _account(place / name, offered[name]))
            if account is not None:
                allowed(Checkpoint(place / name, *account))
            if _fetch(home, place / name, offered[name], tell):
                by_first(lambda name=name: _take(home, name, offered[name], lost, tell))
                return by_first(lambda name=name: checkpoint.opened(home / name))
        if here is None and lost is None and newer:
            raise NotWhole(f"none of the copies in {place} is whole, and there is no checkpoint in {home}; remove them "
                           f"to train from step 0")  # fmt: skip
    if lost is not None:
        raise lost
    return here


def _offered(place: Any, here: Checkpoint | None, tell: Tell | None) -> dict[str, bytes]:
    """What COMMITTED of every copy says."""
    try:
        return by_first(lambda: _own(place, here))
    except OSError as error:
        if here is None:
            raise
        if rank() == 0 and tell is not None:
            tell("copies/trouble", f"{place} does not say what it holds; training goes on from {here.path}: {error}")
        return {}


def _own(place: Any, here: Checkpoint | None) -> dict[str, bytes]:
    """The copies, none of which may be another training's than the checkpoint that is here."""
    offered, own = copies.committed(place), here and here.manifest.get("run")
    accounts = {name: _account(place / name, sha256) for name, sha256 in offered.items()} if own else {}
    others = [name for name, account in accounts.items() if account and account[0].get("run", own) != own]
    if others:
        raise ValueError(
            f"{place} holds copies of another training than the one in {here and here.path.parent}: "
            f"{', '.join(sorted(others))}. One of the two needs another name=NAME, or another "
            f"cluster.train.run.copy_to; or move these copies away"
        )
    return offered


def _account(source: Any, sha256: bytes) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What a copy says of itself: manifest and config.json; None where they are not those that were committed."""
    try:
        manifest, config = storage.read(source / "manifest.json"), storage.read(source / "config.json")
    except FileNotFoundError:
        return None
    if hashlib.sha256(manifest).hexdigest().encode() != sha256:
        return None
    known = json.loads(manifest)
    whole = hashlib.sha256(config).hexdigest() == known["files"]["config.json"]["sha256"]
    return (known, json.loads(config)) if whole else None


def _fetch(home: Path, source: Any, sha256: bytes, tell: Tell | None) -> bool:
    """Brings the files of a copy to this disk, each process its share; says why not where it is not whole."""
    folder = _fetched(home, source.name)
    by_first(lambda: _begin_anew(folder))
    found = [problem for share in each(lambda: _fetch_share(source, sha256, folder)) for problem in share]
    if found:
        by_first(lambda: _refuse(source, sha256, sorted(set(found)), tell))
        by_first(lambda: shutil.rmtree(folder))
    return not found


def _refuse(source: Any, sha256: bytes, found: list[str], tell: Tell | None) -> None:
    """What lies there counts for nothing any more: neither among the copies that stay nor at the next start."""
    message = f"{source} is not taken: {'; '.join(found)}"
    log.warning("%s", message)
    if tell is not None:
        tell(f"refused/copy-of-{source.name}", message)
    copies.set_aside(source, sha256)


def _begin_anew(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _fetch_share(source: Any, sha256: bytes, folder: Path) -> list[str]:
    """This process's files of a copy; returns what is wrong with them."""
    try:
        manifest = storage.read(source / "manifest.json")
    except FileNotFoundError:
        return ["manifest.json is missing"]
    if hashlib.sha256(manifest).hexdigest().encode() != sha256:
        return ["manifest.json does not have the sha256 that COMMITTED names"]
    if rank() == 0:
        copies.put_whole(folder / "manifest.json", manifest)
    found = []
    for name, known in sorted(json.loads(manifest)["files"].items())[rank() :: world_size()]:
        try:
            _get(source / name, folder / Path(name).name)
        except FileNotFoundError:
            found.append(f"{name} is missing")
        else:
            if sealing.seal(folder / name) != known:
                found.append(f"{name} does not have the sha256 of its manifest")
    return found


def _take(home: Path, name: str, sha256: bytes, lost: NotWhole | None, tell: Tell | None) -> None:
    """What was fetched becomes a checkpoint of this disk, in place of those that are not whole."""
    if lost is not None:
        checkpoint.refuse(home, lost.refused, tell)
    sealing.adopt(_fetched(home, name), home / name, sha256.decode())
    log.info("%s was fetched", home / name)


def _fetched(home: Path, name: str) -> Path:
    return home / f"{name}.tmp-fetched"


def _get(source: Any, target: Path) -> None:
    if is_remote(source):
        storage.get_file(source, target)
    else:
        shutil.copyfile(source, target)
