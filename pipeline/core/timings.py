"""How long each stage took when it last had work to do here: kept beside the store, and part of no result."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pydantic import BaseModel


class RunRecord(BaseModel):
    """One run of a stage that ended well."""

    seconds: float
    said: str
    """Its last line."""


def record_run(directory: Path, name: str, record: RunRecord) -> None:
    """Keep the record of a run, in the place of the one before, if it can be: the run itself has ended well."""
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.json").write_text(
            record.model_dump_json() + "\n", encoding="utf-8"
        )  # half a record counts as none


def read_records(directory: Path) -> dict[str, RunRecord]:
    """Return the records that there are, by name; a damaged one counts as none."""
    found = {}
    for path in sorted(directory.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):  # pydantic's errors are ValueErrors
            found[path.stem] = RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    return found
