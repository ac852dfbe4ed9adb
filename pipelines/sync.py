"""Sends what a run said while MLflow was away (or tracking=journal) to MLflow, every point once.

    python -m pipelines.sync                                        the default run, to where it is tracked
    python -m pipelines.sync name=mine tracking.uri=http://host     a run, from its beginning, to another place

It may run at any time, as often as you like; beside a run that sends for itself it is refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.config import ConfigError, compose
from pipelines.lock import LockedError
from pipelines.shipping.shipper import AwayError


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0 all is sent, 1 MLflow is away, 2 the request does not fit."""
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return 0
    try:
        config = compose(overrides)
        output = Path(config.paths.outputs).absolute() / config.name
        if not (output / "journal").is_dir():
            raise ConfigError(f"{output} has no journal; name=NAME and paths.outputs=FOLDER say which run is meant")
        from pipelines.tracking import database_uri, sync

        sent = sync(config.tracking, output)
        print(f"{sent} bytes of {output / 'journal'} sent to {database_uri(config.tracking, output)}")
    except (ConfigError, LockedError) as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    except AwayError as error:
        print(f"\nMLflow cannot be reached: {error}\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
