"""What students are trained from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pipeline.core.errors import DataError
from pipeline.images.prepared import Prepared, read_prepared, read_validation
from pipeline.shards.check import check_same_data
from pipeline.shards.format import MANIFEST
from pipeline.shards.reader import BoundaryShards


class StudentInputs(NamedTuple):
    """What students can be trained from; a method needs some of it."""

    train: Prepared | None
    validation: Prepared | None
    shards: BoundaryShards | None
    teacher: Path | None
    """Read by the methods that need it."""
    test: Prepared | None = None
    """For the curve only, and only of an experiment that asks for it."""


class InputPaths(NamedTuple):
    """Where the inputs of students are."""

    shards: Path
    """Directory of the sample dataset."""
    prepared: Path
    """Directory of the prepared splits."""
    teacher: Path
    """Weights."""
    other_data: bool = False
    """The shards may be of other training images than the prepared ones."""

    def absolute(self) -> InputPaths:
        shards, prepared, teacher = (path.absolute() for path in (self.shards, self.prepared, self.teacher))
        return InputPaths(shards, prepared, teacher, self.other_data)

    def read(self, source: str) -> StudentInputs:
        """Return what methods with a source ('fresh', 'shards' or 'online') need, and prepared splits that are there.

        Raises:
            PipelineError: something that is needed is missing or damaged.
        """
        needed = source != "shards"
        train, validation = self.prepared / "train.h5", self.prepared / "validation.h5"
        if needed and not train.exists():
            raise DataError(
                f"{train}: no such prepared file, and methods with source '{source}' train on its images: make it with "
                "python -m stages.prepare, or take a method with source 'shards', which needs the sample dataset alone"
            )
        if not needed and not (self.shards / MANIFEST).exists():
            raise DataError(
                f"{self.shards / MANIFEST}: no such file, and methods with source 'shards' train on a sample dataset: "
                "make it with python -m stages.attack, or take a method with source 'fresh' or 'online'"
            )
        inputs = StudentInputs(
            train=read_prepared(train) if needed or train.exists() else None,
            validation=read_validation(validation) if needed or validation.exists() else None,
            shards=BoundaryShards(self.shards) if source == "shards" else None,
            teacher=self.teacher,
        )
        if inputs.train is not None and inputs.shards is not None and not self.other_data:
            check_same_data(self.shards, inputs.shards.manifest, inputs.train.digest, self.prepared)
        return inputs
