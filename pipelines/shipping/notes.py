"""outputs/<name>/tracking.json: by which MLflow runs a run is told, at every place that its journals were sent to."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from pipelines.manifest import FORMAT, check_format, read_json, write_json

NAME = "tracking.json"
SQLITE = "sqlite:///"


class Notes:
    """The notes of the place that is sent to now; those of other places lie beside them until it is their turn.

    `token` never changes: by it runs are found again whose ids were not noted, or that are reached by another address.
    """

    def __init__(self, output: Path, uri: str) -> None:
        self._path, place = output / NAME, place_of(uri, output)
        known = check_format(read_json(self._path), self._path) if self._path.exists() else {}
        there = known.get("uri", place)
        if there.startswith(f"{SQLITE}/"):  # as a whole path, from before they were noted from the folder of the runs
            there = place_of(there, output)
        elsewhere = known.get("elsewhere", {})
        if there != place:
            elsewhere[there] = {"runs": known["runs"], "rewinds": known.get("rewinds", {})}
            known |= {"runs": {}, "rewinds": {}, **elsewhere.pop(place, {})}
        self.token: str = known.get("token", uuid.uuid4().hex)
        self.runs: dict[str, str] = known.get("runs", {})  # stage -> id
        # Stage -> each time that training went back: to which step, when, and the run that was left for it.
        self.rewinds: dict[str, list[dict[str, Any]]] = known.get("rewinds", {})
        self._elsewhere, self._place = elsewhere, place
        self.write()  # before anything is made there: by the token it is found again

    def write(self) -> None:
        here = {"uri": self._place, "runs": self.runs, "rewinds": self.rewinds}
        write_json(self._path, {"format": FORMAT, "token": self.token, **here, "elsewhere": self._elsewhere})

    def token_of(self, stage: str) -> str:
        """What the run of a stage's newest way carries."""
        ways = len(self.rewinds_of(stage))
        return f"{self.token}/{stage}" + (f"/{ways}" if ways else "")

    def rewinds_of(self, stage: str) -> list[dict[str, Any]]:
        return self.rewinds.get(stage, [])


def place_of(uri: str, output: Path) -> str:
    """An address; of a database its path from the folder of the runs, so that both may be moved together."""
    if not uri.startswith(SQLITE):
        return uri
    path = Path(uri.removeprefix(SQLITE)).resolve()
    return SQLITE + os.path.relpath(path, output.parent.resolve())
