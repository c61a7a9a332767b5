"""Finished runs of an experiment as small files, so that it can go on on any machine, after any interruption."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from pipeline.core.errors import DataError
from pipeline.core.files import write_atomically
from pipeline.core.text import one_line
from pipeline.evaluate.compare import Comparison
from pipeline.experiment.results import Cost


def _packed(values: NDArray[np.float16]) -> str:
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


def _unpacked(text: Any) -> Any:
    return np.frombuffer(base64.b64decode(text), "<f2") if isinstance(text, str) else text


Packed = Annotated[NDArray[np.float16], BeforeValidator(_unpacked), PlainSerializer(_packed)]
"""An array as float16, in a file the base64 of its little-endian bytes."""


class RunRecord(BaseModel):
    """One finished run: how it was made, and what was measured."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    student: str
    method: str
    seed: int
    wanted: str
    """Fingerprint of `reads` and the seed."""
    reads: dict[str, Any]
    """What was asked for: parameters, and digests of the prepared splits and of the teacher."""
    code: str
    """Digest of the code that made it."""
    processor: str
    seconds: float
    """Of training and evaluation, beside other runs."""
    validation: float | None
    accuracy: float
    test_accuracy_best_epoch: float | None = None
    """The highest after any epoch, chosen on test itself; None of runs that were not asked for it."""
    agreement: float
    divergence: float
    calibration_error: float
    distance: float | None
    robust_accuracy: float
    plane_agreement: float
    magnitude: Packed
    """(M,) magnitude similarity per image that was compared, NaN where left out."""
    angle: Packed
    """(M,) angle similarity."""
    cost: Cost | None
    """Of the sample dataset that it used; None for methods that read no samples."""

    @property
    def pairs(self) -> NDArray[np.bool_]:
        """(M,) images whose pair of perturbations it has."""
        return np.isfinite(self.magnitude)


class RunRecords:
    """The records of an experiment in a folder, one file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, student: str, method: str, seed: int, wanted: str) -> Path:
        return self.folder / f"{student}-{method}-seed-{seed}-{wanted[:12]}.json"

    def find(self, student: str, method: str, seed: int, wanted: str, code: str | None) -> RunRecord | None:
        """Return the record of a run that was asked for so, and made by this code, if any is given.

        Raises:
            DataError: the file is none that an experiment writes.
        """
        path = self.path(student, method, seed, wanted)
        if not path.exists():
            return None
        try:
            record = RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({one_line(error)}); delete it to train again") from None
        return record if record.wanted == wanted and code in (None, record.code) else None

    def write(self, record: RunRecord) -> None:
        """Write a record to its file, atomically."""
        path = self.path(record.student, record.method, record.seed, record.wanted)
        write_atomically(path, record.model_dump_json(indent=1) + "\n")


def measures_of(comparison: Comparison) -> dict[str, Any]:
    """Return what a record has of a comparison."""
    values: dict[str, Any] = comparison._asdict()
    if np.isnan(comparison.distance):
        values["distance"] = None
    for name in ("magnitude", "angle"):
        values[name] = values[name].astype(np.float16)
    return values
